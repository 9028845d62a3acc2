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
    from kvsieve._core import Planner
    from kvsieve.policy.select import HeaviestValues

__all__ = ["ValueSelection", "thinned"]


def thinned(rule: HeaviestValues, forward: Forward, planner: Planner) -> list[bool]:
    """Which rows of a forward that is about to be planned add up the heaviest values alone."""
    longer = forward.longer or [False] * len(forward.lens)
    held = [planner.resident(0, row) if planner.num_rows else 0 for row in range(len(forward.lens))]
    return [new == 1 and not of_prompt and _thins(rule, before + new) for new, of_prompt, before in zip(forward.lens, longer, held)]


def _thins(rule: HeaviestValues, resident: int) -> bool:
    return rule.mass is not None or rule.top is None or resident > rule.top


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
        self._rows, self._found = thinned(self.rule, forward, self._blocks.planner), {}

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
        return _thins(self.rule, self._blocks.resident + width)

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
