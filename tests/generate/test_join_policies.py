"""Documents that were joined under policies that store or select, and what cannot be joined."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import snapshot
from joined_documents import DOCUMENTS, PAST, QUESTION, START, documents, read, stock
from kvsieve.errors import CacheMismatchError, StateError, UnsupportedError

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


# ------------------------------------------------------------------------------------------------------------- stored, selected

STORED = {
    "think": kvsieve.ThinK(0.5, recent=8, observe=4),
    "quantized": kvsieve.Quantized(8, group=16, residual=8),
    "both": kvsieve.ThinK(0.5, recent=8, observe=4) | kvsieve.Quantized(8, group=16, residual=8),
}


@BACKEND
@pytest.mark.parametrize("name", list(STORED))
def test_what_was_joined_is_compressed_as_one_text(name: str, backend: str) -> None:
    with kvsieve.stream(tiny.model(), STORED[name], backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        joined = base.join(forks)
        # A prompt's own attention, and with it the first generated token, is exact.
        want = stock(PAST, DOCUMENTS, QUESTION)
        torch.testing.assert_close(read(joined, QUESTION, START), want, **CLOSE)
        assert joined.stats().compressed == 0
        joined.generate(tiny.ids(1, 1), **HOW)
        assert joined.stats().compressed > 200
        other = base.join(forks, canonical=True)
        other.generate(QUESTION, **HOW)
        assert other.stats().compressed > 200
        # The past may be compressed before it is forked.
        base.end_turn()
        packed = base.stats().compressed
        assert packed > 0 or name != "quantized"
        later = base.join(documents(base, DOCUMENTS))
        later.generate(QUESTION, **HOW)
        assert later.stats().compressed > packed
        forks[1].end_turn()
        with pytest.raises((StateError, CacheMismatchError)):
            base.join(forks)


@pytest.mark.parametrize("name", list(STORED))
def test_backends_compress_what_was_joined_alike(name: str) -> None:
    found = []
    for backend in tiny.BACKENDS:
        with kvsieve.stream(tiny.model(), STORED[name], backend) as base:
            base.feed(PAST)
            base.end_turn()
            joined = base.join(documents(base, DOCUMENTS))
            joined.feed(QUESTION)
            joined.end_turn()
            assert joined.stats().compressed > 200
            found.append(read(joined, tiny.ids(1, 3), START + 5))
    torch.testing.assert_close(*found, atol=2e-2 if name != "think" else 1e-4, rtol=1e-4)


@BACKEND
def test_quantized_documents_are_near_the_masked_sequence(backend: str) -> None:
    with kvsieve.stream(tiny.model(), STORED["quantized"], backend) as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        joined.end_turn()
        assert joined.stats().compressed > 200
        got = read(joined, QUESTION, START)
    want = stock(PAST, DOCUMENTS, QUESTION)
    assert (got - want).abs().max() < 0.1 * want.std()


@BACKEND
def test_a_document_that_is_compressed_already_is_refused(backend: str) -> None:
    with kvsieve.stream(tiny.model(), STORED["quantized"], backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        forks[1].end_turn()
        with pytest.raises(StateError, match="stream 1 has compressed a part of its document"):
            base.join(forks)
        assert base.join([forks[0], forks[2]]).seen == 70 + 2 + 31


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", ["hip", "quest"])
def test_a_selection_reads_what_was_joined(kind: str, wide: bool) -> None:
    """One that finds everything is exact; one that does not is the reference's, and does not depend on the order given."""
    how: dict[str, Any] = {"budget": 256 if wide else 16, "block": 4, "dense_layers": 1, "query_block": 16, "query_stride": 3}
    policy = kvsieve.HiP(**how, sinks=2, window=24) if kind == "hip" else kvsieve.Quest(**how, sinks=0, window=64)
    found = {}
    for backend in tiny.BACKENDS:
        with kvsieve.stream(tiny.model(), policy, backend) as base:
            base.feed(PAST[:, :40])
            # Each is read whole, so what they hold is exact; together they are not.
            forks = documents(base, [tiny.ids(1, 10, seed) for seed in range(9)])
            orders = forks, forks[::-1]
            joined = [base.join(order, canonical=True) for order in orders]
            found[backend] = [read(stream, QUESTION, 50) for stream in joined]
            assert torch.equal(*found[backend])
            assert wide or not joined[0].trace()[1].dense
    torch.testing.assert_close(found["cpu"][0], found["reference"][0], atol=1e-4, rtol=1e-4)
    if wide:
        want = stock(PAST[:, :40], [tiny.ids(1, 10, seed) for seed in range(9)], QUESTION)
        torch.testing.assert_close(found["cpu"][0], want, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "streaming": (kvsieve.StreamingLLM(64, sinks=2), "evicts by what came last"),
    "lm_infinite": (kvsieve.LMInfinite(64, sinks=2), "evicts by what came last"),
    "sirllm": (kvsieve.SirLLM(64, sinks=2, recent=4), "evicts by what came last"),
    "snapkv": (kvsieve.SnapKV(64, observe=4), "evicts by what came last"),
    "h2o": (kvsieve.H2O(64, recent=4), "evicts by what came last"),
    "chain": (kvsieve.StreamingLLM(32, sinks=2) >> kvsieve.Full(), "evicts by what came last"),
    "extended": (kvsieve.HiP(32, sinks=2, window=24, extend=True), "shows tokens at other distances"),
    "prefill": (kvsieve.Quantized(8, group=16, residual=8, when="prefill"), "has compressed a part of its document"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_policies_that_cannot_be_right(name: str) -> None:
    policy, why = REFUSED[name]
    with kvsieve.stream(tiny.model(), policy, "cpu") as base:
        base.feed(PAST[:, :20])
        forks = documents(base, DOCUMENTS)
        with pytest.raises((UnsupportedError, StateError), match=why):
            base.join(forks)
        base.feed(QUESTION)


@pytest.mark.parametrize("family", ["gemma3", "ministral"])
def test_sliding_layers_are_refused(family: str) -> None:
    with kvsieve.stream(tiny.model(family), kvsieve.Full(), "cpu") as base:
        base.feed(PAST)
        with pytest.raises(UnsupportedError, match=r"layers \[0\] slide over the newest tokens"):
            base.join(documents(base, DOCUMENTS))


def test_streams_that_do_not_belong_together() -> None:
    model, full = tiny.model(), kvsieve.Full()
    with kvsieve.stream(model, full, "cpu") as base, kvsieve.stream(model, full, "cpu") as other:
        base.feed(PAST)
        other.feed(PAST)
        forks = documents(base, DOCUMENTS)
        before = snapshot(base)

        def refuses(streams: Any, error: type[Exception], why: str) -> None:
            with pytest.raises(error, match=why):
                base.join(streams)

        refuses([forks[0], other], CacheMismatchError, "stream 1 is no fork of this one")
        refuses([forks[0], forks[0]], StateError, "given twice")
        refuses([forks[0], "text"], StateError, "join takes streams")
        with kvsieve.stream(model, full, "reference") as third:
            refuses([third], CacheMismatchError, "has the backend reference, this one cpu")
        with kvsieve.stream(model, STORED["quantized"], "cpu") as third:
            refuses([third], CacheMismatchError, "has the policy Quantized")
        with kvsieve.stream(tiny.model(seed=1), full, "cpu") as third:
            refuses([third], CacheMismatchError, "of another model")
        late = base.fork()
        late.generate(QUESTION, **HOW)
        refuses([late], StateError, "stream 0 has said tokens that the model has not read")
        short = base.fork()
        short.cache.crop(-1)
        refuses([short], CacheMismatchError, "stream 0 does not begin with the 70 tokens")
        # The same ids, read again: their keys are others' memory.
        short.feed(PAST[:, -1:])
        assert base.join([short]).seen == 70
        apart = base.fork()
        apart.reset()
        apart.feed(PAST)
        refuses([apart], CacheMismatchError, "stream 0 does not begin with the 70 tokens")
        closed = base.fork()
        closed.close()
        refuses([closed], StateError, "closed")
        empty = base.fork()
        empty.reset()
        empty.feed(tiny.ids(2, 4))
        refuses([empty], CacheMismatchError, "stream 0 holds 2 sequences, the others")
        base.feed(QUESTION)
        refuses(forks, CacheMismatchError, "stream 0 does not begin with the 75 tokens")
        base.cache.crop(-5)
        assert all(torch.equal(now, before[name]) for name, now in snapshot(base).items())
        assert base.join(forks).seen == 243


def test_a_loop_that_counts_columns_is_refused() -> None:
    """`model.generate` would tell the model positions that count every token."""
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        with pytest.raises(CacheMismatchError, match=r"use stream\.generate"):
            joined.model(input_ids=QUESTION, past_key_values=joined.cache)
        assert torch.equal(joined.generate(QUESTION, **HOW)[:, 5:], joined.ids[0][None, -6:])
