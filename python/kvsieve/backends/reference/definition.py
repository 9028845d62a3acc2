"""Which keys a query block reads when everything is kept: the specification of HiP and InfiniteHiP, slow and obvious.

Keys ``0..n`` of one row in text order, a key's index being its true position; queries at true positions ``p_i``, ``i = 0..m-1``,
that share one choice. ``S`` sinks and a window of ``W`` tokens are always read, so the selection is from the *region* between them:

    region   = [S, max p_i + 1 - W)
    score(t) = max over the query heads of a KV head's group, and the sampled queries with t <= p_i - W, of q . k_t  else -inf
    kept(t)  = 0 <= p_i - t, and (t < S, or p_i - t < W, or t in a chosen block)

Sampled are the last query and every ``stride``-th before it. One choice for each KV head. A region within the budget is chosen
whole, without reading a key: attention is then exact.

Keys that are stored before their rotation (pre-RoPE; a key's index is then its number among the residents, whatever its true
position) can be scored in two ways, and read in two:

    placed       score and read them where the policy shows them: at their true positions, or in their slots
    relative     score as if every key were W away from every query: content alone decides, and no key is rotated
    consecutive  read what a head keeps as if nothing lay between: the nearest key before the query is 1 away, the next one 2, ...

Bounds (below) of keys that are stored before their rotation are *relative* in either case.

The last two are InfiniteHiP's way past the trained length. With a budget for all, *consecutive* is full attention in slots.

*HiP* (Lee et al., ICLR 2025) is a beam search of ``m`` nodes over an implicit binary tree of blocks:

    nodes = m equal ranges of the region's blocks
    while a node has more than one block:
        children = halves of the nodes (the right one is never the shorter)
        score(child) = best key of its representative block
        nodes = the m best children

*InfiniteHiP* (Lee et al., 2025) narrows the region in stages, each judging chunks on their own:

    chunks = [region]
    for each stage (length l, keep k):
        chunks = ranges of at most l tokens of the chunks
        score(chunk) = best of the keys met on the way down, by halves, always to the half of the better representative
        chunks = the k / l best chunks

*Bounds* (after Quest, Tang et al., ICML 2024) may judge the chunks of the first stage, which are then the blocks ``b`` of 64 keys
``64 b .. 64 b + 63``; sinks are whole blocks, and the window is at least one, so that all of them are whole:

    bound(b) = max over the same queries, if 64 b <= p_i - W, of  sum over channels c of max(q_c * max_bc, q_c * min_bc)

where ``max`` and ``min`` are over the keys of the block as attention reads them: of codes, what they stand for; of a dropped
channel, 0. Both are of the dtype of the layer, rounded outwards where a code's number is none of it (finite ones to finite ones),
so no key of the block scores more. ``max(x * y, x * z)`` is computed as the positive part of ``x`` times ``y`` plus the negative
part times ``z``; a block with a NaN in a key scores ``-inf``.

Where this departs from the papers, or decides what they leave open:

* One choice for a KV head, by the maximum over its group; HiP's is for a query head. Keys are then read once for the group.
* Boundaries are integer floors and half-open. HiP's rounding rule is not given.
* The last block or chunk of a region may be shorter than the others. Blocks are counted from the region's start.
* Sampled queries are counted back from the last of a block, which alone sees the whole region: HiP's sub-sampling, where also a
  block that a chunk cuts short has its last query sampled.
* Equal scores: the earlier block wins. A key of NaN, or one that no query of the block may see, scores -inf; a block that scores
  -inf is never chosen, so a choice may be smaller than the budget.
* Scores are plain products: neither the scale nor a soft cap changes an order. No sigmoid (it ties high logits); a product of 0 is
  a score like any other.
* A chunk's score is the best key met, not only the last; with ``first`` these are equal.
* A window is frozen between refreshes: a query at ``p`` that uses the choice of a query at ``p0`` has a window of ``W + p - p0``,
  so that no key falls between the choice and the window.
* *relative* is one distance, W, for all; the paper compares halves at W + 1 and W, and indexes by chunk in the first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.attention import attend
from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError, ShapeError

if TYPE_CHECKING:
    from kvsieve.facts import LayerRope

__all__ = [
    "Selection",
    "best",
    "bound_scores",
    "check_region",
    "consecutive_attend",
    "first_stage",
    "group_scores",
    "kept",
    "outwards",
    "placed",
    "region",
    "relative",
    "sparse_attend",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Selection:
    """What a query block reads between sinks and window, for each KV head."""

    lo: int
    hi: int
    """The region that was selected from."""
    starts: tuple[Ints, ...]
    """First tokens of the chosen blocks, ascending."""
    ends: tuple[Ints, ...]
    """One past their last tokens."""
    reads: tuple[int, ...]
    """Representative keys scored; one that is met twice counts twice."""
    rounds: tuple[int, ...]
    """Levels of the tree, or stages, that were scored."""
    inputs: tuple[tuple[Ints, ...], ...] = field(default=(), repr=False)
    """InfiniteHiP: for each stage and KV head the ranges ``[c, 2]`` that went into it. A later search can begin there."""

    def tokens(self, head: int) -> Ints:
        """The chosen tokens of a KV head, ascending."""
        pieces = [np.arange(lo, hi) for lo, hi in zip(self.starts[head], self.ends[head])]
        return np.concatenate([np.empty(0, np.int64), *pieces])


def region(positions: Sequence[int], sinks: int, window: int) -> tuple[int, int]:
    """``[lo, hi)`` that queries at ``positions`` search; empty (``lo == hi``) where sinks and window meet."""
    _counts(sinks=sinks, window=window)
    if len(positions) == 0:
        raise ShapeError("a query block needs at least one query, got none")
    hi = max(0, max(positions) + 1 - window)
    return min(sinks, hi), hi


def group_scores(
    q: torch.Tensor, k: torch.Tensor, positions: Sequence[int], window: int, stride: int = 1
) -> npt.NDArray[np.float64]:
    """Score of each key for each KV head: float64 ``[Hkv, n]``.

    Args:
        q: ``[H, m, D]``, unscaled, rotated or not, as ``k``. ``H`` is a multiple of ``Hkv``.
        k: ``[Hkv, n, D]``; key ``t`` has true position ``t``.
        positions: true positions of the ``m`` queries.
        window: a query does not score keys that its window shows anyway.
        stride: only every so many queries score, counted back from the last.

    Raises:
        PolicyError: a stride below 1.
        ShapeError: tensors that do not fit together.
    """
    q, at = _asked(q, k, positions, stride)
    logits = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(-1, -2)
    return _greatest(logits, torch.arange(k.shape[1]), at, window, k.shape[0])


def bound_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: Sequence[int],
    window: int,
    stride: int = 1,
    dtype: torch.dtype | None = None,
) -> npt.NDArray[np.float64]:
    """What each whole block's keys can score at most, for each KV head: float64 ``[Hkv, n // 64]``; arguments and errors as of
    :func:`group_scores`. ``dtype``: of the bounds, if it is not that of ``k``."""
    q, at = _asked(q, k, positions, stride)
    num = k.shape[1] // BLOCK
    blocks = k[:, : num * BLOCK].reshape(k.shape[0], num, BLOCK, k.shape[2])
    both = (outwards(blocks.amax(2), dtype or k.dtype, up=True), outwards(blocks.amin(2), dtype or k.dtype, up=False))
    most, least = (x.double().repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(-1, -2) for x in both)
    logits = q.double().clamp(min=0) @ most + q.double().clamp(max=0) @ least
    return _greatest(logits, torch.arange(num) * BLOCK, at, window, k.shape[0])


def outwards(x: torch.Tensor, dtype: torch.dtype, *, up: bool) -> torch.Tensor:
    """The nearest numbers of ``dtype`` that are not below ``x``, or not above it. Finite ones become finite ones."""
    near = x.to(dtype)
    if torch.equal(near.to(x.dtype), x):
        return near
    limit = torch.finfo(dtype).max
    near = torch.where(x.isfinite(), near.clamp(-limit, limit), near)
    # The next number: of positive ones one bit pattern up is more, of negative ones it is less.
    bits = near.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    away = torch.where(near == 0, bits.new_tensor(1 if up else torch.iinfo(bits.dtype).min + 1), bits + (1 if up else -1))
    toward = torch.where(near < 0, bits - (1 if up else -1), away).view(dtype)
    short = (near.to(x.dtype) < x) if up else (near.to(x.dtype) > x)
    return torch.where(short & toward.isfinite(), toward, near)


def _asked(q: torch.Tensor, k: torch.Tensor, positions: Sequence[int], stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries that score, and their positions."""
    if stride < 1:
        raise PolicyError(f"stride must be at least 1, got {stride}")
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] % k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] != len(positions):
        raise ShapeError(
            f"expected queries [heads, {len(positions)}, D] and keys [kv heads, n, D], got {list(q.shape)} and {list(k.shape)}"
        )
    first = max(len(positions) - 1, 0) % stride
    return q[:, first::stride], torch.tensor(list(positions[first::stride]))


