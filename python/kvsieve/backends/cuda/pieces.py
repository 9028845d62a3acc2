"""Attention to pieces of a row's text: one query reads them where they lie, through `attend`; many through torch's matrix kernels.

What `attend` reads are spans of blocks. A piece is the spans of its runs, and the distance at which the query sees a run's first
slot is the span's rotation; keys are rotated by their slots, unless all of the piece is at one distance. Where KV heads read
different pieces, each head is an item of its own, and its spans name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvsieve.backends.attention import Partial, attend, concatenate
from kvsieve.backends.base import Attended
from kvsieve.backends.cuda.buffers import upload
from kvsieve.backends.cuda.ops.attend import Attend
from kvsieve.backends.cuda.ops.launch import LAYOUTS
from kvsieve.backends.cuda.ops.rotate import rotate
from kvsieve.backends.cuda.ops.rotations import Rotations
from kvsieve.backends.cuda.plan import filling
from kvsieve.backends.cuda.prefill import BAND, fused
from kvsieve.backends.piece_matrices import Matrices, attend_many, in_order, seen_by

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvsieve._core import Residents
    from kvsieve.backends.base import AttendCall, Runs
    from kvsieve.backends.cuda.context import Context
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import Piece

__all__ = ["Held", "Spans", "attend_pieces", "cut"]

CELLS = 1 << 25
"""Most logits that exist at a time where scores are wanted."""


class Held(NamedTuple):
    """A row's tokens in one layer.

    Attributes:
        context: the backend's; blocks: the layer's table of them; shape: KV heads, channels of a key and of a value.
        residents: where the row's tokens lie; read: keys and values of runs, wherever they are.
        check: raises StateError for blocks that are not on the device; None where all are.
    """

    context: Context
    blocks: torch.Tensor
    shape: tuple[int, int, int]
    residents: Residents
    read: Callable[[Runs], Partial]
    check: Callable[[Iterable[int]], None] | None = None


class Spans(NamedTuple):
    """What one query reads, as `attend` takes it.

    Attributes:
        starts: int32 ``[items + 1]``; spans: int32 ``[n, 4]``; shifts: int64, those that spans name.
        keys: int64 ``[items + 1]``, where the keys of each item begin. Items are KV heads; or one for all of them.
    """

    starts: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    shifts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pieces: Sequence[Piece], query: int, residents: Residents, heads: int, rotates: bool) -> Spans:
        """Those of the only query, of number ``query``."""
        rows = []
        for piece in pieces:
            begin, end = seen_by(piece, query)
            far, mine = piece.distance - (0 if piece.fixed else begin - piece.lo), -1 if piece.head is None else piece.head
            for block, lo, hi in residents.runs(begin, end) if begin < end else []:
                rows.append((block, lo, hi, mine, far, piece.fixed))
                far -= 0 if piece.fixed else hi - lo
        return cls._of_runs(np.array(rows, np.int64).reshape(-1, 6).T, heads, rotates)

    @classmethod
    def _of_runs(cls, rows: npt.NDArray[np.int64], heads: int, rotates: bool) -> Spans:
        """Of runs, by columns: block, first slot, slot past the end, head or -1, distance of the first token, whether it is that of
        all."""
        block, lo, hi, head, far, fixed = rows
        # Where slot s is rotated by s, the first slot of a run must seem to be at its distance.
        shifts, turn = np.unique(np.where(fixed == 1, far, far + lo), return_inverse=True)
        slots = lo | hi << 8
        if rotates:
            slots, turn = slots | (1 - fixed) << 16, turn + 1
        else:
            shifts, turn = shifts[:0], np.zeros_like(lo)
        items = [np.arange(len(block))] if (head < 0).all() else [np.flatnonzero((head < 0) | (head == h)) for h in range(heads)]
        found = []
        for number, mine in enumerate(items):
            before = np.cumsum(hi[mine] - lo[mine]) - (hi[mine] - lo[mine])
            found.append(np.stack([block[mine], slots[mine] | number << 17, before, turn[mine]], 1))
        starts = np.cumsum([0, *map(len, items)]).astype(np.int32)
        keys = np.cumsum([0, *(int((hi[mine] - lo[mine]).sum()) for mine in items)])
        return cls(starts, np.concatenate(found).astype(np.int32), shifts.astype(np.int64), keys)

    def upload(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same on ``device``, by one upload."""
        words = [self.spans.view(np.int64).ravel(), self.shifts, self.keys]
        starts = np.concatenate([self.starts, np.zeros(len(self.starts) % 2, np.int32)]).view(np.int64)
        held = upload(np.concatenate([*words, starts]), device)
        spans, shifts, keys, starts_held = torch.split(held, [*map(len, words), len(starts)])
        return starts_held.view(torch.int32), spans.view(torch.int32).view(-1, 4), shifts, keys


def attend_pieces(
    held: Held, q: torch.Tensor, first: int, pieces: Sequence[Piece], call: AttendCall, scored: bool, told: bool = False
) -> Attended:
    """See :meth:`kvsieve.backends.base.Store.attend_pieces`."""
    if q.shape[1] == 1:
        return _attend_one(held, q, first, pieces, call, scored, told)
    near, others = (list(pieces[:1]), pieces[1:]) if scored else ([], pieces)
    near += [part for piece in others for part in cut(piece, first, q.shape[1])]
    matrices = Matrices(
        lambda spans: held.read(in_order(held.residents, spans)),
        lambda rope, x, places: _rotate(held.context, rope, x, places),
        _matrix,
        q.dtype,
        held.shape[0],
        CELLS,
    )
    return attend_many(q, first, near, matrices, call, scored, pieces[1:] if told else None)


