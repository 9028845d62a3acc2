"""Calls that change what a stream holds: one at a time among a stream and its forks, and clear of torch's modes.

Forks share blocks. What the planner decides (which blocks are free, which tokens move) and what the stores then do must not be
interleaved with another fork's: both happen under the lock of the family.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from kvsieve.runtime.modes import unrecorded

__all__ = ["Shared", "exclusive"]

P = ParamSpec("P")
T = TypeVar("T")


class Shared(Protocol):
    """What has a lock in common with its forks."""

    @property
    def lock(self) -> threading.RLock:
        """Held while one of them changes."""
        ...


S = TypeVar("S", bound=Shared)


def exclusive(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """``method`` under its first argument's lock, without gradients and outside of inference mode."""

    @functools.wraps(method)
    def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return unrecorded(method, self, *args, **kwargs)

    return cast("Callable[Concatenate[S, P], T]", wrapped)
