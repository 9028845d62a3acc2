"""One layer's decode attention under RefreshKV: all keys, a partial step, and a full step after which heads choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall, HeadSets
from kvsieve.methods.refresh_kv import RefreshSelection
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 9, 3, 64
LENGTH = 32768
STRIDE = 10


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
    """Float64 ``[H, D]``: each group's queries over the keys of its head that are named."""
    out = []
    for head, (queries, mine) in enumerate(zip(q[0, :, 0].double().chunk(KV_HEADS), keys)):
        weights = (queries @ k[0, head, mine].double().T * DIM**-0.5).softmax(-1)
        out.append(weights @ v[0, head, mine].double())
    return torch.cat(out)


@torch.no_grad()
@pytest.mark.parametrize("budget", [1024, 4096])
def test_a_step_of_one_layer(benchmark: Any, budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    k, v = (torch.randn(1, KV_HEADS, LENGTH, DIM, generator=generator) for _ in "kv")
    q = torch.randn(1, HEADS, 1, DIM, generator=generator)
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")
    held = list(range(LENGTH - 1))
    planner.restore(LENGTH - 1, [(LENGTH - 1, [(held, [0.0] * len(held))])])
    store = get("cpu").make_store(k, v)
    store.write(planner.runs(0, 0), k[0, :, :-1], v[0, :, :-1])
    step, new, call = planner.begin([1], 1, True, False), (k[:, :, -1:], v[:, :, -1:]), AttendCall(DIM**-0.5)
    rule = RefreshSelection(budget)

    def choose() -> HeadSets:
        _, (scores,) = store.run_with_sets(q, *new, step, call, [None])
        assert scores is not None
        tokens, order = rule.choose(scores[:, :-1])
        return HeadSets(tokens.contiguous(), order.contiguous(), 0, LENGTH - 1)

    sets = choose()
    named = [sets.read(head, LENGTH) for head in range(KV_HEADS)]
    assert all(len(mine) == budget + 1 for mine in named)
    whole = [torch.arange(LENGTH)] * KV_HEADS
    torch.testing.assert_close(store.run(q, *new, step, call)[0, 0].double(), exact(q, k, v, whole), atol=1e-5, rtol=0)
    partial = store.run_with_sets(q, *new, step, call, [sets])[0]
    torch.testing.assert_close(partial[0, 0].double(), exact(q, k, v, named), atol=1e-5, rtol=0)
    took = interleaved(
        {
            "all": lambda: store.run(q, *new, step, call),
            "partial": lambda: store.run_with_sets(q, *new, step, call, [sets]),
            "choosing": choose,
        }
    )
    mean = (took["choosing"] + (STRIDE - 1) * took["partial"]) / STRIDE
    record(benchmark, choose, took, budget=budget, length=LENGTH, times_as_fast=round(took["all"] / mean, 2))
