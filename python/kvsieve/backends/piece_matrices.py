"""Attention of many queries to pieces of a row's text, by matrix kernels that a backend brings along.

What is at one distance, and what is at distances that follow each other, is one matrix each, for all heads or for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvsieve.backends.attention import Partial, join
from kvsieve.backends.base import Attended
from kvsieve.backends.pieces import of_head, sees
from kvsieve.backends.prefill_plan import BAND

if TYPE_CHECKING:
    from kvsieve._core import Residents
    from kvsieve.backends.base import AttendCall, Runs
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import Piece

__all__ = ["Matrices", "Read", "attend_many", "in_order", "seen_by"]

Read = Callable[[Sequence[tuple[int, int]]], Partial]
"""Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of the residents ``lo..hi`` of each range, one after another."""


class Matrices(NamedTuple):
    """How a backend computes with matrices.

    Attributes:
        read: keys and values, in the layer's dtype.
        rotate: ``x`` ``[H, n, D]`` to runs of positions, in its dtype; a single position is that of all ``n``.
        attend: float32 out ``[H, m, Dv]`` and lse ``[H, m]`` of rotated queries over rotated keys, values, and which of them each
            query sees (bool ``[m, n]``; None for all).
        dtype: in which queries and keys are rotated and compared, except where scores are wanted, which are float32.
        heads: KV heads that are scored at a time, of ``cells`` logits at most.
    """

    read: Read
    rotate: Callable[[LayerRope, torch.Tensor, Sequence[range]], torch.Tensor]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, AttendCall], Partial]
    dtype: torch.dtype
    heads: int
    cells: int


def in_order(residents: Residents, spans: Sequence[tuple[int, int]]) -> Runs:
    """Where the residents of these ranges lie."""
    return [run for lo, hi in spans for run in residents.runs(lo, hi)]


def seen_by(piece: Piece, query: int) -> tuple[int, int]:
    """The tokens ``lo..hi`` of ``piece`` that one query sees; none if ``lo >= hi``."""
    lo = piece.lo if piece.within is None else max(piece.lo, query - piece.within + 1)
    return lo, min(piece.hi, query - max(piece.nearest, 0) + 1)


def attend_many(
    q: torch.Tensor,
    first: int,
    pieces: Sequence[Piece],
    matrices: Matrices,
    call: AttendCall,
    scored: bool,
    told: Sequence[Piece] | None = None,
) -> Attended:
    """Queries ``q`` ``[H, m, D]`` over ``pieces``; see :meth:`kvsieve.backends.base.Store.attend_pieces`.

    Args:
        told: pieces of whose tokens it is wanted how much attention they got, all of them among what is read; None for none.
    """
    found = _attend_many(q, first, pieces, matrices, call, scored)
    if told is None:
        return found
    total = found.lse
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.detach().to(total)[:, None])
    mass = [_mass(q.float(), first, piece, matrices, call, total) for piece in told]
    return replace(found, mass=torch.cat([total.new_zeros(0), *mass]))


def _mass(q: torch.Tensor, first: int, piece: Piece, matrices: Matrices, call: AttendCall, total: torch.Tensor) -> torch.Tensor:
    """How much attention each token of ``piece`` got from the queries whose logits, of all that they read, sum up to ``total``
    ``[H, m]``: float32 ``[hi - lo]``. Keys are compared again, for some queries at a time; the values are not needed."""
    k = matrices.read([piece[:2]])[0].float()
    group, count = q.shape[0] // k.shape[0], q.shape[1]
    if piece.head is not None:
        mine = slice(piece.head * group, (piece.head + 1) * group)
        q, k, total = q[mine], k[piece.head : piece.head + 1], total[mine]
    if call.rope is not None:
        at = range(piece.distance, piece.distance + (1 if piece.fixed else count))
        q, k = matrices.rotate(call.rope, q, [at]), matrices.rotate(call.rope, k, [range(1 if piece.fixed else k.shape[1])])
    found, seen = q.new_zeros(k.shape[1]), sees(piece, first, count, q.device)
    size = max(1, min(BAND, matrices.cells // max(q.shape[0] * k.shape[1], 1)))
    for lo in range(0, count, size):
        logits = q[:, lo : lo + size].reshape(k.shape[0], -1, q.shape[2]) @ k.transpose(1, 2)
        logits = logits.view(q.shape[0], -1, k.shape[1]).mul_(call.scale)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        if seen is not None:
            logits.masked_fill_(~seen[lo : lo + size], -torch.inf)
        # A query that reads nothing at all gives nothing.
        found += logits.sub_(total[:, lo : lo + size, None].nan_to_num(neginf=0.0)).exp_().sum((0, 1))
    return found


def _attend_many(
    q: torch.Tensor, first: int, pieces: Sequence[Piece], matrices: Matrices, call: AttendCall, scored: bool
) -> Attended:
    near, others = (pieces[0], pieces[1:]) if scored else (None, pieces)
    wide, found = q.to(matrices.dtype), []
    for head in sorted({piece.head for piece in others}, key=lambda head: -1 if head is None else head):
        mine = [piece for piece in others if piece.head == head]
        for distance in sorted({piece.distance for piece in mine if piece.fixed}):
            found += _together(wide, first, [p for p in mine if p.fixed and p.distance == distance], matrices, call)
        found += _together(wide, first, [p for p in mine if not p.fixed], matrices, call)
    if near is not None:
        out, lse, scores = _score(q.float(), first, near, matrices, call, join(found) if found else None)
        return Attended(out.to(q.dtype), lse, scores)
    out, lse = join(found)
    if call.sink_logits is not None:
        out = out * torch.sigmoid(lse - call.sink_logits.detach().to(lse)[:, None])[..., None]
    return Attended(out.to(q.dtype), lse)


def _together(q: torch.Tensor, first: int, pieces: list[Piece], matrices: Matrices, call: AttendCall) -> list[Partial]:
    """Pieces that one head, or all heads, read at one distance, or at distances that follow each other. Those that all queries see
    whole are one matrix, and the others are another one."""
    count, device, found = q.shape[1], q.device, []
    seen = {piece: sees(piece, first, count, device) for piece in pieces}
    for whole in (True, False):
        mine = [piece for piece in pieces if (seen[piece] is None) is whole]
        if not mine:
            continue
        head, farthest = mine[0].head, max(piece.distance for piece in mine)
        keys, values = (x.to(matrices.dtype) for x in matrices.read([piece[:2] for piece in mine]))
        group = q.shape[0] // keys.shape[0]
        queries = q
        if head is not None:
            queries = q[head * group : (head + 1) * group]
            keys, values = keys[head : head + 1], values[head : head + 1]
        if call.rope is not None:
            at, to = [range(farthest, farthest + 1)], [range(1)]
            if not mine[0].fixed:
                at = [range(farthest, farthest + count)]
                to = [range(farthest - p.distance, farthest - p.distance + p.hi - p.lo) for p in mine]
            queries, keys = matrices.rotate(call.rope, queries, at), matrices.rotate(call.rope, keys, to)
        masks = [] if whole else [mask for piece in mine if (mask := seen[piece]) is not None]
        part = matrices.attend(queries, keys, values, torch.cat(masks, 1) if masks else None, call)
        found.append(part if head is None else of_head(part, head, group, q.shape[0]))
    return found


def _score(
    q: torch.Tensor, first: int, piece: Piece, matrices: Matrices, call: AttendCall, others: Partial | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A piece at true distances, whose scores are wanted, beside the ``others``: out, lse, and the scores, all in float32.

    For some KV heads and a band of queries at a time.
    """
    (heads, count, dim), (k, v) = q.shape, (x.float() for x in matrices.read([piece[:2]]))
    group = heads // k.shape[0]
    if call.rope is not None:
        q = matrices.rotate(call.rope, q, [range(piece.distance, piece.distance + count)])
        k = matrices.rotate(call.rope, k, [range(piece.hi - piece.lo)])
    rest = q.new_full((heads, count), -torch.inf) if others is None else others[1]
    beside = rest if call.sink_logits is None else torch.logaddexp(rest, call.sink_logits.detach().to(rest)[:, None])
    out, lse = q.new_empty(heads, count, v.shape[2]), torch.empty_like(rest)
    scores = q.new_zeros(k.shape[0], piece.hi - piece.lo)
    size = max(1, min(BAND, matrices.cells // max(min(matrices.heads, k.shape[0]) * group * k.shape[1], 1)))
    for lo in range(0, count, size):
        hi = min(lo + size, count)
        # None of these queries sees what comes before or behind.
        start = piece.lo if piece.within is None else max(piece.lo, first + lo - piece.within + 1)
        band = piece._replace(lo=start, hi=min(piece.hi, first + hi))
        seen, keys = sees(band, first + lo, hi - lo, q.device), slice(band.lo - piece.lo, band.hi - piece.lo)
        for head in range(0, k.shape[0], matrices.heads):
            held = slice(head, head + matrices.heads)
            mine, some = slice(head * group, held.stop * group), k[held, keys]
            logits = q[mine, lo:hi].reshape(some.shape[0], -1, dim) @ some.transpose(1, 2)
            logits = logits.view(-1, hi - lo, some.shape[1]).mul_(call.scale)
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            if seen is not None:
                logits.masked_fill_(~seen, -torch.inf)
            near = torch.logsumexp(logits, -1)
            weights = logits.sub_(torch.logaddexp(near, beside[mine, lo:hi])[..., None]).exp_()
            weights = weights.view(some.shape[0], -1, some.shape[1])
            out[mine, lo:hi] = (weights @ v[held, keys]).view(-1, hi - lo, v.shape[2])
            lse[mine, lo:hi] = torch.logaddexp(near, rest[mine, lo:hi])
            scores[held, keys] += weights.sum(1)
    if others is not None:
        total = lse if call.sink_logits is None else torch.logaddexp(lse, call.sink_logits.detach().to(lse)[:, None])
        out += others[0] * torch.exp(others[1] - total)[..., None]
    return out, lse, scores
