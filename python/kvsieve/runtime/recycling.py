"""Recycling: heads read tokens again that they chose at their layer's last full step, and all that came since.

What a head reads follows from its choice and the length of the text alone. With ``k`` tokens chosen when a row held ``n``, and a
budget of ``b``, the query that is the row's ``m``-th resident reads

    chosen tokens      but the first to go, so many that with the others there are at most b: ``max(k + (m - 1 - n) - b, 0)``
    newer ones         ``n .. m - 1``, of which at most the newest b
    itself             ``m - 1``

so a partial step changes nothing but a count of steps. A row's state is never changed, only replaced: forks, marks and beams share
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from kvsieve.backends.base import HeadSets
from kvsieve.errors import SessionError, StateError, UnsupportedModelError
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.part import Apply, Crop, Forward, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.saved import in_range, layer_of, of_kind

if TYPE_CHECKING:
    from kvsieve.policy.select import RecycledSelection

__all__ = ["Choice", "Recycling", "RowState", "cosine"]

Mode: TypeAlias = Literal["idle", "whole", "choose", "compare", "partial"]
"""What a row does in a forward: nothing; reads all and chooses nothing; a full step; either, layer by layer; a partial one."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What the heads of one layer of one row chose.

    Attributes:
        held: residents when they did.
        tokens, order: int64 ``[Hkv, k]`` on the layer's device, as of :class:`kvsieve.backends.base.HeadSets`.
        query: float32 ``[D]``, the mean query that they chose by, before RoPE; None where queries are not compared.
    """

    held: int
    tokens: torch.Tensor
    order: torch.Tensor
    query: torch.Tensor | None

    def sets(self, count: int, budget: int) -> HeadSets:
        """What the newest of ``count`` residents reads."""
        newer = count - 1 - self.held
        gone = max(self.tokens.shape[1] + newer - budget, 0)
        return HeadSets(self.tokens, self.order, gone, max(self.held, count - 1 - budget))


@dataclass(frozen=True, eq=False)
class RowState:
    """What one row goes on from.

    Attributes:
        layers: the choices, by layer; empty while everything is read.
        steps: single tokens since all layers chose because they had to.
    """

    layers: Mapping[int, Choice] = field(default_factory=dict)
    steps: int = 0

    @property
    def held(self) -> int:
        """Residents at the last full step of any layer."""
        return max((choice.held for choice in self.layers.values()), default=0)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two queries ``[D]``; nan where one is zero."""
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


Sets: TypeAlias = "list[HeadSets | None]"

State: TypeAlias = "tuple[list[RowState], dict[int, Sets]]"


