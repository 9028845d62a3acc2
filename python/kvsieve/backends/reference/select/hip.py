"""HiP's choice (Lee et al., ICLR 2025, algorithm 1): a beam search over a binary tree of blocks, see :mod:`..definition`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvsieve.backends.reference.definition import Floats, Ints, Selection, best, check_region
from kvsieve.errors import PolicyError

if TYPE_CHECKING:
    from kvsieve.backends.reference.selection import Asked

__all__ = ["REPRESENTATIVES", "choose", "hip_search", "refresh"]

REPRESENTATIVES = ("middle", "first", "last", "oracle")
"""Which block speaks for a node: the middle one, the first, the last, or whichever is best (reads everything; for tests)."""


def refresh(rule: Any) -> tuple[int, ...]:
    """Steps after which each stage is computed again."""
    return (rule.refresh,)


def choose(rule: Any, asked: Asked) -> Selection:
    """What queries read between sinks and window."""
    return hip_search(asked.scores, asked.lo, asked.hi, rule.budget, rule.block, rule.representative)


def _blocks(lo: int, hi: int, block: int, chosen: Ints) -> tuple[Ints, Ints]:
    starts = lo + chosen * block
    return starts, np.minimum(starts + block, hi)


def hip_search(scores: Floats, lo: int, hi: int, budget: int, block: int = 2, representative: str = "middle") -> Selection:
    """HiP's choice of about ``budget`` tokens of the region, in blocks (Lee et al., ICLR 2025, algorithm 1).

    Args:
        scores: ``[Hkv, n]``, see :func:`group_scores`.
        lo, hi: the region, see :func:`region`.
        budget: tokens to choose, sinks and window not counted; rounded up to whole blocks.
        block: tokens of a block, which is chosen or left as a whole.
        representative: one of :data:`REPRESENTATIVES`.

    Raises:
        PolicyError: a budget or block below 1, or an unknown representative.
        ShapeError: a region outside the keys.
    """
    check_region(scores, lo, hi)
    if budget < 1 or block < 1:
        raise PolicyError(f"budget and block must be at least 1, got {budget} and {block}")
    if representative not in REPRESENTATIVES:
        raise PolicyError(f"representative must be one of {', '.join(REPRESENTATIVES)}, got {representative!r}")
    found = [_hip_head(row, lo, hi, budget, block, representative) for row in scores]
    starts, ends, reads, rounds = zip(*found) if found else ((), (), (), ())
    return Selection(lo, hi, starts, ends, reads, rounds)


def _hip_head(scores: Floats, lo: int, hi: int, budget: int, block: int, representative: str) -> tuple[Ints, Ints, int, int]:
    num, width = -(-(hi - lo) // block), -(-budget // block)
    if hi - lo <= budget or num <= width:
        return (*_blocks(lo, hi, block, np.arange(num)), 0, 0)
    padded = np.full(num * block, -np.inf)
    padded[: hi - lo] = np.where(np.isnan(scores[lo:hi]), -np.inf, scores[lo:hi])
    best_key = padded.reshape(num, block).max(1)

    bounds = np.arange(width + 1) * num // width
    left, right, rank = bounds[:-1], bounds[1:], np.full(width, -np.inf)
    reads = rounds = 0
    while np.any(right - left > 1):
        middle = left + (right - left) // 2
        left, right = np.stack([left, middle], 1).ravel(), np.stack([middle, right], 1).ravel()
        left, right = left[left < right], right[left < right]
        if representative == "oracle":
            found = np.array([best_key[lo:hi].max() for lo, hi in zip(left, right)])
            first, end = left, right
        else:
            first = {"middle": left + (right - left) // 2, "first": left, "last": right - 1}[representative]
            found, end = best_key[first], first + 1
        reads += int(np.sum(np.minimum(end * block, hi - lo) - first * block))
        rounds += 1
        chosen = best(found, width)
        left, right, rank = left[chosen], right[chosen], found[chosen]
    return (*_blocks(lo, hi, block, left[rank > -np.inf]), reads, rounds)
