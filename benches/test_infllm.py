"""One layer's step of decode under InfLLM, its choice of blocks included, beside attention to all keys."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope
from layer_steps import FetchingStep, Layer, holding
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 8, 2, 128


@torch.no_grad()
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_step_of_one_layer(benchmark: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    k, v = (torch.randn(1, KV_HEADS, length + 1, DIM, generator=generator) for _ in "kv")
    q, new = torch.randn(1, HEADS, 1, DIM, generator=generator), (k[:, :, -1:], v[:, :, -1:])
    backend, frequencies = get("cpu"), 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    call, dense_call = AttendCall(DIM**-0.5, rope=LayerRope(frequencies, "half")), AttendCall(DIM**-0.5)
    store = backend.make_store(k, v)
    step = FetchingStep(kvsieve.InfLLM(), Layer(backend, store, length, *new, call, HEADS), generator)
    planner = holding(kvsieve.Full(), length)
    assert step.runs == planner.runs(0, 0), "one store serves both"
    store.write(step.runs, k[0, :, :-1], v[0, :, :-1])
    dense_step = planner.begin([1], 1, True, False)

    def dense() -> torch.Tensor:
        return store.run(q, *new, dense_step, dense_call)

    def fetching() -> torch.Tensor:
        return step.run(q)

    got, want = step.checked(q, lambda lo, hi: (k[0, :, lo:hi], v[0, :, lo:hi]))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    took = interleaved({"all": dense, "fetching": fetching})
    fast = round(took["all"] / took["fetching"], 2)
    record(benchmark, fetching, took, length=length, read=step.tokens_read, times_as_fast=fast)
