"""What a stream has seen and holds, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsieve.runtime.bank import Banking
from kvsieve.runtime.compression import Compression
from kvsieve.runtime.value_selection import ValueSelection
from kvsieve.stats import LayerStats, Stats, StoredBytes

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["stats_of"]


def stats_of(engine: Engine) -> Stats:
    """Of one stream."""
    planner, facts, seen = engine.planner, engine.facts, engine.blocks.seen
    bank = engine.parts.find(Banking)
    beside = engine.bytes_of_parts - (0 if bank is None else bank.bytes_held)
    held, full = engine.bytes_held, sum(seen) * facts.bytes_per_token + beside
    return Stats(
        seen=max(seen, default=0),
        resident=engine.blocks.resident,
        bytes_held=held,
        bytes_full=full,
        ratio=held / full if full else 0.0,
        compressed=max((planner.num_packed(row) for row in range(planner.num_rows)), default=0),
        parts=_stored_bytes(engine),
        backend=engine.backend.name,
        policy=repr(engine.policy),
        stored_keys=engine.stored_keys,
        layers=_layers(engine),
        tiers=engine.tier_stats,
    )


def _layers(engine: Engine) -> tuple[LayerStats, ...]:
    values = engine.parts.find(ValueSelection)
    layers = []
    for layer in engine.facts.layers:
        store = engine.stores.get(layer.index)
        mass = None if values is None else values.mass_of(layer.index)
        layers.append(LayerStats(layer.index, engine.blocks.resident, 0 if store is None else store.bytes_held, mass))
    return tuple(layers)


def _stored_bytes(engine: Engine) -> StoredBytes:
    held = [store.held() for store in engine.stores.values()]
    keys, values = sum(h.plain_keys for h in held), sum(h.plain_values for h in held)
    if engine.parts.find(Compression) is None:
        return StoredBytes(keys, values, 0, 0, 0, sum(h.bounds for h in held), engine.bytes_of_summaries)
    keys, values, tail = sum(h.keys for h in held), sum(h.values for h in held), keys + values
    return StoredBytes(keys, values, sum(h.scales for h in held), sum(h.channels for h in held), tail)
