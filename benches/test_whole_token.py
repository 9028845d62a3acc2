"""Whole tokens of a SmolLM2-135M shape: the time a user feels, beside transformers' full cache at the same logits."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.bench.decode import BOUNDED, fill, stock_cache
from kvsieve.bench.subject import model, token, wide
from rounds import interleaved, record

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("length", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_full_beside_transformers(benchmark: Any, dtype: str, length: int) -> None:
    """`Full()` against `DynamicCache`: the same tokens resident, the same logits."""
    made, kind = model(DTYPES[dtype]), DTYPES[dtype]
    theirs = stock_cache(made.config, length, kind)
    with kvsieve.stream(made, kvsieve.Full()) as stream:
        fill(stream, list(range(length)), length, kind)
        ours, stock = token(made, stream.cache), token(made, theirs)
        exact = token(wide(kind), stock_cache(made.config, length, kind, torch.float32))
        error, theirs_error = (float((x.float() - exact).norm() / exact.norm()) for x in (ours, stock))
        # bfloat16 rounds at every layer, so two right answers differ; ours must be at least as close to float32 as theirs.
        assert error < 1e-4 if dtype == "f32" else error < 1.1 * theirs_error
        rounds = 9 if length < 32768 else 5
        medians = interleaved(
            {"kvsieve": lambda: token(made, stream.cache), "transformers": lambda: token(made, theirs)}, rounds, repeat=False
        )
        ratio = medians["transformers"] / medians["kvsieve"]
        record(
            benchmark,
            lambda: token(made, stream.cache),
            medians,
            length=length,
            dtype=dtype,
            speedup=round(ratio, 3),
            error=error,
            theirs_error=theirs_error,
        )


@pytest.mark.parametrize("name", list(BOUNDED))
def test_bounded_time_is_flat(benchmark: Any, name: str) -> None:
    """A bounded policy's token costs the same at 24,000 tokens seen as at 2,000."""
    made = model(torch.float32)
    streams = {}
    for seen in (2000, 24000):
        streams[seen] = kvsieve.stream(made, BOUNDED[name]())
        held = [0, 1, 2, 3, *range(seen - 1019, seen)]
        fill(streams[seen], held, seen, torch.float32)
        token(made, streams[seen].cache)
        assert 1000 < streams[seen].stats().resident <= 1024 + 64
    medians = interleaved({str(seen): (lambda s=s: token(made, s.cache)) for seen, s in streams.items()}, rounds=21, repeat=False)
    assert all(s.stats().resident <= 1024 + 64 for s in streams.values())
    record(
        benchmark,
        lambda: token(made, streams[24000].cache),
        medians,
        policy=name,
        ratio=round(medians["24000"] / medians["2000"], 4),
    )
    for stream in streams.values():
        stream.close()
