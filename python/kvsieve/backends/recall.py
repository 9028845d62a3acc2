"""Attention to what is found in a bank, and how it joins a stream's own: plain torch, on the CPU, where banks lie.

For one row and layer, with queries ``q`` rotated to the one distance at which a bank's tokens are seen:

    asks      = for each KV head the sum over its group's query heads, the mean over a block of queries
    scores    = <asks, mean key of each whole chunk>, for each KV head or summed over all of them
    chunks    = the best ``count``, of equal ones the newer
    found     = softmax attention of every query to the tokens of its block's chunks, with its log-sum-exp
    joined    = own + gate * (found - own),  gate = sigmoid(lse of found + bias - lse of own)

which is one softmax over the keys of both, the bank's logits raised by ``bias``. Queries of a prompt share a choice by blocks of
``QUERIES``, by their positions; a generated token chooses for itself.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from kvsieve.backends.attention import Partial, attend
from kvsieve.backends.ranking import greatest

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.bank.entries import Entries, Piece
    from kvsieve.facts import LayerRope

__all__ = ["QUERIES", "choose", "gather", "joined", "recall", "table_of"]

QUERIES = 16
"""Queries of a prompt that share a choice: those of equal ``position // QUERIES`` in one forward."""

FEW = 64
"""So many chunks, of all heads, are read one by one where they lie in several pieces."""


