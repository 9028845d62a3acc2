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

from kvsieve.backends.attention import Partial, attend, merge
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
    queries, keys = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
    if piece.fixed:
        queries, keys = torch.zeros_like(queries), torch.zeros_like(keys)
    return rope.rotate(q, queries + piece.distance), rope.rotate(k, keys)


def of_head(found: Partial, head: int, group: int, heads: int) -> Partial:
    """What the query heads of one KV head have found, as that of ``heads`` heads, of which the others read nothing."""
    out = found[0].new_zeros(heads, *found[0].shape[1:])
    lse = found[1].new_full((heads, *found[1].shape[1:]), -torch.inf)
    mine = slice(head * group, (head + 1) * group)
    out[mine], lse[mine] = found
    return out, lse


def attend_pieces(q: torch.Tensor, first: int, pieces: Sequence[Piece], read: Read, call: AttendCall, scored: bool) -> Attended:
    """See :meth:`kvsieve.backends.base.Store.attend_pieces`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found: list[Partial] = []
    for piece in pieces:
        k, v = (x.to(wide) for x in read(piece.lo, piece.hi))
        group = q.shape[0] // k.shape[0]
        queries, keys = place(q.to(wide), k, piece, call.rope)
        seen = sees(piece, first, q.shape[1], q.device)
        if seen is None:
            seen = torch.ones(q.shape[1], piece.hi - piece.lo, dtype=torch.bool, device=q.device)
        if piece.head is None:
            found.append(attend(queries, keys, v, seen, call.scale, call.softcap))
            continue
        heads, head = slice(piece.head * group, (piece.head + 1) * group), slice(piece.head, piece.head + 1)
        mine = attend(queries[heads], keys[head], v[head], seen, call.scale, call.softcap)
        found.append(of_head(mine, piece.head, group, q.shape[0]))
    lse = torch.logsumexp(torch.stack([each[1] for each in found]), 0)
    scores = _scores(q.to(wide), first, pieces[0], read, call, lse) if scored else None
    return Attended(merge(found, call.sink_logits).to(q.dtype), lse, scores)


def _scores(q: torch.Tensor, first: int, piece: Piece, read: Read, call: AttendCall, lse: torch.Tensor) -> torch.Tensor:
    """The probabilities of a piece that all heads read, where all that they read has the log-sum-exp ``lse``: ``[Hkv, n]``."""
    k = read(piece.lo, piece.hi)[0].to(q.dtype)
    queries, keys = place(q, k, piece, call.rope)
    if call.sink_logits is not None:
        lse = torch.logaddexp(lse, call.sink_logits.detach().to(lse)[:, None])
    logits = (queries @ keys.repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2)) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    seen = sees(piece, first, q.shape[1], q.device)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    given = torch.exp(logits - lse[..., None]).sum(1)
    return given.view(k.shape[0], -1, given.shape[1]).sum(1).float()
