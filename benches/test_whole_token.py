"""Whole tokens of a SmolLM2-135M shape: the time a user feels, beside transformers' full cache at the same logits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import kvsieve
import pytest
import torch
from rounds import interleaved, record

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64


@functools.lru_cache(maxsize=1)
def model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=49152,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@functools.lru_cache(maxsize=1)
def past(length: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (KV_HEADS, length, HEAD_DIM)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in "kv") for _ in range(LAYERS)]  # type: ignore[misc]


@functools.lru_cache(maxsize=1)
def wide(dtype: torch.dtype) -> Any:
    """The same weights, computing in float32."""
    return copy.deepcopy(model(dtype)).float()


def stock_cache(config: Any, length: int, dtype: torch.dtype, computed: torch.dtype | None = None) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for index, (k, v) in enumerate(past(length, dtype)):
        cache.update(k[None].to(computed or dtype), v[None].to(computed or dtype), index)
    return cache


def fill(stream: kvsieve.Stream, positions: list[int], seen: int, dtype: torch.dtype) -> None:
    """Put ``len(positions)`` tokens into a stream as if it had seen ``seen``."""
    engine = stream._engine
    engine.planner.restore(seen, [(seen, [(positions, [float(p % 97) for p in positions])])])
    for index, (k, v) in enumerate(past(len(positions), dtype)):
        store = engine.stores[index] = engine.backend.make_store(k[None], v[None])
        store.write(engine.planner.runs(0, 0), k, v)


def decode(made: Any, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = made(torch.tensor([[7]]), past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("length", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_full_beside_transformers(benchmark: Any, dtype: str, length: int) -> None:
    """`Full()` against `DynamicCache`: the same tokens resident, the same logits."""
    made, kind = model(DTYPES[dtype]), DTYPES[dtype]
    theirs = stock_cache(made.config, length, kind)
    with kvsieve.stream(made, kvsieve.Full()) as stream:
        fill(stream, list(range(length)), length, kind)
        ours, stock = decode(made, stream.cache), decode(made, theirs)
        exact = decode(wide(kind), stock_cache(made.config, length, kind, torch.float32))
        error, theirs_error = (float((x.float() - exact).norm() / exact.norm()) for x in (ours, stock))
        # bfloat16 rounds at every layer, so two right answers differ; ours must be at least as close to float32 as theirs.
        assert error < 1e-4 if dtype == "f32" else error < 1.1 * theirs_error
        rounds = 9 if length < 32768 else 5
        medians = interleaved({"kvsieve": lambda: decode(made, stream.cache), "transformers": lambda: decode(made, theirs)}, rounds)
        ratio = medians["transformers"] / medians["kvsieve"]
        record(
            benchmark,
            lambda: decode(made, stream.cache),
            medians,
            length=length,
            dtype=dtype,
            speedup=round(ratio, 3),
            error=error,
            theirs_error=theirs_error,
        )


BOUNDED = {
    "StreamingLLM": lambda: kvsieve.StreamingLLM(1024),
    "LMInfinite": lambda: kvsieve.LMInfinite(1020, sinks=4),
    "SirLLM": lambda: kvsieve.SirLLM(1024),
}


@pytest.mark.parametrize("name", list(BOUNDED))
def test_bounded_time_is_flat(benchmark: Any, name: str) -> None:
    """A bounded policy's token costs the same at 24,000 tokens seen as at 2,000."""
    made = model(torch.float32)
    streams = {}
    for seen in (2000, 24000):
        streams[seen] = kvsieve.stream(made, BOUNDED[name]())
        held = [0, 1, 2, 3, *range(seen - 1019, seen)]
        fill(streams[seen], held, seen, torch.float32)
        decode(made, streams[seen].cache)
        assert 1000 < streams[seen].stats().resident <= 1024 + 64
    medians = interleaved({str(seen): (lambda s=s: decode(made, s.cache)) for seen, s in streams.items()}, rounds=21)
    assert all(s.stats().resident <= 1024 + 64 for s in streams.values())
    record(
        benchmark,
        lambda: decode(made, streams[24000].cache),
        medians,
        policy=name,
        ratio=round(medians["24000"] / medians["2000"], 4),
    )
    for stream in streams.values():
        stream.close()
