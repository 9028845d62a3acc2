"""How everything is measured: thread CPU time, turns, medians. Only ratios of one run mean something."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from kvsieve import _core

__all__ = ["CACHE", "Clock", "Ring", "Run", "Timing", "available_bytes", "figure", "interleaved", "quickest", "readers", "steady"]

Run = Callable[[], Any]
Clock = Callable[[], float]
T = TypeVar("T")

CACHE = 192 << 20
"""More than any last-level cache that a process has to itself: buffers that take turns hold at least so many bytes in all."""

ROUND = 2e-3
"""A round repeats its call until it takes at least so many seconds: clocks are not free."""

SLOW = 0.2
"""A call of more seconds is measured in five rounds at most."""


def figure(seconds: float) -> str:
    """Milliseconds to three digits, or whole ones."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, minimum and maximum of ``rounds`` rounds of ``calls`` calls each."""

    median: float
    min: float
    max: float
    rounds: int
    calls: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; times in milliseconds."""
        times = {f"{name}_ms": round(getattr(self, name) * 1e3, 6) for name in ("median", "min", "max")}
        return {**times, "rounds": self.rounds, "calls": self.calls}

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.min)}-{figure(self.max)})"


class Ring(Generic[T]):
    """Copies of the same thing that take turns, so that each is out of the caches when its turn comes again.

    Everything that a row compares takes from one ring: what a call has just read is not what the next one reads.
    """

    def __init__(self, make: Callable[[int], T], bytes_each: int) -> None:
        self.copies = [make(i) for i in range(copies(bytes_each))]
        self._turns = itertools.count()

    def next(self) -> T:
        return self.copies[next(self._turns) % len(self.copies)]


def copies(bytes_each: int) -> int:
    """How many copies of so many bytes it takes to be sure that none of them is still in a cache."""
    return max(1, math.ceil(CACHE / max(bytes_each, 1)))


@contextmanager
def steady(threads: int = 1) -> Iterator[Clock]:
    """torch on ``threads`` threads, this process on one CPU if that is one; everything is put back at the end.

    Gives the clock to measure by: the CPU time of this thread, or the wall's when there are more threads than this.
    """
    before, affinity = torch.get_num_threads(), None
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        affinity = os.sched_getaffinity(0)
        # The first CPU is where interrupts tend to be served.
        os.sched_setaffinity(0, {max(affinity)})
    try:
        yield time.thread_time if threads == 1 else time.perf_counter
    finally:
        torch.set_num_threads(before)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


def interleaved(
    runs: dict[str, Run], rounds: int = 9, *, clock: Clock = time.thread_time, repeat: bool = True
) -> dict[str, Timing]:
    """The time of one call of each run, measured in turns: round by round, one run after the other.

    Args:
        runs: by name. Each is called twice before anything counts.
        rounds: of each run; at most five for calls above 200 ms.
        clock: seconds, from somewhere.
        repeat: whether a round of a short call repeats it; not for calls that change what the next one sees.
    """
    calls, wanted = {}, {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        once = max(clock() - start, 1e-7)
        calls[name] = min(256, math.ceil(ROUND / once)) if repeat else 1
        wanted[name] = min(rounds, 5) if once > SLOW else rounds
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(max(wanted.values())):
        for name, run in runs.items():
            if index < wanted[name]:
                start = clock()
                for _ in range(calls[name]):
                    run()
                times[name].append((clock() - start) / calls[name])
    return {name: Timing(statistics.median(t), min(t), max(t), len(t), calls[name]) for name, t in times.items()}


def quickest(runs: dict[str, Run], clock: Clock, factor: float) -> list[str]:
    """The runs that took at most ``factor`` times as long as the quickest, by the better of two calls. Warm them up before."""
    trial = dict.fromkeys(runs, math.inf)
    for _ in range(2):
        for name, run in runs.items():
            start = clock()
            run()
            trial[name] = min(trial[name], clock() - start)
    return [name for name, took in trial.items() if took <= factor * min(trial.values())]


def readers(tensors: Sequence[torch.Tensor] = ()) -> tuple[int, dict[str, Run]]:
    """Ways to read memory by one thread, to be measured beside what they are the yardstick of; and the bytes they read.

    Reads ``tensors`` (contiguous, of 4 or 2 bytes an element), for how fast memory is depends on where it lies: on the machine of
    the first records 26 or 34 GB/s from one buffer to the next. Without any, 256 MiB of its own.
    """
    theirs = torch.ones(64 << 20)
    ours = [x.detach().reshape(-1).view(torch.float32).numpy() for x in tensors] or [theirs.numpy()]

    def read() -> None:
        for x in ours:
            _core.read(x)

    # Repeated until it is as much as the other, which is more than any cache holds.
    times = -(-theirs.nbytes // sum(x.nbytes for x in ours))
    ours = ours * times
    return sum(x.nbytes for x in ours), {"read": read}


def available_bytes() -> int:
    """Bytes of memory that are free to take, as far as the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        free = found["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        most, taken = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
    except (OSError, ValueError):
        return free
    return min(free, most - taken)
