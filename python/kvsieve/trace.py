"""What a stream tells of itself: what it holds, and what a policy that selects read last, in positions of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from kvsieve.errors import StateError
from kvsieve.runtime.bank import Banking
from kvsieve.runtime.compression import Compression
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.stats import HeadTrace, LayerStats, LayerTrace, Stats, StoredBytes

if TYPE_CHECKING:
    from kvsieve.backends.base import HeadChoice
    from kvsieve.policy.select import SparseSelection
    from kvsieve.runtime.engine import Engine

__all__ = ["ranges", "stats", "trace"]

Ints: TypeAlias = "npt.NDArray[np.int64]"


def trace(engine: Engine) -> tuple[LayerTrace, ...]:
    """See :meth:`kvsieve.Stream.trace`."""
    selection, recycling = engine.parts.find(Selection), engine.parts.find(Recycling)
    if selection is None and recycling is None:
        raise StateError(f"{engine.policy!r} reads all that it holds; a trace shows what a selection left out, as of kvsieve.HiP")
    if not engine.num_rows:
        raise StateError("the stream has read nothing yet")
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


def check_head(engine: Engine, layer: int | None, head: int | None) -> None:
    """Refuse a layer or head that the stream does not hold.

    Raises:
        StateError: naming those that there are.
    """
    known = {facts.index: facts.num_kv_heads for facts in engine.facts.layers}
    if layer is None and head is not None:
        raise StateError(f"head {head} of which layer? pass layer= too, one of {sorted(known)}")
    if layer is not None and layer not in known:
        raise StateError(f"the stream holds no layer {layer!r}; its full-attention layers are {sorted(known)}")
    if layer is not None and head is not None and not 0 <= head < known[layer]:
        raise StateError(f"layer {layer} has key-value heads 0 to {known[layer] - 1}, not {head!r}")


def stats(engine: Engine) -> Stats:
    """What a stream has seen and holds."""
    planner, facts, resident, seen = engine.planner, engine.facts, engine.blocks.resident, engine.blocks.seen
    layers = tuple(
        LayerStats(layer.index, resident, engine.stores[layer.index].bytes_held if layer.index in engine.stores else 0)
        for layer in facts.layers
    )
    bank = engine.parts.find(Banking)
    beside = engine.bytes_of_parts - (0 if bank is None else bank.bytes_held)
    held, full = engine.bytes_held, sum(seen) * facts.bytes_per_token + beside
    return Stats(
        seen=max(seen, default=0),
        resident=resident,
        bytes_held=held,
        bytes_full=full,
        ratio=held / full if full else 0.0,
        compressed=max((planner.num_packed(row) for row in range(planner.num_rows)), default=0),
        parts=_stored_bytes(engine),
        backend=engine.backend.name,
        policy=repr(engine.policy),
        stored_keys=engine.stored_keys,
        layers=layers,
    )


def _stored_bytes(engine: Engine) -> StoredBytes:
    held = [store.held() for store in engine.stores.values()]
    keys, values = sum(h.plain_keys for h in held), sum(h.plain_values for h in held)
    if engine.parts.find(Compression) is None:
        return StoredBytes(keys, values, 0, 0, 0, sum(h.bounds for h in held))
    keys, values, tail = sum(h.keys for h in held), sum(h.values for h in held), keys + values
    return StoredBytes(keys, values, sum(h.scales for h in held), sum(h.channels for h in held), tail)
