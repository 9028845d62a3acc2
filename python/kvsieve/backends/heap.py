"""The heap that tensors of every backend come from."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["trim_heap"]


def trim_heap() -> None:
    """Return to the system what was freed in the middle of the heap.

    glibc keeps it: what is smaller than the largest tensor freed so far comes from the heap, of which only the end ever shrinks.
    Other allocators need not be told.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
