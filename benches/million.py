"""A text of a million tokens under InfLLM with a budget of memory: what the process holds, and what a decoded token takes.

python benches/million.py [tokens] [folder of the file]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import kvsieve
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CHUNK = 8192
STEPS = 32
"""Tokens that are decoded at each mark."""


def anonymous() -> float:
    """MiB of the process that no file is behind."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def main(tokens: int = 1 << 20, folder: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
    )
    model, generator = LlamaForCausalLM(config).eval(), torch.Generator().manual_seed(1)
    marks = {min(mark, tokens) for mark in (1 << 15, 1 << 17, 3 << 16, 1 << 18, 1 << 19, tokens)}
    warm: tuple[int, float] | None = None
    with kvsieve.stream(model, kvsieve.InfLLM(host_budget="256MiB", disk=folder)) as stream:
        for read in range(CHUNK, tokens + 1, CHUNK):
            stream.feed(torch.randint(512, (1, CHUNK), generator=generator), chunk=2048)
            if read not in marks:
                continue
            before, took = stream.stats().tiers, []
            for _ in range(STEPS):
                begun = time.process_time()
                stream.feed(torch.randint(512, (1, 1), generator=generator))
                took.append(time.process_time() - begun)
            stats = stream.stats()
            assert stats.resident == stats.seen
            assert stats.tiers is not None
            assert before is not None
            hits, loads = stats.tiers.hits - before.hits, stats.tiers.loads - before.loads
            found = {
                "tokens": stats.seen,
                "process_mib": round(anonymous(), 1),
                "decode_ms": round(sorted(took)[STEPS // 2] * 1e3, 2),
                "decode_hit_rate": round(hits / (hits + loads), 3),
                "decode_loads": round(loads / STEPS, 1),
            }
            if stats.tiers.spills and warm is None:
                warm = stats.seen, found["process_mib"]
            elif warm is not None:
                found["kb_per_1000_tokens"] = round((found["process_mib"] - warm[1]) * 1024 / (stats.seen - warm[0]) * 1000, 2)
            print(json.dumps(found | dataclasses.asdict(stats.tiers)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