def table_of(rope: LayerRope, distance: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation of a query by which a key before RoPE is seen at ``distance``: for :meth:`LayerRope.turn`, on the CPU."""
    cos, sin = rope.table(torch.tensor([distance]), dtype)
    # The model scales queries and keys, and keys are as they were before.
    return cos * rope.factor, sin * rope.factor


def choose(entries: Entries, layer: int, asks: torch.Tensor, count: int, per_head: bool = True) -> torch.Tensor:
    """The chunks that the queries ``asks`` float32 ``[Hkv, b, D]`` find, each KV head for itself or all of them the same: int64
    ``[Hkv, b, n]``, ascending, counted from the oldest one held; ``n`` is ``count``, or all there are."""
    pieces = [piece for piece in entries.pieces if piece.lo < piece.hi]
    scores = torch.cat([asks @ p.segment.means[layer][:, p.lo : p.hi].transpose(1, 2) for p in pieces], 2)
    if per_head:
        return greatest(scores, count, newest=True)
    return greatest(scores.sum(0, keepdim=True), count, newest=True).expand(asks.shape[0], -1, -1)


def gather(entries: Entries, layer: int, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values ``[Hkv, b, n * chunk, D]`` of ``chunks`` ``[Hkv, b, n]``, and which of their slots hold a token, bool
    ``[Hkv, b, n * chunk]``; None where all do."""
    pieces = [piece for piece in entries.pieces if piece.lo < piece.hi]
    few = len(pieces) > 1 and chunks.numel() <= FEW
    k, v, lengths = (_one_by_one if few else _by_piece)(pieces, layer, chunks)
    seen = (torch.arange(k.shape[3]) < lengths[..., None]).flatten(2) if entries.ragged else None
    return k.flatten(2, 3), v.flatten(2, 3), seen


def _by_piece(pieces: list[Piece], layer: int, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values ``[Hkv, b, n, chunk, D]`` and lengths ``[Hkv, b, n]`` of chunks, all that are in one piece at a time."""
    heads = torch.arange(chunks.shape[0])[:, None, None].expand_as(chunks)
    if len(pieces) == 1:
        segment, lo, _ = pieces[0]
        at = chunks + lo
        return segment.keys[layer][heads, at], segment.values[layer][heads, at], segment.lengths[at]
    sample = pieces[0].segment
    k, v = (x[layer].new_empty(*chunks.shape, *x[layer].shape[2:]) for x in (sample.keys, sample.values))
    lengths, first = torch.empty_like(chunks), 0
    for segment, lo, hi in pieces:
        here = ((chunks >= first) & (chunks < first + hi - lo)).nonzero(as_tuple=True)
        if len(here[0]):
            at = chunks[here] - first + lo
            k[here], v[here] = segment.keys[layer][here[0], at], segment.values[layer][here[0], at]
            lengths[here] = segment.lengths[at]
        first += hi - lo
    return k, v, lengths


def _one_by_one(pieces: list[Piece], layer: int, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, where there are few."""
    ends = list(accumulate(piece.hi - piece.lo for piece in pieces))
    places = []
    for head, rows in enumerate(chunks.tolist()):
        for number in (one for row in rows for one in row):
            at = bisect_right(ends, number)
            places.append((pieces[at].segment, head, number - ends[at] + pieces[at].hi))
    k, v = (torch.stack([getattr(s, name)[layer][head, at] for s, head, at in places]) for name in ("keys", "values"))
    lengths = torch.stack([s.lengths[at] for s, _, at in places])
    return k.view(*chunks.shape, *k.shape[1:]), v.view(*chunks.shape, *v.shape[1:]), lengths.view(chunks.shape)


def recall(
    q: torch.Tensor, entries: Entries, layer: int, first: int, count: int, call: AttendCall, per_head: bool = True
) -> Partial:
    """Attention of a row's new queries to what they find.

    Args:
        q: float ``[H, m, D]`` on the CPU, turned by :func:`table_of`; first: the position of the first of them.
        entries: of the row's namespace, with at least one whole chunk.
        count: chunks that a query finds; per_head: whether each KV head finds its own.

    Returns:
        out ``[H, m, Dv]`` and lse ``[H, m]``, in the dtype of ``q``, without learned sinks.
    """
    kv_heads = entries.pieces[0].segment.means[layer].shape[0]
    (heads, m, dim), group = q.shape, q.shape[0] // kv_heads
    if m == 1:
        return _one(q.view(kv_heads, group, dim), entries, layer, count, call, per_head)
    at = torch.arange(m) + first % QUERIES
    block, blocks = at // QUERIES, int(at[-1]) // QUERIES + 1
    summed = q.view(kv_heads, group, m, dim).sum(1)
    asks = summed.new_zeros(kv_heads, blocks, dim).index_add_(1, block, summed)
    asks /= torch.bincount(block, minlength=blocks)[:, None]
    k, v, seen = gather(entries, layer, choose(entries, layer, asks.float(), count, per_head))
    width = QUERIES if blocks > 1 else m
    slots = at if blocks > 1 else at - at[0]
    grid = q.new_zeros(heads, blocks * width, dim).index_copy_(1, slots, q)
    grid = grid.view(kv_heads, group, blocks, width, dim).transpose(1, 2).reshape(kv_heads * blocks, group * width, dim)
    visible = torch.ones(1, 1, 1, dtype=torch.bool) if seen is None else seen.flatten(0, 1)[:, None]
    out, lse = attend(grid, k.flatten(0, 1).to(q.dtype), v.flatten(0, 1).to(q.dtype), visible, call.scale, call.softcap)
    back = (kv_heads, blocks, group, width)
    out = out.view(*back, -1).transpose(1, 2).reshape(heads, blocks * width, -1)
    lse = lse.view(back).transpose(1, 2).reshape(heads, blocks * width)
    return out[:, slots], lse[:, slots]


def _one(q: torch.Tensor, entries: Entries, layer: int, count: int, call: AttendCall, per_head: bool) -> Partial:
    """The same for one query, given as ``[Hkv, group, D]``."""
    k, v, seen = gather(entries, layer, choose(entries, layer, q.sum(1, keepdim=True).float(), count, per_head))
    logits = torch.bmm(q, k[:, 0].to(q.dtype).transpose(1, 2)) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    out = torch.bmm(torch.exp(logits - lse), v[:, 0].to(q.dtype))
    return out.flatten(0, 1)[:, None], lse.flatten(0, 1)


def joined(own: torch.Tensor, lse: torch.Tensor, found: Partial, bias: float) -> torch.Tensor:
    """One softmax over own and found keys: ``[m, H, Dv]`` from own ``[m, H, Dv]`` with lse ``[H, m]``, and what was found."""
    gate = torch.sigmoid(found[1] + bias - lse).transpose(0, 1)[..., None]
    return own + gate * (found[0].transpose(0, 1) - own)
