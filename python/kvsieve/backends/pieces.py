"""Attention to pieces of a row's text, each seen where it is told: the definition, which every backend is compared with.

    query i, token j of a piece lo..hi, with p = the query's number, t = lo + j

    visible   = 0 <= p - t, nearest <= p - t < within
    distance  = the piece's, if it is fixed; else  distance + i - j
    logits    = scale * <rotate(q, distance), k>       k as it was before RoPE

and one softmax over all pieces that a head reads, and its learned sink logit, if it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kvsieve.backends.attention import Partial
from kvsieve.backends.base import Attended

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import Piece

__all__ = ["Read", "attend_pieces", "of_head", "place", "sees"]

Read = Callable[[int, int], Partial]
"""Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of the residents ``lo..hi``."""


def sees(piece: Piece, first: int, count: int, device: torch.device) -> torch.Tensor | None:
    """Which token of ``piece`` each of ``count`` queries from number ``first`` on sees: bool ``[count, hi - lo]``; None for all."""
    near, far = first - (piece.hi - 1), first + count - 1 - piece.lo
    if near >= piece.nearest and near >= 0 and (piece.within is None or far < piece.within):
        return None
    at = torch.arange(first, first + count, device=device)[:, None] - torch.arange(piece.lo, piece.hi, device=device)[None, :]
    seen = (at >= 0) & (at >= piece.nearest)
    return seen if piece.within is None else seen & (at < piece.within)


def place(q: torch.Tensor, k: torch.Tensor, piece: Piece, rope: LayerRope | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` ``[H, m, D]`` and the keys ``[Hkv, n, D]`` of ``piece``, rotated to the distances that it names."""
    if rope is None:
        return q, k
    if piece.fixed:
        return rope.rotate_to(q, [range(piece.distance, piece.distance + 1)]), rope.rotate_to(k, [range(1)])
    return rope.rotate_to(q, [range(piece.distance, piece.distance + q.shape[1])]), rope.rotate_to(k, [range(k.shape[1])])


def of_head(found: Partial, head: int, group: int, heads: int) -> Partial:
    """What the query heads of one KV head have found, as that of ``heads`` heads, of which the others read nothing."""
    out = found[0].new_zeros(heads, *found[0].shape[1:])
    lse = found[1].new_full((heads, *found[1].shape[1:]), -torch.inf)
    mine = slice(head * group, (head + 1) * group)
    out[mine], lse[mine] = found
    return out, lse


def attend_pieces(
    q: torch.Tensor, first: int, pieces: Sequence[Piece], read: Read, call: AttendCall, scored: bool, told: bool = False
) -> Attended:
    """See :meth:`kvsieve.backends.base.Store.attend_pieces`."""
    wide, (heads, count, dim) = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32), q.shape
    logits, values = [], []
    for piece in pieces:
        k, v = (only(x, piece.head).to(wide.dtype) for x in read(piece.lo, piece.hi))
        queries, keys = place(wide, k, piece, call.rope)
        mine = (queries.reshape(k.shape[0], -1, dim) @ keys.transpose(1, 2)).view(heads, count, -1) * call.scale
        if call.softcap is not None:
            mine = call.softcap * torch.tanh(mine / call.softcap)
        seen = sees(piece, first, count, q.device)
        if seen is not None:
            mine = mine.masked_fill(~seen, -torch.inf)
        if piece.head is not None:
            reads = torch.arange(k.shape[0], device=q.device).repeat_interleave(heads // k.shape[0]) == piece.head
            mine = mine.masked_fill(~reads[:, None, None], -torch.inf)
        logits.append(mine)
        values.append(v)
    every = torch.cat(logits, 2)
    lse = torch.logsumexp(every, 2)
    total = lse if call.sink_logits is None else torch.logaddexp(lse, call.sink_logits.detach().to(lse)[:, None])
    weights = torch.exp(every - torch.where(total.isneginf(), 0.0, total)[..., None])
    joined = torch.cat(values, 1)
    given = weights.view(joined.shape[0], -1, joined.shape[1])
    out = (given @ joined).view(heads, count, -1)
    near = pieces[0].hi - pieces[0].lo
    scores = given[..., :near].sum(1).float() if scored else None
    return Attended(out.to(q.dtype), lse, scores, given[..., near:].sum((0, 1)).float() if told else None)


def only(x: torch.Tensor, head: int | None) -> torch.Tensor:
    """``x`` ``[Hkv, n, D]`` where one KV head alone reads it: nothing of the other heads; None for all of them."""
    if head is None:
        return x
    mine = torch.zeros_like(x)
    mine[head] = x[head]
    return mine