def _attend_one(
    held: Held, q: torch.Tensor, first: int, pieces: Sequence[Piece], call: AttendCall, scored: bool, told: bool
) -> Attended:
    """The query ``q`` ``[H, 1, D]``, in place."""
    (kv_heads, key_dim, value_dim), (heads, _, _), rope, device = held.shape, q.shape, call.rope, q.device
    group, asked = heads // kv_heads, Spans.of(pieces, first, held.residents, kv_heads, rope is not None)
    if held.check is not None:
        held.check(asked.spans[:, 0].tolist())
    starts, spans, shifts, keys = asked.upload(device)
    rotations = in_block = None
    if rope is not None:
        frequencies, in_block = held.context.rope(rope, device)
        rotations = torch.empty(len(asked.shifts), rope.rotary_dim, dtype=torch.float32, device=device)
        Rotations(shifts, None, frequencies, rotations).launch()
    q = q if q.stride(-1) == 1 else q.contiguous()
    by_head = len(asked.starts) > 2
    splits = min(filling(device, kv_heads, group, key_dim, rope is not None), int(np.diff(asked.starts).max()))
    out, lse, scores = Attend(
        torch.unflatten(q, 0, (kv_heads, group)) if by_head else q[None],
        held.blocks,
        starts,
        spans,
        rotations,
        in_block,
        kv_heads=1 if by_head else kv_heads,
        value_dim=value_dim,
        splits=max(splits, 1),
        scale=call.scale,
        softcap=call.softcap or 0.0,
        layout=0 if rope is None else LAYOUTS[rope.layout],
        factor=1.0 if rope is None else rope.factor**2,
        raw=rope is not None,
        sink_logits=call.sinks,
        key_starts=keys if scored or told else None,
        total_keys=int(asked.keys[-1]) if scored or told else 0,
    ).run()
    assert lse is not None
    mass = _mass_of(scores, pieces, first, asked.keys) if told and scores is not None else None
    if not scored:
        scores = None
    if scores is not None:
        lo, hi = seen_by(pieces[0], first)
        # The first piece comes first in every item.
        mine = [scores[:, at : at + hi - lo] for at in asked.keys[:-1].tolist()]
        scores = torch.nn.functional.pad(torch.cat(mine), (lo - pieces[0].lo, pieces[0].hi - hi))
    return Attended(out.view(heads, 1, value_dim), lse.view(heads, 1), scores, mass)


def _mass_of(scores: torch.Tensor, pieces: Sequence[Piece], query: int, keys: npt.NDArray[np.int64]) -> torch.Tensor:
    """What the tokens of each piece but the first got, of what all keys of each item got, float32 ``[Hkv or 1, n]``."""
    found, at = [torch.zeros(piece.hi - piece.lo, device=scores.device) for piece in pieces], keys[:-1].tolist()
    for piece, mine in zip(pieces, found):
        lo, hi = seen_by(piece, query)
        for item in range(len(at)) if lo < hi else ():
            if piece.head in (None, item):
                mine[lo - piece.lo : hi - piece.lo] += scores[:, at[item] : at[item] + hi - lo].sum(0)
                at[item] += hi - lo
    return torch.cat([scores.new_zeros(0), *found[1:]])


def cut(piece: Piece, first: int, count: int) -> list[Piece]:
    """``piece`` in up to three: what some of ``count`` queries from number ``first`` on see, what all of them do, and what some do.
    Without what none sees."""
    (lo, _), (_, hi) = seen_by(piece, first), seen_by(piece, first + count - 1)
    (middle, _), (_, after) = seen_by(piece, first + count - 1), seen_by(piece, first)
    edges = [lo, hi] if middle >= after else [lo, middle, after, hi]
    spans = [(a, b) for a, b in pairwise(edges) if a < b]
    return [piece._replace(lo=a, hi=b, distance=piece.distance - (0 if piece.fixed else a - piece.lo)) for a, b in spans]


def _rotate(context: Context, rope: LayerRope, x: torch.Tensor, places: Sequence[range]) -> torch.Tensor:
    frequencies, _ = context.rope(rope, x.device)
    runs = [torch.arange(run.start, run.stop, device=x.device) for run in places]
    positions = runs[0].expand(x.shape[1]).contiguous() if sum(map(len, places)) == 1 else torch.cat(runs)
    return rotate(x if x.stride(-1) == 1 else x.contiguous(), positions, frequencies, LAYOUTS[rope.layout], rope.factor, x.dtype)


def _matrix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, call: AttendCall) -> Partial:
    if seen is None and call.softcap is None and k.shape[-1] == v.shape[-1]:
        return fused(q, k, v, call.scale)
    if seen is None:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    q, k, v = (x.float() for x in (q, k, v))
    bands = range(0, q.shape[1], BAND)
    return concatenate([attend(q[:, b : b + BAND], k, v, seen[b : b + BAND], call.scale, call.softcap) for b in bands])
