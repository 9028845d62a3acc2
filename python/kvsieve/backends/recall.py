"""Attention to what is found in a bank, and how it joins a stream's own: plain torch, on the CPU, where banks lie.

For one row and layer, with queries ``q`` rotated to the one distance at which a bank's tokens are seen:

    asks      = for each KV head the sum over its group's query heads, the mean over a block of queries
    scores    = <asks, mean key of each whole chunk>;  the best ``count`` chunks, of equal ones the newer
    found     = softmax attention of every query to the tokens of its block's chunks, with its log-sum-exp
    joined    = own + gate * (found - own),  gate = sigmoid(lse of found + bias - lse of own)

which is one softmax over the keys of both, the bank's logits raised by ``bias``. Queries of a prompt share a choice by blocks of
``QUERIES``, by their positions; a generated token chooses for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvsieve.backends.attention import Partial, attend

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.bank.entries import Entries
    from kvsieve.facts import LayerRope

__all__ = ["QUERIES", "choose", "gather", "joined", "recall", "turned"]

QUERIES = 16
"""Queries of a prompt that share a choice: those of equal ``position // QUERIES`` in one forward."""


def turned(q: torch.Tensor, rope: LayerRope | None, distance: int) -> torch.Tensor:
    """Queries ``[..., m, D]`` before RoPE, turned so that a key before RoPE is seen at ``distance``."""
    if rope is None:
        return q
    cos, sin = rope.table(torch.tensor([distance], device=q.device), q.dtype)
    # The model scales queries and keys; the keys are as they were before.
    return rope.turn(q, (cos * rope.factor, sin * rope.factor))


def choose(entries: Entries, layer: int, asks: torch.Tensor, count: int) -> torch.Tensor:
    """The chunks that the queries ``asks`` float32 ``[Hkv, b, D]`` find: int64 ``[Hkv, b, n]``, ascending, counted from the oldest
    one held; ``n`` is ``count``, or all there are."""
    pieces = [piece for piece in entries.pieces if piece.lo < piece.hi]
    scores = torch.cat([asks @ p.segment.means[layer][:, p.lo : p.hi].transpose(1, 2) for p in pieces], 2)
    held = scores.shape[2]
    if count >= held:
        return torch.arange(held).expand(*scores.shape[:2], held)
    best = scores.topk(count, dim=2, sorted=False)
    tied = (scores >= best.values.amin(2, keepdim=True)).sum(2) > count
    found = best.indices
    if bool(tied.any()):
        newest_first = scores.flip(2).sort(dim=2, descending=True, stable=True).indices[..., :count]
        found = held - 1 - newest_first
    return found.sort(dim=2).values


def gather(entries: Entries, layer: int, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values ``[Hkv, b, n * chunk, D]`` of ``chunks`` ``[Hkv, b, n]``, and which of their slots hold a token, bool
    ``[Hkv, b, n * chunk]``; None where all do."""
    heads = torch.arange(chunks.shape[0])[:, None, None].expand_as(chunks)
    pieces = [piece for piece in entries.pieces if piece.lo < piece.hi]
    lengths = None
    if len(pieces) == 1:
        segment, lo, _ = pieces[0]
        at = chunks + lo
        k, v = segment.keys[layer][heads, at], segment.values[layer][heads, at]
        lengths = segment.lengths[at] if entries.ragged else None
    else:
        sample = pieces[0].segment
        k, v = (x[layer].new_empty(*chunks.shape, *x[layer].shape[2:]) for x in (sample.keys, sample.values))
        lengths = torch.empty_like(chunks) if entries.ragged else None
        first = 0
        for segment, lo, hi in pieces:
            here = ((chunks >= first) & (chunks < first + hi - lo)).nonzero(as_tuple=True)
            if len(here[0]):
                at = chunks[here] - first + lo
                k[here], v[here] = segment.keys[layer][here[0], at], segment.values[layer][here[0], at]
                if lengths is not None:
                    lengths[here] = segment.lengths[at]
            first += hi - lo
    seen = None if lengths is None else (torch.arange(k.shape[3]) < lengths[..., None]).flatten(2)
    return k.flatten(2, 3), v.flatten(2, 3), seen


def recall(q: torch.Tensor, entries: Entries, layer: int, first: int, count: int, call: AttendCall) -> Partial:
    """Attention of a row's new queries to what they find.

    Args:
        q: float ``[H, m, D]`` on the CPU, as of :func:`turned`; first: the position of the first of them.
        entries: of the row's namespace, with at least one whole chunk.
        count: chunks that a query finds.

    Returns:
        out ``[H, m, Dv]`` and lse ``[H, m]``, in the dtype of ``q``, without learned sinks.
    """
    kv_heads = entries.pieces[0].segment.means[layer].shape[0]
    (heads, m, dim), group = q.shape, q.shape[0] // kv_heads
    at = torch.arange(m) + first % QUERIES if m > 1 else torch.zeros(1, dtype=torch.int64)
    block, blocks = at // QUERIES, int(at[-1]) // QUERIES + 1
    summed = q.view(kv_heads, group, m, dim).sum(1)
    asks = summed.new_zeros(kv_heads, blocks, dim).index_add_(1, block, summed)
    asks /= torch.bincount(block, minlength=blocks)[:, None]
    k, v, seen = gather(entries, layer, choose(entries, layer, asks.float(), count))
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


def joined(own: torch.Tensor, lse: torch.Tensor, found: Partial, bias: float) -> torch.Tensor:
    """One softmax over own and found keys: ``[m, H, Dv]`` from own ``[m, H, Dv]`` with lse ``[H, m]``, and what was found."""
    gate = torch.sigmoid(found[1] + bias - lse).transpose(0, 1)[..., None]
    return own + gate * (found[0].transpose(0, 1) - own)
