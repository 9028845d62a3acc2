"""What is printed and written: the machine first, then a line for each case as soon as it is measured."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from kvsieve import _core
from kvsieve.bench.measure import Timing, available_bytes, figure
from kvsieve.bench.options import RANDOM, WHOLE, Options, Shape
from kvsieve.errors import AccuracyError
from kvsieve.evals.results import ResultsError, check_writable, read_held, write_json

__all__ = ["Report", "Row", "check", "facts", "known", "middle", "spread", "timings"]

TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "f16": 1e-2}
"""Largest error of an answer relative to float64's, in the Euclidean norm."""

ROUNDING = {"f32": 2.0**-20, "bf16": 2.0**-9, "f16": 2.0**-12}
"""What a right answer may be off for being written down in its dtype, in float32 also for the order in which a processor adds up
(6e-7 was seen where torch's was 5e-7). Below this no answer is better than another."""


def facts(options: Options) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    others = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"kvsieve": _core.__version__, **others, "python": platform.python_version()},
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


Row = Mapping[str, Any]

SAME = ("table", "model", "weights", "compiled", "versions", "cpu", "instruction_set", "threads", "clock", "rounds")
"""Facts that two runs must have in common for their rows to stand in one table."""


def known(report: Report, shape: Shape, dtype: str, length: int, **more: Any) -> bool:
    """Whether the rows of one layer's case are there already; see :meth:`Report.known`."""
    return report.known(heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.dim, dtype=dtype, length=length, **more)


def timings(timed: Mapping[str, Timing]) -> dict[str, Any]:
    """Times by name, for JSON."""
    return {name: time.as_dict() for name, time in timed.items()}


def spread(timed: Row) -> str:
    """A time of a row with its least and most, in milliseconds."""
    median, least, most = (figure(timed[f"{name}_ms"] / 1e3) for name in ("median", "min", "max"))
    return f"{median} ({least}-{most})"


def middle(timed: Row) -> str:
    """The median of a time of a row, in milliseconds."""
    return figure(timed["median_ms"] / 1e3)


class Report:
    """Prints the rows of a table, and keeps the JSON file up to date: a run that is stopped leaves what it measured.

    Raises:
        ResultsError: for a file that cannot be written, and one to go on with that is of something else.
    """

    def __init__(self, options: Options) -> None:
        self._json = options.json
        self._widths: list[int] = []
        self._cells: Callable[[Row], list[str]] = lambda row: []
        self.content: dict[str, Any] = {
            **{"table": options.table, "model": options.model, "weights": options.weights, "compiled": options.compiled},
            **{**facts(options), "rows": [], "skipped": []},
        }
        if options.model == RANDOM and options.table not in WHOLE:
            self.content["model"] = None
        self._held: list[dict[str, Any]] = self._read() if options.resume else []
        if self._json is not None:
            check_writable(self._json)
            if not options.resume:
                self._write()
        found = self.content
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        print(f"{found['cpu']}, {found['instruction_set']}; {versions}")
        threads = "one thread" if options.threads == 1 else f"{options.threads} threads"
        print(f"{threads}, {found['clock']}; milliseconds: median of {options.rounds} rounds (min-max)")

    def _read(self) -> list[dict[str, Any]]:
        assert self._json is not None
        mine = {name: self.content[name] for name in SAME}
        rows = read_held(self._json, mine, lambda held: (held, [dict(row) for row in held["rows"]]))
        return rows or []

    def head(self, cells: Callable[[Row], list[str]], *columns: tuple[str, int]) -> None:
        """Prints the head: name and width of each column; ``cells`` makes those of a row. Numbers stand to the right."""
        self._widths, self._cells = [width for _, width in columns], cells
        self._line([name for name, _ in columns])

    def _line(self, cells: list[str]) -> None:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths)).rstrip(), flush=True)

    def row(self, **content: Any) -> None:
        """One line, and one entry of the JSON."""
        self._line(self._cells(content))
        self.content["rows"].append(content)
        self._write()

    def known(self, **key: Any) -> bool:
        """Whether the file that is gone on with has rows of these values; they are told as if they had been measured now."""
        mine = [row for row in self._held if all(row.get(name) == value for name, value in key.items())]
        for row in mine:
            self._held.remove(row)
            try:
                self._line(self._cells(row))
            except (KeyError, TypeError, ValueError) as error:
                raise ResultsError(f"{self._json} has a row that cannot be read: {error!r}; name another --json") from error
            self.content["rows"].append(row)
        return bool(mine)

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
            # What was not come to yet is kept as well: an interruption loses nothing.
            write_json(self._json, {**self.content, "rows": [*self.content["rows"], *self._held]})


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
