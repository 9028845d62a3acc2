"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): what the end of the prompt looks at stays.

Departures from the published method, and why:

* A prompt may come in chunks, and turns may follow. Tokens are evicted again, with the newest queries, after every chunk that
  leaves the memory over budget, at the end of a turn, and while decoding whenever the memory is a whole block over budget.
  Published, this is done once, and what is generated afterwards stays for good.
* Attention scores of a group's query heads are added up, so that each key and value is held once, by its KV head; published, keys
  are repeated for each query head first.
* After the first eviction the tokens that pooling calls neighbours are neighbours among the residents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsieve.budget import check_budget, check_count, tokens_for
from kvsieve.checks import as_plain, plain_fields
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import HeadObservation, PerHeadEviction
from kvsieve.policy.position import Original
from kvsieve.policy.specs import EvictionSpec

if TYPE_CHECKING:
    import torch

__all__ = ["ObservationWindow", "SnapKV"]


@dataclass(frozen=True)
class ObservationWindow(PerHeadEviction):
    """The newest ``observe`` tokens stay, and those others with the highest attention scores of their queries; neighbours of up to
    ``kernel // 2`` tokens share the highest score. Li et al., NeurIPS 2024, arXiv 2404.14469.
    """

    budget: int | str
    observe: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("observe", self.observe, least=1)
        check_count("kernel", self.kernel, least=1)
        if self.kernel % 2 == 0:
            raise PolicyError(f"kernel must be odd, so that it has a middle, got {self.kernel}")
        self._check(self.budget)

    def _check(self, budget: int | str) -> None:
        check_budget(budget, sinks=0, recent=0, name="ObservationWindow")
        if isinstance(budget, int) and budget <= self.observe:
            raise BudgetError(
                f"ObservationWindow: a budget of {budget} tokens cannot hold the {self.observe} observed ones and one more; "
                f"give it at least {self.observe + 1}, or observe fewer"
            )

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        budget = tokens_for(self.budget, bytes_per_token)
        self._check(budget)
        return EvictionSpec("own", budget=budget, sinks=0, recent=self.observe)

    def scores(self, observation: HeadObservation) -> torch.Tensor:
        from torch.nn.functional import max_pool1d, pad

        others = observation.attention_scores()[:, : -self.observe]
        return pad(max_pool1d(others, self.kernel, stride=1, padding=self.kernel // 2), (0, self.observe))


@as_plain
def SnapKV(budget: int | str, observe: int = 32, kernel: int = 7) -> Memory:
    """Keep the newest ``observe`` tokens and, for each layer and KV head, the others that their queries look at most.

    A score is a softmax probability over all residents, summed over the queries and over the query heads of the group, then
    max-pooled along the tokens. A prompt that fits the budget loses nothing.

    Args:
        budget: residents per sequence and head, in tokens, or in bytes such as ``"64MiB"``.
        observe: newest tokens that stay and whose queries score the others.
        kernel: tokens that share the highest score among them; odd.

    Raises:
        BudgetError: if the budget does not hold the observed tokens and one more.
        PolicyError: for counts that are not, or an even kernel.

    >>> SnapKV(1024)
    SnapKV(budget=1024, observe=32, kernel=7)
    """
    evict = ObservationWindow(budget=budget, observe=observe, kernel=kernel)
    return Memory(evict=evict, position=Original(), text=f"SnapKV(budget={budget!r}, observe={observe}, kernel={kernel})")
