"""InfiniteHiP's choice (Lee et al., 2025, section 4.1), and Quest's: stages that narrow the region, see :mod:`..definition`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsieve.backends.reference.definition import Floats, Ints, Selection, best, check_region
from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError

if TYPE_CHECKING:
    from kvsieve.backends.reference.selection import Asked

__all__ = ["best_on_the_way", "choose", "infinite_hip_search", "refresh"]


def refresh(rule: Any) -> tuple[int, ...]:
    """Steps after which each stage is computed again."""
    return tuple(rule.refresh)


def choose(rule: Any, asked: Asked) -> Selection:
    """What queries read between sinks and window."""
    chunks, keep = zip(*rule.stages)
    inputs = asked.inputs if asked.start else ()
    return infinite_hip_search(
        asked.scores, asked.lo, asked.hi, chunks, keep, rule.representative, start=asked.start, inputs=inputs, bounds=asked.bounds
    )


def best_on_the_way(scores: Floats, chunks: Ints, representative: str) -> tuple[Floats, Ints, int]:
    """Walks down each chunk, always to the half whose representative key is better (ties: the left).

    Args:
        scores: ``[n]``; chunks: ``[c, 2]``, none empty; representative: ``"first"`` or ``"middle"`` key of a half.

    Returns:
        For each chunk the best score met and the token it ended at; and the number of keys scored: two a level, one for a chunk of
        one token.
    """
    if representative not in ("first", "middle"):
        raise PolicyError(f"representative must be first or middle, got {representative!r}")
    scores = np.where(np.isnan(scores), -np.inf, scores)
    lo, hi = chunks[:, 0].copy(), chunks[:, 1].copy()
    best = np.where(hi - lo == 1, scores[lo], -np.inf)
    reads = int(np.sum(hi - lo == 1))
    while np.any(hi - lo > 1):
        live = hi - lo > 1
        mid = (lo + hi) // 2
        left, right = (lo, mid) if representative == "first" else ((lo + mid) // 2, (mid + hi) // 2)
        a, b = scores[left], scores[right]
        go = live & (b > a)
        best = np.where(live, np.maximum(best, np.maximum(a, b)), best)
        lo, hi = np.where(go, mid, lo), np.where(live & ~go, mid, hi)
        reads += 2 * int(np.sum(live))
    return best, lo, reads


def _cut(ranges: Ints, length: int) -> Ints:
    """Ranges ``[c, 2]`` cut into pieces of at most ``length`` tokens."""
    pieces = [(at, min(at + length, hi)) for lo, hi in ranges.tolist() for at in range(lo, hi, length)]
    return np.array(pieces, np.int64).reshape(-1, 2)


def infinite_hip_search(
    scores: Floats,
    lo: int,
    hi: int,
    chunks: Sequence[int] = (256, 32, 8),
    keep: Sequence[int] = (32768, 8192, 2048),
    representative: str = "first",
    *,
    start: int = 0,
    inputs: tuple[tuple[Ints, ...], ...] = (),
    every_stage: bool = False,
    bounds: Floats | None = None,
) -> Selection:
    """InfiniteHiP's choice of at most ``keep[-1]`` tokens of the region (Lee et al., 2025, section 4.1).

    Args:
        scores: ``[Hkv, n]``, see :func:`group_scores`; lo, hi: the region, see :func:`region`.
        chunks: tokens of a chunk in each stage, each a multiple of the next.
        keep: tokens that leave each stage, each a multiple of its chunk.
        representative: ``"first"`` key of a half (the paper), or its ``"middle"``.
        start: the first stage to compute; earlier ones are taken from ``inputs``, of an earlier selection over the same region.
        every_stage: score also where all chunks stay anyway, as the paper counts.
        bounds: ``[Hkv, blocks]``, see :func:`bound_scores`: judge the first stage's chunks, blocks of the text, by these. Each
            counts as two reads.

    Raises:
        PolicyError: stages that do not divide each other, or ``inputs`` that do not go with ``start``; bounds of other blocks.
        ShapeError: a region outside the keys.
    """
    check_region(scores, lo, hi)
    _check_stages(chunks, keep)
    if bounds is not None and (chunks[0] != BLOCK or lo % BLOCK or bounds.shape[1] * BLOCK < hi):
        raise PolicyError(f"bounds are of blocks of {BLOCK} tokens, which {lo}..{hi} in chunks of {chunks[0]} are not")
    if not 0 <= start < len(chunks) or (start > 0 and len(inputs) != len(chunks)):
        raise PolicyError(f"a selection of {len(chunks)} stages from stage {start} on needs the inputs of all, got {len(inputs)}")
    stages: list[tuple[Ints, ...]] = list(inputs[:start])
    reads, rounds = [0] * len(scores), [0] * len(scores)
    whole = np.array([[lo, hi]] if hi > lo else [], np.int64).reshape(-1, 2)
    last = inputs[start] if start else tuple(whole for _ in scores)
    dense = hi - lo <= keep[-1] and not every_stage
    for stage, (length, most) in list(enumerate(zip(chunks, keep)))[start:]:
        stages.append(last)
        out = []
        for head, row in enumerate(scores):
            pieces = _cut(last[head], length)
            if len(pieces) and not dense and (every_stage or len(pieces) > most // length):
                if stage == 0 and bounds is not None:
                    found = np.where(np.isnan(bounds[head]), -np.inf, bounds[head])[lo // BLOCK : lo // BLOCK + len(pieces)]
                    count = 2 * len(pieces)
                else:
                    found, _, count = best_on_the_way(row, pieces, representative)
                reads[head], rounds[head] = reads[head] + count, rounds[head] + 1
                chosen = best(found, most // length)
                pieces = pieces[chosen[found[chosen] > -np.inf]]
            out.append(pieces)
        last = tuple(out)
    starts, ends = tuple(x[:, 0] for x in last), tuple(x[:, 1] for x in last)
    return Selection(lo, hi, starts, ends, tuple(reads), tuple(rounds), tuple(stages))


def _check_stages(chunks: Sequence[int], keep: Sequence[int]) -> None:
    if not chunks or len(chunks) != len(keep) or min(chunks) < 1 or min(keep) < 1:
        raise PolicyError(
            f"stages need as many chunk lengths as counts to keep, all at least 1, got {list(chunks)} and {list(keep)}"
        )
    if any(a % b for a, b in pairwise(chunks)) or any(k % c for c, k in zip(chunks, keep)):
        raise PolicyError(
            f"a chunk must be a multiple of the next one, and what is kept of its chunk, got {list(chunks)} and {list(keep)}"
        )
