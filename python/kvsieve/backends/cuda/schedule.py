"""When the rows of a layer select again, and which queries share what they find: integers, decided on the host.

Nothing here knows what was found. A choice lies on the device, in a *slot* for each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvsieve.backends.cuda.ops.residents import QUERY_COLUMNS
from kvsieve.backends.cuda.staged import StagedRule

__all__ = ["Choosing", "Schedule"]

NO_STAGE = 1 << 20
"""Beyond every stage: the choice stands."""


class Choosing(NamedTuple):
    """A row's choice, but for what lies on the device.

    Attributes:
        next: the position that its next query must have, or it chooses anew.
        step: steps since it chose from all.
        lo, hi: the region.
        start: the first stage of its last selection.
        searched: whether it has slots; False where the region is read whole.
    """

    next: int
    step: int
    lo: int
    hi: int
    start: int
    searched: bool


class Schedule:
    """Who selects in a step, and what each query reads: for one rule and one state of the rows, whichever layers share them.

    Slots are *symbols* here: first those that the rows come with (``row * stages + stage``), then those that the step needs.

    Args:
        known: what each row comes with; first: its first new position; lens: its new tokens, the last ones of ``columns``.
    """

    def __init__(
        self, rule: StagedRule, known: Sequence[Choosing | None], first: Sequence[int], lens: Sequence[int], columns: int
    ) -> None:
        self.rule = rule
        self.at = np.full((len(lens) * columns, 2), -1, np.int32)
        """Of each query its block of queries and its number there; -1 for a pad."""
        self.most_queries = self.longest = 0
        """Queries of a block; keys that a query reads. At most."""
        self.candidates = [0] * rule.stages
        """Of each stage: pieces to choose from, at most; 0 where nobody computes it."""
        self.after: list[tuple[Choosing, list[int]] | None] = []
        """What each row has afterwards, and the symbols of its slots; None where that is what it came with."""
        self._first_new = len(known) * rule.stages
        self._stage_of: list[int] = []
        self._rows: list[tuple[int, ...]] = []
        for row, (facts, begin, count) in enumerate(zip(known, first, lens)):
            self.after.append(self._row(row, facts, begin, count, columns))
        self._table = np.zeros((len(self._rows), QUERY_COLUMNS), np.int32)
        self._table[:, 7:] = -1
        self._symbols = np.array([row[7:] for row in self._rows], np.int64).reshape(-1, rule.stages)
        if self._rows:
            self._table[:, :7] = [row[:7] for row in self._rows]

        last = {symbol for after in self.after if after is not None for symbol in after[1]}
        self.kept: list[tuple[int, int]] = []
        """Symbol and stage of new slots that a row refers to afterwards."""
        self.spares = [0] * rule.stages
        """New slots of each stage that only this step needs."""
        self._places = np.full(self._first_new + len(self._stage_of) + 1, -1, np.int32)  # the last one is symbol -1
        for symbol, stage in enumerate(self._stage_of, self._first_new):
            if symbol in last:
                self.kept.append((symbol, stage))
            else:
                self._places[symbol] = 2 * self.spares[stage] + 1
                self.spares[stage] += 1

    def _row(self, row: int, facts: Choosing | None, first: int, count: int, columns: int) -> tuple[Choosing, list[int]] | None:
        """One row's blocks of queries, one after another."""
        rule, done = self.rule, 0
        symbols = [row * rule.stages + stage for stage in range(rule.stages)] if facts is not None and facts.searched else []
        while done < count:
            at, column = first + done, columns - count + done
            size = min(count - done, rule.query_block - at % rule.query_block)
            start: int | None = 0
            # A region that was read whole was not searched, and that is no choice to stand by.
            if size == 1 and at > 0 and facts is not None and facts.next == at and facts.hi - facts.lo > rule.budget:
                start = rule.due(facts.step)
            if start == 0 or facts is None:
                lo, hi = rule.region(at, size)
                facts = Choosing(at, 0, lo, hi, 0, not rule.whole(lo, hi))
            if start is not None:
                symbols = symbols[:start] + self._new(start, facts) if facts.searched else []
                facts = facts._replace(start=start)
            self.at[row * columns + column : row * columns + column + size, 0] = len(self._rows)
            self.at[row * columns + column : row * columns + column + size, 1] = range(size)
            due = NO_STAGE if start is None or not facts.searched else start
            self._rows.append((row, column, size, at, facts.lo, facts.hi, due, *(symbols or [-1] * rule.stages)))
            self._reads(facts, at, size)
            facts = facts._replace(next=at + size, step=facts.step + 1)
            done += size
        return None if facts is None or not count else (facts, symbols)

    def _new(self, start: int, facts: Choosing) -> list[int]:
        """Symbols of what the stages from ``start`` on are to choose."""
        rule, first = self.rule, self._first_new + len(self._stage_of)
        for stage in range(start, rule.stages):
            if stage == 0:
                pieces = -(-(facts.hi - facts.lo) // rule.chunks[0])
            else:
                pieces = rule.most[stage - 1] * (rule.chunks[stage - 1] // rule.chunks[stage])
            self.candidates[stage] = max(self.candidates[stage], pieces)
            self._stage_of.append(stage)
        return list(range(first, self._first_new + len(self._stage_of)))

    def _reads(self, facts: Choosing, first: int, size: int) -> None:
        rule, longest = self.rule, first + size
        if facts.searched:
            start = min(facts.hi, max(0, first + 1 - rule.window))
            longest = min(longest, rule.sinks + rule.most[-1] * rule.chunks[-1] + first + size - start)
        self.longest, self.most_queries = max(self.longest, longest), max(self.most_queries, size)

    @property
    def num_blocks(self) -> int:
        """Blocks of queries."""
        return len(self._rows)

    def table(self, slots: Mapping[int, int]) -> npt.NDArray[np.int32]:
        """The blocks of queries, see ``QueryBlock`` in residents.cuh.

        ``slots`` are the numbers of symbols that outlive the step: those that rows come with, and :attr:`kept`.
        """
        places = self._places.copy()
        places[list(slots)] = 2 * np.fromiter(slots.values(), np.int32, len(slots))
        table = self._table.copy()
        table[:, 8 : 8 + self.rule.stages] = places[self._symbols]
        return table
