"""What a whole token costs on a GPU, and how many kernels it launches; sections of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_measure import Bench, Dense, caught

__all__ = ["launches", "whole_token"]


def launches(b: Bench) -> dict[str, Any]:
    """What launching costs: one layer's step (append, attend, merge) over 64 tokens, where the GPU has nothing else to do."""
    held = Dense(b, 64, raw=False)
    store = held.stores[0]

    def run(i: int = 0) -> Any:
        return store.run(held.q, held.k, held.v, held.step, held.call)

    eager = b.wall(run, 400)
    graph = b.microseconds(run, inner=32)
    return {"eager_us_per_layer": round(eager, 2), "graph_us_per_layer": round(graph["us"], 2)}


def whole_token(b: Bench) -> dict[str, Any]:
    """A token of a Llama-8B shape with random weights: transformers' full cache, ours, and bounded memories from 8k to 1M seen."""
    import kvsieve
    import torch
    from kvsieve.graphs import GraphDecoder
    from transformers import DynamicCache

    model = llama(b)
    rows: dict[str, Any] = {"weights_gib": round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)}
    token = torch.full((1, 1), 7, device=b.device)
    tokens = 1 if b.dry else 16

    def decode(cache: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return model(input_ids=token, past_key_values=cache, use_cache=True).logits

        return run

    for length in b.lengths[:1] if b.dry else [8 << 10, 128 << 10]:
        with caught(rows, f"transformers {length}"):
            cache = DynamicCache(config=model.config)
            for index in range(model.config.num_hidden_layers):
                cache.update(*past(b, length, index), index)
            rows[f"transformers {length}"] = {"us": round(b.wall(decode(cache), tokens), 1)}
            del cache
    budget = b.budget
    made: dict[str, Any] = {
        "Full": kvsieve.Full(),
        "StreamingLLM": kvsieve.StreamingLLM(budget),
        "LMInfinite": kvsieve.LMInfinite(budget - 4, sinks=4),
        "SirLLM": kvsieve.SirLLM(budget),
        "ThinK": kvsieve.ThinK(0.5),
        "Quantized": kvsieve.Quantized(4, group=16 if b.dry else 32),
    }
    for name, policy in made.items():
        bounded = name in ("StreamingLLM", "LMInfinite", "SirLLM")
        for seen in b.lengths if bounded else b.lengths[:1] if b.dry else [8 << 10, 128 << 10]:
            if b.left < 30:
                rows[f"{name} {seen}"] = {"error": "no time left"}
                continue
            with caught(rows, f"{name} {seen}"), kvsieve.stream(model, policy, "cuda") as stream:
                before = 0 if b.dry else torch.cuda.memory_allocated()
                count = min(seen, budget) if bounded else seen
                fill(b, stream, [*range(4), *range(seen - count + 4, seen)], seen)
                if stream.policy.compression is not None:
                    pack_filled(b, stream)
                row = rows[f"{name} {seen}"] = {"resident": stream.stats().resident, "bytes_reported": stream.stats().bytes_held}
                if not b.dry:
                    row["bytes_allocated"] = torch.cuda.memory_allocated() - before
                row["eager_us"] = round(b.wall(decode(stream.cache), tokens), 1)
                decoder = GraphDecoder(stream)
                row["graph_us"] = round(b.wall(lambda d=decoder: d.step(token), 2 * tokens), 1)
                decoder.finish()
                row["captures"] = decoder.captures
                del decoder
    rows["summary"] = summary(rows, b)
    return rows


def summary(rows: dict[str, Any], b: Bench) -> dict[str, Any]:
    """The ratios that are asked for."""
    found: dict[str, Any] = {}
    first, last, long = b.lengths[0], b.lengths[-1], b.lengths[0] if b.dry else 128 << 10
    stock = rows.get(f"transformers {long}", {}).get("us")
    for name in ("Full", "StreamingLLM", "LMInfinite", "SirLLM", "ThinK", "Quantized"):
        times = {seen: rows.get(f"{name} {seen}", {}).get("graph_us") for seen in (first, last, long)}
        if times[first] and times[last]:
            found[f"{name}: time at {last} seen over {first}, graph"] = round(times[last] / times[first], 3)
        if stock and times[long]:
            found[f"{name}: times as fast as transformers' full cache at {long}, graph"] = round(stock / times[long], 2)
    return found


def llama(b: Bench) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    if b.dry:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(
        **shape,
        num_attention_heads=b.heads,
        num_key_value_heads=b.kv_heads,
        head_dim=b.dim,
        max_position_embeddings=2 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    with b.device:
        model = LlamaForCausalLM._from_config(config, dtype=b.dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def past(b: Bench, length: int, seed: int) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator(b.device).manual_seed(seed)
    shape = (1, b.kv_heads, length, b.dim)
    return tuple(torch.randn(shape, generator=generator, device=b.device, dtype=b.dtype) for _ in "kv")  # type: ignore[return-value]


def fill(b: Bench, stream: Any, positions: list[int], seen: int) -> None:
    """Put tokens into a stream as if it had seen ``seen``."""
    engine = stream._engine
    engine.begin_at(seen, [(seen, [(positions, [float(p % 97) for p in positions])])])
    for layer in engine.facts.layers:
        k, v = past(b, len(positions), layer.index)
        store = engine.make_store(layer.index, k, v)
        store.write(engine.planner.runs(0, 0), k[0], v[0])


def pack_filled(b: Bench, stream: Any) -> None:
    """Pack what a filled stream holds, by random queries."""
    import torch
    from kvsieve.runtime.compression import Compression
    from kvsieve.runtime.part import Forward

    engine = stream._engine
    compression = engine.parts.the(Compression)
    width = max(compression.rule.observe, 2)
    for layer in engine.facts.layers:
        compression.observe(layer.index, torch.randn(1, b.heads, width, b.dim, device=b.device).to(b.dtype), [width])
    compression.commit(Forward([width], width, [0]))()
    compression.compress(prompt_ended=True)
    engine.blocks.free_unused()
