"""Prompts in bfloat16 by products of bfloat16 matrices: as the processor says, right on every one, and by nothing that chooses."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from drive import Layer
from kvsieve.backends.cpu import prefill, store
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


def outs(policy: Any, dtype: torch.dtype, backend: str = "cpu") -> torch.Tensor:
    """``[700, H * D]``: a layer's answers to a prompt in three pieces."""
    layer, random = Layer(backend, policy, rope=ROPE, scale=32**-0.5), torch.Generator().manual_seed(0)
    found = []
    for width in (400, 200, 100):
        q, k, v = (torch.randn(1, heads, width, 32, generator=random).to(torch.bfloat16).to(dtype) for heads in (6, 2, 2))
        found.append(layer.feed(q, k, v)[0].flatten(1))
    return torch.cat(found).double()


@pytest.mark.parametrize("work", [prefill.WORK, 1 << 22], ids=["whole", "in pieces"])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_both_ways_are_right(policy: str, narrow: bool, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used, flash = set(), prefill.flash

    def spy(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used.add(q.dtype)
        return flash(q, *args, **kwargs)

    monkeypatch.setattr(store, "multiplies_bfloat16", lambda: narrow)
    monkeypatch.setattr(prefill, "flash", spy)
    monkeypatch.setattr(prefill, "WORK", work)
    got, want = outs(POLICIES[policy], torch.bfloat16), outs(POLICIES[policy], torch.float32, "reference")
    assert used == {torch.bfloat16 if narrow else torch.float32}
    assert float((got - want).norm() / want.norm()) < (8e-3 if narrow else 4e-3)


def test_other_dtypes_are_not_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "multiplies_bfloat16", lambda: True)
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        got, want = outs(POLICIES["full"], dtype), outs(POLICIES["full"], torch.float32, "reference")
        assert float((got - want).norm() / want.norm()) < most


def test_the_answer_is_that_of_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert prefill.multiplies_bfloat16.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not prefill.multiplies_bfloat16.__wrapped__()
