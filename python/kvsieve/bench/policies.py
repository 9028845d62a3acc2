"""Every policy beside transformers' caches, against length: time of a token, bytes held, memory of the process.

Each has a process of its own, which reads the text in chunks, as a user's would. At every length all of them have read as much,
and then a token of each is timed, in turns, round by round. The processes are as many as fit into half of the memory that is
free; where that is not all of them, each group has a `DynamicCache` of its own, which its ratios are against.

Nothing is timed before the logits of `Full()` and of `StaticCache` were found to be those of `DynamicCache`. How far those of the
others are off is printed: what a policy forgets of random tokens says nothing about texts.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.context import BaseContext
from typing import Any

import torch

import kvsieve
from kvsieve.bench import subject
from kvsieve.bench.alone import Job, serve
from kvsieve.bench.caches import RIVALS, STOCK
from kvsieve.bench.measure import Timing, available_bytes, figure, readers, steady
from kvsieve.bench.options import DTYPES, Options
from kvsieve.bench.report import Report, Row, spread, timings
from kvsieve.errors import AccuracyError, BenchError

__all__ = ["run"]

EXACT = {"Full()", "StaticCache"}
"""What must give the logits of the stock cache, as far as rounding allows."""

TOLERANCE = {"f32": 1e-3, "bf16": 0.1, "f16": 0.1}
"""How far those may be off, relative, in the Euclidean norm: each layer rounds, and so did those of every token before."""

PROCESS = 512 << 20
"""What a process takes beside weights and caches."""

MIB = 2**20

COLUMNS = (
    ("dtype", 5),
    ("tokens", 7),
    ("policy", 32),
    ("ms a token", 20),
    ("x", 5),
    ("held MiB", 9),
    ("process MiB", 11),
    ("grown MiB", 9),
    ("read tok/s", 10),
    ("least ms", 8),
    ("logits off", 10),
)


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``.

    Raises:
        KvsieveError: for policies that do not parse, or that this model cannot be read under.
    """
    subject.load.cache_clear()
    names = [*RIVALS, *dict.fromkeys(repr(kvsieve.methods.parse(text)) for text in options.policies)]
    report.note(
        f"x: times as fast as transformers' {STOCK}; process: its resident memory, grown: since before it held anything; "
        "least: reading weights and what is held once"
    )
    report.head(cells, *COLUMNS)
    with steady(options.threads):
        for dtype in options.dtypes:
            left: dict[str, list[int]] = {name: [] for name in names}
            for length in sorted(options.lengths):
                for name in names:
                    if not report.known(dtype=dtype, length=length, name=name):
                        left[name].append(length)
            Table(options, dtype, report).measure({name: lengths for name, lengths in left.items() if lengths})


