"""InfiniteHiP's search (Lee et al., 2025), and Quest's over page bounds (Tang et al., ICML 2024)."""

from __future__ import annotations

from typing import Any

from kvsieve._core import Sparse

__all__ = ["make"]


def make(rule: Any) -> Sparse:
    """The core's implementation of ``rule``."""
    return Sparse.infinite(
        list(rule.stages),
        rule.representative,
        rule.sinks,
        rule.window,
        list(rule.refresh),
        query_block=rule.query_block,
        query_stride=rule.query_stride,
        bounded=rule.page_bounds,
    )
