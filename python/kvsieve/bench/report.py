"""What is printed and written: the machine first, then a line for each case as soon as it is measured."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib import metadata
from typing import Any

from kvsieve import _core
from kvsieve.bench.measure import Timing, available_bytes
from kvsieve.bench.options import Options
from kvsieve.errors import AccuracyError

__all__ = ["Report", "facts"]

TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "f16": 1e-2}
"""Largest error of an answer relative to float64's, in the Euclidean norm."""

ROUNDING = {"f32": 2.0**-20, "bf16": 2.0**-9, "f16": 2.0**-12}
"""What a right answer may be off for being written down in its dtype, in float32 also for the order in which a processor adds up
(6e-7 was seen where torch's was 5e-7). Below this no answer is better than another."""


def facts(options: Options) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    names = ("kvsieve", "torch", "transformers", "numpy")
    return {
        "versions": {**{name: metadata.version(name) for name in names}, "python": platform.python_version()},
        "cpu": _cpu(),
        "instruction_set": _core.isa(),
        "threads": options.threads,
        "clock": "thread CPU time" if options.threads == 1 else "wall time",
        "rounds": options.rounds,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Report:
    """Prints the rows of a table, and keeps the JSON file up to date: a run that is stopped leaves what it measured."""

    def __init__(self, options: Options) -> None:
        self._json = options.json
        self._widths: list[int] = []
        self.content: dict[str, Any] = {"table": options.table, **facts(options), "rows": [], "skipped": []}
        self._write()
        found = self.content
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        print(f"{found['cpu']}, {found['instruction_set']}; {versions}")
        threads = "one thread" if options.threads == 1 else f"{options.threads} threads"
        print(f"{threads}, {found['clock']}; milliseconds: median of {options.rounds} rounds (min-max)")

    def head(self, *columns: tuple[str, int]) -> None:
        """Prints the head: name and width of each column. Numbers stand to the right."""
        self._widths = [width for _, width in columns]
        self._line([name for name, _ in columns])

    def _line(self, cells: list[str]) -> None:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths)).rstrip(), flush=True)

    def row(self, cells: list[str], **content: Any) -> None:
        """One line, and one entry of the JSON."""
        self._line(cells)
        self.content["rows"].append({k: v.as_dict() if isinstance(v, Timing) else v for k, v in content.items()})
        self._write()

    def skip(self, what: str, need: int) -> bool:
        """Whether ``need`` bytes are more than half of what is free; says so if they are."""
        free = available_bytes()
        if need <= free // 2:
            return False
        print(f"{what}: skipped, it needs {need / 2**30:.1f} GiB and half of what is free is {free / 2**31:.1f} GiB", flush=True)
        self.content["skipped"].append({"what": what, "bytes_needed": need, "bytes_available": free})
        self._write()
        return True

    def note(self, text: str) -> None:
        """A line of text."""
        print(text, flush=True)

    def _write(self) -> None:
        if self._json is not None:
            self._json.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def check(what: str, dtype: str, error: float, torchs: float | None = None) -> float:
    """``error``, if it is within the tolerance of its dtype and not worse than ``torchs``.

    Raises:
        AccuracyError: if it is not. A hair's breadth above torch's, or above what rounding to the dtype costs, is not worse.
    """
    if not error <= TOLERANCE[dtype]:
        raise AccuracyError(f"{what}: the answer is {error:.1e} off float64, it may be {TOLERANCE[dtype]:.0e}; nothing was timed")
    if torchs is not None and math.isfinite(torchs) and not error <= max(1.1 * torchs, ROUNDING[dtype]):
        raise AccuracyError(f"{what}: the answer is {error:.1e} off float64, torch's own {torchs:.1e}; nothing was timed")
    return error
