"""What each row has chosen to read, and when it chooses anew, by :mod:`kvsieve.backends.reference.definition`.

A choice stands until a stage is due again, or a query comes that does not follow the last one. Several queries of one forward
choose together, by blocks of equal ``position // query_block``, and always anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvsieve.backends.attention import Partial, attend, concatenate
from kvsieve.backends.base import AttendCall, HeadChoice
from kvsieve.backends.reference import select
from kvsieve.backends.reference.definition import (
    Floats,
    Ints,
    Selection,
    bound_scores,
    first_stage,
    group_scores,
    kept,
    region,
    sparse_attend,
)
from kvsieve.backends.rules import implementation
from kvsieve.policy.select import SparseSelection

__all__ = ["Asked", "ReferenceSelection", "RowChoice", "consecutive"]


@dataclass(frozen=True)
class Asked:
    """What a rule chooses from.

    Attributes:
        scores: ``[Hkv, n]``, see :func:`kvsieve.backends.reference.definition.group_scores`; bounds: of blocks, or None.
        lo, hi: the region.
        start: the first stage to compute; inputs: what went into each stage of the choice that stood.
    """

    scores: Floats
    bounds: Floats | None
    lo: int
    hi: int
    start: int
    inputs: tuple[tuple[Ints, ...], ...]


@dataclass(frozen=True)
class Asking:
    """Queries ``[H, m, D]`` and keys ``[Hkv, n, D]`` of a row, once for each purpose.

    Attributes:
        compared: rotated for the selection; content: the same for bounds of blocks, whose keys are as they are stored.
        read: rotated to where the policy places them; not rotated if the call is consecutive.
        dtype: of the layer's keys as they came, and of bounds.
    """

    compared: Partial
    content: Partial
    read: Partial
    dtype: torch.dtype

    def queries(self, mine: slice) -> Asking:
        """The same for some of the queries."""
        compared, content, read = ((q[:, mine], k) for q, k in (self.compared, self.content, self.read))
        return Asking(compared, content, read, self.dtype)


@dataclass(frozen=True)
class RowChoice:
    """One row's choice.

    Attributes:
        found: what was chosen; None before the first choice.
        next: the position of the query that may use it.
        step: steps since the row chose from all.
        since: the position of the query that did, or the last of them.
    """

    found: Selection | None = None
    next: int = 0
    step: int = 0
    since: int = 0


class _OwnDefinition:
    """The definition that a rule of one stage brings along, as one of the files in :mod:`.select`."""

    @staticmethod
    def refresh(rule: SparseSelection) -> tuple[int, ...]:
        return rule.paces

    @staticmethod
    def choose(rule: SparseSelection, asked: Asked) -> Selection:
        lo, hi = asked.lo, asked.hi
        whole = np.array([[lo, hi]] if hi > lo else [], np.int64).reshape(-1, 2)
        heads = [whole] * len(asked.scores) if hi - lo <= rule.num_found else rule.choose(asked.scores, lo, hi)
        none = (0,) * len(heads)
        return Selection(lo, hi, tuple(x[:, 0] for x in heads), tuple(x[:, 1] for x in heads), none, none)


class ReferenceSelection:
    """One layer's choices."""

    def __init__(self, rule: SparseSelection) -> None:
        self.rule: Any = rule
        self._definition: Any = _OwnDefinition if rule.defines_itself else implementation(select, rule)
        self.rows: list[RowChoice] = []
        self.work = (0, 0)
        self._before: list[RowChoice] | None = None

    def begin(self, num_rows: int) -> None:
        """A forward of ``num_rows`` rows begins."""
        self._before, self.work = list(self.rows), (0, 0)
        if len(self.rows) != num_rows:
            self.rows = [RowChoice()] * num_rows

    def undo(self) -> None:
        if self._before is not None:
            self.rows, self._before = self._before, None

    def reset(self) -> None:
        self.rows, self._before = [], None

    def select_rows(self, rows: Sequence[int]) -> None:
        self.rows, self._before = [self.rows[row] for row in rows] if self.rows else [], None

    def state(self) -> Any:
        return list(self.rows)

    def return_to(self, state: Any) -> None:
        self.rows, self._before = list(state), None

    def choice(self, row: int) -> list[HeadChoice]:
        found = self.rows[row].found if row < len(self.rows) else None
        if found is None:
            return []
        heads = zip(found.starts, found.ends, found.reads, found.rounds)
        return [HeadChoice(np.stack([lo, hi], 1), found.hi, reads, rounds) for lo, hi, reads, rounds in heads]

    def attend(self, row: int, asking: Asking, v: torch.Tensor, call: AttendCall) -> Partial:
        """Attention of a row's ``m`` new queries over its ``n`` residents, of which they are the last."""
        pieces, n, m = [], v.shape[1], asking.read[0].shape[1]
        lo = 0
        while lo < m:
            first = n - m + lo
            count = min(m - lo, self.rule.query_block - first % self.rule.query_block)
            positions = list(range(first, first + count))
            mine = asking.queries(slice(lo, lo + count))
            choice = self._choose(self.rows[row], mine, positions)
            assert choice.found is not None
            window = self.rule.window + positions[-1] - choice.since
            visible = kept(choice.found, positions, n, self.rule.sinks, window)
            self.work = self.work[0], self.work[1] + int(visible.sum())
            visible = visible.to(v.device)
            if call.consecutive and call.rope is not None:
                pieces.append(consecutive(*mine.read, v, visible, call))
            else:
                pieces.append(sparse_attend(*mine.read, v, visible, call.scale, call.softcap))
            self.rows[row] = RowChoice(choice.found, first + count, choice.step + 1, choice.since)
            lo += count
        return concatenate(pieces)

    def _choose(self, row: RowChoice, asking: Asking, positions: list[int]) -> RowChoice:
        """The choice for queries at ``positions``: as it stands, or made anew from a stage on."""
        rule, definition = self.rule, self._definition
        most = rule.dense_until - rule.sinks - rule.window
        # A region that was read whole was not searched, and that is no choice to stand by.
        stands = row.found is not None and row.found.hi - row.found.lo > most
        follows = stands and len(positions) == 1 and row.next == positions[0] > 0
        start = first_stage(row.step, definition.refresh(rule)) if follows else 0
        if start is None:
            return row
        whole = start == 0 or row.found is None
        lo, hi = region(positions, rule.sinks, rule.window) if whole else (row.found.lo, row.found.hi)  # type: ignore[union-attr]
        scores = group_scores(*asking.compared, positions, rule.window, rule.query_stride)
        judged = start == 0 and rule.page_bounds and hi - lo > most
        bounds = None
        if judged:
            bounds = bound_scores(*asking.content, positions, rule.window, rule.query_stride, asking.dtype)
        asked = Asked(scores, bounds, lo, hi, start, () if row.found is None else row.found.inputs)
        found: Selection = definition.choose(rule, asked)
        self.work = self.work[0] + sum(found.reads), self.work[1]
        return RowChoice(found, 0, 0, positions[-1]) if whole else RowChoice(found, 0, row.step, row.since)


