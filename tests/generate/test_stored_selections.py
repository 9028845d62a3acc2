"""Quest, InfLLM and LongHeads over tokens that are stored in less, and Quest over what SirLLM retained.

Forks, rows, beams, crops, assisted decoding, padding and turns of the same policies: :mod:`test_systems`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, pad_left
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.errors import BackendError, PolicyError, ShapeError
from kvsieve.methods.parser import parse
from kvsieve.methods.sirllm import Surprisal
from kvsieve.policy.position import Fetched
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.fetching import Fetching
from tiny import BACKENDS

pytestmark = pytest.mark.slow
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def quest(**changes: Any) -> Any:
    """Two blocks of 64 are candidates, of which 32 tokens are read."""
    return kvsieve.Quest(**{"budget": 32, "sinks": 0, "window": 64, "query_block": 16, "query_stride": 3, **changes})


def infllm(**changes: Any) -> Any:
    return kvsieve.InfLLM(**{"window": 24, "blocks": 2, "block": 8, "representatives": 2, "sinks": 4, "query_block": 8, **changes})


def think(**changes: Any) -> Any:
    return kvsieve.ThinK(0.5, recent=8, observe=8, **changes)


def codes(bits: int | None = 8, **changes: Any) -> Any:
    return kvsieve.Quantized(bits, **{"group": 16, "residual": 8, **changes})


POLICIES: dict[str, Callable[[], Any]] = {
    "quest_think": lambda: quest() | think(),
    "quest_single_channels": lambda: quest() | think(channels="single", flush_every=5),
    "quest_flush": lambda: quest(refresh=(8, 2), sinks=64) | think(flush_every=3),
    "quest_codes": lambda: quest(budget=128, block=64, candidates=1, window=70) | codes(4),
    "quest_few_bits": lambda: quest() | codes(2, value_bits=0),
    "quest_values": lambda: quest() | codes(4, key_bits=0),
    "quest_thin_keys_coded_values": lambda: quest() | (think() | codes(4, key_bits=0)),
    "quest_both": lambda: quest() | (think() | codes()),
    "quest_prefill": lambda: quest() | codes(when="prefill"),
    "quest_extended": lambda: quest(extend=120) | codes(),
    "infllm_codes": lambda: infllm() | codes(),
    "infllm_values": lambda: infllm(per_head=True) | codes(4, key_bits=0),
    "infllm_think": lambda: infllm() | think(flush_every=3),
    "infllm_both": lambda: infllm() | (think(when="prefill") | codes()),
    "longheads_codes": lambda: kvsieve.LongHeads(96, chunk=16) | codes(),
    "longheads_think": lambda: kvsieve.LongHeads(96, chunk=16) | think(flush_every=3),
    "sirllm_quest": lambda: kvsieve.SirLLM(200, sinks=2, recent=8) | quest(),
    "sirllm_quest_codes": lambda: kvsieve.SirLLM(200, sinks=2, recent=8) | quest() | codes(),
}
EVERY = pytest.mark.parametrize("name", list(POLICIES))
WITH_SINKS = ["quest_think", "quest_codes", "quest_both", "infllm_codes", "infllm_think", "longheads_codes", "sirllm_quest_codes"]

ROUNDED = 1e-5
"""Of the greatest logit. Sums in another order were 9e-7 apart at most."""

FLIPPED = 1e-2
"""Of the greatest logit. A number at the border of two codes may get either, a step apart; such logits were 3e-3 apart at most."""


def read_first(stream: kvsieve.Stream) -> list[list[list[list[int]]]]:
    """What each head of the first layer read last: its keys are those that came, bit for bit, whatever the backend."""
    fetching = stream._engine.parts.find(Fetching)
    if fetching is not None:
        return [
            [[list(found) for found in last.read(head)] for head in range(2)] for last in fetching.read[min(fetching.read)] if last
        ]
    return [[head.read.tolist() for head in row] for row in stream.trace()[0].rows]


@pytest.mark.parametrize(
    ("family", "name"),
    # What is stored does not depend on the family: its learned sinks and sliding layers meet each selection and each way to store.
    [*(("llama", name) for name in POLICIES), *(("gpt_oss", name) for name in WITH_SINKS)],
)
def test_the_backends_agree(family: str, name: str) -> None:
    """A padded batch: a prompt, tokens after it, another prompt, tokens."""
    model, (ids, mask) = tiny.model(family), pad_left([tiny.ids(1, n, n)[0] for n in (300, 230)])
    got, read, packed = {}, [], []
    for backend in BACKENDS:
        with kvsieve.stream(model, POLICIES[name](), backend) as stream:
            parts = [forward(model, stream.cache, ids[:, :240], mask[:, :240])]
            for lo, hi in [*((at, at + 1) for at in range(240, 257)), (257, 292), *((at, at + 1) for at in range(292, 300))]:
                parts.append(forward(model, stream.cache, ids[:, lo:hi], mask[:, :hi]))
                read.append(read_first(stream))
            got[backend] = torch.cat(parts, 1)[:, -220:]
            packed.append([stream._engine.planner.num_packed(row) for row in range(2)])
    assert packed[0] == packed[1]
    assert ("codes" in name or "think" in name or "quest_" in name or "infllm" in name) == (packed[0][0] > 0)
    assert read[: len(read) // 2] == read[len(read) // 2 :]
    difference = (got["cpu"] - got["reference"]).abs().max()
    assert difference <= (FLIPPED if "Quantized" in repr(POLICIES[name]()) else ROUNDED) * got["reference"].abs().max()


@BACKEND
@EVERY
def test_a_saved_stream_goes_on_where_it_was(name: str, backend: str, tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, POLICIES[name](), backend) as stream:
        stream.generate(tiny.ids(1, 250), max_new_tokens=8, do_sample=False)
        stream.generate(tiny.ids(1, 41, 7), max_new_tokens=8, do_sample=False)
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(1, 14, 2), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend) as stream:
        assert repr(stream.policy) == repr(POLICIES[name]())
        got = forwards(model, stream.cache, tiny.ids(1, 14, 2), [1])
    if (name, backend) == ("sirllm_quest_codes", "cpu"):
        # What is left after evictions comes to lie side by side, so that sums are made in another order.
        assert (got - want).abs().max() <= ROUNDED * want.abs().max()
    else:
        assert torch.equal(got, want)


@BACKEND
def test_a_prompt_is_read_as_it_came(backend: str) -> None:
    """Nothing is compressed before it ends; then less is held, and other logits follow."""
    model, ids = tiny.model(), tiny.ids(1, 308)
    for plain, small in ((quest(), codes()), (infllm(), codes()), (kvsieve.LongHeads(96, chunk=16), think())):
        got, held = [], []
        for policy in (plain, plain | small):
            with kvsieve.stream(model, policy, backend) as stream:
                got.append([forward(model, stream.cache, ids[:, :300]), forwards(model, stream.cache, ids[:, 300:], [1])])
                held.append(stream.stats().parts)
        assert torch.equal(got[0][0], got[1][0])
        assert not torch.allclose(got[0][1], got[1][1], atol=1e-5)
        assert held[1].keys + held[1].scales < 0.8 * held[0].keys


def test_bounds_of_compressed_blocks_are_counted() -> None:
    model, ids = tiny.model(), tiny.ids(1, 450)
    with kvsieve.stream(model, quest() | codes(), "cpu") as stream:
        forward(model, stream.cache, ids[:, :400])
        whole = stream.stats().parts.bounds
        forwards(model, stream.cache, ids[:, 400:], [1])
        # Six blocks before, seven now; what was compressed since has lost those that it had.
        assert stream.stats().parts.bounds == whole // 6 * 7
        stream.reset()
        assert stream.stats().parts.bounds == 0


@pytest.mark.parametrize("extend", [False, 4000])
def test_quest_goes_on_over_what_is_left(extend: Any) -> None:
    """Tokens taken out of the middle: blocks are of those that are left, as on the reference."""
    model, ids, found = tiny.model(), tiny.ids(1, 430), []
    for backend in BACKENDS:
        with kvsieve.stream(model, quest(extend=extend), backend) as stream:
            forward(model, stream.cache, ids[:, :400])
            stream.evict(30, 100)
            stream.evict(220, 230)
            found.append(forwards(model, stream.cache, ids[:, 400:], [20, 1]))
            for layer in stream.trace():
                read = {token for head in layer.rows[0] for lo, hi in head.read.tolist() for token in range(lo, hi)}
                assert not layer.dense
                assert not read & {*range(30, 100), *range(220, 230)}
                assert read >= {*range(370, 430)}
    assert (found[0] - found[1]).abs().max() <= ROUNDED * found[1].abs().max()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: infllm() | think(channels="single"), "one by one cannot be rotated"),
        (lambda: kvsieve.LongHeads(96, chunk=16) | think(channels="single"), "one by one cannot be rotated"),
        (lambda: infllm(host_budget="1MiB") | codes(), "decide storage"),
        (lambda: kvsieve.Memory(Surprisal(200), Fetched(), infllm().select), "of which .* evicts some"),
        (lambda: kvsieve.SirLLM(200) | infllm(), "decide position"),
        (lambda: kvsieve.SirLLM(200) | quest(extend=True), "decide position"),
        (lambda: quest() | codes() | kvsieve.Memory(storage=kvsieve.policy.Tiered("1MiB")), "decide storage"),
    ],
)
def test_what_cannot_be_right_is_refused_when_it_is_built(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        build()


@EVERY
def test_its_text_is_read_back(name: str) -> None:
    policy = POLICIES[name]()
    assert parse(repr(policy)) == policy


def test_keys_and_values_of_two_dtypes_are_refused_by_the_core() -> None:
    planner = make_planner(kvsieve.Full().specs(1), "post_rope")
    k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 32)
    store, step = get("cpu").make_store(k, v.bfloat16()), planner.begin([5], 5, True, True)
    with pytest.raises(ShapeError, match="float32"):
        store.run(torch.randn(1, 4, 5, 16), k, v.bfloat16(), step, AttendCall(0.25))


def test_a_backend_that_compares_plain_keys_alone_says_so() -> None:
    from kvsieve.backends.capabilities import Capabilities, SelectionCapabilities

    can = Capabilities("other", SelectionCapabilities(frozenset(), compressed=False))
    can.check_fetching()
    with pytest.raises(BackendError, match="fetches tokens as they came"):
        can.check_fetching(compressed=True)
