"""Measurements a user can repeat: what the kernels take here, beside what torch takes and what the memory allows.

A table a file: ``attend`` (one layer, one query), ``search`` (the same, over a selection), ``prefill`` (one layer, a chunk of
queries), ``decode`` (whole tokens), ``policies`` (whole tokens and memory against length, every policy in its own process).
All of them keep to the same rules:

* nothing is timed before its answer was compared with float64 (:class:`~kvsieve.errors.AccuracyError` otherwise);
* one pinned thread, and the time of that thread alone, so that other work on the machine counts little;
* buffers take turns over more than 192 MiB, so that nothing is answered from the last-level cache;
* the ways that a row compares take turns too, and so does reading memory: a row's ratios come from the same moments.
"""

from __future__ import annotations

from kvsieve.bench.options import DTYPES, TABLES, Options, Shape

__all__ = ["DTYPES", "TABLES", "Options", "Shape"]
