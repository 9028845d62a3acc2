"""Two stores under one planner, one of which holds few blocks in memory, as functions of a backend and a device."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from backend_cases import on
from drive import forwards
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.errors import StateError
from kvsieve.policy import Memory, Tiered
from kvsieve.policy.specs import make_planner

HEADS, DIM = 2, 8

BLOCK = 2 * 64 * 2 * 2 * 16 * 4
"""Bytes of a block of 64 tokens in all layers of the tiny model."""

BASES: dict[str, Callable[[], Any]] = {
    "full": kvsieve.Full,
    "hip": lambda: kvsieve.HiP(64, sinks=4, window=16, dense_layers=1),
    "infllm": lambda: kvsieve.InfLLM(64, blocks=3, block=32, representatives=2, sinks=8, query_block=64),
    "infllm_per_head": lambda: kvsieve.InfLLM(64, blocks=2, block=8, sinks=8, query_block=64, per_head=True),
    "longheads": lambda: kvsieve.LongHeads(128, chunk=32),
}


class Twins:
    """Two stores under one planner, and its forks: one of them may spill."""

    def __init__(
        self,
        backend: str,
        folder: Path | None,
        capacity: int,
        rows: int = 2,
        decay: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        made, self.device = backends.get(backend), torch.device(device)
        example = torch.zeros(1, HEADS, 1, DIM, device=device)
        self.tiered: Any = made.make_store(example, example)
        self.plain: Any = made.make_store(example, example)
        self.file = made.make_tier(None if folder is None else str(folder))
        self.tiered.set_tier(self.file, capacity, decay)
        self.planners = [make_planner(kvsieve.Full().specs(1), "post_rope")]
        self.rows, self.generator = rows, torch.Generator().manual_seed(7)

    def runs(self, planner: Any) -> list[tuple[int, int, int]]:
        return [run for row in range(planner.num_rows) for run in planner.runs(0, row)]

    def feed(self, planner: Any, lens: list[int]) -> None:
        width = max(lens)
        q, k, v = (torch.randn(self.rows, HEADS, width, DIM, generator=self.generator).to(self.device) for _ in range(3))
        runs = self.runs(planner)
        self.tiered.fetch(runs)
        step = planner.begin(lens, width, True, False)
        call = AttendCall(DIM**-0.5)
        got, want = (store.run(q, k, v, step, call) for store in (self.tiered, self.plain))
        assert torch.equal(got, want)
        planner.commit()

    def both(self, method: str, *args: Any) -> None:
        for store in (self.tiered, self.plain):
            getattr(store, method)(*args)

    def free_unused(self) -> None:
        planner = self.planners[0]
        self.both("free_unused", planner.blocks_in_use(), planner.packed_in_use())
        moves = planner.tidy()
        if len(moves):
            self.both("apply", moves)
            self.both("free_unused", planner.blocks_in_use(), planner.packed_in_use())

    def check(self) -> None:
        for planner in self.planners:
            for row in range(planner.num_rows):
                runs = planner.runs(0, row)
                for got, want in zip(self.tiered.read(runs), self.plain.read(runs)):
                    assert torch.equal(got, want)


def schedule(backend: str, seed: int, folder: Path | None, device: torch.device | str = "cpu") -> None:
    """Blocks come and go at random; what is read is what a store that holds all in memory reads."""
    rng = random.Random(seed)
    twins = Twins(backend, folder, capacity=rng.choice([0, 3, 8]), decay=rng.choice([None, 0.1]), device=device)
    for _ in range(60):
        planner = rng.choice(twins.planners)
        seen = min((planner.seen(row) for row in range(planner.num_rows)), default=0)
        held = [block for block, _, _ in twins.runs(planner)]
        some = rng.sample(held, min(len(held), 5))
        act = rng.choice(["feed"] * 3 + ["crop", "rows", "fork", "drop", "spill", "trim", "hold", "free", "score", "prefetch"])
        if act == "feed":
            twins.feed(planner, [rng.choice([1, 1, 40, 90, 200]) for _ in range(twins.rows)])
        elif act == "crop" and seen > 1:
            planner.crop_rows([rng.randrange(1, min(seen, 150)) for _ in range(twins.rows)])
        elif act == "rows" and seen:
            planner.select_rows([rng.randrange(twins.rows) for _ in range(twins.rows)])
        elif act == "fork" and len(twins.planners) < 4:
            twins.planners.append(planner.fork())
        elif act == "drop" and len(twins.planners) > 1:
            twins.planners.remove(planner)
            del planner
        elif act == "spill":
            twins.tiered.spill(some, later=rng.random() < 0.5)
        elif act == "trim":
            twins.tiered.trim(some, later=rng.random() < 0.5)
        elif act == "prefetch":
            twins.tiered.prefetch([(block, 0, 1) for block in some])
        elif act == "hold":
            twins.tiered.hold(some)
        elif act == "score":
            twins.tiered.score(some, [rng.random() for _ in some])
        elif act == "free":
            twins.free_unused()
        twins.check()
    twins.tiered.finish()
    counts = twins.tiered.tier_counts()
    assert counts.loads
    assert counts.spills


def never_read(backend: str, folder: Path | None, device: torch.device | str = "cpu") -> None:
    """To read a block that is not in memory is an error; fetched, it is there. Every byte that moves is counted."""
    twins = Twins(backend, folder, capacity=2, rows=1, device=device)
    planner = twins.planners[0]
    twins.feed(planner, [300])
    twins.tiered.trim([])
    runs = planner.runs(0, 0)
    step = planner.begin([1], 1, True, True)
    q = torch.randn(1, HEADS, 1, DIM, device=device)
    with pytest.raises(StateError, match="block 0 is not in memory; fetch it"):
        twins.tiered.run(q, q, q, step, AttendCall(1.0))
    planner.rollback()
    twins.check()
    # Of the five blocks of 300 tokens the last one is not full, and two of the others fit.
    assert twins.tiered.tier_counts().spills == 2
    twins.tiered.fetch(runs)
    counts = twins.tiered.tier_counts()
    assert (counts.hits, counts.loads) == (3, 2)
    block = 64 * 2 * HEADS * DIM * 4
    assert (counts.bytes_written, counts.bytes_in_file) == (2 * block, 2 * block)
    assert counts.bytes_read == 2 * block + 2 * block, "once to be checked, once to stay"
    # They have copies: to give them back again writes nothing.
    twins.tiered.trim([])
    assert twins.tiered.tier_counts().bytes_written == 2 * block
    twins.feed(planner, [1])


def what_fits_stays(backend: str, folder: Path | None, later: bool = False, device: torch.device | str = "cpu") -> None:
    """Blocks that are read again and again, fewer than the capacity, are all in memory after a while.

    Those that nobody reads leave for them, though they had no copy at first.
    """
    twins = Twins(backend, folder, capacity=4, rows=1, device=device)
    twins.feed(twins.planners[0], [12 * 64])
    runs = twins.runs(twins.planners[0])

    def end_step() -> None:
        twins.tiered.trim([], later)
        twins.tiered.finish()

    end_step()
    cold, loads = in_memory(twins.tiered, runs), []
    assert cold == {block for block, _, _ in runs[-4:]}
    for step in range(24):
        twins.tiered.fetch([runs[step % 3]])
        end_step()
        twins.check()
        assert len(in_memory(twins.tiered, runs)) <= 4
        loads.append(twins.tiered.tier_counts().loads)
    assert loads[11] == loads[23], f"three blocks of a capacity of four: {loads}"
    assert loads[11] <= 6, f"each was loaded once, and once more at most: {loads}"
    assert in_memory(twins.tiered, runs) >= {block for block, _, _ in runs[:3]}


def in_memory(store: Any, runs: list[tuple[int, int, int]]) -> set[int]:
    """The blocks of ``runs`` that a store with a tier has in memory; in the reference those that left take as much, and are nan."""
    blocks, tier = {block for block, _, _ in runs}, store._tier
    gone = {block for block in blocks if tier.is_spilled(block)} if hasattr(tier, "is_spilled") else tier.away(blocks)
    return blocks - gone


def most_in_memory(stream: kvsieve.Stream) -> int:
    """Blocks in memory of the layer that has most of them there."""
    planner = stream._engine.planner
    runs = [run for row in range(planner.num_rows) for run in planner.runs(0, row)]
    return max(len(in_memory(store, runs)) for store in stream._engine.stores.values())


def tiered(base: Any, blocks: int = 3, **others: Any) -> Any:
    return base | Memory(storage=Tiered(blocks * BLOCK, **others))


def model(base: str, device: torch.device) -> None:
    """Streams on the CUDA backend with few blocks on the device, beside one that has all of them there."""
    made, ids = on(tiny.model(), device), tiny.ids(1, 424).to(device)
    with kvsieve.stream(made, BASES[base](), "cuda") as stream:
        want = forwards(made, stream.cache, ids, [400, 1])
    fetches = BASES[base]().memories[0].roles.select.fetches
    for count, order in ((20, "recency"), (3, "recency"), (4, "scores" if fetches else "recency")):
        with kvsieve.stream(made, tiered(BASES[base](), count, keep=64, order=order), "cuda") as stream:
            assert torch.equal(forwards(made, stream.cache, ids, [400, 1]), want)
            tiers = stream.stats().tiers
            assert tiers is not None
            assert (tiers.loads > 0, tiers.spills > 0) == (count < 20, count < 20)
            # The block that is being filled is there besides.
            assert count == 20 or tiers.bytes_in_memory <= (count + 1) * BLOCK
            assert tiers.file_bytes == tiers.bytes_in_file
