"""Pinned tokens, which no policy evicts. The planner keeps them; here is what else their life cycle takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvsieve.errors import SessionError
from kvsieve.runtime.part import Apply, Crop, Saved, Setting, StreamPart, unchanged
from kvsieve.runtime.saved import MOST, in_range, listed, of_kind, pair

if TYPE_CHECKING:
    from kvsieve._core import Planner
    from kvsieve.runtime.blocks import Blocks

__all__ = ["Pinning", "Ranges", "num_pinned", "pinned", "with_pinned"]

Ranges = list[tuple[int, int]]
"""Positions ``(start, stop)`` that ascend and do not touch."""


class Pinning(StreamPart):
    """The pinned tokens of each row.

    Attributes:
        per_head: whether each head keeps tokens of its own, among which the planner cannot look for those that are pinned.
    """

    name = "pins"

    def __init__(self, per_head: bool, blocks: Blocks) -> None:
        self.per_head, self._blocks = per_head, blocks

    @classmethod
    def of(cls, setting: Setting) -> Pinning:
        """Every stream has it."""
        return cls(any(memory.roles.evict.per_head for memory in setting.policy.memories), setting.blocks)

    def pins(self) -> list[Ranges]:
        """Of each row the pinned positions; empty before the first token."""
        planner = self._blocks.planner
        return [planner.pins(row) for row in range(planner.num_rows)]

    def pin(self, rows: Sequence[int] | None, start: int, stop: int) -> None:
        """The tokens ``start`` to ``stop - 1`` of these rows stay, those that are still to come among them."""
        self._blocks.apply(self._blocks.planner.pin(None if rows is None else list(rows), start, stop, self.per_head))

    def crop(self, crop: Crop) -> Apply:
        before = self.pins() if crop.keeps_pins else []
        if not any(before):
            return unchanged

        def apply() -> None:
            for row, ranges in enumerate(before):
                if ranges:
                    self._blocks.planner.set_pins(row, ranges, True)

        return apply

    def save(self) -> Saved:
        return Saved({"pins": self.pins(), "early": self._blocks.planner.early()})

    def restore(self, saved: Saved) -> None:
        planner = self._blocks.planner
        for told in saved.get("early", list):
            row, first, last, add = listed(told, 4, "early")
            start, stop = pair([first, last], MOST, "early")
            rows = None if row is None else [in_range(of_kind(row, int, "early"), 0, MOST, "early")]
            if of_kind(add, bool, "early"):
                planner.pin(rows, start, stop, False)
            else:
                planner.unpin(rows, start, stop)
        for row, ranges in enumerate(saved.rows("pins")):
            pairs = [pair(x, MOST, "pins") for x in of_kind(ranges, list, "pins")]
            if any(stop >= start for (_, stop), (start, _) in pairwise(pairs)):
                raise SessionError(f"its 'pins' of row {row} do not ascend, or touch")
            if pairs and len(planner.set_pins(row, pairs, self.per_head)):
                raise SessionError(f"row {row} holds pinned tokens where there can be none")


def num_pinned(planner: Planner) -> int:
    """Pinned tokens of the row that has most, those to come included."""
    rows = range(planner.num_rows)
    return max((sum(stop - start for start, stop in planner.pins(row)) for row in rows), default=0)


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
