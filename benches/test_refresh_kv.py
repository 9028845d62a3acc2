"""One layer's decode attention under RefreshKV: all keys, a partial step, and a full step after which heads choose."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from layer_steps import Layer, RefreshStep, exact, holding
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 9, 3, 64
LENGTH = 32768
STRIDE = 10


@torch.no_grad()
@pytest.mark.parametrize("budget", [1024, 4096])
def test_a_step_of_one_layer(benchmark: Any, budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    k, v = (torch.randn(1, KV_HEADS, LENGTH, DIM, generator=generator) for _ in "kv")
    q, new = torch.randn(1, HEADS, 1, DIM, generator=generator), (k[:, :, -1:], v[:, :, -1:])
    planner, backend, call = holding(kvsieve.Full(), LENGTH - 1), get("cpu"), AttendCall(DIM**-0.5)
    store = backend.make_store(k, v)
    store.write(planner.runs(0, 0), k[0, :, :-1], v[0, :, :-1])
    step = planner.begin([1], 1, True, False)
    refresh = RefreshStep(budget, Layer(backend, store, LENGTH - 1, *new, call, HEADS), step)
    sets = refresh.choose(q)

    whole = exact(q, k[0], v[0], call.scale, [torch.arange(LENGTH)] * KV_HEADS)
    torch.testing.assert_close(store.run(q, *new, step, call)[0, 0].double(), whole, atol=1e-5, rtol=0)
    partial, want = refresh.checked(q, sets, k[0], v[0])
    torch.testing.assert_close(partial.double(), want, atol=1e-5, rtol=0)
    took = interleaved(
        {
            "all": lambda: store.run(q, *new, step, call),
            "partial": lambda: refresh.partial(q, sets),
            "choosing": lambda: refresh.choose(q),
        }
    )
    mean = (took["choosing"] + (STRIDE - 1) * took["partial"]) / STRIDE
    facts = {"budget": budget, "length": LENGTH, "times_as_fast": round(took["all"] / mean, 2)}
    record(benchmark, lambda: refresh.choose(q), took, **facts)
