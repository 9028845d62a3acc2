"""One layer, a chunk of ``n`` queries over as many keys: ours, which also stores them, beside torch on the same dense problem.

``Full()`` is that dense problem. The window policies attend to at most their budget, so their time per query stays what it is
while the chunk grows; it is printed for that reason.
"""

from __future__ import annotations

from typing import Any

import torch

import kvsieve
from kvsieve.backends import get
from kvsieve.backends.attention import attend as naive_attend
from kvsieve.backends.attention import merge, rotate_part
from kvsieve.backends.base import AttendCall
from kvsieve.bench import rivals
from kvsieve.bench.measure import Clock, Ring, Run, copies, interleaved, quickest, readers, steady
from kvsieve.bench.options import DTYPES, Options, Shape
from kvsieve.bench.report import TOLERANCE, Report, Row, check, known, middle, spread, timings
from kvsieve.facts import LayerRope
from kvsieve.policy.compose import Policy
from kvsieve.policy.specs import make_planner

__all__ = ["run"]

BUDGET = 1024
"""Tokens that a query of the window policies sees."""

POLICIES: dict[str, Policy] = {
    "Full": kvsieve.Full(),
    "StreamingLLM": kvsieve.StreamingLLM(BUDGET),
    "LMInfinite": kvsieve.LMInfinite(BUDGET - 4, sinks=4),
}

SAMPLE = 24
"""Queries whose answers are compared with float64: the first, the last, and some between."""

COLUMNS = (
    ("heads", 8),
    ("dtype", 5),
    ("queries", 7),
    ("Full()", 22),
    ("generate", 8),
    ("x", 5),
    ("best", 7),
    ("x", 5),
    ("which", 16),
    ("StreamingLLM", 12),
    ("us/query", 8),
    ("LMInfinite", 10),
    ("us/query", 8),
    ("error", 7),
    ("torch's", 7),
)


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``."""
    report.note(f"x: times as long as ours; windows hold {BUDGET} tokens; us/query: microseconds of one query of the chunk")
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
    """Bytes of a case: inputs and stores, float32 copies of everything on the way, and the sample's answer in float64."""
    held = (shape.token_bytes(getattr(torch, DTYPES[dtype]).itemsize) * length) * (1 + shape.group)
    wide = length * shape.dim * 8 * (3 * shape.heads + 2 * shape.kv_heads)
    return held * (copies(held) + len(POLICIES)) + 2 * wide + 4 * SAMPLE * shape.heads * length * 8 + (512 << 20)


Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _bytes(chunk: Chunk) -> int:
    return sum(x.nbytes for x in chunk)


