"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): tokens with high accumulated attention scores stay.

Departures from the published code, and why:

* Attention is added up for each KV head, over the query heads of its group, so that each key and value is held once.
* Tokens are evicted a block at a time in decode (published: one for each new one), so that memory moves seldom. Between two
  evictions a row holds up to 63 tokens over budget.
* A prompt read in chunks is brought down to the budget after each; published, prompts are read whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvsieve.budget import check_budget, check_count, tokens_for
from kvsieve.checks import as_plain, plain_fields
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import HeadObservation, PerHeadEviction
from kvsieve.policy.position import Original
from kvsieve.policy.specs import EvictionSpec

if TYPE_CHECKING:
    import torch

__all__ = ["H2O", "HeavyHitters"]


@dataclass(frozen=True)
class HeavyHitters(PerHeadEviction):
    """The first ``sinks``, the newest ``recent`` and the tokens that were given the most attention by all queries so far stay.
    Zhang et al., NeurIPS 2023, arXiv 2306.14048.
    """

    budget: int | str
    recent: int | None = None  # type: ignore[assignment]
    sinks: int = 0
    accumulates: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("sinks", self.sinks)
        if self.recent is not None:
            check_count("recent", self.recent)
        check_budget(self.budget, sinks=self.sinks, recent=self.recent or 0, name="HeavyHitters")

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        budget = tokens_for(self.budget, bytes_per_token)
        recent = budget // 2 if self.recent is None else self.recent
        check_budget(budget, sinks=self.sinks, recent=recent, name="HeavyHitters")
        return EvictionSpec("own", budget=budget, sinks=self.sinks, recent=recent)

    def scores(self, observation: HeadObservation) -> torch.Tensor:
        assert observation.accumulated_scores is not None
        return observation.accumulated_scores


@as_plain
def H2O(budget: int | str, recent: int | None = None, sinks: int = 0) -> Memory:
    """Keep the newest ``recent`` tokens and, for each layer and KV head, those others that were given the most attention.

    A token's score is the softmax probability that every query since gave it, its own included, summed over queries and over the
    query heads of the group.

    Args:
        budget: residents per sequence and head, in tokens, or in bytes such as ``"64MiB"``.
        recent: newest tokens that always stay; half of the budget by default.
        sinks: first real tokens of each sequence that are never evicted.

    Raises:
        BudgetError: if the budget does not hold the sinks and the recent tokens.
        PolicyError: for counts that are not.

    >>> H2O(1024)
    H2O(budget=1024)
    """
    evict = HeavyHitters(budget=budget, recent=recent, sinks=sinks)
    text = f"H2O(budget={budget!r}"
    text += "" if recent is None else f", recent={recent}"
    text += "" if sinks == 0 else f", sinks={sinks}"
    return Memory(evict=evict, position=Original(), text=text + ")")
