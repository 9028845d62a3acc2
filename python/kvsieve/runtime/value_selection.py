"""Value selection: a single new token adds up the heaviest values alone.

Nothing is remembered from one forward to the next, but for what the last one reports. Forwards over several tokens of a row, and
the pieces of a longer prompt, add up everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvsieve.runtime.part import Apply, Forward, LayerInput, Setting, StreamPart

if TYPE_CHECKING:
    from kvsieve.policy.select import HeaviestValues

__all__ = ["ValueSelection"]


class ValueSelection(StreamPart):
    """Which rows add up the heaviest values alone.

    Attributes:
        rule: the policy's.
        mass: by layer, float32 ``[B, H]``: the probability mass of the values that the last forward added up, nan for rows that
            added up all.
    """

    name = "value_selection"

    def __init__(self, rule: HeaviestValues, setting: Setting) -> None:
        self.rule, self._blocks = rule, setting.blocks
        self.mass: dict[int, torch.Tensor] = {}
        self._rows: list[bool] = []
        self._found: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, setting: Setting) -> ValueSelection | None:
        """None if queries add up all that they read."""
        rule = setting.policy.heaviest_values
        return None if rule is None else cls(rule, setting)

    def begin(self, forward: Forward) -> None:
        planner = self._blocks.planner
        longer = forward.longer or [False] * len(forward.lens)
        held = [planner.resident(0, row) if planner.num_rows else 0 for row in range(len(forward.lens))]
        self._rows = [
            new == 1 and not of_prompt and self._thins(before + new) for new, of_prompt, before in zip(forward.lens, longer, held)
        ]
        self._found = {}

    def _thins(self, resident: int) -> bool:
        return self.rule.mass is not None or self.rule.top is None or resident > self.rule.top

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        if layer.store is None or layer.forward.step is None or not any(self._rows):
            return None
        out, mass = layer.store.run_heaviest(layer.q, layer.k, layer.v, layer.forward.step, layer.call, self.rule, self._rows)
        self._found[layer.index] = mass
        return out

    def commit(self, forward: Forward) -> Apply:
        found = self._found

        def apply() -> None:
            self.mass = found
            self.rollback()

        return apply

    def rollback(self) -> None:
        self._rows, self._found = [], {}

    def must_step(self, width: int, has_prompt: bool) -> bool:
        return self._thins(self._blocks.resident + width)

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.mass = {}

        return apply

    def mass_of(self, index: int) -> float | None:
        """The least mass that a head of any row added up in the last forward; None where all added up everything."""
        found = self.mass.get(index)
        known = None if found is None else found[~found.isnan()]
        return None if known is None or not len(known) else float(known.min())

    def reset(self) -> None:
        self.mass = {}
        self.rollback()
