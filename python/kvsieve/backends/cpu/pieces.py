"""Attention to pieces of a row's text: one query reads them where they lie; many gather them once for torch's matrix kernels.

What is at one distance, and what is at distances that follow each other, is one matrix each, for all heads or for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve._core import attend_pieces as attend_in_place
from kvsieve.backends.attention import Partial, attend, concatenate, join
from kvsieve.backends.attention_scores import CELLS
from kvsieve.backends.base import Attended
from kvsieve.backends.cpu.prefill import dense, flash
from kvsieve.backends.cpu.tensors import view
from kvsieve.backends.pieces import Read, of_head, sees
from kvsieve.backends.prefill_plan import BAND

if TYPE_CHECKING:
    from kvsieve._core import Residents, Store
    from kvsieve.backends.base import AttendCall
    from kvsieve.policy.select import Piece

__all__ = ["attend_many", "attend_one"]


def attend_one(
    core: Store, q: torch.Tensor, first: int, residents: Residents, pieces: Sequence[Piece], call: AttendCall, scored: bool
) -> Attended:
    """The query ``q`` ``[H, 1, D]`` over ``pieces``, in place."""
    out = torch.empty(1, q.shape[0], core.value_dim, dtype=q.dtype)
    lse = np.empty(q.shape[0], np.float32)
    sink_logits = None if call.sink_logits is None else call.sink_logits.detach().float().numpy()
    seen = [_seen(piece, first) for piece in pieces]
    given = [
        (-1 if p.head is None else p.head, lo, hi, p.distance if p.fixed else p.distance - (lo - p.lo), p.fixed)
        for p, (lo, hi) in zip(pieces, seen)
        if lo < hi
    ]
    rope = None if call.rope is None else call.rope.core
    lo, hi = seen[0]
    wanted = scored and lo < hi
    found = attend_in_place(
        core,
        view(q[None]),
        residents,
        given,
        rope,
        call.scale,
        softcap=call.softcap,
        sinks=sink_logits,
        out=view(out),
        lse=lse,
        scored=0 if wanted else None,
        threads=torch.get_num_threads(),
    )
    scores = None
    if scored:
        assert found is not None
        scores = torch.from_numpy(found)
        if (lo, hi) != pieces[0][:2]:
            scores = torch.nn.functional.pad(scores, (lo - pieces[0].lo, pieces[0].hi - hi))
    return Attended(out[0][:, None], torch.from_numpy(lse)[:, None], scores)


def _seen(piece: Piece, query: int) -> tuple[int, int]:
    """The tokens of ``piece`` that one query sees."""
    lo = piece.lo if piece.within is None else max(piece.lo, query - piece.within + 1)
    return lo, min(piece.hi, query - piece.nearest + 1)


def attend_many(q: torch.Tensor, first: int, pieces: Sequence[Piece], read: Read, call: AttendCall, scored: bool) -> Attended:
    """Queries ``q`` ``[H, m, D]`` over ``pieces``."""
    near, others = (pieces[0], pieces[1:]) if scored else (None, pieces)
    wide, found = q.float(), []
    for head in sorted({piece.head for piece in others}, key=lambda head: -1 if head is None else head):
        mine = [piece for piece in others if piece.head == head]
        for distance in sorted({piece.distance for piece in mine if piece.fixed}):
            found += _together(wide, first, [p for p in mine if p.fixed and p.distance == distance], read, call)
        found += _together(wide, first, [p for p in mine if not p.fixed], read, call)
    if near is not None:
        out, lse, scores = _score(wide, first, near, read, call, join(found) if found else None)
        return Attended(out.to(q.dtype), lse, scores)
    out, lse = join(found)
    if call.sink_logits is not None:
        out = out * torch.sigmoid(lse - call.sink_logits.detach().to(lse)[:, None])[..., None]
    return Attended(out.to(q.dtype), lse)


def _together(q: torch.Tensor, first: int, pieces: list[Piece], read: Read, call: AttendCall) -> list[Partial]:
    """Pieces that one head, or all heads, read at one distance, or at distances that follow each other. Those that all queries see
    whole are one matrix, and the others are another one."""
    count, found = q.shape[1], []
    seen = {piece: sees(piece, first, count, q.device) for piece in pieces}
    for whole in (True, False):
        mine = [piece for piece in pieces if (seen[piece] is None) is whole]
        if not mine:
            continue
        head, farthest = mine[0].head, max(piece.distance for piece in mine)
        keys, values = (torch.cat(x, 1) for x in zip(*(_of(read, piece) for piece in mine)))
        group = q.shape[0] // keys.shape[0]
        queries = q
        if head is not None:
            queries = q[head * group : (head + 1) * group]
            keys, values = keys[head : head + 1], values[head : head + 1]
        if call.rope is not None:
            at, to = torch.full((count,), farthest), torch.zeros(keys.shape[1], dtype=torch.long)
            if not mine[0].fixed:
                at = at + torch.arange(count)
                to = torch.cat([torch.arange(piece.hi - piece.lo) + farthest - piece.distance for piece in mine])
            queries, keys = call.rope.rotate(queries, at), call.rope.rotate(keys, to)
        masks = [] if whole else [mask for piece in mine if (mask := seen[piece]) is not None]
        part = _matrix(queries, keys, values, torch.cat(masks, 1) if masks else None, call)
        found.append(part if head is None else of_head(part, head, group, q.shape[0]))
    return found


def _of(read: Read, piece: Piece) -> Partial:
    k, v = read(piece.lo, piece.hi)
    return k.float(), v.float()


def _matrix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, call: AttendCall) -> Partial:
    if call.softcap is None and k.shape[-1] == v.shape[-1]:
        if seen is None:
            return dense(q, k, v, k.shape[1], call.scale)
        if bool(seen.any(1).all()):
            return flash(q, k, v, call.scale, bias=torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf))
    if seen is None:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    bands = range(0, q.shape[1], BAND)
    return concatenate([attend(q[:, b : b + BAND], k, v, seen[b : b + BAND], call.scale, call.softcap) for b in bands])


def _score(
    q: torch.Tensor, first: int, piece: Piece, read: Read, call: AttendCall, others: Partial | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A piece at true distances, whose scores are wanted, beside the ``others``: out, lse, and the scores.

    For one KV head and a band of queries at a time.
    """
    (heads, count, _), (k, v) = q.shape, _of(read, piece)
    group = heads // k.shape[0]
    if call.rope is not None:
        q = call.rope.rotate(q, torch.arange(piece.distance, piece.distance + count))
        k = call.rope.rotate(k, torch.arange(piece.hi - piece.lo))
    rest = q.new_full((heads, count), -torch.inf) if others is None else others[1]
    beside = rest if call.sink_logits is None else torch.logaddexp(rest, call.sink_logits.detach().to(rest)[:, None])
    out, lse = q.new_empty(heads, count, v.shape[2]), torch.empty_like(rest)
    scores = q.new_zeros(k.shape[0], piece.hi - piece.lo)
    size = max(1, min(BAND, CELLS // max(group * k.shape[1], 1)))
    for lo in range(0, count, size):
        hi = min(lo + size, count)
        # None of these queries sees what comes before or behind.
        start = piece.lo if piece.within is None else max(piece.lo, first + lo - piece.within + 1)
        band = piece._replace(lo=start, hi=min(piece.hi, first + hi))
        seen, keys = sees(band, first + lo, hi - lo, q.device), slice(band.lo - piece.lo, band.hi - piece.lo)
        for head in range(k.shape[0]):
            mine = slice(head * group, (head + 1) * group)
            logits = (q[mine, lo:hi] @ k[head, keys].T).mul_(call.scale)
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            if seen is not None:
                logits.masked_fill_(~seen, -torch.inf)
            near = torch.logsumexp(logits, -1)
            weights = logits.sub_(torch.logaddexp(near, beside[mine, lo:hi])[..., None]).exp_()
            out[mine, lo:hi], lse[mine, lo:hi] = weights @ v[head, keys], torch.logaddexp(near, rest[mine, lo:hi])
            scores[head, keys] += weights.sum((0, 1))
    if others is not None:
        total = lse if call.sink_logits is None else torch.logaddexp(lse, call.sink_logits.detach().to(lse)[:, None])
        out += others[0] * torch.exp(others[1] - total)[..., None]
    return out, lse, scores
