"""One layer's choices, in Rust."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsieve._core import Sparse
from kvsieve.backends.base import HeadChoice
from kvsieve.policy.select import SparseSelection

__all__ = ["CpuSelection"]


class CpuSelection:
    """One layer's choices; :attr:`core` makes them and remembers them."""

    def __init__(self, rule: SparseSelection) -> None:
        self.core = Sparse(
            rule.kind,
            sinks=rule.sinks,
            window=rule.window,
            refresh=rule.paces,
            query_block=rule.query_block,
            query_stride=rule.query_stride,
            **rule.parameters,
        )
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
