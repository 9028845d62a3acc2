"""What the process as a whole is asked for: that Ctrl-C waits, and that freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["defer_sigint", "trim_heap"]


@contextmanager
def defer_sigint() -> Iterator[None]:
    """SIGINT waits until the block is left; then its handler is called. Who insists, by a second one, is heard at once.

    In other threads than the main one, which alone is interrupted, nothing is done.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if arrived:
            before(number, frame)
        arrived.append((number, frame))

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        before(*arrived[-1])


def trim_heap() -> None:
    """Return to the system what was freed in the middle of the heap.

    glibc keeps it: what is smaller than the largest tensor freed so far comes from the heap, of which only the end ever shrinks.
    Other allocators need not be told.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
