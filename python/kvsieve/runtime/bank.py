"""A bank at the end of a policy: what the policy evicts goes there, and queries read what they find there.

    begin     each row takes what its namespace holds; a new text begins a new chunk
    attend    the store's own attention, with its log-sum-exp; what was found is joined to it (:mod:`kvsieve.backends.recall`)
    evict     the planner as it is before
    evicted   what it held then and does not hold now: read from the stores, where a fork of the planner keeps it, and appended

What a row recalls is a value (:class:`kvsieve.bank.entries.Entries`), so marks, candidates, beams and forks go on as the original
would. The stream that was opened with the bank *leads*: what its rows hold is what the bank holds. Its forks keep what they evict
to themselves. Of rows that were one row the first one leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.recall import joined, recall, table_of
from kvsieve.bank.entries import Entries, Shape
from kvsieve.errors import CacheMismatchError, StateError, UnsupportedError
from kvsieve.policy.compose import Banked
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.part import Apply, Crop, Forward, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.pinning import num_pinned
from kvsieve.runtime.saved import in_range, of_kind

if TYPE_CHECKING:
    from kvsieve._core import Planner
    from kvsieve.backends.base import Runs
    from kvsieve.facts import LayerRope
    from kvsieve.policy.bank import BankRule

__all__ = ["Banking", "RowState"]


@dataclass(frozen=True, eq=False)
class RowState:
    """What one row recalls.

    Attributes:
        name: its namespace.
        entries: what it holds for this row.
        left_at: tokens that the row had seen when some of its own last went there; 0 before.
        newest: the last position that did; -1 before.
    """

    name: str
    entries: Entries
    left_at: int = 0
    newest: int = -1


class BankState(NamedTuple):
    """What it takes to return to a moment: what each row recalls, and before the first token what the bank holds."""

    rows: tuple[RowState, ...]
    held: dict[str, Entries]


class Banking(StreamPart):
    """What the rows of a stream recall from a bank.

    Attributes:
        rule: the bank.
        distance: at which its tokens are seen.
        rows: of each row; empty before the first forward.
        leads: whether the bank holds what the rows do.
    """

    name = "bank"
    stores_all = True

    def __init__(self, rule: BankRule, distance: int, most: int | None, setting: Setting) -> None:
        self.rule, self.distance, self._blocks = rule, distance, setting.blocks
        self._most, self._book = most, rule.book
        self.rows: list[RowState] = []
        self.leads = False
        shape = self._book.shape
        self._layers = frozenset(x.index for x in shape.layers) if shape else frozenset[int]()
        self._new: list[RowState] = []
        self._tables: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._before: Planner | None = None

    @classmethod
    def of(cls, setting: Setting) -> Banking | None:
        """None without a bank."""
        policy = setting.policy
        if not isinstance(policy, Banked):
            return None
        bytes_per_token = setting.facts.bytes_per_token
        budgets = [spec.evict.budget or spec.evict.sinks + spec.evict.window for spec in policy.specs(bytes_per_token)]
        evicts = all(memory.roles.evict.evicts for memory in policy.memories) and not policy.bank.read_only
        return cls(policy.bank, policy.distance(bytes_per_token), sum(budgets) if evicts else None, setting)

    def lead(self, shape: Shape) -> None:
        """The bank belongs to the stream's model, and holds from now on what this stream's rows do.

        Raises:
            StateError: if another stream writes one of the namespaces.
        """
        self._layers = frozenset(layer.index for layer in shape.layers)
        if not self.rule.read_only:
            self._book.lead(self.rule.names, self)
        self.leads = not self.rule.read_only

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        """Every row takes what its namespace holds.

        Raises:
            CacheMismatchError: if there are other rows than namespaces.
        """
        self._new = []
        if not self.rows:
            held = [self._book.entries(name) for name in self._names(forward)]
            begun = [entries if self.rule.read_only else entries.flush() for entries in held]
            self._new = [RowState(name, entries) for name, entries in zip(self._names(forward), begun)]

    def _names(self, forward: Forward) -> tuple[str, ...]:
        names, count, ids = self.rule.names, len(forward.lens), forward.ids
        if len(names) == count:
            return names
        if len(names) == 1 and ids is not None and bool((ids == ids[:1]).all()) and len(set(forward.lens)) == 1:
            return names * count  # beams, or several answers: one text
        raise CacheMismatchError(
            f"the batch has {count} rows, and the bank was given {len(names)} namespaces; rows of different texts must not read "
            "each other's entries: name one for each, bank.namespace(['ann', 'bob'])"
        )

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        rows, store, step, q = self.rows or self._new, layer.store, layer.forward.step, layer.q
        if store is None or step is None or layer.index not in self._layers or self.rule.bias == -torch.inf:
            return None
        if self.rule.reads == "answers" and not layer.forward.answered:
            return None
        found = [row for row, count in enumerate(layer.forward.lens) if count and rows[row].entries.num_chunks]
        if not found:
            return None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        new = {row: slice(q.shape[2] - layer.forward.lens[row], None) for row in found}
        # A GPU is waited for here, before it is given more to do: it attends while the bank is searched.
        asks = {row: q[row, :, new[row]].detach().to("cpu", wide) for row in found}
        out, lse = store.run_with_lse(q, layer.k, layer.v, step, layer.call)
        for row, asked in asks.items():
            if layer.call.rope is not None:
                asked = layer.call.rope.turn(asked, self._table(layer.index, layer.call.rope, wide))
            count = self.rule.top_k // self.rule.chunk
            entries, first = rows[row].entries, layer.forward.seen[row]
            answer = recall(asked, entries, layer.index, first, count, layer.call, self.rule.per_head)
            there = (answer[0].to(out.device), answer[1].to(out.device))
            own, total = out[row, new[row]].to(wide), lse[row, :, new[row]].to(wide)
            out[row, new[row]] = joined(own, total, there, self.rule.bias).to(out.dtype)
        return out

    def _table(self, layer: int, rope: LayerRope, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if (layer, dtype) not in self._tables:
            self._tables[layer, dtype] = table_of(rope, self.distance, dtype)
        return self._tables[layer, dtype]

    def commit(self, forward: Forward) -> Apply:
        rows = self.rows or self._new

        def apply() -> None:
            self.rows = rows
            self.rollback()

        return apply

    def rollback(self) -> None:
        self._new, self._before = [], None

    def must_step(self, width: int, has_prompt: bool) -> bool:
        """What a candidate finds depends on its own query alone, and on what went to the bank before."""
        found = any(state.entries.num_chunks for state in self.rows)
        return found or (self._most is not None and self._blocks.resident + width > self._most)

    # ---------------------------------------------------------------------------------------------------------------- evicting

    def evict(self, force: bool, turn_ended: bool) -> None:
        planner = self._blocks.planner
        # With pinned tokens to come, a window evicts before it is full.
        full = self._most is not None and bool(self.rows) and (self._blocks.resident > self._most or num_pinned(planner) > 0)
        self._before = planner.fork() if full else None

    def evicted(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            with self._blocks.all_layers("filling the bank"):
                now, rows = self._blocks.planner, range(before.num_rows)
                self.rows = [self._with(row, before, *_gone(before, now, row)) for row in rows]
                self._publish()

    def _with(self, row: int, planner: Planner, positions: npt.NDArray[np.int64], runs: Runs) -> RowState:
        """A row's state once the tokens at ``positions``, ascending, in the slots ``runs``, have gone to the bank."""
        state = self.rows[row]
        if not len(positions):
            return state
        read = {index: self._blocks.stores[index].read(runs) for index in self._layers}
        keys, values = ({index: both[at].detach().cpu() for index, both in read.items()} for at in (0, 1))
        return replace(
            state,
            entries=state.entries.append(keys, values),
            left_at=planner.seen(row),
            newest=int(max(positions[-1], state.newest)),
        )

    def remember(self) -> None:
        """What the rows still hold goes to the bank as well. The stream must then begin another text.

        Raises:
            StateError: of a fork, or where nothing may be written.
        """
        if not self.leads:
            why = "its bank is read-only" if self.rule.read_only else "a fork leaves the bank to its original"
            raise StateError(f"this stream writes nothing to its bank: {why}")
        planner = self._blocks.planner
        rows = [self._with(row, planner, *_gone(planner, None, row)) for row in range(planner.num_rows)]
        self.rows = [replace(state, entries=state.entries.flush()) for state in rows]
        self._publish()

    def _publish(self) -> None:
        """The bank holds what the rows do; of those with one name, what the first one does."""
        if self.leads:
            for state in reversed(self.rows):
                self._book.put(state.name, state.entries)

    # -------------------------------------------------------------------------------------------------------------- tokens, rows

    def check_crop(self, crop: Crop) -> None:
        """Refuse to go back to before tokens went to the bank: a shorter text would still hold them.

        Raises:
            StateError: saying how many tokens can be forgotten.
        """
        for row, state in enumerate(self.rows):
            seen, gone = crop.seen[row], crop.counts[row]
            least = state.newest + 1 if crop.columns is None else state.left_at + crop.read_again
            if gone and state.left_at and seen - gone < least:
                raise StateError(
                    f"row {row}: cannot forget {gone} tokens: some went to the bank when the row had seen {state.left_at}, which a "
                    f"text of {seen - gone} tokens would still hold; at most {max(seen - least, 0)} can be forgotten; {GO_BACK}"
                )

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.rows = [self.rows[row] for row in rows] if self.rows else []
            self._publish()

        return apply

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> BankState:
        if self.rows or not self.leads:
            return BankState(tuple(self.rows), {})
        return BankState((), {name: self._book.entries(name) for name in self.rule.names})

    def return_to(self, state: BankState) -> None:
        self.rows = list(state.rows)
        self._publish()
        for name, entries in state.held.items() if self.leads else ():
            self._book.put(name, entries)

    def save(self) -> Saved:
        """Not what the bank holds, only how far it had come.

        Raises:
            UnsupportedError: if a row recalls what the bank does not hold: a fork's, or one of several that were one row.
        """
        for row, state in enumerate(self.rows):
            if not self.rule.read_only and self._book.entries(state.name) is not state.entries and state.entries.written:
                raise UnsupportedError(
                    f"row {row} recalls what is not in the bank, because it belongs to a fork, or was one row with another; save "
                    "the stream that writes the bank"
                )
        told = ("written", "dropped", "tail")
        rows = [
            {"name": s.name, "left_at": s.left_at, "newest": s.newest, **{key: getattr(s.entries, key) for key in told}}
            for s in self.rows
        ]
        return Saved({"rows": rows, "identity": self._book.identity, "distance": self.distance})

    def restore(self, saved: Saved) -> None:
        mine, rows = self._book.identity, []
        wrong = [name for name, told in saved.get("identity", dict).items() if mine.get(name, told) != told]
        if wrong:
            raise CacheMismatchError(f"the stream was saved with a bank of another model: its {', '.join(wrong)} differ")
        for data, seen in zip(saved.rows("rows"), saved.seen):
            row = Saved(of_kind(data, dict, "rows"))
            name = row.get("name", str)
            entries, told = self._book.entries(name), {key: row.count(key) for key in ("written", "dropped", "tail")}
            if any(getattr(entries, key) != value for key, value in told.items()):
                raise CacheMismatchError(
                    f"when the stream was saved, {told['written']} tokens had been written to namespace {name!r} of its "
                    f"bank and {told['dropped']} dropped; now it is {entries.written} and {entries.dropped}. Save both, and "
                    "load the stream with that bank: kvsieve.load(path, model, bank=bank)"
                )
            newest = in_range(row.get("newest", int), -1, seen - 1, "newest")
            rows.append(RowState(name, entries, row.count("left_at", seen), newest))
        self.rows = rows

    # ----------------------------------------------------------------------------------------------------------------- the end

    @property
    def bytes_held(self) -> int:
        segments = {id(segment): segment for state in self.rows for segment in state.entries.segments()}
        return sum(segment.nbytes for segment in segments.values())

    def reset(self) -> None:
        """The bank keeps what it holds."""
        self.rows = []
        self.rollback()

    def release(self) -> None:
        self._book.leave(self)
        self.leads = False
        self.reset()


