"""Pins and evictions that cannot be are refused, and nothing is changed by them."""

from __future__ import annotations

from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forward, holds, lacks, pad_left, snapshot
from kvsieve.errors import BudgetError, PolicyError, RangeError, StateError, UnsupportedError
from kvsieve.runtime import pinning

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
BUDGET = 48


def unchanged(stream: kvsieve.Stream, call: Any, error: type[Exception], match: str | None = None) -> None:
    """``call`` raises, and nothing is changed by it."""
    before, pinned = snapshot(stream), stream.pins
    with pytest.raises(error, match=match):
        call()
    assert stream.pins == pinned
    assert all(torch.equal(now, before[name]) for name, now in snapshot(stream).items())


@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_a_budget_that_cannot_hold_the_pins_is_refused(policy: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](BUDGET), "cpu") as stream:
        stream.feed(tiny.ids(2, 20))
        spec = stream.policy.specs(1)[0].evict
        sinks, recent = spec.sinks, spec.recent
        budget = spec.budget or sinks + spec.window
        most = budget - sinks - recent - 1
        stream.pin(sinks, sinks + most - 1, rows=1)
        message = rf"row 1: a budget of {budget} tokens cannot hold {sinks} sinks, {most + 1} pinned and {recent} recent"
        unchanged(stream, lambda: stream.pin(sinks, sinks + most + 1), BudgetError, message.replace("row 1", "row 0"))
        unchanged(stream, lambda: stream.pin(sinks, sinks + most + 1, rows=1), BudgetError, message)
        stream.pin(sinks, sinks + most)
        stream.generate(tiny.ids(2, 100, 1), **HOW)
        assert holds(stream, set(range(sinks + most)) if policy != "snapkv" else set(range(most)))


@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_tokens_that_are_gone_cannot_be_pinned(policy: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](BUDGET), "cpu") as stream:
        stream.feed(tiny.ids(1, 30))
        stream.evict(10, 12)
        unchanged(stream, lambda: stream.pin(8, 14), StateError, r"row 0: 2 .*(10..12|tokens 8 to 14)")
        stream.pin(8, 10)
        stream.feed(tiny.ids(1, 300, 1))
        start = next(start for start in range(30, 300) if not holds(stream, {*range(start, start + 9)}))
        unchanged(stream, lambda: stream.pin(start, start + 9), StateError, "no longer held")


def test_ranges_and_rows_that_are_none() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        with pytest.raises(RangeError, match="the stream has seen none"):
            stream.evict(0, 1)
        stream.feed(tiny.ids(2, 20))
        wrong: list[tuple[Any, Any]] = [(-1, 3), (4, 4), (5, 2), (1.0, 2), (0, True), ("0", 3), (0, 2**60), (None, 3)]
        for call in (stream.pin, stream.unpin, stream.evict):
            for start, stop in wrong:
                unchanged(stream, lambda call=call, at=(start, stop): call(*at), RangeError)
            for rows in (2, -1, [0, 2], [], True, "0"):
                unchanged(stream, lambda call=call, rows=rows: call(0, 3, rows=rows), RangeError)
        unchanged(stream, lambda: stream.evict(18, 21), RangeError, "the model has read 20")
        stream.cache.crop(-3)
        unchanged(stream, lambda: stream.evict(15, 18), RangeError, "the model has read 17")
    with pytest.raises(StateError, match="closed"):
        stream.pin(0, 1)


def test_what_cannot_be_exact_is_refused() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.InfLLM(64, block=8, representatives=1, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 100))
        stream.pin(3, 9)
        unchanged(stream, lambda: stream.evict(3, 9), UnsupportedError, "InfLLM")
    with kvsieve.stream(tiny.model("gemma2"), kvsieve.Full(), "cpu") as stream:
        stream.feed(tiny.ids(1, 100))
        unchanged(stream, lambda: stream.evict(70, 78), UnsupportedError, "row 0: tokens 77 to 78 .* window of 24")
        stream.evict(70, 77)
        assert lacks(stream, set(range(70, 77)))


def test_a_mask_cannot_evict_but_evicting_can() -> None:
    """The refusal of a mask that hides tokens names the call that does it."""
    model, ids = tiny.model(), tiny.ids(1, 20)
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        forward(model, stream.cache, ids)
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, 5:9] = 0
        with pytest.raises(kvsieve.KvsieveError, match=r"stream\.evict"):
            forward(model, stream.cache, tiny.ids(1, 1), mask)
        stream.evict(5, 9)
        forward(model, stream.cache, tiny.ids(1, 1))
        assert stream.kept()[0].positions.tolist() == [*range(5), *range(9, 21)]


def test_with_pinned_makes_room_from_the_oldest() -> None:
    stays = np.array([False, False, True, False, True, False])
    assert pinning.with_pinned([0, 1, 3, 5], {0, 5}, stays, 4) == [0, 2, 4, 5]
    assert pinning.with_pinned([0, 1, 3, 5], {0, 5}, stays, 5) == [0, 2, 3, 4, 5]
    assert pinning.with_pinned([0, 1], set(), np.zeros(6, np.bool_), 4) == [0, 1]
    assert issubclass(BudgetError, PolicyError)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_what_is_fed_or_asked_can_be_pinned_as_it_comes(policy: str, backend: str) -> None:
    """The new tokens of a turn are pinned, not the answer, nor the end of the answer before, which is read with them."""
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](60), backend) as stream:
        stream.feed(*pad_left([tiny.ids(1, 9)[0], tiny.ids(1, 4)[0]]), pin=True)
        assert stream.pins == [[(0, 9)], [(0, 4)]]
        stream.generate(tiny.ids(2, 20), **HOW)
        lengths = [len(row) for row in stream.ids]
        stream.generate(tiny.ids(2, 6, 3), pin=True, **HOW)
        want = [[(0, 9), (lengths[0], lengths[0] + 6)], [(0, 4), (lengths[1], lengths[1] + 6)]]
        assert stream.pins == want
        for seed in range(3):
            stream.generate(tiny.ids(2, 70, seed), **HOW)
        assert stream.pins == want
        for row, ranges in enumerate(want):
            assert holds(stream, {at for lo, hi in ranges for at in range(lo, hi)}, row)
        told = [row.tolist() for row in stream.ids]
        with pytest.raises(BudgetError):
            stream.feed(tiny.ids(2, 70), pin=True)
        assert (stream.pins, [row.tolist() for row in stream.ids]) == (want, told)


@BACKEND
def test_a_row_that_the_first_input_does_not_have_is_refused_by_it(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES["streaming"](BUDGET), backend) as stream:
        stream.pin(3, 9, rows=2**50)
        stream.pin(4, 6, rows=[1])
        with pytest.raises(PolicyError, match=f"row {2**50} of 2"):
            stream.feed(tiny.ids(2, 12))
        assert (stream.seen, stream.pins) == (0, [])
        stream.unpin(0, 9, rows=2**50)
        stream.feed(tiny.ids(2, 12))
        assert stream.pins == [[], [(4, 6)]]
