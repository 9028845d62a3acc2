"""What a prefill reads of one part of its step: made once, used by all layers of the step, on any backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.runs import Columns

if TYPE_CHECKING:
    from kvsieve._core import Part
    from kvsieve.facts import LayerRope

__all__ = ["BAND", "PrefillPlan"]

BAND = 128
"""Queries that share one band of keys."""

Table = tuple[torch.Tensor, torch.Tensor]


@dataclass
class PrefillPlan:
    """A part of a step, in the form that prefill wants; shared by all layers of the step."""

    part: Part
    runs: Columns
    num_old: int
    num_queries: int
    tables: dict[int, tuple[Table, Table] | None] = field(default_factory=dict)
    bands: list[tuple[slice, slice, torch.Tensor | None]] | None = None
    visible: torch.Tensor | None = None
    edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    @classmethod
    def of(cls, part: Part, num_queries: int) -> PrefillPlan:
        runs = part.runs()
        return cls(part, runs, int((runs[2] - runs[1]).sum()), num_queries)

    def rotation(self, rope: LayerRope | None, frame: str) -> tuple[Table, Table] | None:
        """Tables for queries and keys, or None if nothing rotates."""
        if rope is None:
            return None
        if id(rope) not in self.tables:
            self.tables[id(rope)] = self._rotation(rope, frame)
        return self.tables[id(rope)]

    def positions(self, frame: str) -> Table | None:
        """Where to rotate queries and keys to, int64, from where they are; None if nothing rotates."""
        part = self.part
        q_at, k_at = torch.from_numpy(part.query_positions()), torch.from_numpy(part.key_positions())
        if part.fixed is not None:
            q_at, k_at = torch.full_like(q_at, part.fixed), torch.zeros_like(k_at)
        elif frame == "post_rope":
            q_at, k_at = q_at - torch.from_numpy(part.query_true()), k_at - torch.from_numpy(part.key_true())
            if not q_at.any() and not k_at.any():
                return None
        return q_at, k_at

    def _rotation(self, rope: LayerRope, frame: str) -> tuple[Table, Table] | None:
        at = self.positions(frame)
        if at is None:
            return None
        scaled = frame == "pre_rope"
        return rope.table(at[0], torch.float32, factor=scaled), rope.table(at[1], torch.float32, factor=scaled)

    def band_list(self) -> list[tuple[slice, slice, torch.Tensor | None]]:
        """(queries, keys, bias) so that every query meets each key it sees in exactly one band."""
        if self.bands is None:
            q_at, k_at = torch.from_numpy(self.part.query_true()), torch.from_numpy(self.part.key_true())
            near = self.part.near
            self.bands = []
            for lo in range(0, self.num_queries, BAND):
                queries = q_at[lo : lo + BAND]
                first = 0 if near is None else int(torch.searchsorted(k_at, queries[0] - near, right=True))
                last = int(torch.searchsorted(k_at, queries[-1], right=True))
                distance = queries[:, None] - k_at[None, first:last]
                hidden = distance < 0
                if near is not None:
                    hidden |= distance >= near
                bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf) if bool(hidden.any()) else None
                self.bands.append((slice(lo, lo + len(queries)), slice(first, last), bias))
        return self.bands

    def seen_by(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each key, int64 ``[keys]``: the first query that sees it, and the first after that one that does not."""
        if self.edges is None:
            part = self.part
            q_at, k_at = part.query_true(), part.key_true()
            first = np.searchsorted(q_at, k_at + max(part.far, 0))
            last = np.full_like(first, self.num_queries) if part.near is None else np.searchsorted(q_at, k_at + part.near)
            self.edges = first, np.maximum(first, last)
        return self.edges
