"""One layer's choices, in Rust."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsieve.backends.base import HeadChoice
from kvsieve.backends.cpu import select
from kvsieve.backends.rules import implementation
from kvsieve.policy.select import SparseSelection

__all__ = ["CpuSelection"]


class CpuSelection:
    """One layer's choices; :attr:`core` makes them and remembers them."""

    def __init__(self, rule: SparseSelection) -> None:
        self.core = implementation(select, rule).make(rule)
        self.work = (0, 0)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.core.select_rows(list(rows))

    def undo(self) -> None:
        self.core.undo()

    def reset(self) -> None:
        self.core.reset()

    def state(self) -> Any:
        return self.core.state()

    def return_to(self, state: Any) -> None:
        self.core.return_to(state)

    def choice(self, row: int) -> list[HeadChoice]:
        return [HeadChoice(*head) for head in self.core.choice(row)]
