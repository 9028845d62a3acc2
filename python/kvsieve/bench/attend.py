"""One layer, one query: the public CPU store, which stores the new token and attends, beside what torch takes to attend alone.

``post_rope`` reads keys as the model rotated them, ``pre_rope`` rotates them on read (torch's ways get rotated keys for nothing).
The rivals: transformers' own call, torch with the query heads of a group packed as queries, and the fastest exact formulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.bench import rivals
from kvsieve.bench.measure import Clock, Ring, Run, Timing, copies, interleaved, quickest, readers, steady
from kvsieve.bench.options import DTYPES, Options, Shape
from kvsieve.bench.report import TOLERANCE, Report, Row, check, known, middle, spread, timings
from kvsieve.facts import LayerRope

__all__ = ["run"]

Pair = tuple[torch.Tensor, torch.Tensor]

COLUMNS = (
    ("heads", 8),
    ("dtype", 5),
    ("tokens", 7),
    ("read GB/s", 9),
    ("post-RoPE", 22),
    ("GB/s", 5),
    ("of read", 7),
    ("pre-RoPE", 8),
    ("pre/post", 8),
    ("generate", 8),
    ("x", 5),
    ("packed", 7),
    ("x", 5),
    ("best", 7),
    ("x", 5),
    ("which", 16),
    ("error", 7),
    ("torch's", 7),
)


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``."""
    report.note("x: times as long as ours, post-RoPE keys; of read: of what one thread reads at the same moment")
    report.head(cells, *COLUMNS)
    with steady(options.threads) as clock:
        for shape in options.shapes:
            for dtype in options.dtypes:
                for length in options.lengths:
                    if known(report, shape, dtype, length):
                        continue
                    if not report.skip(f"{shape} {dtype} {length}", need(shape, dtype, length)):
                        measure(shape, dtype, length, options.rounds, clock, report)


def need(shape: Shape, dtype: str, length: int) -> int:
    """Bytes of a case: what ours and torch hold, what rivals make on their way, and one head in float64."""
    itemsize = getattr(torch, DTYPES[dtype]).itemsize
    held = shape.token_bytes(itemsize) * length
    # The thirstiest rival was seen to take half of what it reads in float32, three times as much in 16 bits.
    return 2 * held * copies(held) + (held if itemsize == 4 else 4 * held) + 6 * 8 * length * shape.dim + (512 << 20)


