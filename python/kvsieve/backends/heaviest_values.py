"""Of each query head the heaviest values alone: the definition.

    p[j]   = softmax over the keys that the query sees (and the sink logit of its head, which keeps its share)
    M      = sum of p over what is kept / sum of p over all keys
    out    = sum of p[j] * v[j] over what is kept, divided by M where it is renormalised

Kept are the keys with the highest p, of equal ones the earlier: so many, or as many as it takes for a mass M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from kvsieve.backends.attention import rotate_part, visibility

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvsieve._core import Step
    from kvsieve.backends.base import AttendCall, Store
    from kvsieve.policy.select import HeaviestValues

__all__ = ["Found", "Piece", "heaviest", "of_rows"]

Piece: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"
"""The query ``[H, D]``, and keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` that it sees, rotated to their distances. ``H`` is a
multiple of ``Hkv``."""


def heaviest(pieces: Sequence[Piece], call: AttendCall, rule: HeaviestValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query to the keys of all pieces, in text order.

    Returns:
        out ``[H, Dv]``, and the mass of what was added up, ``[H]``.
    """
    group = pieces[0][0].shape[0] // pieces[0][1].shape[0]
    logits = torch.cat([(k.repeat_interleave(group, 0) @ q[:, :, None])[..., 0] for q, k, _ in pieces], 1) * call.scale
    v = torch.cat([v for _, _, v in pieces], 1).repeat_interleave(group, 0)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    shares = logits.softmax(-1)
    best_first, order = logits.sort(dim=-1, descending=True, stable=True)
    taken = torch.ones_like(best_first, dtype=torch.bool)
    if rule.top is not None:
        taken[:, rule.top :] = False
    if rule.mass is not None:
        # Another one is needed as long as those before it are not enough.
        before = shares.gather(1, order).cumsum(1).roll(1, 1)
        before[:, 0] = 0
        taken &= before < rule.mass
    kept = torch.zeros_like(taken).scatter_(1, order, taken)
    mass = (shares * kept).sum(1)
    weights = shares * kept
    if call.sink_logits is not None:
        sinks = call.sink_logits.detach().to(logits)
        total = torch.logsumexp(logits, 1)
        weights = weights * torch.sigmoid(total - sinks)[:, None]
    if rule.renormalise:
        weights = weights / mass[:, None]
    return (weights[:, None] @ v)[:, 0], mass


@dataclass(frozen=True, eq=False)
class Found:
    """The answers of some rows, by row: out ``[H, Dv]``, and the mass ``[H]``."""

    rows: Mapping[int, tuple[torch.Tensor, torch.Tensor]]

    def put_in(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``out`` ``[B, q, H, Dv]`` with the answers as its last columns, and the masses float32 ``[B, H]``, nan of other rows."""
        masses = out.new_full((out.shape[0], out.shape[2]), torch.nan, dtype=torch.float32)
        for row, (answer, mass) in self.rows.items():
            out[row, -1] = answer.to(out.dtype)
            masses[row] = mass.float()
        return out, masses


def of_rows(
    store: Store,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    step: Step,
    call: AttendCall,
    rule: HeaviestValues,
    rows: Sequence[bool],
) -> Found:
    """What the rows that are named read, before the step's tokens are stored: ``new`` is q ``[B, H, q, D]``, k and v."""
    q, k, v = new
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    pieces: dict[int, list[Piece]] = {}
    for part in step.parts():
        if not rows[part.row]:
            continue
        old = store.read(list(zip(*(run.tolist() for run in part.runs()))))
        # The row's only new token, in the last column, is a key of this part or of another.
        newest = slice(k.shape[2] - 1 + part.new_range[0], k.shape[2] - 1 + part.new_range[1])
        keys, values = (torch.cat([held, x[part.row, :, newest]], 1).to(wide) for held, x in zip(old, (k, v)))
        query, keys = rotate_part(q[part.row, :, -1:].to(wide), keys, part, step.stored_keys, call.rope)
        seen = visibility(part, q.device)[-1]
        pieces.setdefault(part.row, []).append((query[:, 0], keys[:, seen], values[:, seen]))
    return Found({row: heaviest(mine, call, rule) for row, mine in pieces.items()})
