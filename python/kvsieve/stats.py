"""What a stream tells of itself. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BankStats",
    "HeadTrace",
    "Kept",
    "LayerStats",
    "LayerTrace",
    "NamespaceStats",
    "Stats",
    "StoredBytes",
    "TierStats",
]


@dataclass(frozen=True)
class LayerStats:
    """One full-attention layer.

    Attributes:
        index: the layer's index in the model.
        resident: tokens of the fullest row.
        bytes_held: bytes of keys and values.
        value_mass: the least probability mass that a query head added up in the last forward; None where all values were.
    """

    index: int
    resident: int
    bytes_held: int
    value_mass: float | None = None


@dataclass(frozen=True)
class StoredBytes:
    """The bytes of a stream's keys and values by what they hold; their sum, with those of sliding layers and of a bank, is
    ``bytes_held``.

    Attributes:
        keys, values: compressed tokens; of a policy that compresses nothing, all tokens.
        scales: scales and zero points of codes.
        channels: which channels of keys were kept.
        residual: keys and values that are not compressed yet.
        bounds: what a selection by page bounds knows of blocks.
        summaries: what a selection that fetches blocks knows of them.
    """

    keys: int
    values: int
    scales: int
    channels: int
    residual: int
    bounds: int = 0
    summaries: int = 0


@dataclass(frozen=True)
class TierStats:
    """Blocks in memory and in a file, over all layers, since the stream was opened or reset; forks of it share them.

    Attributes:
        bytes_in_memory: of keys and values in memory.
        bytes_in_file: of the copies that the file holds; copies of blocks that are in memory as well count.
        file_bytes: size of the file.
        hits: blocks that a layer fetched and that were in memory.
        loads: blocks that were read from the file to stay in memory, for a layer to read, or because they were written or moved.
        spills: blocks that were written to the file.
        bytes_read, bytes_written: bytes moved.
    """

    bytes_in_memory: int
    bytes_in_file: int
    file_bytes: int
    hits: int
    loads: int
    spills: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Stats:
    """What a stream has seen and holds.

    Attributes:
        seen: tokens of the row that saw most (pads not counted).
        resident: tokens of the row that holds most.
        bytes_held: bytes of keys and values the allocator holds, for all rows and layers; forks share blocks with their parent.
        bytes_full: bytes a full cache of the same rows would hold.
        ratio: ``bytes_held / bytes_full``; 0 before the first token.
        compressed: compressed tokens of the row that has most.
        parts: the bytes by what they hold.
        backend: name of the backend.
        policy: the policy, as text.
        stored_keys: how keys are stored, ``"post_rope"`` (as the model rotated them) or ``"pre_rope"``.
        layers: one entry per full-attention layer.
        tiers: blocks in memory and in a file; None for a policy that holds all in memory.
    """

    seen: int
    resident: int
    bytes_held: int
    bytes_full: int
    ratio: float
    compressed: int
    parts: StoredBytes
    backend: str
    policy: str
    stored_keys: str
    layers: tuple[LayerStats, ...]
    tiers: TierStats | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """The resident tokens of one row, in text order.

    Attributes:
        positions: int64 ``[n]``, numbers of the tokens in their sequence (pads not counted).
        scores: float32 ``[n]``; nan where the policy has no score.
    """

    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeadTrace:
    """What one key-value head of one row read last.

    Attributes:
        read: int64 ``[n, 2]``, ranges ``lo..hi`` of token positions that the newest query read, ascending; pads do not count.
        found: int64 ``[n, 2]``, what was selected between sinks and window, as it was then: the window may have moved on since.
        scored: representative keys that its last selection compared; 0 where it was not needed.
        rounds: levels of that selection's tree, or its stages.
    """

    read: npt.NDArray[np.int64]
    found: npt.NDArray[np.int64]
    scored: int
    rounds: int


@dataclass(frozen=True)
class LayerTrace:
    """What one full-attention layer read last.

    Attributes:
        index: the layer's index in the model.
        dense: whether it read everything.
        scored: keys compared in the last forward, over all rows, queries and key-value heads.
        read: keys attended to, likewise; of a dense layer, by the newest query of each row. Where blocks are fetched, both are
            of the newest queries alone, which share a choice.
        rows: for each row its key-value heads.
    """

    index: int
    dense: bool
    scored: int
    read: int
    rows: tuple[tuple[HeadTrace, ...], ...]


@dataclass(frozen=True)
class NamespaceStats:
    """What one namespace of a bank holds.

    Attributes:
        tokens: tokens held, those of an unfinished chunk among them.
        chunks: whole chunks, which can be found.
        pending: tokens of the chunk that is being filled.
        first: the number of the oldest token held; those before it are gone. Numbers never change.
        written: tokens ever written; the number of the next one.
    """

    tokens: int
    chunks: int
    pending: int
    first: int
    written: int


@dataclass(frozen=True)
class BankStats:
    """What a bank holds.

    Attributes:
        tokens: of all namespaces.
        capacity: most tokens of a namespace.
        bytes_held: bytes of keys, values and mean keys in host memory, for all layers and namespaces.
        namespaces: by name, those that hold something.
    """

    tokens: int
    capacity: int
    bytes_held: int
    namespaces: dict[str, NamespaceStats]
