"""Locks that a forked process finds open.

The child of a fork has the parent's memory, but of its threads only the one that forked: a lock that another thread held stays held
there for ever, and what it guards stays half changed. So a fork waits until the other threads have left what these locks guard,
which is bookkeeping, done in milliseconds, or a step of a batch. (The core's own locks do the same; see `fork.rs`.)
"""

from __future__ import annotations

import os
import threading
import time
import weakref

__all__ = ["shared_lock"]

PATIENCE = 5.0
"""Seconds that a fork waits for all locks together. One that is not to be had until then (two threads may wait for each other, the
one that forks among them) is new in the child."""

_registry = threading.RLock()
_known: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_held: list[threading.RLock] = []
_missed: list[threading.RLock] = []


def shared_lock() -> threading.RLock:
    """A lock that its thread may take again, and that forks wait for."""
    made = threading.RLock()
    with _registry:
        _known.add(made)
    return made


def _before() -> None:
    _registry.acquire()
    deadline = time.monotonic() + PATIENCE
    for lock in list(_known):
        (_held if lock.acquire(timeout=max(deadline - time.monotonic(), 0.0)) else _missed).append(lock)


def _after() -> None:
    for lock in _held:
        lock.release()
    _held.clear()
    _missed.clear()
    _registry.release()


def _after_in_child() -> None:
    for lock in _missed:
        lock._at_fork_reinit()  # type: ignore[attr-defined]
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
