"""HiP's search (Lee et al., ICLR 2025)."""

from __future__ import annotations

from typing import Any

from kvsieve._core import Sparse

__all__ = ["make"]


def make(rule: Any) -> Sparse:
    """The core's implementation of ``rule``."""
    return Sparse.hip(
        rule.budget,
        rule.block,
        rule.representative,
        rule.sinks,
        rule.window,
        rule.refresh,
        query_block=rule.query_block,
        query_stride=rule.query_stride,
    )
