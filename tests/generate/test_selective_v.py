"""SelectiveV: exact scores over all keys, and the heaviest values alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, pad_left
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.backends.heaviest_values import heaviest
from kvsieve.errors import BackendError, PolicyError
from kvsieve.facts import LayerRope
from kvsieve.methods import parse
from kvsieve.policy.select import HeaviestValues
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.value_selection import ValueSelection
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def rule(stream: kvsieve.Stream) -> ValueSelection:
    return stream._engine.parts.the(ValueSelection)


# ------------------------------------------------------------------------------------------------------------- the definition


def test_the_worked_numbers() -> None:
    """Logits 4, 3, 1, 0, -1, -2: the two heaviest have a mass of 0.9465."""
    logits = torch.tensor([4.0, 3, 1, 0, -1, -2], dtype=torch.float64)
    keys, values = torch.stack([logits, torch.zeros(6)], 1)[None], torch.eye(6, dtype=torch.float64)[None]
    query, call = torch.tensor([[1.0, 0]], dtype=torch.float64), AttendCall(1.0)
    p = logits.softmax(0)
    out, mass = heaviest([(query, keys, values)], call, HeaviestValues(2))
    assert float(mass) == pytest.approx(0.9465, abs=5e-5)
    assert torch.allclose(out[0], p * torch.tensor([1, 1, 0, 0, 0, 0]))
    out, mass = heaviest([(query, keys, values)], call, HeaviestValues(2, renormalise=True))
    assert torch.allclose(out.sum(1), torch.ones(1, dtype=torch.float64))
    assert int((heaviest([(query, keys, values)], call, HeaviestValues(None, 0.95))[0] > 0).sum()) == 3
    assert int((heaviest([(query, keys, values)], call, HeaviestValues(1, 0.95))[0] > 0).sum()) == 1
    equal = heaviest([(query, torch.zeros_like(keys), values)], call, HeaviestValues(2))[0]
    assert equal[0].nonzero()[:, 0].tolist() == [0, 1], "of equal ones the earlier"


def test_the_error_is_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        n, group = 2 + case % 50, 1 + case % 3
        q, k, v = (torch.randn(2 * h, m, 8, generator=generator, dtype=torch.float64) for h, m in ((group, 1), (1, n), (1, n)))
        call = AttendCall(
            1.5, softcap=[None, 2.0][case % 2], sink_logits=[None, torch.randn(2 * group, generator=generator)][case // 2 % 2]
        )
        exact, all_of_it = heaviest([(q[:, 0], k, v)], call, HeaviestValues(n))
        assert torch.allclose(all_of_it, torch.ones_like(all_of_it))
        for renormalise in (False, True):
            out, mass = heaviest([(q[:, 0], k, v)], call, HeaviestValues(1 + case % 9, renormalise=renormalise))
            most = v.norm(dim=2).amax(1).repeat_interleave(group)
            assert bool(((out - exact).norm(dim=1) <= (1 + renormalise) * (1 - mass) * most + 1e-12).all())


# -------------------------------------------------------------------------------------------------------------------- backends

POLICIES = {
    "all": lambda: kvsieve.SelectiveV(9),
    "mass": lambda: kvsieve.SelectiveV(None, mass=0.7),
    "either": lambda: kvsieve.SelectiveV(20, mass=0.9, renormalise=True),
    "rotated queries": lambda: kvsieve.StreamingLLM(40, sinks=2) | kvsieve.SelectiveV(9),
    "rotated keys": lambda: kvsieve.LMInfinite(38, sinks=2) | kvsieve.SelectiveV(9),
    "codes": lambda: kvsieve.Quantized(8, group=16, residual=8) | kvsieve.SelectiveV(9),
    "channels": lambda: kvsieve.ThinK(0.5, recent=8, observe=8) | kvsieve.SelectiveV(9),
}


@pytest.mark.parametrize("tested", ["cpu"])
@pytest.mark.parametrize("policy", ["all", "mass", "either", "rotated queries", "rotated keys"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_cpu_computes_the_definition(policy: str, dtype: torch.dtype, tested: str) -> None:
    """Random rows, some of which have no new token, or several, or a prompt."""
    for seed in range(3):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        heads, group, rows, size = 2, rng.choice([1, 3]), 3, 16
        rope = LayerRope(10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size), "half", 1.0)
        sinks = torch.randn(heads * group, generator=generator) if seed else None
        made = POLICIES[policy]()
        select = made.memories[0].select
        call = AttendCall(size**-0.5, [None, 5.0][seed % 2], sinks, rope if made.moves else None)
        planner = make_planner(made.specs(1), made.stored_keys)
        stores: dict[str, Any] = {}
        for width, lens in [(90, [90, 70, 3]), (1, [1, 1, 1]), (1, [1, 0, 1]), (3, [1, 3, 1]), (80, [1, 80, 0]), (1, [1, 1, 1])]:
            q, k, v = (torch.randn(rows, h, width, size, generator=generator).to(dtype) for h in (heads * group, heads, heads))
            step = planner.begin(lens, width, store_all=True, with_parts=True)
            mine = [n == 1 for n in lens]
            found = {}
            for backend in (tested, "reference"):
                wide = [x.double() if backend == "reference" else x for x in (q, k, v)]
                if backend not in stores:
                    stores[backend] = backends.get(backend).make_store(wide[1], wide[2])
                found[backend] = stores[backend].run_heaviest(*wide, step, call, select, mine)
            planner.commit()
            moves = planner.settle(width > 1)
            for store in stores.values():
                store.apply(moves)
            (got, got_mass), (want, want_mass) = found[tested], found["reference"]
            assert got.dtype == dtype
            for row, n in enumerate(lens):
                off = (got[row, width - n :].double() - want[row, width - n :]).abs().max() if n else torch.tensor(0.0)
                assert float(off) <= TOLERANCE[dtype] * float(want.abs().max())
                assert bool(got_mass[row].isnan().all()) != mine[row]
            close = torch.isclose(got_mass.double(), want_mass.double(), atol=TOLERANCE[dtype], equal_nan=True)
            assert bool(close.all())


@pytest.mark.parametrize("tested", ["cpu"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_stream_on_the_cpu_reads_what_the_reference_reads(policy: str, tested: str) -> None:
    model, found = tiny.model(), []
    for backend in (tested, "reference"):
        with kvsieve.stream(model, POLICIES[policy](), backend) as stream:
            found.append(forwards(model, stream.cache, tiny.ids(1, 130), [100, 1]))
            assert set(rule(stream).mass) == {layer.index for layer in stream.stats().layers}
    assert float((found[0] - found[1]).abs().max()) <= (5e-3 if policy == "codes" else 1e-4) * float(found[1].abs().max())


# -------------------------------------------------------------------------------------------------------------------- streams


@BACKEND
def test_as_many_values_as_there_are_tokens_is_the_full_cache_bit_for_bit(backend: str) -> None:
    model, ids, found = tiny.model(), tiny.ids(1, 60), []
    for policy in (kvsieve.Full(), kvsieve.SelectiveV(60)):
        with kvsieve.stream(model, policy, backend) as stream:
            found.append(forwards(model, stream.cache, ids, [40, 1]))
            assert all(layer.value_mass is None for layer in stream.stats().layers)
    assert torch.equal(*found)


@BACKEND
@pytest.mark.parametrize("chunk", [1, 16, 40])
def test_a_prompt_is_read_whole_however_it_is_cut(chunk: int, backend: str) -> None:
    """Of a batch, so that its rows end at other places of a piece; then each row reads as it would alone."""
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (49, 33)]
    ids, mask = pad_left(rows)
    with kvsieve.stream(model, kvsieve.SelectiveV(8), backend) as stream:
        stream.feed(ids, attention_mask=mask, chunk=chunk)
        assert all(layer.value_mass is None for layer in stream.stats().layers)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        got = forward(model, stream.cache, tiny.ids(2, 1, 5), mask)
        masses = [layer.value_mass for layer in stream.stats().layers]
        assert all(mass is not None and 0 < mass < 1 for mass in masses)
    for row, text in enumerate(rows):
        with kvsieve.stream(model, kvsieve.SelectiveV(8), backend) as stream:
            forward(model, stream.cache, text[None])
            want = forward(model, stream.cache, tiny.ids(2, 1, 5)[row : row + 1])
            assert float((got[row] - want[0]).abs().max()) <= 1e-4 * float(want.abs().max())


@BACKEND
def test_the_mass_that_was_asked_for_is_reached(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.SelectiveV(None, mass=0.8), backend) as stream:
        forwards(tiny.model(), stream.cache, tiny.ids(1, 70), [60, 1])
        # One value more than it takes is at most a share of the mass.
        assert all(layer.value_mass is not None and 0.8 - 1e-6 <= layer.value_mass < 0.97 for layer in stream.stats().layers)


def test_what_makes_no_policy_is_refused() -> None:
    for wrong in ({"top_m": 0}, {"top_m": None}, {"mass": 0.0}, {"mass": 1.0}, {"mass": float("nan")}, {"mass": "much"}):
        with pytest.raises(PolicyError):
            kvsieve.SelectiveV(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="part of a chain"):
        kvsieve.StreamingLLM(40) >> kvsieve.SelectiveV(8)
    with pytest.raises(PolicyError, match="Dense"):
        kvsieve.SnapKV(40) | kvsieve.SelectiveV(8)
    with pytest.raises(PolicyError, match="select"):
        kvsieve.HiP(64) | kvsieve.SelectiveV(8)
    without = replace(CUDA, selection=replace(CUDA.selection, heaviest_values=False))
    with pytest.raises(BackendError, match="adds up all values"):
        without.check_heaviest_values()


def test_its_text_is_read_back() -> None:
    for made in (
        kvsieve.SelectiveV(),
        kvsieve.SelectiveV(7),
        kvsieve.SelectiveV(None, 0.9),
        kvsieve.SelectiveV(8, 0.5, True),
        kvsieve.SelectiveV(host_budget="1MiB", disk="x"),
    ):
        assert parse(repr(made)) == made
