"""What the benches add to `kvsieve.bench.measure`: results in pytest-benchmark's JSON. Only ratios of one run mean something."""

from __future__ import annotations

from typing import Any

import torch
from kvsieve.bench import measure
from kvsieve.bench.measure import Run


def interleaved(runs: dict[str, Run], rounds: int = 9, *, repeat: bool = True) -> dict[str, float]:
    """Median thread-CPU seconds of each run, measured in turns on one thread."""
    torch.set_num_threads(1)
    return {name: time.median for name, time in measure.interleaved(runs, rounds, repeat=repeat).items()}


def record(benchmark: Any, run: Run, medians: dict[str, float], **facts: Any) -> None:
    """Put ``run`` into the benchmark's JSON, with the interleaved medians (milliseconds) and whatever else was seen beside it."""
    benchmark.extra_info.update({f"{name}_ms": round(value * 1e3, 4) for name, value in medians.items()}, **facts)
    benchmark.pedantic(run, rounds=3, iterations=1)


def read_bandwidth() -> float:
    """Bytes per second that one thread reads from memory, by summing a buffer larger than the caches."""
    moved, yardsticks = measure.readers()
    return moved / min(interleaved(yardsticks, rounds=5).values())
