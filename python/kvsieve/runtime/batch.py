"""New tokens of several rows as one batch, padded on the left, and where a stream is with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["Batch", "positions_of"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of several rows, pads first.

    Attributes:
        ids: int64 ``[B, n]``.
        mask: int64 ``[B, n]``, 0 for pads.
        counts: real tokens of each row.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor], pad: int = 0) -> Batch:
        """Rows ``[n_i]`` side by side, padded on the left with ``pad``."""
        width = max(len(row) for row in rows)
        ids, mask = rows[0].new_full((len(rows), width), pad), rows[0].new_zeros(len(rows), width)
        for at, row in enumerate(rows):
            ids[at, width - len(row) :], mask[at, width - len(row) :] = row, 1
        return cls(ids, mask, [len(row) for row in rows])

    @property
    def width(self) -> int:
        """Columns."""
        return self.ids.shape[1]

    def positions(self, totals: Sequence[int], offsets: Sequence[int]) -> torch.Tensor:
        """The position of each column, int64 ``[B, n]``, of rows that hold ``totals`` tokens when these are read. Offsets may be
        negative; no position is."""
        last = torch.tensor(totals, device=self.ids.device)[:, None]
        at = last - self.width + torch.arange(self.width, device=self.ids.device)
        return (at.clamp(min=0) + torch.tensor(offsets, device=self.ids.device)[:, None]).clamp(min=0)


def positions_of(engine: Engine, batch: Batch, given: Batch | None = None) -> torch.Tensor:
    """The position of each column, int64 ``[B, n]``, of what the model is given: ``batch``, or the whole conversation with it."""
    seen = engine.transcript.seen() or [0] * len(batch.counts)
    totals = [old + new for old, new in zip(seen, batch.counts)]
    return (given or batch).positions(totals, engine.positions.of_rows(len(totals)))