class Case:
    """A chunk, as the attention of a layer gets it: contiguous, rotated where the policy stores post-RoPE keys."""

    def __init__(self, shape: Shape, dtype: str, length: int) -> None:
        kind = getattr(torch, DTYPES[dtype])
        generator = torch.Generator().manual_seed(length)
        sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
        q, k, v = (torch.randn(1, heads, length, shape.dim, generator=generator).to(kind) for heads in sizes)
        self.rope = LayerRope(1e4 ** (-torch.arange(shape.dim // 2).double() / (shape.dim // 2)), "half")
        self.scale, self.length = shape.dim**-0.5, length
        self.chunk = q, k, v
        self.chunks: Ring[Chunk] = Ring(lambda i: (q, k, v) if i == 0 else (q.clone(), k.clone(), v.clone()), _bytes(self.chunk))
        self.rows = torch.arange(0, length, max(1, (length - 1) // (SAMPLE - 1)))

    def ours(self, policy: Policy) -> tuple[Run, Any, AttendCall]:
        """The call, its step, and what the layer adds to it."""
        backend = get("cpu")
        planner = make_planner(policy.specs(1), policy.stored_keys)
        step = planner.begin([self.length], self.length, False, False)
        call = AttendCall(scale=self.scale, rope=self.rope if policy.moves else None)
        store = backend.make_store(self.chunk[1], self.chunk[2])

        def once() -> torch.Tensor:
            return store.run(*self.chunks.next(), step, call)

        # One store will do: nothing is read from it. From the second call on its memory is there.
        once()
        # The planner must outlive the step: its blocks are what the step writes to.
        return once, (planner, step), call

    def theirs(self, way: rivals.Way) -> Run:
        return lambda: way(*self.chunks.next(), self.scale)

    def exact(self, step: Any, call: AttendCall) -> torch.Tensor:
        """The sampled rows of the answer in float64, ``[rows, H, D]``, by the parts of the step: the reference's definition."""
        parts = []
        for part in step.parts():
            lo, hi = part.new_range
            q, k, v = (x[0].double() for x in self.chunk)
            q, k = rotate_part(q, k[:, lo:hi], part, step.stored_keys, call.rope)
            at = torch.from_numpy(part.query_true())[self.rows]
            distance = at[:, None] - torch.from_numpy(part.key_true())[None, :]
            visible = (distance >= 0) & (distance >= part.far)
            if part.near is not None:
                visible &= distance < part.near
            parts.append(naive_attend(q[:, self.rows], k, v[:, lo:hi], visible, self.scale))
        return merge(parts).transpose(0, 1)

    def off(self, got: torch.Tensor, want: torch.Tensor) -> float:
        """Relative error of the sampled rows of ``got`` ``[1, m, H, D]`` in the Euclidean norm."""
        return float((got[0, self.rows].double() - want).norm() / want.norm())


def measure(shape: Shape, dtype: str, length: int, rounds: int, clock: Clock, report: Report) -> None:
    """One row: checks every answer, then measures."""
    what = f"prefill {shape} {dtype} {length}"
    case = Case(shape, dtype, length)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    kept = []
    ways = {"generate_default": rivals.generate_default, **rivals.PREFILL}
    if dtype == "f32":
        ways = {name: way for name, way in ways.items() if name not in rivals.IN_F32}
    for name, policy in POLICIES.items():
        call, (planner, step), layer = case.ours(policy)
        kept.append(planner)
        want = case.exact(step, layer)
        if name == "Full":
            # float64 of this file and of the rivals' file must be one thing before anything is held against either.
            if length <= 1024 and not case.off(rivals.exact(*case.chunk, case.scale, causal=True).float(), want) < 1e-6:
                raise AssertionError(f"{what}: two definitions of the same attention differ")
            errors |= {other: case.off(way(*case.chunk, case.scale), want) for other, way in ways.items()}
        errors[name] = case.off(call(), want)
        check(f"{what}, {name}", dtype, errors[name], errors["generate_default"] if name == "Full" else None)
        runs[name] = call
    theirs: dict[str, Run] = {name: case.theirs(way) for name, way in ways.items()}
    exact = [name for name in ways if errors[name] <= TOLERANCE[dtype]]
    fast = quickest({name: theirs[name] for name in exact}, clock, 1.5)
    runs |= {name: call for name, call in theirs.items() if name in fast or name == "generate_default"}
    bytes_read, yardsticks = readers()
    times = interleaved({**yardsticks, **runs}, rounds, clock=clock)
    best = min(fast, key=lambda name: times[name].median)
    ms = {name: time.median * 1e3 for name, time in times.items()}
    ratios = {name: ms[name] / ms["Full"] for name in runs if name != "Full"}
    per_query = {name: ms[name] * 1e3 / length for name in POLICIES}
    report.row(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        dtype=dtype,
        length=length,
        budget=BUDGET,
        read_gb_per_s=round(bytes_read / min(times[name].median for name in yardsticks) / 1e9, 3),
        best=best,
        ratios={name: round(ratio, 4) for name, ratio in ratios.items()},
        us_per_query={name: round(us, 4) for name, us in per_query.items()},
        errors=errors,
        times=timings(times),
    )


def cells(row: Row) -> list[str]:
    """The row, as it is printed."""
    times, ratios, best = row["times"], row["ratios"], row["best"]
    shape = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
    made = [shape, row["dtype"], str(row["length"]), spread(times["Full"])]
    made += [middle(times["generate_default"]), f"{ratios['generate_default']:.2f}"]
    made += [middle(times[best]), f"{ratios[best]:.2f}", best]
    for name in ("StreamingLLM", "LMInfinite"):
        made += [middle(times[name]), f"{row['us_per_query'][name]:.1f}"]
    return [*made, f"{row['errors']['Full']:.0e}", f"{row['errors']['generate_default']:.0e}"]
