"""At which distance a query sees each resident token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsieve.budget import check_count
from kvsieve.checks import plain_fields
from kvsieve.policy.evict import EvictionRule
from kvsieve.policy.specs import PositionSpec, StoredKeys

__all__ = ["Capped", "Fetched", "FixedDistance", "InCache", "Original", "PositionRule", "Rebased"]


class PositionRule:
    """At which distance a query sees each resident token."""

    moves: ClassVar[bool] = True
    """Whether a token may be seen at another distance than its true one."""
    collapses: ClassVar[bool] = False
    """Whether tokens of several distances are seen at one."""
    needs_window: ClassVar[bool] = False
    """Whether it is relative to the edge of a window, which only the first memory of a chain has."""
    renumbers: ClassVar[bool] = False
    """Whether it numbers what a sparse selection found."""
    places_fetched: ClassVar[bool] = False
    """Whether tokens are seen where a selection places what it fetches."""

    def stored_keys(self, evict: EvictionRule) -> StoredKeys:
        """How keys must be stored for this rule to be exact."""
        return "pre_rope"

    def spec(self) -> PositionSpec:
        """What the planner is told of this rule."""
        raise NotImplementedError(f"{type(self).__name__} does not define spec()")


@dataclass(frozen=True)
class Original(PositionRule):
    """At its true distance, as the model rotated it."""

    moves: ClassVar[bool] = False

    def stored_keys(self, evict: EvictionRule) -> StoredKeys:
        return "post_rope"

    def spec(self) -> PositionSpec:
        return PositionSpec("original")


@dataclass(frozen=True)
class InCache(PositionRule):
    """As if the residents stood side by side: the distance counts residents, not tokens of the text."""

    def stored_keys(self, evict: EvictionRule) -> StoredKeys:
        return "post_rope" if evict.contiguous else "pre_rope"

    def spec(self) -> PositionSpec:
        return PositionSpec("in_cache")


@dataclass(frozen=True)
class Capped(PositionRule):
    """At its true distance inside the window; the sinks beyond it at ``distance``."""

    distance: int
    collapses: ClassVar[bool] = True
    needs_window: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("ceiling", self.distance, least=1)

    def spec(self) -> PositionSpec:
        return PositionSpec("capped", self.distance)


@dataclass(frozen=True)
class Rebased(PositionRule):
    """At its true distance while all that was seen lies within ``after`` tokens, by default the model's trained length.

    Beyond, what a query reads stands side by side, ending at the query, in every layer, and a sparse selection compares by content
    alone, all keys at one distance. The longest row of a batch decides for all. Lee et al., 2025, arXiv 2502.08910.
    """

    after: int | None = None
    renumbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.after is not None:
            check_count("after", self.after)

    def spec(self) -> PositionSpec:
        return PositionSpec("original")


@dataclass(frozen=True)
class FixedDistance(PositionRule):
    """Every token at one ``distance``."""

    distance: int
    collapses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("distance", self.distance)

    def spec(self) -> PositionSpec:
        return PositionSpec("fixed", self.distance)


@dataclass(frozen=True)
class Fetched(PositionRule):
    """Where a selection that fetches blocks places them; see :class:`kvsieve.policy.FetchedSelection`."""

    places_fetched: ClassVar[bool] = True

    def spec(self) -> PositionSpec:
        return PositionSpec("original")
