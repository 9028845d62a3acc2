"""What a policy hands to the Rust core, and the only place where its words become the core's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvsieve._core import Planner

__all__ = ["EvictionSpec", "MemorySpec", "PositionSpec", "StoredKeys", "core_frame", "make_planner", "to_core"]

StoredKeys = Literal["post_rope", "pre_rope"]
"""Whether keys are stored as the model rotated them, or as they were before."""


@dataclass(frozen=True)
class EvictionSpec:
    """An eviction rule, its budget in tokens.

    Attributes:
        rule: which of the core's rules; ``"own"`` for one that is asked in Python.
        budget: most residents after the rule has acted; 0 where it does not count them: where all stay, or a window slides.
        sinks, recent: first and newest tokens that always stay.
        window: newest tokens that stay besides the sinks, where nothing else does; 0 of other rules.
        published: whether scores and ranking are those of SirLLM's published code.
    """

    rule: Literal["keep_all", "window", "surprisal", "own"]
    budget: int = 0
    sinks: int = 0
    recent: int = 0
    window: int = 0
    published: bool = False

    @property
    def visible(self) -> int:
        """Newest tokens that a query sees in a window, itself included; 0 of other rules."""
        return self.window + 1 if self.rule == "window" else 0


@dataclass(frozen=True)
class PositionSpec:
    """A position rule; ``distance`` where it shows tokens at a given one."""

    rule: Literal["original", "in_cache", "capped", "fixed"]
    distance: int | None = None


@dataclass(frozen=True)
class MemorySpec:
    """One memory; ``top_k`` where the last query of a forward reads only so many of its tokens."""

    evict: EvictionSpec
    position: PositionSpec
    top_k: int = 0


_RULES = {"keep_all": "all", "window": "window", "surprisal": "surprisal", "own": "manual"}
_POSITIONS = {"original": "true", "in_cache": "slots", "capped": "ceiling", "fixed": "fixed"}
_FRAMES = {"post_rope": "rotated", "pre_rope": "raw"}


def to_core(spec: MemorySpec) -> dict[str, Any]:
    """``spec`` in the core's words."""
    evict, position = spec.evict, spec.position
    return {
        "retain": _RULES[evict.rule],
        "budget": evict.budget,
        "sinks": evict.sinks,
        "recent": evict.recent,
        "window": evict.window,
        "published": evict.published,
        "visible": evict.visible or None,
        "place": _POSITIONS[position.rule],
        "distance": position.distance,
        "top_k": spec.top_k,
    }


def core_frame(stored_keys: str) -> str:
    """How keys are stored, in the core's words."""
    return _FRAMES[stored_keys]


def make_planner(specs: Sequence[MemorySpec], stored_keys: str) -> Planner:
    """The core's planner of a stream whose memories are ``specs``."""
    return Planner([to_core(spec) for spec in specs], core_frame(stored_keys))
