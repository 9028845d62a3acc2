"""Blocks in a file: memory must not grow with the text, and what one step's blocks cost.

Two layers without a model. Random keys and values are appended in pieces, full blocks leave memory for the budget, and then each
layer fetches random blocks, step by step. What is fetched is compared with what was appended.

    python benches/tiers.py --tokens 1000000 --budget 64MiB --disk /tmp
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import torch
from kvsieve import backends
from kvsieve.backends.cpu.tensors import view
from kvsieve.budget import BLOCK, parse_bytes
from kvsieve.policy.specs import make_planner

LAYERS, HEADS, DIM, PIECE = 2, 2, 64, 512
DTYPE = torch.bfloat16


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def piece(number: int) -> torch.Tensor:
    """Keys, which are the values too, of one piece: ``[1, HEADS, PIECE, DIM]``."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(-(1 << 15), 1 << 15, (1, HEADS, PIECE, DIM), dtype=torch.int16, generator=generator).view(DTYPE)


class Text:
    """Two stores under a planner, with a budget of memory."""

    def __init__(self, budget: int, disk: str, keep: int) -> None:
        backend, example = backends.get("cpu"), torch.zeros(1, HEADS, 1, DIM, dtype=DTYPE)
        self.file, self.keep = backend.make_tier(disk), keep
        self.stores: list[Any] = [backend.make_store(example, example) for _ in range(LAYERS)]
        self.planner = make_planner(kvsieve.Full().specs(1), "post_rope")
        for store in self.stores:
            store.set_tier(self.file, budget // (LAYERS * BLOCK * HEADS * 2 * DIM * DTYPE.itemsize), None)

    def append(self, number: int) -> None:
        new = view(piece(number))
        step = self.planner.begin([PIECE], PIECE, True, False)
        for store in self.stores:
            store._core.append(new, new, step)
        self.planner.commit()
        self.settle()

    def settle(self) -> None:
        kept = self.planner.newest_blocks(0, 0, self.keep)
        for store in self.stores:
            store.trim(kept)

    def counts(self) -> np.ndarray[Any, Any]:
        return np.sum([store.tier_counts() for store in self.stores], 0)


def check(text: Text, runs: list[tuple[int, int, int]], chosen: list[int]) -> None:
    """What was fetched is what was appended."""
    for store in text.stores:
        k, v = store.read([runs[i] for i in chosen])
        want = [piece(i * BLOCK // PIECE)[0, :, i * BLOCK % PIECE :][:, :BLOCK] for i in chosen]
        assert torch.equal(k.view(torch.int16), torch.cat(want, 1).view(torch.int16))
        assert torch.equal(v.view(torch.int16), k.view(torch.int16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--disk", default=tempfile.gettempdir())
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=16, help="blocks that a layer fetches in a step")
    args = parser.parse_args()
    text, rng = Text(parse_bytes(args.budget), args.disk, keep=4096), random.Random(0)
    pieces = args.tokens // PIECE
    # By then the budget is full.
    early = max(pieces // 4, 2 * parse_bytes(args.budget) // (LAYERS * HEADS * 2 * DIM * DTYPE.itemsize * PIECE))
    assert early < pieces, "too few tokens for this budget"
    began, memory = time.process_time(), {}
    for number in range(pieces):
        text.append(number)
        if number + 1 in (early, pieces):
            memory[number + 1] = resident_bytes()
    appended = time.process_time() - began
    runs, before = text.planner.runs(0, 0), text.counts()
    spent = []
    for _ in range(args.steps):
        chosen = rng.sample(range(len(runs)), args.blocks)
        start = time.perf_counter()
        for store in text.stores:
            store.fetch([runs[i] for i in chosen])
        spent.append(time.perf_counter() - start)
        check(text, runs, chosen)
        text.settle()
    moved = text.counts() - before
    (_, first), (_, last) = sorted(memory.items())
    figures = {
        "tokens": pieces * PIECE,
        "bytes of all keys and values": pieces * PIECE * LAYERS * HEADS * 2 * DIM * DTYPE.itemsize,
        "bytes in memory": sum(store.bytes_held for store in text.stores),
        "bytes in the file": int(text.counts()[5]),
        "resident MiB early, at the end, after fetching": [x >> 20 for x in (first, last, resident_bytes())],
        "resident bytes a token": round((last - first) / ((pieces - early) * PIECE), 2),
        "CPU microseconds a token to make, append and spill": round(appended / (pieces * PIECE) * 1e6, 2),
        "hits and loads": [int(x) for x in moved[:2]],
        "loads a second": round(moved[1] / sum(spent)),
        "microseconds a block fetched, median": round(sorted(spent)[len(spent) // 2] / (args.blocks * LAYERS) * 1e6, 1),
        "MiB read, written": [int(x) >> 20 for x in (moved[3], text.counts()[4])],
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