def consecutive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, call: AttendCall) -> Partial:
    """:func:`sparse_attend` before rotation: what a query reads of a head is numbered ``0, 1, ..``, the query itself last."""
    rope, (kv_heads, count, _) = call.rope, visible.shape
    assert rope is not None
    reads = visible.sum(-1)
    # For each head and query what it reads, in order; behind that, where others read more, tokens that are not seen.
    place = torch.arange(int(reads.max()), device=q.device)
    read, seen = (~visible).byte().sort(dim=-1, stable=True).indices[..., : len(place)], place < reads[..., None]
    keys, values = (x[:, None].expand(-1, count, -1, -1).gather(2, read[..., None].expand(-1, -1, -1, x.shape[2])) for x in (k, v))
    cos, sin = rope.table(place, q.dtype)
    last = reads[:, :, None] - 1
    queries = rope.turn(torch.unflatten(q, 0, (kv_heads, -1)).transpose(1, 2), (cos[last], sin[last]))  # [Hkv, m, group, D]
    group = queries.shape[2]
    out, lse = attend(
        queries.reshape(-1, 1, q.shape[2]),
        rope.turn(keys, (cos, sin)).flatten(0, 1),
        values.masked_fill(~seen[..., None], 0).flatten(0, 1),
        seen.flatten(0, 1).repeat_interleave(group, 0)[:, None],
        call.scale,
        call.softcap,
    )
    out, lse = (x.reshape(kv_heads, count, group, -1).transpose(1, 2).flatten(0, 1) for x in (out, lse))
    return out, lse[..., 0]
