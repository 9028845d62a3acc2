"""Eviction that all heads share: the planner's rules, and rules of one's own that are asked in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError
from kvsieve.policy.evict import Residents
from kvsieve.runtime.cropping import check_evicted
from kvsieve.runtime.part import Apply, Crop, Forward, Join, Saved, Setting, StreamPart
from kvsieve.runtime.pinning import num_pinned, pinned, with_pinned

if TYPE_CHECKING:
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.blocks import Blocks

__all__ = ["Eviction"]


class Eviction(StreamPart):
    """What the memories of a chain evict, and when they last did.

    Attributes:
        evicted_at: tokens that each row had seen when it last evicted some: a crop to before that moment would not be exact. Empty
            before the first forward, and where nothing is ever evicted.
    """

    name = "eviction"

    def __init__(self, policy: Policy, bytes_per_token: int, blocks: Blocks) -> None:
        self._policy, self._blocks = policy, blocks
        self._rules = [memory.roles.evict for memory in policy.memories]
        self._specs = [rule.spec(bytes_per_token) for rule in self._rules]
        self._evicts = any(rule.evicts for rule in self._rules)
        self._decay = [getattr(rule, "decay", 1.0) for rule in self._rules]
        self.evicted_at: list[int] = []

    @classmethod
    def of(cls, setting: Setting) -> Eviction | None:
        """None if each head keeps tokens of its own."""
        if any(memory.roles.evict.per_head for memory in setting.policy.memories):
            return None
        return cls(setting.policy, setting.facts.bytes_per_token, setting.blocks)

    def commit(self, forward: Forward) -> Apply:
        return self._begin_rows

    def _begin_rows(self) -> None:
        if self._evicts and not self.evicted_at:
            self.evicted_at = [0] * self._blocks.num_rows

    def must_step(self, width: int, has_prompt: bool) -> bool:
        """A rule that ranks tokens could act among the candidates; the later memories of a chain receive between forwards."""
        resident, specs = self._blocks.resident + width, self._specs
        if len(specs) > 1:
            return resident > (specs[0].window or specs[0].budget) - num_pinned(self._blocks.planner)
        slack = 0 if has_prompt else BLOCK - 1
        return bool(specs[0].budget) and resident > specs[0].budget + slack

    # ---------------------------------------------------------------------------------------------------------------- evicting

    def evict(self, force: bool, turn_ended: bool) -> None:
        if turn_ended:
            self._blocks.planner.decay(self._decay)
        before = self._residents()
        self._blocks.apply(self._blocks.planner.settle(force))
        for memory, spec in enumerate(self._specs):
            if spec.rule == "own":
                for row in range(self._blocks.num_rows):
                    self._ask(memory, row, force, turn_ended)
        self._note(before)

    def _residents(self) -> list[list[int]]:
        """Tokens that each memory of each row holds."""
        if not self._evicts:
            return []
        planner = self._blocks.planner
        return [[planner.resident(m, row) for m in range(len(self._rules))] for row in range(planner.num_rows)]

    def _note(self, before: list[list[int]]) -> None:
        for row, (old, new) in enumerate(zip(before, self._residents())):
            # A window may leave out what it would evict at once: then it holds less than it was given.
            seen = self._blocks.planner.seen(row)
            if old != new or (sum(new) < seen and not self.evicted_at[row]):
                self.evicted_at[row] = seen

    def _ask(self, memory: int, row: int, force: bool, turn_ended: bool) -> None:
        """Let a rule of one's own choose among the tokens of a row, if it is over budget."""
        planner, rule, spec = self._blocks.planner, self._rules[memory], self._specs[memory]
        count = planner.resident(memory, row)
        if count <= spec.budget or (not force and count < spec.budget + BLOCK):
            return
        positions, first = planner.positions(memory, row), memory == 0
        stays = pinned(planner.pins(row) if first else [], positions)
        residents = Residents(positions, planner.scores(memory, row), planner.seen(row), turn_ended, stays, spec.budget)
        kept = [int(i) for i in rule.keep(residents)]
        if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < count):
            raise PolicyError(f"{type(rule).__name__}.keep must return ascending indices below {count}, got {kept[:4]}...")
        # Of the first memory the sinks are positions: some may have been evicted by name.
        sinks = int((positions < spec.sinks).sum()) if first else spec.sinks
        must = {*range(sinks), *range(count - spec.recent, count)}
        if len(kept) > spec.budget or not must <= set(kept):
            raise PolicyError(
                f"{type(rule).__name__}.keep returned {len(kept)} of {count} residents; it must return at most {spec.budget}, "
                f"the first {sinks} and the last {spec.recent} among them"
            )
        self._blocks.apply(planner.keep(memory, row, with_pinned(kept, must, stays, spec.budget)))

    def evict_range(self, rows: Sequence[int], start: int, stop: int) -> None:
        planner = self._blocks.planner
        # A crop to before this moment would have to bring them back.
        self.evicted_at = self.evicted_at or [0] * planner.num_rows
        for row in rows:
            self.evicted_at[row] = planner.seen(row)
        self._blocks.apply(planner.evict(list(rows), start, stop))

    # -------------------------------------------------------------------------------------------------------------- going back

    def check_crop(self, crop: Crop) -> None:
        if crop.columns is None:
            return
        for row, at in enumerate(self.evicted_at):
            check_evicted(self._policy, crop, row, at)

    def crop(self, crop: Crop) -> Apply:
        def apply() -> None:
            if crop.columns is not None:
                self.evicted_at = [min(at, self._blocks.planner.seen(row)) for row, at in enumerate(self.evicted_at)]

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.evicted_at = [self.evicted_at[row] for row in rows] if self.evicted_at else []

        return apply

    # ----------------------------------------------------------------------------------------------------------------- telling

    def kept(self, row: int, layer: int | None, head: int | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Positions of a row's residents in text order and their scores, the same in all heads of all layers."""
        planner = self._blocks.planner
        positions = np.concatenate([planner.positions(m, row) for m in range(len(self._rules))])
        scores = np.concatenate([planner.scores(m, row) for m in range(len(self._rules))])
        order = np.argsort(positions, kind="stable")
        return positions[order], scores[order]

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> list[int]:
        return list(self.evicted_at)

    def return_to(self, state: Any) -> None:
        self.evicted_at = list(state)

    def join(self, forks: Sequence[Eviction], join: Join) -> Apply:
        """What was evicted by name is gone; a crop into what was joined is refused anyway."""
        evicted = any(any(part.evicted_at) for part in (self, *forks))

        def apply() -> None:
            self.evicted_at = join.totals if evicted else []

        return apply

    def save(self) -> Saved:
        return Saved({"evicted_at": self.evicted_at})

    def restore(self, saved: Saved) -> None:
        self.evicted_at = saved.by_row("evicted_at")

    def begin_at(self, columns: int, seen: Sequence[int]) -> None:
        self.evicted_at = list(seen) if self._evicts else []

    def reset(self) -> None:
        self.evicted_at = []
