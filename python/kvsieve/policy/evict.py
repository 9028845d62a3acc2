"""Which tokens stay: the base of rules that keep the same in every layer and head, that of rules per head, and what each sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvsieve.budget import check_budget, tokens_for
from kvsieve.errors import PolicyError
from kvsieve.policy.specs import EvictionSpec

if TYPE_CHECKING:
    import torch

__all__ = ["EvictionRule", "HeadObservation", "KeepAll", "PerHeadEviction", "Residents"]


@dataclass(frozen=True)
class Residents:
    """What an eviction rule sees of one sequence: its resident tokens, in text order.

    Attributes:
        positions: int64 ``[n]``, the number of each token in its sequence.
        scores: float32 ``[n]``; nan where no score was given.
        seen: tokens the sequence has seen.
        turn_ended: whether this is the end of a turn rather than an overflow.
        pinned: bool ``[n]``, which of them :meth:`kvsieve.Stream.pin` said stay. They stay whether or not the rule keeps them:
            then they take the places of the oldest others.
        budget: most that may stay, in tokens: a rule whose budget is in bytes does not know it.
    """

    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    seen: int
    turn_ended: bool
    pinned: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    budget: int = 0


class HeadObservation(Protocol):
    """What a rule per head sees of one layer of one sequence when its heads must choose."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[Hkv, n]``, the true position of each resident of each head, ascending."""
        ...

    @property
    def queries(self) -> torch.Tensor:
        """``[H, m, D]``, the newest queries, as the model rotated them: as many as the rule observes, or as there are."""
        ...

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 ``[m]``."""
        ...

    @property
    def keys(self) -> torch.Tensor:
        """``[Hkv, n, D]``, those of the residents, as the model rotated them; copied at first use."""
        ...

    @property
    def accumulated_scores(self) -> torch.Tensor | None:
        """float32 ``[Hkv, n]``, the probability that each resident was given by every query since it came, summed over queries and
        over the query heads of a group; None unless the rule accumulates.
        """
        ...

    def attention_scores(self) -> torch.Tensor:
        """The probability that the newest queries give each resident now, summed as the accumulated: float32 ``[Hkv, n]``."""
        ...


class EvictionRule:
    """Which tokens stay resident. Subclass and write :meth:`keep` for a rule of one's own."""

    budget: int | str | None = None
    """Most residents after the rule ran, in tokens, or bytes as text; None when unbounded."""
    sinks: int = 0
    """First tokens of the sequence, in every keep."""
    recent: int = 0
    """Newest tokens, in every keep."""
    evicts: ClassVar[bool] = True
    """Whether any token is ever evicted."""
    per_head: ClassVar[bool] = False
    """Whether each key-value head of each layer keeps tokens of its own."""
    contiguous: ClassVar[bool] = False
    """Whether every keep is the sinks and one run of recent tokens."""
    needs_surprisal: ClassVar[bool] = False

    def keep(self, residents: Residents) -> Sequence[int]:
        """Indices of the residents that stay, ascending; the sinks, the recent ones and at most ``residents.budget`` in all."""
        raise NotImplementedError(f"{type(self).__name__} does not define keep()")

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        """What the planner is told of this rule; a budget in bytes becomes tokens."""
        if self.budget is None:
            raise PolicyError(f"{type(self).__name__} needs a budget: set the attribute `budget` to a count of tokens")
        check_budget(self.budget, sinks=self.sinks, recent=self.recent, name=type(self).__name__)
        budget = tokens_for(self.budget, bytes_per_token)
        check_budget(budget, sinks=self.sinks, recent=self.recent, name=type(self).__name__)
        return EvictionSpec("own", budget=budget, sinks=self.sinks, recent=self.recent)


@dataclass(frozen=True)
class KeepAll(EvictionRule):
    """Every token stays."""

    evicts: ClassVar[bool] = False
    contiguous: ClassVar[bool] = True

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        return EvictionSpec("keep_all")


class PerHeadEviction(EvictionRule):
    """Which tokens each key-value head of each layer keeps. Subclass and write :meth:`scores` for a rule of one's own.

    Every head keeps equally many: the first ``sinks`` and the newest ``recent`` residents, and of the others those that it scores
    highest. The rule acts when it is a whole block over budget, after every longer forward that left it over budget, and at the end
    of a turn. Tokens are seen at their true distance (:class:`Original`).
    """

    per_head: ClassVar[bool] = True
    observe: int = 0
    """Newest queries that are kept for the rule to look at."""
    accumulates: bool = False
    """Whether attention scores are added up, at every forward."""

    def scores(self, observation: HeadObservation) -> torch.Tensor:
        """A score for every resident of every head: float ``[Hkv, n]``, on any device.

        Equal scores prefer the earlier token; nan comes last. The scores of sinks and recent tokens are not looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define scores()")

    def keep(self, residents: Residents) -> Sequence[int]:
        raise PolicyError(f"{type(self).__name__} keeps other tokens for each head; it has no one answer for all")
