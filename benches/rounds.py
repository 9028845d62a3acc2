"""How the benches measure: thread CPU time, interleaved rounds, medians. Only ratios of one run mean something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def interleaved(runs: dict[str, Run], rounds: int = 9, warmup: int = 2) -> dict[str, float]:
    """Median thread-CPU seconds of each run, measured in turns on one thread."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + warmup):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if index >= warmup:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def record(benchmark: Any, run: Run, medians: dict[str, float], **facts: Any) -> None:
    """Put ``run`` into the benchmark's JSON, with the interleaved medians (milliseconds) and whatever else was seen beside it."""
    benchmark.extra_info.update({f"{name}_ms": round(value * 1e3, 4) for name, value in medians.items()}, **facts)
    benchmark.pedantic(run, rounds=3, iterations=1)


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second that one thread reads from memory, by summing a buffer larger than the caches."""
    buffer = torch.ones(megabytes << 18)
    return buffer.nbytes / interleaved({"sum": buffer.sum}, rounds=5)["sum"]
