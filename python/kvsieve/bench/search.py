"""One layer, one query, a long text: a search and what it reads, beside all keys and beside what ``generate`` calls.

Several layers take turns, so that none finds its keys in a cache. ``refresh`` 1 searches at every step; with 8 the time is the
mean of eight steps, of which the first searches. Keys are random: the worst case for what a search finds, and no matter for what
it costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import kvsieve
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.bench import rivals
from kvsieve.bench.attend import off
from kvsieve.bench.measure import Clock, Run, copies, figure, interleaved, readers, steady
from kvsieve.bench.options import DTYPES, Options, Shape
from kvsieve.bench.report import Report, Row, check, known, spread, timings
from kvsieve.policy.select import SparseSelection
from kvsieve.policy.specs import make_planner

__all__ = ["POLICIES", "run"]

POLICIES = {
    "HiP(1024)": kvsieve.HiP(1024, refresh=8, dense_layers=0),
    "InfiniteHiP()": kvsieve.InfiniteHiP(wide_layers=0),
    "Quest(1024)": kvsieve.Quest(1024, refresh=8),
}

COLUMNS = (
    ("heads", 8),
    ("dtype", 5),
    ("tokens", 7),
    ("policy", 14),
    ("Full()", 22),
    ("generate", 8),
    ("every step", 10),
    ("x Full", 6),
    ("x gen.", 6),
    ("as refreshed", 12),
    ("x Full", 6),
    ("x gen.", 6),
    ("scored", 8),
    ("read", 7),
    ("error", 7),
)


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``."""
    report.note("x: how often ours fits in their time; scored, read: keys of one step that selects, over all key-value heads")
    report.head(cells, *COLUMNS)
    with steady(options.threads) as clock:
        for shape in options.shapes:
            for dtype in options.dtypes:
                for length in options.lengths:
                    names = wanted(shape, dtype, length, report)
                    if names and not report.skip(f"{shape} {dtype} {length}", need(shape, dtype, length)):
                        measure(shape, dtype, length, names, options.rounds, clock, report)


def wanted(shape: Shape, dtype: str, length: int, report: Report) -> list[str]:
    """The policies of a case that search a text so long, and that were not measured before."""
    found = []
    for name, policy in POLICIES.items():
        rule: Any = policy.selection
        if length <= rule.dense_until:
            report.note(f"{shape} {dtype} {length} {name}: read whole, nothing to measure")
        elif not known(report, shape, dtype, length, name=name):
            found.append(name)
    return found


def need(shape: Shape, dtype: str, length: int) -> int:
    """Bytes of a case: every layer's keys and values, torch's, and what the answer in float64 takes."""
    held = shape.token_bytes(getattr(torch, DTYPES[dtype]).itemsize) * length
    return held * (copies(held) + 1) + shape.group * held + (512 << 20)