class Alone:
    """A process that holds one cache, and the pipe to it."""

    def __init__(self, context: BaseContext, job: Job) -> None:
        self.name = job.name
        self._pipe, theirs = context.Pipe()
        # mypy does not know that every context has processes
        self._process: Any = context.Process(target=serve, args=(theirs, job), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Has something done, and gives the answer."""
        with suppress(OSError):
            self._pipe.send((name, *arguments))
        return self.answer()

    def opened(self) -> dict[str, Any]:
        """What the process was before it held anything; waits until it is ready."""
        facts: dict[str, Any] = self.answer()
        self.facts = facts
        return facts

    def answer(self) -> Any:
        """Raises BenchError for a process that refuses, or that is gone."""
        try:
            how, told = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            raise BenchError(
                f"{self.name}: its process ended (exit {code}); if memory was short, ask for a shorter --length"
            ) from None
        if how == "error":
            raise BenchError(f"{self.name}: {told}")
        return told

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


class Table:
    """All rows of one dtype."""

    def __init__(self, options: Options, dtype: str, report: Report) -> None:
        self.options, self.dtype, self.report = options, dtype, report
        methods = multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.context.set_forkserver_preload(["kvsieve.bench.alone"])

    def measure(self, left: dict[str, list[int]]) -> None:
        """Measures the lengths that are left of each name, group by group."""
        waiting = [name for name in left if name != STOCK]
        first = True
        while waiting or (first and left):
            with ExitStack() as processes:
                stock = self._started(STOCK, processes)
                facts = stock.opened()
                each = facts["base_bytes"] or facts["weight_bytes"] + PROCESS
                each += 3 * facts["token_bytes"] * max(self.options.lengths)
                count = max(1, available_bytes() // 2 // each)
                group, waiting = waiting[:count], waiting[count:]
                workers = [stock, *self._group(group, processes)]
                self._lengths(workers, left if first else {name: left[name] for name in group})
            first = False

    def _started(self, name: str, processes: ExitStack) -> Alone:
        options = self.options
        job = Job(name, options.model, DTYPES[self.dtype], max(options.lengths), subject.CHUNK, options.threads)
        worker = Alone(self.context, job)
        processes.callback(worker.close)
        return worker

    def _group(self, names: Sequence[str], processes: ExitStack) -> list[Alone]:
        """Started together, so that they load at the same time. A rival that cannot be had here is left out aloud."""
        started, ready = [self._started(name, processes) for name in names], []
        for worker in started:
            try:
                worker.opened()
            except BenchError as error:
                if worker.name not in RIVALS:
                    raise
                self.report.note(f"{self.dtype}: left out, {error}")
                continue
            ready.append(worker)
        return ready

    def _lengths(self, workers: Sequence[Alone], left: dict[str, list[int]]) -> None:
        facts = {worker.name: worker.facts for worker in workers}
        for length in sorted({length for lengths in left.values() for length in lengths}):
            told = {worker.name: worker("read", length) for worker in workers}
            errors = self._errors(length, told)
            times, read = self._timed(workers)
            for name, mine in told.items():
                if length not in left.get(name, ()):
                    continue
                del mine["logits"]
                self.report.row(
                    dtype=self.dtype,
                    length=length,
                    name=name,
                    **facts[name],
                    **mine,
                    error=errors[name],
                    read_gb_per_s=round(read / 1e9, 3),
                    least_ms=round((facts[name]["weight_bytes"] + mine["bytes_held"]) / read * 1e3, 4),
                    times_as_fast=round(times[STOCK].median / times[name].median, 4),
                    times=timings({"token": times[name]}),
                )

    def _errors(self, length: int, told: dict[str, dict[str, Any]]) -> dict[str, float]:
        """How far the logits of each are off the stock cache's.

        Raises:
            AccuracyError: for what should be exact, and is not.
        """
        logits = {name: torch.tensor(mine["logits"], dtype=torch.float64) for name, mine in told.items()}
        want = logits[STOCK]
        errors = {name: float((got - want).norm() / want.norm()) for name, got in logits.items()}
        for name in EXACT & errors.keys():
            if not errors[name] <= TOLERANCE[self.dtype]:
                what = f"policies {self.dtype} {length}, {name}"
                raise AccuracyError(f"{what}: logits are {errors[name]:.1e} off {STOCK}'s; nothing was timed")
        return errors

    def _timed(self, workers: Sequence[Alone]) -> tuple[dict[str, Timing], float]:
        """The time of a token of each, and bytes a second of reading memory, round by round."""
        bytes_read, yardsticks = readers()
        with steady(self.options.threads) as clock:
            taken: dict[str, list[float]] = {worker.name: [] for worker in workers}
            reading = []
            for number in range(self.options.rounds + 2):
                for worker in workers:
                    seconds = worker("token")
                    # Two tokens that count for nothing: the first ones find cold caches.
                    taken[worker.name] += [seconds] if number > 1 else []
                for run in yardsticks.values():
                    began = clock()
                    run()
                    reading.append(clock() - began)
        found = {name: Timing(statistics.median(t), min(t), max(t), len(t), 1) for name, t in taken.items()}
        return found, bytes_read / statistics.median(reading)


def cells(row: Row) -> list[str]:
    """The row, as it is printed."""
    resident, base = row["resident_bytes"], row["base_bytes"]
    made = [row["dtype"], str(row["length"]), row["name"], spread(row["times"]["token"]), f"{row['times_as_fast']:.2f}"]
    made += [f"{row['bytes_held'] / MIB:.1f}", "" if resident is None else f"{resident / MIB:,.0f}"]
    made += ["" if resident is None or base is None else f"{(resident - base) / MIB:,.1f}"]
    made += [f"{row['read'] / row['read_seconds']:.0f}" if row["read"] else ""]
    return [*made, figure(row["least_ms"] / 1e3), f"{row['error']:.0e}"]
