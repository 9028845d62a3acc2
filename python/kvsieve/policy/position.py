"""At which distance a query sees each resident token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvsieve.budget import check_count
from kvsieve.policy.evict import Retain

__all__ = ["AsRotated", "Ceiling", "Consecutive", "Fixed", "Frame", "Place", "Slots"]

Frame = Literal["rotated", "raw"]


class Place:
    """At which distance a query sees each resident token."""

    moves: ClassVar[bool] = True
    """Whether a token may be seen at another distance than its true one."""
    collapses: ClassVar[bool] = False
    """Whether tokens of several distances are seen at one."""
    needs_window: ClassVar[bool] = False
    """Whether it is relative to the edge of a window, which only the first memory of a chain has."""
    renumbers: ClassVar[bool] = False
    """Whether it numbers what a search found."""

    def frame(self, retain: Retain) -> Frame:
        """The frame in which keys must be stored for this rule to be exact."""
        return "raw"

    def spec(self) -> dict[str, Any]:
        """This rule in the control plane's terms."""
        raise NotImplementedError


@dataclass(frozen=True)
class AsRotated(Place):
    """At its true distance, as the model rotated it."""

    moves: ClassVar[bool] = False

    def frame(self, retain: Retain) -> Frame:
        return "rotated"

    def spec(self) -> dict[str, Any]:
        return {"place": "true"}


@dataclass(frozen=True)
class Slots(Place):
    """As if the residents stood side by side: the distance counts residents, not tokens of the text."""

    def frame(self, retain: Retain) -> Frame:
        return "rotated" if retain.contiguous else "raw"

    def spec(self) -> dict[str, Any]:
        return {"place": "slots"}


@dataclass(frozen=True)
class Ceiling(Place):
    """At its true distance inside the window; the sinks beyond it at ``distance``."""

    distance: int
    collapses: ClassVar[bool] = True
    needs_window: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("ceiling", self.distance, least=1)

    def spec(self) -> dict[str, Any]:
        return {"place": "ceiling", "distance": self.distance}


@dataclass(frozen=True)
class Consecutive(Place):
    """At its true distance while all that was seen lies within ``after`` tokens, by default the model's trained length.

    Beyond, what a query reads stands side by side, ending at the query, in every layer, and a :class:`Search` compares by content
    alone, all keys at one distance. The longest row of a batch decides for all. Lee et al., 2025, arXiv 2502.08910.
    """

    after: int | None = None
    renumbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.after is not None:
            check_count("after", self.after)

    def spec(self) -> dict[str, Any]:
        return {"place": "true"}


@dataclass(frozen=True)
class Fixed(Place):
    """Every token at one ``distance``."""

    distance: int
    collapses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("distance", self.distance)

    def spec(self) -> dict[str, Any]:
        return {"place": "fixed", "distance": self.distance}
