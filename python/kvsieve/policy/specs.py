"""What a policy hands to the Rust core, which has the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvsieve._core import Eviction, Memory, Planner, PositionRule

__all__ = ["EvictionSpec", "MemorySpec", "PositionSpec", "StoredKeys", "make_planner", "to_core"]

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


def to_core(spec: MemorySpec) -> Memory:
    """``spec`` for the core."""
    return Memory(_eviction(spec.evict), _position(spec.position), spec.evict.visible or None, spec.top_k)


def _eviction(spec: EvictionSpec) -> Eviction:
    if spec.rule == "keep_all":
        return Eviction.keep_all()
    if spec.rule == "window":
        return Eviction.window(spec.sinks, spec.window)
    if spec.rule == "surprisal":
        return Eviction.surprisal(spec.budget, spec.sinks, spec.recent, spec.published)
    return Eviction.own(spec.budget, spec.sinks, spec.recent)


def _position(spec: PositionSpec) -> PositionRule:
    if spec.rule == "original":
        return PositionRule.original()
    if spec.rule == "in_cache":
        return PositionRule.in_cache()
    distance = spec.distance or 0
    return PositionRule.capped(distance) if spec.rule == "capped" else PositionRule.fixed(distance)


def make_planner(specs: Sequence[MemorySpec], stored_keys: str) -> Planner:
    """The core's planner of a stream whose memories are ``specs``."""
    return Planner([to_core(spec) for spec in specs], stored_keys)