def _greatest(
    logits: torch.Tensor, key_at: torch.Tensor, query_at: torch.Tensor, window: int, num_kv_heads: int
) -> npt.NDArray[np.float64]:
    """Of scores ``[H, m, n]`` the maximum of each KV head's group, of the queries that see a key outside their window."""
    hidden = key_at[None, :] > query_at[:, None] - window
    logits = logits.masked_fill(hidden | logits.isnan(), -torch.inf)
    return logits.reshape(num_kv_heads, -1, logits.shape[2]).amax(1).numpy()


def placed(
    q: torch.Tensor, k: torch.Tensor, query_at: Sequence[int], key_at: Sequence[int], rope: LayerRope | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-RoPE queries ``[H, m, D]`` and keys ``[Hkv, n, D]`` rotated to where they are shown, for :func:`group_scores` and
    :func:`sparse_attend`. Without a rotation (None) they are as they were."""
    if rope is None:
        return q, k
    return rope.rotate(q, torch.tensor(list(query_at))), rope.rotate(k, torch.tensor(list(key_at)))


def relative(q: torch.Tensor, k: torch.Tensor, window: int, rope: LayerRope | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-RoPE queries and keys as :func:`group_scores` takes them where all keys count as ``window`` away (InfiniteHiP)."""
    return placed(q, k, [window] * q.shape[1], [0] * k.shape[1], rope)


def _counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise PolicyError(f"{name} must be at least 0, got {value}")


def check_region(scores: Floats, lo: int, hi: int) -> None:
    if scores.ndim != 2:
        raise ShapeError(f"expected scores [kv heads, n], got {list(scores.shape)}")
    if not 0 <= lo <= hi <= scores.shape[1]:
        raise ShapeError(f"the region {lo}..{hi} is not within the {scores.shape[1]} keys")


def best(scores: Floats, count: int) -> Ints:
    """Ascending indices of the ``count`` best; of equal ones the earlier."""
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    return np.sort(order[:count])


def first_stage(step: int, refresh: Sequence[int]) -> int | None:
    """The first stage that decoding step ``step`` (from 0) computes again, and all later ones; None when the choice stands."""
    if any(every < 1 for every in refresh):
        raise PolicyError(f"a stage is refreshed every so many steps, at least 1, got {list(refresh)}")
    return next((stage for stage, every in enumerate(refresh) if step % every == 0), None)


def kept(selection: Selection, positions: Sequence[int], num_keys: int, sinks: int, window: int) -> torch.Tensor:
    """Which keys each query reads: bool ``[Hkv, m, n]``. Sinks, window and choice are a union, so no key counts twice.

    ``window`` is that of these queries: for a query later than the one that selected, wider by the difference of their positions.
    """
    _counts(sinks=sinks, window=window)
    chosen = np.zeros((len(selection.starts), 1, num_keys), bool)
    for head in range(len(chosen)):
        chosen[head, 0, selection.tokens(head)] = True
    at, key = np.array(positions, np.int64)[:, None], np.arange(num_keys)
    return torch.from_numpy((key <= at) & ((key < sinks) | (at - key < window) | chosen))


def sparse_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kvsieve.backends.attention.attend`, where each KV head has keys of its own: ``visible`` bool ``[Hkv, m, n]``."""
    return attend(q, k, v, visible.repeat_interleave(q.shape[0] // k.shape[0], 0), scale, softcap)


def consecutive_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    positions: Sequence[int],
    rope: LayerRope | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sparse_attend` over pre-RoPE queries and keys, where each query numbers the keys it reads ``0, 1, ...`` and stands
    right behind those before it (InfiniteHiP's streaming order).

    Args:
        positions: the keys' indices that the queries themselves have.
    """
    group = q.shape[0] // k.shape[0]
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
    table = None if rope is None else rope.table(torch.arange(k.shape[1] + 1), q.dtype)

    def turned(x: torch.Tensor, first: int) -> torch.Tensor:
        """``x`` ``[h, n, D]`` at places ``first, first + 1, ...``."""
        if rope is None or table is None:
            return x
        cos, sin = (one[first : first + x.shape[1]] for one in table)
        return rope.turn(x, (cos, sin))

    for head, mine in enumerate(visible):
        heads = slice(head * group, (head + 1) * group)
        for i, position in enumerate(positions):
            tokens = mine[i].nonzero()[:, 0]
            before = int((tokens < position).sum())
            query, keys = turned(q[heads, i : i + 1], before), turned(k[head : head + 1, tokens], 0)
            seen = torch.ones(1, len(tokens), dtype=torch.bool)
            found = attend(query, keys, v[head : head + 1, tokens], seen, scale, softcap)
            out[heads, i : i + 1], lse[heads, i : i + 1] = found
    return out, lse
