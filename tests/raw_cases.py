"""What a selection from pre-RoPE keys must do on a GPU, as functions of a device: beside the reference's store, step by step.

Queries and keys are odd multiples of 1/8 and rotations are quarter turns, so that scores are exact, and ties are ties.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any, Literal

import kvsieve
import torch
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope
from kvsieve.policy.specs import make_planner

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}

Mode = Literal["placed", "relative", "consecutive"]
MODES: list[Mode] = ["placed", "relative", "consecutive"]


class Quarters(LayerRope):
    """Turns by quarters of a circle, exactly."""

    def table(self, positions: torch.Tensor, dtype: torch.dtype, *, factor: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().table(positions, torch.float64, factor=False)
        scale = self.factor if factor else 1.0
        return (cos.round() * scale).to(dtype), (sin.round() * scale).to(dtype)


def quarters(rng: random.Random, dim: int) -> LayerRope:
    pairs = rng.choice([dim // 2, dim // 4])
    turns = torch.tensor([rng.choice([0, 1, 2, 3, 5]) * math.pi / 2 for _ in range(pairs)], dtype=torch.float64)
    return Quarters(turns, rng.choice(["half", "interleaved"]), rng.choice([1.0, 2.0]))


def hip(rng: random.Random) -> Any:
    """A rule as a policy gives it."""
    made = kvsieve.HiP(rng.choice([4, 20, 48]), rng.choice([1, 2, 3]), rng.choice([0, 3]), rng.choice([1, 9, 40]))
    how = {"representative": rng.choice(["middle", "first", "last", "oracle"]), "refresh": rng.choice([1, 3, 8])}
    return replace(made.selection, **how, **queries(rng), dense_layers=0)


def infinite(rng: random.Random) -> Any:
    stages = ((16, 96), (4, 32), (2, 12))
    made = kvsieve.InfiniteHiP(stages=stages, refresh=(8, 4, 2), sinks=rng.choice([0, 3]), window=rng.choice([1, 9, 40]), wide=12)
    return replace(made.selection, representative=rng.choice(["first", "middle"]), **queries(rng))


def quest(rng: random.Random) -> Any:
    made = kvsieve.Quest(32, candidates=4, sinks=rng.choice([0, 64]), window=rng.choice([64, 90]), refresh=rng.choice([1, (4, 2)]))
    return replace(made.selection, **queries(rng))


def queries(rng: random.Random) -> dict[str, int]:
    return {"query_block": rng.choice([1, 8, 16]), "query_stride": rng.choice([1, 3, 4])}


RULES = {"hip": hip, "infinite": infinite, "quest": quest}


class RawLayer:
    """A layer of pre-RoPE keys in both backends, under one planner."""

    def __init__(self, rule: Any, policy: Any, mode: Mode, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
        rng = random.Random(seed)
        self.rows, self.heads, self.group, self.size = shape
        self.dtype, self.planner = dtype, make_planner(policy.specs(1), "pre_rope")
        sinks = torch.randn(self.heads * self.group, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
        rope = quarters(rng, self.size)
        relative, consecutive = mode != "placed", mode == "consecutive"
        self.call = AttendCall(self.size**-0.5, rng.choice([None, 4.0]), sinks, rope, True, relative, consecutive)
        self.backends = [backends.get(name) for name in ("cuda", "reference")]
        self.found = [backend.make_selection(rule) for backend in self.backends]
        self.stores: list[Any] = []
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, heads: int, width: int) -> torch.Tensor:
        odd = torch.randint(-8, 8, (self.rows, heads, width, self.size), generator=self.generator) * 2 + 1
        return (odd / 8).to(self.dtype)

    def feed(self, width: int, device: torch.device, lens: list[int] | None = None) -> None:
        """One forward of random tokens, everything compared."""
        q, k, v = (self.draw(heads, width) for heads in (self.heads * self.group, self.heads, self.heads))
        lens = [width] * self.rows if lens is None else lens
        step = self.planner.begin(lens, width, width <= 16, True)
        outs = []
        for at, (backend, found) in enumerate(zip(self.backends, self.found)):
            given = [x.to(device) if at == 0 else x.double() for x in (q, k, v)]
            if len(self.stores) <= at:
                self.stores.append(backend.make_store(*given[1:]))
            sinks = self.call.sink_logits
            call = replace(self.call, sink_logits=None if sinks is None else sinks.to(given[0]))
            outs.append(self.stores[at].run_selected(*given, step, call, found).cpu().double())
        self.planner.commit()
        got, want = outs
        assert float((got - want).abs().max()) <= TOLERANCE[self.dtype] * max(1.0, float(want.abs().max()))
        for row in range(self.rows):
            mine, theirs = (found.choice(row) for found in self.found)
            for one, other in zip(mine, theirs, strict=True):
                assert one.ranges.tolist() == other.ranges.tolist()
                assert (one.end, one.reads, one.rounds) == (other.end, other.reads, other.rounds)
        assert self.found[0].work == self.found[1].work

    def keep(self, rng: random.Random, count: int) -> None:
        """Lets all but ``count`` residents go, another set in each row."""
        for row in range(self.rows):
            have = self.planner.resident(0, row)
            moves = self.planner.keep(0, row, sorted(rng.sample(range(have), min(count, have))))
            for store in self.stores:
                store.apply(moves)


def layer(kind: str, mode: Mode, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 16) -> None:
    """Prompts of unequal rows, single tokens, candidates and chunks, of a text that keeps every token."""
    rng = random.Random(f"{kind} {mode} {seed}")
    shape = (rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 3, 4]), size)
    tested = RawLayer(RULES[kind](rng), kvsieve.HiP(8, extend=True), mode, shape, dtype, seed)
    first = 330 if kind == "quest" else rng.choice([30, 200])
    tested.feed(first, device, [first, *(rng.randint(first // 2, first) for _ in range(shape[0] - 1))])
    for width in (1, 1, 5, 1, 40, 1, 1, 1, 1, 1):
        tested.feed(width, device)


def slots(kind: str, device: torch.device, seed: int = 0) -> None:
    """Tokens stand in slots and leave, so that a token's number is not its position."""
    rng = random.Random(f"slots {kind} {seed}")
    shape = (rng.choice([1, 2]), 2, rng.choice([1, 3]), 16)
    policy = kvsieve.SirLLM(4096, sinks=0, recent=0)
    tested = RawLayer(RULES[kind](rng), policy, rng.choice(["placed", "relative"]), shape, torch.float32, seed)
    tested.feed(200, device, [200, *(rng.randint(100, 200) for _ in range(shape[0] - 1))])
    for count in (500, 150, 90):
        tested.feed(rng.choice([1, 20]), device)
        tested.keep(rng, count)
        for width in (1, 1, rng.choice([1, 3, 30]), 1):
            tested.feed(width, device)