class Layers:
    """Layers of one stream, all of which hold the same ``length`` tokens; time goes on together for them."""

    def __init__(self, shape: Shape, dtype: str, length: int) -> None:
        kind = getattr(torch, DTYPES[dtype])
        generator = torch.Generator().manual_seed(length)
        self.k, self.v = (torch.randn(1, shape.kv_heads, length, shape.dim, generator=generator).to(kind) for _ in "kv")
        self.q = torch.randn(1, shape.heads, 1, shape.dim, generator=generator).to(kind)
        self.scale = shape.dim**-0.5
        self.new = self.k[:, :, -1:].contiguous(), self.v[:, :, -1:].contiguous()
        self.call, self.backend = AttendCall(scale=self.scale), get("cpu")
        self.planner = make_planner(kvsieve.Full().specs(1), "post_rope")
        held = list(range(length - 1))
        self.planner.restore(length - 1, [(length - 1, [(held, [0.0] * len(held))])])
        runs = self.planner.runs(0, 0)
        self.stores = []
        for _ in range(copies(shape.token_bytes(kind.itemsize) * length)):
            store = self.backend.make_store(self.k, self.v)
            store.write(runs, self.k[0, :, :-1], self.v[0, :, :-1])
            self.stores.append(store)

    def steps(self, rule: SparseSelection | None, count: int) -> Callable[[], torch.Tensor]:
        """``count`` tokens through all layers, of which none is left afterwards; gives the last layer's last answer."""
        searches = [self.backend.make_selection(rule) for _ in self.stores] if rule is not None else None

        def run() -> torch.Tensor:
            out = self.q
            for _ in range(count):
                step = self.planner.begin([1], 1, True, False)
                for i, store in enumerate(self.stores):
                    if searches is None:
                        out = store.run(self.q, *self.new, step, self.call)
                    else:
                        out = store.run_selected(self.q, *self.new, step, self.call, searches[i])
                self.planner.commit()
            self.planner.crop(count)
            if searches is not None:
                self.found = searches[-1]
            return out

        return run

    def exact(self, rule: SparseSelection) -> torch.Tensor:
        """What the last search should have given: softmax over what it chose, in float64. ``[1, 1, H, D]``."""
        parts = []
        length, group = self.k.shape[2], self.q.shape[1] // self.k.shape[1]
        for head, choice in enumerate(self.found.choice(0)):
            read = np.zeros(length, bool)
            for lo, hi in choice.ranges:
                read[lo:hi] = True
            read[: rule.sinks] = read[length - rule.window :] = True
            keep = torch.from_numpy(read)
            mine = slice(head * group, (head + 1) * group)
            one = slice(head, head + 1)
            parts.append(rivals.exact(self.q[:, mine], self.k[:, one, keep], self.v[:, one, keep], self.scale))
        return torch.cat(parts, 2)


def measure(shape: Shape, dtype: str, length: int, names: Sequence[str], rounds: int, clock: Clock, report: Report) -> None:
    """The rows of one case: checks every answer, then measures."""
    layers = Layers(shape, dtype, length)
    for name in names:
        policy = POLICIES[name]
        rule: Any = policy.selection
        paces = rule.paces
        cycle = max(paces)
        every = dataclasses.replace(rule, refresh=(1,) * len(paces) if isinstance(rule.refresh, tuple) else 1)
        once = layers.steps(every, 1)
        answer = once()
        scored, read = layers.found.work
        error = check(f"search {shape} {dtype} {length} {name}", dtype, off(answer, layers.exact(rule)))
        runs: dict[str, Run] = {
            "full": layers.steps(None, 1),
            "every_step": once,
            "as_refreshed": layers.steps(rule, cycle),
            "generate_default": lambda: rivals.generate_default(layers.q, layers.k, layers.v, layers.scale),
        }
        bytes_read, yardsticks = readers([layers.k, layers.v])
        times = interleaved({**yardsticks, **runs}, rounds, clock=clock)
        count = len(layers.stores)
        per = {"full": count, "every_step": count, "as_refreshed": count * cycle, "generate_default": 1}
        seconds = {run: times[run].median / n for run, n in per.items()}
        ratios = {
            f"{run}_over_{rival}": round(seconds[rival] / seconds[run], 3)
            for run in ("every_step", "as_refreshed")
            for rival in ("full", "generate_default")
        }
        report.row(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            dtype=dtype,
            length=length,
            name=name,
            policy=repr(policy),
            layers=count,
            cycle=cycle,
            scored=scored,
            read=read,
            error=error,
            read_gb_per_s=round(bytes_read / min(times[name].median for name in yardsticks) / 1e9, 3),
            seconds=seconds,
            ratios=ratios,
            times=timings(times),
        )


def cells(row: Row) -> list[str]:
    """The row, as it is printed."""
    seconds, ratios, full = row["seconds"], row["ratios"], row["times"]["full"]
    shape = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
    a_layer = {name: ms / row["layers"] for name, ms in full.items() if name.endswith("_ms")}
    made = [shape, row["dtype"], str(row["length"]), row["name"], spread(a_layer), figure(seconds["generate_default"])]
    for run in ("every_step", "as_refreshed"):
        made += [figure(seconds[run]), *(f"{ratios[f'{run}_over_{rival}']:.1f}" for rival in ("full", "generate_default"))]
    return [*made, str(row["scored"]), str(row["read"]), f"{row['error']:.0e}"]