class Case:
    """``length`` tokens in stores and in tensors, the last of them new in the stores' eyes."""

    def __init__(self, shape: Shape, dtype: str, length: int) -> None:
        kind = getattr(torch, DTYPES[dtype])
        generator = torch.Generator().manual_seed(length)
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.dim
        self.k, self.v = (torch.randn(1, kv_heads, length, dim, generator=generator).to(kind) for _ in "kv")
        self.q = torch.randn(1, heads, 1, dim, generator=generator).to(kind)
        self.scale = dim**-0.5
        self.rope = LayerRope(1e4 ** (-torch.arange(dim // 2).double() / (dim // 2)), "half")
        self.new = self.k[:, :, -1:].contiguous(), self.v[:, :, -1:].contiguous()
        self.call = AttendCall(scale=self.scale, rope=self.rope)
        held = list(range(length - 1))
        steps, runs = {}, []
        for stored_keys in ("post_rope", "pre_rope"):
            memory = _core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())
            planner = _core.Planner([memory], stored_keys)
            planner.restore(length - 1, [(length - 1, [(held, [0.0] * len(held))])])
            runs = planner.runs(0, 0)
            steps[stored_keys] = planner.begin([1], 1, True, False)
        self.steps = steps
        backend = get("cpu")

        def store(_: int) -> Any:
            made = backend.make_store(self.k, self.v)
            made.write(runs, self.k[0, :, :-1], self.v[0, :, :-1])
            return made

        held_bytes = shape.token_bytes(kind.itemsize) * length
        # A block means the same place in every store, so one step serves them all, as it serves all layers of a model.
        self.stores = Ring(store, held_bytes)
        self.pairs: Ring[Pair] = Ring(lambda i: (self.k, self.v) if i == 0 else (self.k.clone(), self.v.clone()), held_bytes)

    def ours(self, stored_keys: str) -> Callable[[], torch.Tensor]:
        step = self.steps[stored_keys]

        def call() -> torch.Tensor:
            out: torch.Tensor = self.stores.next().run(self.q, *self.new, step, self.call)
            return out

        return call

    def theirs(self, way: rivals.Way) -> Callable[[], torch.Tensor]:
        return lambda: way(self.q, *self.pairs.next(), self.scale)

    def exact(self, stored_keys: str) -> torch.Tensor:
        """``[1, 1, H, D]`` in float64."""
        if stored_keys == "post_rope":
            return rivals.exact(self.q, self.k, self.v, self.scale)
        at = torch.arange(self.k.shape[2])
        parts = []
        for head, queries in enumerate(self.q[0].chunk(self.k.shape[1])):
            # The rotation of one head at a time: all of them in float64 would be most of the case's memory.
            rotated = self.rope.rotate(queries.double(), at[-1:])[None]
            keys = self.rope.rotate(self.k[0, head].double(), at)[None, None]
            parts.append(rivals.exact(rotated, keys, self.v[:, head : head + 1], self.scale))
        return torch.cat(parts, 2)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; ``got`` may have heads and queries the other way round where one of them is one."""
    return float((got.double().flatten() - want.flatten()).norm() / want.norm())


def measure(shape: Shape, dtype: str, length: int, rounds: int, clock: Clock, report: Report) -> None:
    """One row: checks every answer, then measures."""
    what = f"attend {shape} {dtype} {length}"
    case = Case(shape, dtype, length)
    want = case.exact("post_rope")
    runs: dict[str, Run] = {}
    errors = {"generate_default": off(case.theirs(rivals.generate_default)(), want)}
    for stored_keys in ("post_rope", "pre_rope"):
        ours, answer = case.ours(stored_keys), want if stored_keys == "post_rope" else case.exact(stored_keys)
        # Every copy is checked: each is read while it is measured. torch has no pre-RoPE keys, but the same sums to make.
        errors[stored_keys] = max(off(ours(), answer) for _ in case.stores.copies)
        check(f"{what}, {stored_keys} keys", dtype, errors[stored_keys], errors["generate_default"])
        runs[stored_keys] = ours
    runs["generate_default"] = case.theirs(rivals.generate_default)
    promising, errors = promising_ways(case, want, dtype, errors, clock)
    bytes_read, yardsticks = readers([x for pair in case.pairs.copies for x in pair])
    times = interleaved({**yardsticks, **runs, **promising}, rounds, clock=clock)
    read = bytes_read / min(times[name].median for name in yardsticks)
    exact = [name for name in (*promising, "generate_default") if errors[name] <= TOLERANCE[dtype]]
    best = min(exact, key=lambda name: times[name].median)
    report.row(**told(shape, dtype, length, times, read, best, errors))


def promising_ways(
    case: Case, want: torch.Tensor, dtype: str, errors: dict[str, float], clock: Clock
) -> tuple[dict[str, Run], dict[str, float]]:
    """torch's formulations that are exact and, once tried, at most three times as slow as the fastest; packed torch always."""
    calls = {name: case.theirs(way) for name, way in rivals.DECODE.items() if dtype != "f32" or name not in rivals.IN_F32}
    found = {**errors, **{name: off(call(), want) for name, call in calls.items()}}
    exact: dict[str, Run] = {name: call for name, call in calls.items() if found[name] <= TOLERANCE[dtype]}
    chosen = quickest(exact, clock, 3.0) if exact else []
    return {name: call for name, call in exact.items() if name in chosen or name == "packed_sdpa"}, found


def told(
    shape: Shape, dtype: str, length: int, times: dict[str, Timing], read: float, best: str, errors: dict[str, float]
) -> dict[str, Any]:
    """The row, as it is written."""
    ms = {name: time.median * 1e3 for name, time in times.items()}
    moved = shape.token_bytes(getattr(torch, DTYPES[dtype]).itemsize) * length
    speed = moved / times["post_rope"].median
    ratios = {name: ms[name] / ms["post_rope"] for name in times if name not in ("read", "post_rope")}
    return {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.dim,
        "dtype": dtype,
        "length": length,
        "bytes_read": moved,
        "read_gb_per_s": round(read / 1e9, 3),
        "gb_per_s": round(speed / 1e9, 3),
        "of_read": round(speed / read, 4),
        "best": best,
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "errors": errors,
        "times": timings(times),
    }


def cells(row: Row) -> list[str]:
    """The row, as it is printed."""
    times, ratios, packed, best = row["times"], row["ratios"], "packed_sdpa", row["best"]
    shape = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
    made = [shape, row["dtype"], str(row["length"]), f"{row['read_gb_per_s']:.1f}", spread(times["post_rope"])]
    made += [f"{row['gb_per_s']:.1f}", f"{row['of_read']:.2f}", middle(times["pre_rope"]), f"{ratios['pre_rope']:.2f}"]
    made += [middle(times["generate_default"]), f"{ratios['generate_default']:.1f}"]
    # Not exact enough to be timed: say so rather than leave the row out.
    made += [middle(times[packed]), f"{ratios[packed]:.1f}"] if packed in times else ["inexact", ""]
    made += [middle(times[best]), f"{ratios[best]:.1f}", best]
    return [*made, f"{row['errors']['post_rope']:.0e}", f"{row['errors']['generate_default']:.0e}"]
