"""What a stream tells of itself: what it holds, and what a policy that selects read last, in positions of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from kvsieve.checks import plain, told
from kvsieve.errors import StateError
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.stats import HeadTrace, LayerTrace

if TYPE_CHECKING:
    from kvsieve.backends.base import HeadChoice
    from kvsieve.policy.select import SparseSelection
    from kvsieve.runtime.engine import Engine

__all__ = ["ranges", "trace"]

Ints: TypeAlias = "npt.NDArray[np.int64]"


def trace(engine: Engine) -> tuple[LayerTrace, ...]:
    """See :meth:`kvsieve.Stream.trace`."""
    selection, recycling, fetching = engine.parts.find(Selection), engine.parts.find(Recycling), engine.parts.find(Fetching)
    if selection is None and recycling is None and fetching is None:
        raise StateError(f"{engine.policy!r} reads all that it holds; a trace shows what a selection left out, as of kvsieve.HiP")
    if not engine.num_rows:
        raise StateError("the stream has read nothing yet")
    if fetching is not None:
        return _fetched(engine, fetching)
    if selection is None:
        assert recycling is not None
        return _recycled(engine, recycling)
    rows = [selection.read_positions(row) for row in range(engine.num_rows)]
    found = []
    for layer in engine.facts.layers:
        search = selection.searches.get(layer.index) if selection.searching else None
        rule = selection.rule_of(layer.index)
        if search is None or rule is None:
            everything = tuple(_everything(positions, layer.num_kv_heads) for positions in rows)
            read = layer.num_kv_heads * sum(len(positions) for positions in rows)
            found.append(LayerTrace(layer.index, True, 0, read, everything))
            continue
        heads = tuple(
            tuple(_head(positions, choice, rule) for choice in search.choice(row)) or _everything(positions, layer.num_kv_heads)
            for row, positions in enumerate(rows)
        )
        found.append(LayerTrace(layer.index, False, *search.work, heads))
    return tuple(found)


def _recycled(engine: Engine, recycling: Recycling) -> tuple[LayerTrace, ...]:
    rows = [engine.planner.positions(0, row) for row in range(engine.num_rows)]
    found = []
    for layer in engine.facts.layers:
        heads, read = [], 0
        sets = recycling.read.get(layer.index, [None] * len(rows))
        for positions, mine in zip(rows, sets):
            count = len(positions)
            if mine is None:
                heads.append(_everything(positions, layer.num_kv_heads))
                read += layer.num_kv_heads * count
                continue
            whole = [mine.read(head, count).numpy() for head in range(layer.num_kv_heads)]
            read += sum(map(len, whole))
            chosen = [at[at < mine.rest] for at in whole]
            heads.append(tuple(HeadTrace(ranges(positions[a]), ranges(positions[b]), 0, 0) for a, b in zip(whole, chosen)))
        found.append(LayerTrace(layer.index, all(mine is None for mine in sets), 0, read, tuple(heads)))
    return tuple(found)


def _fetched(engine: Engine, fetching: Fetching) -> tuple[LayerTrace, ...]:
    found, nothing = [], np.empty((0, 2), np.int64)
    for layer in engine.facts.layers:
        rows, compared, read, dense = [], 0, 0, True
        for last in fetching.read.get(layer.index, [None] * engine.num_rows):
            heads = []
            for head in range(layer.num_kv_heads):
                if last is None:
                    heads.append(HeadTrace(nothing, nothing, 0, 0))
                    continue
                mine, blocks = last.read(head), last.blocks(fetching.rule, head)
                compared, read = compared + last.choice.compared, read + sum(hi - lo for lo, hi in mine)
                dense = dense and len(last.choice.pieces) == 1
                ranges_read = ranges(np.concatenate([np.arange(*span) for span in mine]))
                heads.append(HeadTrace(ranges_read, blocks, last.choice.compared, 1 if last.choice.compared else 0))
            rows.append(tuple(heads))
        found.append(LayerTrace(layer.index, dense, compared, read, tuple(rows)))
    return tuple(found)


def _everything(positions: Ints, heads: int) -> tuple[HeadTrace, ...]:
    return (HeadTrace(ranges(positions), np.empty((0, 2), np.int64), 0, 0),) * heads


def _head(positions: Ints, choice: HeadChoice, rule: SparseSelection) -> HeadTrace:
    count = len(positions)
    start = min(choice.end, max(count - rule.window, 0))
    chosen = np.zeros(count, bool)
    for lo, hi in choice.ranges:
        chosen[lo:hi] = True
    read = chosen.copy()
    read[: min(rule.sinks, start)] = True
    read[start:] = True
    return HeadTrace(ranges(positions[read]), ranges(positions[chosen]), choice.reads, choice.rounds)


def ranges(positions: Ints) -> Ints:
    """Ascending numbers as ranges ``[n, 2]`` of neighbours."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    if not len(positions):
        return np.empty((0, 2), np.int64)
    first, last = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(positions)]]) - 1
    return np.stack([positions[first], positions[last] + 1], 1).astype(np.int64)


def check_head(engine: Engine, layer: int | None, head: int | None) -> tuple[int | None, int | None]:
    """Both as ints; a layer or head that the stream does not hold is refused.

    Raises:
        StateError: naming those that there are.
    """
    known = {facts.index: facts.num_kv_heads for facts in engine.facts.layers}
    if layer is None and head is not None:
        raise StateError(f"head {told(head)} of which layer? pass layer= too, one of {sorted(known)}")
    if layer is None:
        return None, None
    at = plain(layer)
    if isinstance(at, bool) or not isinstance(at, int) or at not in known:
        raise StateError(f"the stream holds no layer {told(layer)}; its full-attention layers are {sorted(known)}")
    number = plain(head)
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < known[at]):
        raise StateError(f"layer {at} has key-value heads 0 to {known[at] - 1}, not {told(head)}")
    return at, number