class Recycling(StreamPart):
    """The choices of a stream's rows.

    Attributes:
        rule: the policy's.
        rows: the state of each row; empty before the first forward.
        full_steps: by layer, how many single tokens took a full step, over all rows, since the stream was opened.
        read: by layer, what each row read in the last forward: None where it was everything.
    """

    name = "recycling"
    stores_all = True

    def __init__(self, rule: RecycledSelection, setting: Setting) -> None:
        self.rule, self._blocks, self._ranks = rule, setting.blocks, setting.facts.ranks
        self._ropes = {layer.index: layer.rope for layer in setting.facts.layers}
        self._layers = {layer.index: layer for layer in setting.facts.layers}
        self.rows: list[RowState] = []
        self.full_steps: dict[int, int] = {}
        self.read: dict[int, Sets] = {}
        self._modes: list[Mode] = []
        self._held: list[int] = []
        self._chosen: dict[int, list[Choice | None]] = {}
        self._reads: dict[int, Sets] = {}

    @classmethod
    def of(cls, setting: Setting) -> Recycling | None:
        """None if no rule lets heads read again what they chose.

        Raises:
            UnsupportedModelError: if queries must be compared before RoPE, whose frequencies change with the length.
        """
        rule, facts = setting.policy.recycling, setting.facts
        if rule is None:
            return None
        if rule.similarity is not None and (facts.longrope or facts.dynamic_rope):
            raise UnsupportedModelError(
                f"this model changes its rotary frequencies with the length, so {setting.policy!r} cannot compare queries of two "
                "steps; a fixed schedule, similarity=None, goes with it"
            )
        return cls(rule, setting)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        planner = self._blocks.planner
        before = [planner.resident(0, row) if planner.num_rows else 0 for row in range(len(forward.lens))]
        self._held = [old + new for old, new in zip(before, forward.lens)]
        self._chosen, self._reads = {}, {}
        rows = self.rows if len(self.rows) == len(forward.lens) else [RowState()] * len(forward.lens)
        self._modes = [self._mode(*row) for row in zip(rows, forward.lens, self._alone(forward), self._held)]

    @staticmethod
    def _alone(forward: Forward) -> list[bool]:
        """Of each row whether it reads one token, which is no piece of a longer prompt."""
        return [new == 1 and not longer for new, longer in zip(forward.lens, forward.longer or [False] * len(forward.lens))]

    def _mode(self, state: RowState, new: int, alone: bool, held: int) -> Mode:
        if not new:
            return "idle"
        if held <= self.rule.budget:
            return "whole"
        if not alone or not state.layers:
            return "choose"
        if (state.steps + 1) % self.rule.stride:
            return "partial"
        return "choose" if self.rule.similarity is None else "compare"

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        store, step, q = layer.store, layer.forward.step, layer.q
        if store is None or step is None or all(mode in ("idle", "whole") for mode in self._modes):
            return None
        sets: Sets = [None] * q.shape[0]
        queries: list[torch.Tensor | None] = [None] * q.shape[0]
        for row, mode in enumerate(self._modes):
            choice = self.rows[row].layers.get(layer.index) if row < len(self.rows) else None
            if self.rule.similarity is not None and (mode in ("choose", "compare") or choice is None):
                at = layer.forward.seen[row] + layer.forward.lens[row] - 1
                queries[row] = self._mean_query(layer.index, q[row, :, -1], at)
            if choice is not None and (mode == "partial" or (mode == "compare" and self._similar(queries[row], choice))):
                sets[row] = choice.sets(self._held[row], self.rule.budget)
        out, scores = store.run_with_sets(q, layer.k, layer.v, step, layer.call, sets)
        self._chosen[layer.index] = [
            None if mode in ("idle", "whole") else self._choose(found, held, query)
            for mode, found, held, query in zip(self._modes, scores, self._held, queries)
        ]
        self._reads[layer.index] = sets
        return out

    def _mean_query(self, layer: int, q: torch.Tensor, position: int) -> torch.Tensor:
        """The mean over heads of ``q`` ``[H, D]``, turned back from ``position``: float32 ``[D]``."""
        mean, rope = q.detach().float().mean(0, keepdim=True), self._ropes[layer]
        if self._ranks is not None:
            mean = self._ranks.sum(mean) / self._ranks.size
        if rope is not None:
            mean = rope.rotate(mean, torch.tensor([-position], device=mean.device), factor=False)
        return mean[0]

    def _similar(self, query: torch.Tensor | None, choice: Choice) -> bool:
        """Whether a layer goes on with what it chose. A query of nothing is like no other."""
        assert query is not None
        assert choice.query is not None
        assert self.rule.similarity is not None
        return cosine(query, choice.query) > self.rule.similarity

    def _choose(self, scores: torch.Tensor | None, held: int, query: torch.Tensor | None) -> Choice | None:
        if scores is None:
            return None
        tokens, order = self.rule.choose(scores)
        return Choice(held, tokens.to(scores.device).contiguous(), order.to(scores.device).contiguous(), query)

    def commit(self, forward: Forward) -> Apply:
        old = self.rows if len(self.rows) == len(forward.lens) else [RowState()] * len(forward.lens)
        alone = self._alone(forward)
        rows = [self._after(row, *state) for row, state in enumerate(zip(old, self._modes, alone))]

        def apply() -> None:
            for index, chosen in self._chosen.items():
                single = sum(choice is not None and one for choice, one in zip(chosen, alone))
                self.full_steps[index] = self.full_steps.get(index, 0) + single
            self.rows, self.read = rows, self._reads
            self.rollback()

        return apply

    def _after(self, row: int, state: RowState, mode: Mode, alone: bool) -> RowState:
        if mode == "idle":
            return state
        if mode == "whole":
            return RowState()
        chosen = {index: choice for index, found in self._chosen.items() if (choice := found[row]) is not None}
        if not alone or not state.layers:
            return RowState(chosen)
        return RowState({**state.layers, **chosen}, state.steps + 1)

    def rollback(self) -> None:
        self._modes, self._held, self._chosen, self._reads = [], [], {}, {}

    def must_step(self, width: int, has_prompt: bool) -> bool:
        return self._blocks.resident + width > self.rule.budget

    # -------------------------------------------------------------------------------------------------------------- tokens, rows

    def evict_range(self, rows: Sequence[int], start: int, stop: int) -> None:
        """What was chosen names residents by number, so the next token of these rows takes a full step."""
        self.read = {}
        for row in rows:
            self.rows[row] = RowState()

    def check_crop(self, crop: Crop) -> None:
        """Refuse to go back to before a choice: what heads had chosen until then is forgotten.

        Raises:
            StateError: saying how many tokens can be forgotten.
        """
        for row, (state, gone) in enumerate(zip(self.rows, crop.counts if crop.columns is not None else ())):
            resident = self._blocks.planner.resident(0, row)
            if gone and 0 < resident - gone < state.held:
                raise StateError(
                    f"row {row}: cannot forget {gone} tokens: heads have chosen since what they read, and what they had chosen "
                    f"before is forgotten; at most {resident - state.held} can be; {GO_BACK}"
                )

    def crop(self, crop: Crop) -> Apply:
        """Tokens after the last choice came one by one."""

        def apply() -> None:
            self.read = {}
            for row, gone in enumerate(crop.counts[: len(self.rows)]):
                state, left = self.rows[row], self._blocks.planner.resident(0, row)
                whole = left < state.held or not state.layers
                self.rows[row] = RowState() if whole else replace(state, steps=max(state.steps - gone, 0))

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.read = {}
            self.rows = [self.rows[row] for row in rows] if self.rows else []

        return apply

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> State:
        return list(self.rows), dict(self.read)

    def return_to(self, state: State) -> None:
        self.rows, self.read = list(state[0]), dict(state[1])

    def save(self) -> Saved:
        tensors: dict[str, torch.Tensor] = {}
        for row, state in enumerate(self.rows):
            for layer, choice in state.layers.items():
                tensors[f"tokens.{layer}.{row}"] = choice.tokens.clone()
                tensors[f"order.{layer}.{row}"] = choice.order.clone()
                if choice.query is not None:
                    tensors[f"query.{layer}.{row}"] = choice.query.clone()
        held = [{str(layer): choice.held for layer, choice in state.layers.items()} for state in self.rows]
        return Saved({"held": held, "steps": [state.steps for state in self.rows]}, tensors)

    def restore(self, saved: Saved) -> None:
        self.rows = []
        for row, (told, steps) in enumerate(zip(saved.rows("held"), saved.by_row("steps"))):
            most = self._blocks.planner.resident(0, row)
            held = {layer_of(name, self._layers): count for name, count in of_kind(told, dict, "held").items()}
            layers = {
                layer: self._restored(saved, row, layer, in_range(of_kind(count, int, "held"), 0, most, "held"))
                for layer, count in held.items()
            }
            self.rows.append(RowState(layers, steps))

    def _restored(self, saved: Saved, row: int, layer: int, held: int) -> Choice:
        facts, device, end = self._layers[layer], self._layers[layer].device, f".{layer}.{row}"
        tokens = saved.indices(f"tokens{end}", max(held, 1), facts.num_kv_heads, None)
        order = saved.indices(f"order{end}", max(tokens.shape[1], 1), *tokens.shape)
        if tokens.shape[1] > held:
            raise SessionError(f"row {row} reads {tokens.shape[1]} tokens of the {held} that layer {layer} held")
        query = None
        if f"query{end}" in saved.tensors:
            query = saved.tensor(f"query{end}", torch.float32, None).to(device)
        return Choice(held, tokens.to(device), order.to(device), query)

    def reset(self) -> None:
        self.rows, self.full_steps, self.read = [], {}, {}
        self.rollback()
