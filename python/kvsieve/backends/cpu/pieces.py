"""Attention to pieces of a row's text: one query reads them where they lie; many gather them once for torch's matrix kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve._core import attend_pieces as attend_in_place
from kvsieve._core import linear, top_k
from kvsieve.backends.attention import Partial, attend, concatenate
from kvsieve.backends.attention_scores import CELLS
from kvsieve.backends.base import Attended
from kvsieve.backends.cpu.prefill import dense, flash
from kvsieve.backends.cpu.tensors import floats, view
from kvsieve.backends.piece_matrices import Matrices, Read, seen_by
from kvsieve.backends.piece_matrices import attend_many as attend_matrices
from kvsieve.backends.prefill_plan import BAND

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvsieve._core import Residents, Store
    from kvsieve.backends.base import AttendCall
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import Piece

__all__ = ["attend_many", "attend_one", "best_summaries"]


def best_summaries(summaries: Sequence[torch.Tensor], asked: torch.Tensor, most: int, per_head: bool) -> list[list[int]]:
    """See :meth:`kvsieve.backends.base.Store.best_summaries`. Products are the core's, in which equal summaries have equal sums."""
    pieces = [piece.numpy() for piece in summaries]
    given = asked.numpy() if per_head else asked.numpy().reshape(1, -1)
    scores, at = np.empty((len(given), sum(map(len, pieces))), np.float32), 0
    for piece in pieces:
        matrices = piece.transpose(1, 0, 2) if per_head else piece.reshape(1, len(piece), -1)
        for head, matrix in enumerate(matrices):
            linear(given[head : head + 1], matrix, None, scores[head : head + 1, at : at + len(piece)])
        at += len(piece)
    found, least = top_k(scores, most), np.float32(-np.inf)
    return [sorted(number for number in row.tolist() if mine[number] > least) for row, mine in zip(found, scores)]


def attend_one(
    core: Store,
    q: torch.Tensor,
    first: int,
    residents: Residents,
    pieces: Sequence[Piece],
    call: AttendCall,
    scored: bool,
    told: bool,
) -> Attended:
    """The query ``q`` ``[H, 1, D]`` over ``pieces``, in place."""
    out = torch.empty(1, q.shape[0], core.value_dim, dtype=q.dtype)
    lse = np.empty((q.shape[0], 1), np.float32)
    seen = [seen_by(piece, first) for piece in pieces]
    given = [
        (-1 if p.head is None else p.head, lo, hi, p.distance if p.fixed else p.distance - (lo - p.lo), p.fixed)
        for p, (lo, hi) in zip(pieces, seen)
        if lo < hi
    ]
    rope = None if call.rope is None else call.rope.core
    lo, hi = seen[0]
    wanted = scored and lo < hi
    found, mass = attend_in_place(
        core,
        view(q)[None],
        residents,
        given,
        rope,
        call.scale,
        softcap=call.softcap,
        sinks=floats(call.sinks),
        out=view(out),
        lse=lse[:, 0],
        scored=0 if wanted else None,
        threads=torch.get_num_threads(),
        told=told,
    )
    scores = None
    if scored:
        assert found is not None
        scores = torch.from_numpy(found)
        if (lo, hi) != pieces[0][:2]:
            scores = torch.nn.functional.pad(scores, (lo - pieces[0].lo, pieces[0].hi - hi))
    told_of = None if mass is None else _padded(mass, pieces, seen)
    return Attended(out.transpose(0, 1), torch.from_numpy(lse), scores, told_of)


def _padded(mass: npt.NDArray[np.float32], pieces: Sequence[Piece], seen: Sequence[tuple[int, int]]) -> torch.Tensor:
    """What the tokens ``seen`` of each piece got, as that of all tokens of each but the first."""
    found, at = [], 0
    for piece, (lo, hi) in zip(pieces, seen):
        count = max(hi - lo, 0)
        mine = torch.from_numpy(mass[at : at + count])
        found.append(torch.nn.functional.pad(mine, (lo - piece.lo, piece.hi - hi)) if count else torch.zeros(piece.hi - piece.lo))
        at += count
    return torch.cat([torch.zeros(0), *found[1:]])


def attend_many(
    q: torch.Tensor, first: int, pieces: Sequence[Piece], read: Read, call: AttendCall, scored: bool, told: bool
) -> Attended:
    """Queries ``q`` ``[H, m, D]`` over ``pieces``, in float32; where scores are wanted, a KV head at a time."""
    return attend_matrices(
        q, first, pieces, Matrices(read, _rotate, _matrix, torch.float32, 1, CELLS), call, scored, pieces[1:] if told else None
    )


def _rotate(rope: LayerRope, x: torch.Tensor, places: Sequence[range]) -> torch.Tensor:
    return rope.rotate_to(x, places)


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
