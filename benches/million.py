"""A text of a million tokens under InfLLM with a budget of memory: what the process holds, and what a decoded token takes.

    python benches/million.py [tokens] [folder of the file] [budget]

At the marks up to :data:`TWIN` tokens the states of decoded tokens are those of a stream that holds all blocks in memory, bit for
bit; it runs before, in a process of its own. Beyond them they must be finite.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

import kvsieve
import torch
from kvsieve.budget import parse_bytes
from transformers import LlamaConfig, LlamaForCausalLM

CHUNK = 8192
STEPS = 32
"""Tokens that are decoded at each mark."""
MARKS = (1 << 15, 1 << 17, 3 << 16, 1 << 18, 1 << 19)
TWIN = 3 << 16
"""Tokens that the stream without a budget reads: of 384 MiB, a third lies in the file of the other one."""
SIZES = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}
TOKEN = 2 * 4 * SIZES["num_hidden_layers"] * SIZES["num_key_value_heads"] * SIZES["head_dim"]
"""Bytes of a token's keys and values."""


def anonymous() -> float:
    """MiB of the process that no file is behind."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


@dataclasses.dataclass
class Mark:
    """What was found there.

    Attributes:
        stats: of the stream, before and after the tokens that were decoded.
        took: CPU seconds of each.
        states: of the last layer, float32 ``[STEPS, D]``, normalized: what the model predicts by.
    """

    stats: tuple[kvsieve.Stats, kvsieve.Stats]
    took: list[float]
    states: torch.Tensor


def read(policy: Any, tokens: int, marks: set[int]) -> Iterator[tuple[int, Mark]]:
    """Feed so many tokens to a stream, and decode some at each mark."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_attention_heads=4, max_position_embeddings=8192, **SIZES
        )
    ).eval()
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda module, given, out: states.append(out[0, -1].clone()))
    generator = torch.Generator().manual_seed(1)
    with kvsieve.stream(model, policy) as stream:
        for at in range(CHUNK, tokens + 1, CHUNK):
            stream.feed(torch.randint(512, (1, CHUNK), generator=generator), chunk=2048)
            if at not in marks:
                continue
            before, took = stream.stats(), []
            states.clear()
            for _ in range(STEPS):
                begun = time.process_time()
                stream.feed(torch.randint(512, (1, 1), generator=generator))
                took.append(time.process_time() - begun)
            yield at, Mark((before, stream.stats()), took, torch.stack(states))


def without_budget(tokens: int, marks: set[int]) -> dict[int, torch.Tensor]:
    """The states at each mark, of a stream that holds all in memory."""
    return {at: mark.states for at, mark in read(kvsieve.InfLLM(), tokens, marks)}


def check(mark: Mark, budget: str, want: torch.Tensor | None) -> None:
    """What was held is within the budget, and what the model said is what it says without one."""
    stats = mark.stats[1]
    assert stats.resident == stats.seen
    assert stats.tiers is not None
    # The block that is being filled is there besides; what is a block more or less than the budget may be all in memory, or not.
    most, block, all_of_it = parse_bytes(budget), 64 * TOKEN, stats.seen * TOKEN
    assert stats.tiers.bytes_in_memory <= most + block
    assert (stats.tiers.spills > 0) == (all_of_it > most) or abs(all_of_it - most) <= block
    assert mark.states.shape[0] == STEPS
    assert mark.states.isfinite().all()
    assert want is None or torch.equal(mark.states, want), "where blocks lie changes an output"


def main(tokens: int = 1 << 20, folder: str | None = None, budget: str = "256MiB") -> None:
    tokens = tokens // CHUNK * CHUNK
    marks = {min(mark, tokens) for mark in (*MARKS, tokens)}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        want = pool.apply(without_budget, (min(TWIN, tokens), marks))
    assert want
    warm: tuple[int, float] | None = None
    for at, mark in read(kvsieve.InfLLM(host_budget=budget, disk=folder), tokens, marks):
        check(mark, budget, want.get(at))
        before, stats = mark.stats
        assert before.tiers is not None
        assert stats.tiers is not None
        hits, loads = stats.tiers.hits - before.tiers.hits, stats.tiers.loads - before.tiers.loads
        found = {
            "tokens": stats.seen,
            "process_mib": round(anonymous(), 1),
            "decode_ms": round(sorted(mark.took)[STEPS // 2] * 1e3, 2),
            "decode_hit_rate": round(hits / (hits + loads), 3),
            "decode_loads": round(loads / STEPS, 1),
            "same_without_budget": at in want,
        }
        if stats.tiers.spills and warm is None:
            warm = stats.seen, found["process_mib"]
        elif warm is not None:
            found["kb_per_1000_tokens"] = round((found["process_mib"] - warm[1]) * 1024 / (stats.seen - warm[0]) * 1000, 2)
        print(json.dumps(found | dataclasses.asdict(stats.tiers)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:4])
