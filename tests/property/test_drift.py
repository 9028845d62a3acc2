"""Nothing drifts: after 100,000 evictions what is kept is what was given, and attention over it is as exact as on the first day."""

from __future__ import annotations

from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import Layer, attention
from kvsieve.facts import LayerRope

TOKENS, SIZE, BUDGET = 100_000 + 400, 32, 128

# Tokens per step: few, so that every path of decoding runs often; the reference is slow on purpose.
STEP = {"reference": 250, "cpu": 10}

POLICIES: dict[str, Any] = {
    "streaming": kvsieve.StreamingLLM(budget=BUDGET, sinks=4),
    "lm_infinite": kvsieve.LMInfinite(window=BUDGET, sinks=4),
    "sirllm": kvsieve.SirLLM(budget=BUDGET, sinks=4, recent=16),
}


def distances(policy: str, kept: list[int], query: int) -> list[int]:
    """At which distance the definition shows each kept token to the query."""
    if policy == "lm_infinite":
        return [min(query - position, BUDGET) for position in kept]
    return list(range(len(kept) - 1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_attention_after_a_hundred_thousand_evictions(backend: str, policy: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # What the dtype can hold, so that the reference below starts from the same numbers.
    k, v, q = (torch.randn(1, h, TOKENS, SIZE, generator=generator).to(dtype) for h in (1, 1, 2))
    scores = torch.rand(TOKENS, generator=generator).numpy()
    rope = LayerRope(10000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE), "half")
    layer = Layer(backend, POLICIES[policy], rope=rope, scale=SIZE**-0.5)
    scored, step = POLICIES[policy].needs_surprisal, STEP[backend]
    for lo in range(0, TOKENS - 1, step):
        hi = min(lo + step, TOKENS - 1)
        given = [scores[lo:hi]] if scored else None
        layer.feed(q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], scores=given, settle=False)
    residents = layer.positions()
    assert TOKENS - 1 - len(residents) >= 100_000
    out = layer.feed(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], scores=[scores[-1:]] if scored else None)

    query = TOKENS - 1
    shown = [*residents, query]
    if policy == "lm_infinite":
        shown = [p for p in shown if p < 4 or query - p < BUDGET]
    want = attention(
        q[0, :, -1],
        k[0, :, shown].transpose(0, 1),
        v[0, :, shown].transpose(0, 1),
        distances(policy, shown, query),
        rope,
        layer.call.scale,
    )
    error = (out[0, 0].double() - want).abs().max() / want.abs().max()
    assert float(error) < 0.02

    # What is stored is what was given, bit for bit; rotated once where the policy stores rotated keys.
    kept = layer.positions()
    keys, values = layer.store.read(layer.planner.runs(0, 0))
    assert torch.equal(values, v[0, :, kept])
    if layer.stored_keys == "pre_rope":
        assert torch.equal(keys, k[0, :, kept])
    else:
        assert torch.equal(keys[0], rope.rotate(k[0, 0, kept].double(), torch.tensor(kept)).to(dtype))
    if scored:
        assert np.array_equal(layer.planner.scores(0, 0), scores[kept])
        threshold = np.sort(scores)[-BUDGET]
        middle = [p for p in kept if 4 <= p < TOKENS - 200]
        assert np.mean(scores[middle] >= threshold - 1e-3) > 0.9, "the best of a hundred thousand are kept"
