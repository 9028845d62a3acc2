"""What callers say of tokens by their positions: these are never evicted, those are evicted now.

Positions are numbers of a row's own tokens, pads left out: token ``i`` of ``stream.ids[row]`` has position ``i``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvsieve.checks import check_rows, check_tokens
from kvsieve.errors import RangeError
from kvsieve.runtime.exclusive import exclusive

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["Rows", "coming", "evict", "pin", "unpin"]

Rows = int | Sequence[int] | None
"""One row, several, or all of them."""


@exclusive
def pin(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows stay; see :meth:`kvsieve.Stream.pin`."""
    engine.idle()
    start, stop = check_tokens(start, stop)
    named = check_rows(rows, engine.num_rows)
    for row in range(engine.num_rows) if named is None else named:
        for part in engine.parts:
            part.check_held(row, start, stop)
    engine.pinning.pin(named, start, stop)
    engine.make_room()


@exclusive
def unpin(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows may be evicted again."""
    engine.idle()
    start, stop = check_tokens(start, stop)
    engine.planner.unpin(check_rows(rows, engine.num_rows), start, stop)
    engine.make_room()


@exclusive
def evict(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows are evicted now; see :meth:`kvsieve.Stream.evict`."""
    engine.idle()
    start, stop = check_tokens(start, stop)
    named = check_rows(rows, engine.num_rows)
    each = list(range(engine.num_rows)) if named is None else named
    _check_evictable(engine, start, stop, each)
    engine.candidates.marks.clear()
    for part in engine.parts:
        part.evict_range(each, start, stop)
    engine.make_room()
    engine.blocks.free_unused()


@contextmanager
def coming(engine: Engine, counts: Sequence[int], skip: Sequence[int]) -> Iterator[None]:
    """After ``skip[row]`` others, the next ``counts[row]`` tokens of each row are pinned as they come. Whatever happens inside,
    what came stays pinned, and positions to which no token came are as they were.

    Raises:
        BudgetError: before anything is changed, if the budget cannot hold them.
    """
    engine.idle()
    before = [engine.planner.pins(row) for row in range(len(counts))]
    seen = engine.blocks.seen or [0] * len(counts)
    firsts = [at + past for at, past in zip(seen, skip)]
    ends = [at + count for at, count in zip(firsts, counts)]
    planned = engine.planner.fork()
    for row, (at, end) in enumerate(zip(firsts, ends)):
        if at < end:
            planned.pin([row], at, end, engine.pinning.per_head)
    engine.blocks.planner = planned
    try:
        yield
    finally:
        engine.rollback()
        for row, (first, end, old) in enumerate(zip(firsts, ends, before)):
            now = max(engine.planner.seen(row) if row < engine.num_rows else 0, first)
            if now < end:
                engine.planner.unpin([row], now, end)
                for lo, hi in old:
                    if max(lo, now) < min(hi, end):
                        engine.planner.pin([row], max(lo, now), min(hi, end), True)


def _check_evictable(engine: Engine, start: int, stop: int, rows: Sequence[int]) -> None:
    if not engine.num_rows:
        raise RangeError(f"cannot evict tokens {start} to {stop}: the stream has seen none")
    for row in rows:
        seen = engine.planner.seen(row)
        if stop > seen:
            raise RangeError(f"row {row}: cannot evict tokens {start} to {stop}: the model has read {seen}")
        for part in engine.parts:
            part.check_evict(row, start, stop)
