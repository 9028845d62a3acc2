"""Selections on a GPU: what each row of a layer has chosen, and the launches that choose and attend.

Choices stay on the device, in *slots*. A slot belongs to one stage and holds, for each key-value head, the first tokens of the
ranges that the stage chose. A choice of a row is a value: its slots are not written again while anything refers to them, so
undoing, marks and reordered beams copy references.

Layers of a model decide alike: a schedule is made by the first one that asks for it, and its table is uploaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.base import HeadChoice
from kvsieve.backends.cuda import select
from kvsieve.backends.cuda.ops import residents
from kvsieve.backends.cuda.ops.angles import Angles
from kvsieve.backends.cuda.ops.launch import aligned
from kvsieve.backends.cuda.ops.residents import Residents, slot_width
from kvsieve.backends.cuda.ops.sparse import RESIDENT, Sparse, heads_together
from kvsieve.backends.cuda.schedule import Choosing, Schedule
from kvsieve.backends.rules import implementation
from kvsieve.errors import ShapeError, StateError
from kvsieve.policy.select import SparseSelection

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.backends.cuda.staged import StagedRule
    from kvsieve.backends.cuda.step_residents import StepResidents

__all__ = ["CudaSelection", "RowChoice", "StepSelection"]

Ints = npt.NDArray[np.int64]
Turns = Callable[[int], Angles]


# ------------------------------------------------------------------------------------------------------------------ what was chosen


class Slot:
    """A place for what one stage chose; free again when nothing refers to it."""

    __slots__ = ("number", "pool")

    def __init__(self, pool: SlotPool, number: int) -> None:
        self.pool, self.number = pool, number

    def __del__(self) -> None:
        self.pool.free.append(self.number)


class SlotPool:
    """The slots of one stage: int32 ``[slots, Hkv, slot_width(most)]`` on the device. It grows."""

    def __init__(self, kv_heads: int, most: int, device: torch.device) -> None:
        self.tensor = torch.zeros(0, kv_heads, slot_width(most), dtype=torch.int32, device=device)
        self.free: list[int] = []

    def take(self) -> Slot:
        """A slot that nothing refers to; what it holds is old."""
        if not self.free:
            old = self.tensor
            count = max(4, 2 * old.shape[0])
            self.tensor = old.new_zeros(count, *old.shape[1:])
            self.tensor[: old.shape[0]] = old
            self.free = list(range(count - 1, old.shape[0] - 1, -1))
        return Slot(self, self.free.pop())

    def copy(self, slot: Slot) -> Slot:
        """A slot of this pool that holds what ``slot`` of another one does."""
        mine = self.take()
        self.tensor[mine.number].copy_(slot.pool.tensor[slot.number])
        return mine


@dataclass(frozen=True)
class RowChoice:
    """The choice of one row, and where it lies: a slot for each stage, none where the region is read whole."""

    facts: Choosing
    slots: tuple[Slot, ...]


@dataclass
class Work:
    """What a call counted, on the device, until somebody asks; and choices that only it needs."""

    searched: list[torch.Tensor] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)
    spares: list[torch.Tensor] = field(default_factory=list)

    def shorten(self) -> None:
        """Keep no more than what a few queries count."""
        self.spares = []
        for counts in (self.searched, self.read):
            counts[:] = [x if x.numel() <= 4096 else x.sum() for x in counts]


State = tuple[list["RowChoice | None"], "list[SlotPool]"]


# -------------------------------------------------------------------------------------------------------------------------- a layer


class StepSelection(NamedTuple):
    """A step's selection in one layer, as the file of a rule sees it.

    Attributes:
        rule: its stages; schedule: who selects, and from how many candidates.
        q: ``[B, H, q, D]``; residents: where the keys lie; table: blocks of queries.
        held, spares: of each stage, slots that outlive the step and slots that only it needs.
        angles: how queries, and keys before RoPE, are turned to be compared.
    """

    rule: StagedRule
    schedule: Schedule
    q: torch.Tensor
    residents: Residents
    table: torch.Tensor
    kv_heads: int
    held: list[torch.Tensor]
    spares: list[torch.Tensor]
    angles: Angles
    arrived: Callable[[int, int, torch.device], torch.Tensor]

    def arrivals(self, blocks: int) -> torch.Tensor:
        """Zeros int32 for the arrivals of so many blocks of queries; to be left zero."""
        return self.arrived(blocks, self.kv_heads, self.q.device)


class CudaSelection:
    """One layer's choices: its rule and what its rows have chosen."""

    def __init__(self, rule: SparseSelection) -> None:
        self._rule_file = implementation(select, rule)
        self.rule: StagedRule = self._rule_file.rule_of(rule)
        self._choices: list[RowChoice | None] = []
        self._before: list[RowChoice | None] | None = None
        self._pools: list[SlotPool] = []
        self._arrivals: torch.Tensor | None = None
        self._work = Work()

    # ----------------------------------------------------------------------------------------------------------------- its state

    def begin(self) -> None:
        """A run begins; if it fails, there is nothing to undo."""
        self._before = None

    def reset(self) -> None:
        """Forget all choices."""
        self._choices, self._before = [], None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row ``i`` is what row ``rows[i]`` was."""
        if not self._choices:
            return
        if any(not 0 <= row < len(self._choices) for row in rows):
            raise ShapeError(f"rows must lie below {len(self._choices)}, got {list(rows)}")
        self._choices, self._before = [self._choices[row] for row in rows], None

    def undo(self) -> None:
        """The choices as they were before the last run; nothing if that failed, or was undone already."""
        if self._before is not None:
            self._choices, self._before = self._before, None

    def state(self) -> State:
        """What :meth:`return_to` takes, here or in another selection by the same rule."""
        return list(self._choices), self._pools

    def return_to(self, state: State) -> None:
        """The choices are those of ``state``. Those of another selection are copied."""
        choices, pools = state
        if any(choice is not None and choice.slots and len(choice.slots) != self.rule.stages for choice in choices):
            raise StateError("these choices are of another rule")
        if pools is not self._pools and pools:
            if not self._pools:
                self._pools = [SlotPool(x.tensor.shape[1], most, x.tensor.device) for x, most in zip(pools, self.rule.most)]
            choices = [c if c is None else self._adopt(c) for c in choices]
        self._choices, self._before = list(choices), None

    def _adopt(self, choice: RowChoice) -> RowChoice:
        return RowChoice(choice.facts, tuple(pool.copy(slot) for pool, slot in zip(self._pools, choice.slots)))

    def choice(self, row: int) -> list[HeadChoice]:
        """What each key-value head of a row has chosen; empty before it has. Waits for the device."""
        choice = self._choices[row] if row < len(self._choices) else None
        if choice is None:
            return []
        facts, length = choice.facts, self.rule.chunks[-1]

        def chosen(starts: Ints, reads: int, rounds: int) -> HeadChoice:
            return HeadChoice(np.stack([starts, np.minimum(starts + length, facts.hi)], 1), facts.hi, reads, rounds)

        if not choice.slots:
            every = np.arange(facts.lo, facts.hi, length, dtype=np.int64)
            return [chosen(every, 0, 0) for _ in range(self._pools[0].tensor.shape[1])]
        held = [slot.pool.tensor[slot.number].cpu().numpy().astype(np.int64) for slot in choice.slots]
        reads, rounds = (np.stack([x[:, column] for x in held[facts.start :]]).sum(0) for column in (1, 2))
        return [chosen(mine[4 : 4 + mine[0]], int(reads[head]), int(rounds[head])) for head, mine in enumerate(held[-1])]

    @property
    def work(self) -> tuple[int, int]:
        """Representative keys scored and keys read by the last run, over all heads and queries. Waits for the device."""
        searched, read = (sum(int(x.sum()) for x in counts) for counts in (self._work.searched, self._work.read))
        return searched, read

    # ------------------------------------------------------------------------------------------------------------------ one step

    def run(
        self, q: torch.Tensor, shape: tuple[int, int], asked: StepResidents, call: AttendCall, turns: Turns | None = None
    ) -> torch.Tensor:
        """Select where it is due, and attend: out ``[B, q, H, Dv]``. The new tokens are stored.

        Args:
            q: ``[B, H, q, D]``; shape: key-value heads, and the size of a value.
            turns: the turns of so many positions; None where keys are as the model rotated them, or nothing rotates.
        """
        rule, (kv_heads, value_dim) = self.rule, shape
        choices: list[RowChoice | None] = [None] * q.shape[0]
        if len(self._choices) == len(choices):
            choices = self._choices
        if not self._pools:
            self._pools = [SlotPool(kv_heads, most, q.device) for most in rule.most]
        schedule = self._schedule(choices, asked, q.shape[2])
        slots = {
            row * rule.stages + stage: slot
            for row, choice in enumerate(choices)
            for stage, slot in enumerate(() if choice is None else choice.slots)
        }
        slots |= {symbol: self._pools[stage].take() for symbol, stage in schedule.kept}
        after = [
            old if new is None else RowChoice(new[0], tuple(slots[symbol] for symbol in new[1]))
            for old, new in zip(choices, schedule.after)
        ]
        q, work = aligned(q), Work()
        if schedule.num_blocks:
            table = asked.upload(schedule.table({symbol: slot.number for symbol, slot in slots.items()}))
            last = max(rule.window + 1, schedule.longest if call.consecutive and call.relative else max(asked.counts))
            angles = Angles() if turns is None else turns(last)._replace(alone=call.relative)
            selecting = self._search(q, kv_heads, schedule, asked, table, work, angles)
            out = self._attend(selecting, value_dim, asked, call, work)
        else:
            out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], value_dim)
        self._before, self._choices, self._work = choices, after, work
        return out

    def _schedule(self, choices: list[RowChoice | None], asked: StepResidents, columns: int) -> Schedule:
        """Who selects in this step: decided by the first layer whose rows have chosen alike."""
        known = tuple(None if choice is None else choice.facts for choice in choices)
        schedule = asked.schedules.get((self.rule, known))
        if schedule is None:
            schedule = asked.schedules[self.rule, known] = Schedule(self.rule, known, asked.first, asked.lens, columns)
        return schedule

    def _search(
        self,
        q: torch.Tensor,
        kv_heads: int,
        schedule: Schedule,
        asked: StepResidents,
        table: torch.Tensor,
        work: Work,
        angles: Angles,
    ) -> StepSelection:
        """Compute the stages that are due."""
        work.spares = [q.new_empty((n, *p.tensor.shape[1:]), dtype=torch.int32) for n, p in zip(schedule.spares, self._pools)]
        selecting = StepSelection(
            rule=self.rule,
            schedule=schedule,
            q=q,
            residents=asked.residents,
            table=table,
            kv_heads=kv_heads,
            held=[pool.tensor for pool in self._pools],
            spares=work.spares,
            angles=angles,
            arrived=self._arrived,
        )
        work.searched += [self._rule_file.search(selecting, stage) for stage, n in enumerate(schedule.candidates) if n]
        return selecting

    def _attend(self, selecting: StepSelection, value_dim: int, asked: StepResidents, call: AttendCall, work: Work) -> torch.Tensor:
        rule, schedule, kv_heads = self.rule, selecting.schedule, selecting.kv_heads
        out, read = Sparse(
            q=selecting.q,
            residents=asked.residents,
            queries=selecting.table,
            most_queries=schedule.most_queries,
            at=asked.upload(schedule.at) if asked.decode else None,
            kv_heads=kv_heads,
            value_dim=value_dim,
            sinks=rule.sinks,
            window=rule.window,
            stage=rule.stages - 1,
            length=rule.chunks[-1],
            most=rule.most[-1],
            held=selecting.held[-1],
            spare=selecting.spares[-1],
            splits=self._splits(schedule, asked, kv_heads, selecting.q.shape[1] // kv_heads),
            scale=call.scale,
            softcap=call.softcap or 0.0,
            sink_logits=call.sinks,
            angles=selecting.angles._replace(alone=call.consecutive),
        ).launch()
        work.read.append(read)
        work.shorten()
        return out

    def _splits(self, schedule: Schedule, asked: StepResidents, kv_heads: int, group: int) -> int:
        """Thread blocks for each query and key-value head: as many as fill the GPU, each with 64 keys or more."""
        sets = -(-group // heads_together(group))
        fill = asked.processors * RESIDENT // max(len(schedule.at) * kv_heads * sets, 1)
        return max(1, min(fill, -(-schedule.longest // 64)))

    def _arrived(self, blocks: int, kv_heads: int, device: torch.device) -> torch.Tensor:
        count = 2 * min(blocks, residents.BAND) * kv_heads
        if self._arrivals is None or self._arrivals.shape[0] < count:
            self._arrivals = torch.zeros(count, dtype=torch.int32, device=device)
        return self._arrivals
