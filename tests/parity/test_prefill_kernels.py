"""Prompts by whichever kernel is faster on a processor: each is right on every one, and what chooses is never rounded."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from drive import Layer
from kvsieve import _core
from kvsieve.backends.cpu import prefill
from kvsieve.facts import LayerRope
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import Original

ROPE = LayerRope(10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32), "half")
POLICIES: dict[str, Any] = {
    "full": kvsieve.Full(),
    "window": kvsieve.StreamingLLM(300, sinks=3),
    "bands": kvsieve.LMInfinite(300, sinks=3),
    "true": Memory(evict=kvsieve.StreamingLLM(300, sinks=3).roles.evict, position=Original()),
}
WAYS = {
    "torch": prefill.Kernels(own=False, bfloat16=None),
    "torch by pairs": prefill.Kernels(own=False, bfloat16="torch"),
    "own": prefill.Kernels(own=True, bfloat16=None),
    "own by pairs": prefill.Kernels(own=True, bfloat16="own"),
}


def outs(policy: Any, dtype: torch.dtype, backend: str = "cpu", softcap: float | None = None, value_dim: int = 32) -> torch.Tensor:
    """``[700, H * Dv]``: a layer's answers to a prompt in three pieces."""
    random = torch.Generator().manual_seed(0)
    layer = Layer(backend, policy, rope=ROPE, scale=32**-0.5, softcap=softcap)
    found = []
    for width in (400, 200, 100):
        shapes = [(1, heads, width, dim) for heads, dim in ((6, 32), (2, 32), (2, value_dim))]
        q, k, v = (torch.randn(*shape, generator=random).to(torch.bfloat16).to(dtype) for shape in shapes)
        found.append(layer.feed(q, k, v)[0].flatten(1))
    return torch.cat(found).double()


def spy_on(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, torch.dtype]]:
    """Who computes, and in which dtype."""
    used, flash, seen = set(), prefill.flash, prefill.seen

    def of_torch(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used.add(("torch", q.dtype))
        return flash(q, *args, **kwargs)

    def own(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used.add(("own", q.dtype))
        return seen(q, *args, **kwargs)

    monkeypatch.setattr(prefill, "flash", of_torch)
    monkeypatch.setattr(prefill, "seen", own)
    return used


@pytest.mark.parametrize("work", [prefill.WORK, 1 << 22], ids=["whole", "in pieces"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_way_is_right(policy: str, way: str, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used, narrow = spy_on(monkeypatch), WAYS[way].bfloat16 is not None
    monkeypatch.setattr(prefill, "kernels", lambda: WAYS[way])
    monkeypatch.setattr(prefill, "WORK", work)
    got, want = outs(POLICIES[policy], torch.bfloat16), outs(POLICIES[policy], torch.float32, "reference")
    assert (way.split()[0], torch.bfloat16 if narrow else torch.float32) in used
    assert {dtype for _, dtype in used} == {torch.bfloat16 if narrow else torch.float32}
    assert float((got - want).norm() / want.norm()) < (8e-3 if narrow else 4e-3)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_what_torch_does_not_know_is_computed_all_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = spy_on(monkeypatch)
    monkeypatch.setattr(prefill, "kernels", lambda: WAYS["torch"])
    for unknown in ({"softcap": 2.0}, {"value_dim": 24}):
        got = outs(POLICIES[policy], torch.float32, **unknown)
        want = outs(POLICIES[policy], torch.float32, "reference", **unknown)
        assert float((got - want).norm() / want.norm()) < 1e-5
    assert used == {("own", torch.float32)}


@pytest.mark.parametrize("way", list(WAYS))
def test_other_dtypes_are_not_narrowed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "kernels", lambda: WAYS[way])
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        got, want = outs(POLICIES["full"], dtype), outs(POLICIES["full"], torch.float32, "reference")
        assert float((got - want).norm() / want.norm()) < most


@pytest.mark.parametrize(
    ("isa", "intel", "amx", "chosen"),
    [
        ("avx512bf16", True, True, (True, "torch")),
        ("avx512bf16", True, False, (True, "own")),
        ("avx512bf16", False, False, (True, "own")),
        ("avx512", True, False, (True, None)),
        ("avx2", False, False, (True, None)),
        ("avx2", True, False, (False, None)),
        ("neon", False, False, (False, None)),
        ("portable", False, False, (False, None)),
    ],
)
def test_the_processor_decides(isa: str, intel: bool, amx: bool, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "isa", lambda: isa)
    monkeypatch.setattr(_core, "is_intel", lambda: intel)
    monkeypatch.setattr(prefill, "multiplies_bfloat16", lambda: amx)
    assert prefill.kernels.__wrapped__() == chosen


def test_units_for_matrices_are_those_of_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert prefill.multiplies_bfloat16.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not prefill.multiplies_bfloat16.__wrapped__()
