"""Makes the table that was asked for."""

from __future__ import annotations

from importlib import import_module

from kvsieve.bench.options import Options
from kvsieve.bench.report import Report

__all__ = ["run"]


def run(options: Options) -> None:
    """Measures and prints the table.

    Raises:
        AccuracyError: if an answer is further from float64 than it may be; the rows before it stand.
    """
    import_module(f"kvsieve.bench.{options.table}").run(options, Report(options))