def _gone(before: Planner, now: Planner | None, row: int) -> tuple[npt.NDArray[np.int64], Runs]:
    """Positions, ascending, and slots of what a row held ``before`` and does not hold ``now``; of all, where that is None."""
    memories = range(before.num_memories)
    positions = np.concatenate([before.positions(memory, row) for memory in memories])
    slots = np.concatenate([_slots(before.runs(memory, row)) for memory in memories])
    if now is not None:
        left = np.concatenate([now.positions(memory, row) for memory in memories])
        gone = ~np.isin(positions, left, assume_unique=True)
        positions, slots = positions[gone], slots[gone]
    order = np.argsort(positions, kind="stable")
    positions, slots = positions[order], slots[order]
    ends = np.flatnonzero(np.diff(slots[:, 0]) | (np.diff(slots[:, 1]) != 1)) + 1
    return positions, [(int(run[0, 0]), int(run[0, 1]), int(run[-1, 1]) + 1) for run in np.split(slots, ends) if len(run)]


def _slots(runs: Runs) -> npt.NDArray[np.int64]:
    """The block and slot of each token of some runs: ``[n, 2]``."""
    each = [np.stack([np.full(hi - lo, block), np.arange(lo, hi)], 1) for block, lo, hi in runs]
    return np.concatenate(each) if each else np.zeros((0, 2), np.int64)
