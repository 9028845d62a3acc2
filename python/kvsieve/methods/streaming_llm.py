"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): attention sinks and a window of recent tokens.

Departures from the published code, and why:

* Every query sees the sinks, the ``budget - sinks`` tokens before it, and itself, whatever the size of the chunk it came in. The
  published code prefills densely and trims afterwards, so its answer depends on how the prompt was cut.
* Keys are stored as the model rotated them and the *query* is shifted for the sinks. Nothing is re-rotated, so nothing drifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsieve.budget import check_budget, check_count, tokens_for
from kvsieve.checks import as_plain, plain_fields
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import EvictionRule
from kvsieve.policy.position import InCache
from kvsieve.policy.specs import EvictionSpec

__all__ = ["StreamingLLM", "Window"]


@dataclass(frozen=True)
class Window(EvictionRule):
    """The first ``sinks`` tokens and the newest ``budget - sinks`` stay. A query sees them and itself."""

    budget: int | str
    sinks: int = 4
    contiguous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("sinks", self.sinks)
        check_budget(self.budget, sinks=self.sinks, recent=1, name="Window")

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        budget = tokens_for(self.budget, bytes_per_token)
        check_budget(budget, sinks=self.sinks, recent=1, name="Window")
        window = budget - self.sinks
        return EvictionSpec("window", sinks=self.sinks, window=window)


@as_plain
def StreamingLLM(budget: int | str, sinks: int = 4) -> Memory:
    """Keep the first ``sinks`` tokens and the newest ``budget - sinks``; distances count residents.

    Args:
        budget: residents per sequence, in tokens, or in bytes such as ``"64MiB"``.
        sinks: first real tokens of each sequence that are never evicted.

    Raises:
        BudgetError: if the budget does not hold the sinks and one more token.

    >>> StreamingLLM(1024)
    StreamingLLM(budget=1024, sinks=4)
    """
    evict = Window(budget=budget, sinks=sinks)
    return Memory(evict=evict, position=InCache(), text=f"StreamingLLM(budget={budget!r}, sinks={sinks})")
