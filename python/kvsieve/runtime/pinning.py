"""What callers say of tokens by their positions: these are never evicted, those are evicted now.

Positions are numbers of a row's own tokens, pads left out: token ``i`` of ``stream.ids[row]`` has position ``i``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvsieve.errors import RangeError, UnsupportedError

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["Rows", "coming", "evict", "keep_pins", "most", "pin", "pinned", "pins", "unpin", "with_pinned"]

Rows = int | Sequence[int] | None
"""One row, several, or all of them."""

Ranges = list[tuple[int, int]]

LARGEST = 2**53
"""Positions beyond this are not exact in the arithmetic of distances."""


def pins(engine: Engine) -> list[Ranges]:
    """Of each row the pinned positions, as ranges ``(start, stop)`` that ascend and do not touch; empty before the first token."""
    return [engine.planner.pins(row) for row in range(engine.num_rows)]


def most(engine: Engine) -> int:
    """Pinned tokens of the row that has most, those to come included."""
    return max((sum(stop - start for start, stop in ranges) for ranges in pins(engine)), default=0)


def pin(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows stay; see :meth:`kvsieve.Stream.pin`."""
    engine.idle()
    _check_range(start, stop)
    named = _rows(engine, rows)
    if engine.observer is not None:
        for row in range(engine.num_rows) if named is None else named:
            engine.observer.check_held(engine.planner, row, start, stop)
    engine._apply(engine.planner.pin(named, start, stop, engine.observer is not None))
    _settle(engine)


def unpin(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows may be evicted again."""
    engine.idle()
    _check_range(start, stop)
    engine.planner.unpin(_rows(engine, rows), start, stop)
    _settle(engine)


def evict(engine: Engine, start: int, stop: int, rows: Rows = None) -> None:
    """The tokens at positions ``start`` to ``stop - 1`` of these rows are evicted now; see :meth:`kvsieve.Stream.evict`."""
    engine.idle()
    _check_range(start, stop)
    named = _rows(engine, rows)
    each = list(range(engine.num_rows)) if named is None else named
    _check_evictable(engine, start, stop, each)
    # What a search chose names residents by number.
    if engine.search is not None:
        engine._read = [engine.planner.positions(0, row).copy() for row in range(engine.num_rows)]
        for search in engine.searches.values():
            search.reset()
    engine._marks.clear()
    # A crop to before this moment would have to bring them back.
    engine.evicted_at = engine.evicted_at or [0] * engine.num_rows
    for row in each:
        engine.evicted_at[row] = engine.planner.seen(row)
    if engine.observer is None:
        engine._apply(engine.planner.evict(named, start, stop))
    else:
        for row in each:
            engine.observer.evict(engine.planner, engine.stores, row, start, stop)
    _settle(engine)
    engine.free_unused()


@contextmanager
def coming(engine: Engine, counts: Sequence[int], skip: Sequence[int]) -> Iterator[None]:
    """After ``skip[row]`` others, the next ``counts[row]`` tokens of each row are pinned as they come. Whatever happens inside,
    what came stays pinned, and positions to which no token came are as they were.

    Raises:
        BudgetError: before anything is changed, if the budget cannot hold them.
    """
    engine.idle()
    before = [engine.planner.pins(row) for row in range(len(counts))]
    seen = [engine.planner.seen(row) if engine.num_rows else 0 for row in range(len(counts))]
    firsts = [at + past for at, past in zip(seen, skip)]
    ends = [at + count for at, count in zip(firsts, counts)]
    per_head = engine.observer is not None
    planned = engine.planner.fork()
    for row, (at, end) in enumerate(zip(firsts, ends)):
        if at < end:
            planned.pin([row], at, end, per_head)
    engine.planner = planned
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


@contextmanager
def keep_pins(engine: Engine, keep: bool = True) -> Iterator[None]:
    """What is pinned stays pinned, if ``keep``, when tokens are forgotten that were never part of the conversation: candidates
    that were rejected, and what a row was fed after it had stopped."""
    before = pins(engine) if keep else []
    yield
    for row, ranges in enumerate(before):
        if ranges:
            engine.planner.set_pins(row, ranges, True)


def pinned(ranges: Ranges, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of ``positions`` (int64 ``[n]``) lie in ``ranges``: bool ``[n]``."""
    found = np.zeros(len(positions), np.bool_)
    for start, stop in ranges:
        found |= (positions >= start) & (positions < stop)
    return found


def with_pinned(kept: list[int], must: set[int], stays: npt.NDArray[np.bool_], budget: int) -> list[int]:
    """What a rule kept and what is pinned (``stays``), at most ``budget`` residents: the oldest that need not stay make room."""
    whole = sorted({*kept, *np.flatnonzero(stays).tolist()})
    over = len(whole) - budget
    others = [i for i in whole if i not in must and not stays[i]] if over > 0 else []
    gone = set(others[: max(over, 0)])
    return [i for i in whole if i not in gone]


def _settle(engine: Engine) -> None:
    if engine.num_rows and not engine.recording:
        engine.settle(force=False)


def _check_range(start: int, stop: int) -> None:
    for name, value in (("start", start), ("stop", stop)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise RangeError(f"{name} must be the number of a token, an int, got {value!r}")
        if not 0 <= value <= LARGEST:
            raise RangeError(f"{name} must be a number of tokens from 0 to {LARGEST}, got {value}")
    if start >= stop:
        raise RangeError(f"tokens {start} to {stop} are none: start must lie before stop")


def _rows(engine: Engine, rows: Rows) -> list[int] | None:
    if rows is None:
        return None
    named = [rows] if isinstance(rows, int) else list(rows)
    for row in named:
        if isinstance(row, bool) or not isinstance(row, int) or row < 0 or (engine.num_rows and row >= engine.num_rows):
            raise RangeError(f"the stream holds rows 0 to {engine.num_rows - 1}, not {row!r}")
    if not named:
        raise RangeError("rows must name at least one row, or be None for all of them")
    return sorted(set(named))


def _check_evictable(engine: Engine, start: int, stop: int, rows: Sequence[int]) -> None:
    if not engine.num_rows:
        raise RangeError(f"cannot evict tokens {start} to {stop}: the stream has seen none")
    if engine.search is not None and engine.search.page_bounds:
        raise UnsupportedError(
            f"{engine.policy!r} judges whole blocks of an unbroken text by bounds of their keys, so no tokens can be taken out of "
            "it; go back to a mark taken before these tokens"
        )
    widest = max(engine.sliding.windows.values(), default=1)
    for row in rows:
        seen = engine.planner.seen(row)
        if stop > seen:
            raise RangeError(f"row {row}: cannot evict tokens {start} to {stop}: the model has read {seen}")
        if stop > seen - widest + 1:
            raise UnsupportedError(
                f"row {row}: tokens {max(start, seen - widest + 1)} to {stop} are still within the window of {widest} tokens of "
                "the model's sliding layers, which would go on seeing them; evict them once the window has moved on, or go back to "
                "a mark taken before them"
            )
