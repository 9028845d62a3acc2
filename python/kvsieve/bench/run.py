"""Makes the table that was asked for."""

from __future__ import annotations

import sys
from importlib import import_module

import torch

import kvsieve
from kvsieve.bench import subject
from kvsieve.bench.options import DTYPES, RANDOM, Options
from kvsieve.bench.report import Report
from kvsieve.evals.results import check_writable, interrupted

__all__ = ["run"]


def run(options: Options) -> None:
    """Measures and prints the table, and draws it where that is asked for.

    Raises:
        AccuracyError: if an answer is further from float64 than it may be; the rows before it stand.
        ResultsError: for a file that cannot be written, or gone on with.
        KvsieveError: for a model that cannot be read, and others.
    """
    if options.plot is not None:
        from kvsieve.view.lengths import need_matplotlib

        need_matplotlib()
        check_writable(options.plot)
    if options.table == "policies":
        for text in options.policies:
            kvsieve.methods.parse(text)
    if options.model != RANDOM:
        # What cannot be read is said before a file of results is replaced.
        subject.load(options.model, getattr(torch, DTYPES[options.dtypes[0]]), options.weights)
    report = Report(options)
    try:
        import_module(f"kvsieve.bench.{options.table}").run(options, report)
    except KeyboardInterrupt:
        print(f"kvsieve: {interrupted(len(report.content['rows']), 'rows', options.json)}", file=sys.stderr)
        raise
    if options.plot is not None:
        from kvsieve.bench.picture import draw

        draw(report.content, options.plot)
