"""Rows whose heads read tokens that they chose before: what was chosen is a choice of ranges of one token each, and a window.

``sparse.cu`` reads it as it reads what a selection has chosen. The sets stay on the device; nothing waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve.backends.cuda.ops.launch import aligned
from kvsieve.backends.cuda.ops.residents import QUERY_COLUMNS, slot_width
from kvsieve.backends.cuda.ops.sparse import RESIDENT, Sparse, heads_together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsieve.backends.base import AttendCall, HeadSets
    from kvsieve.backends.cuda.step_residents import StepResidents

__all__ = ["attend_sets"]

FAR = 2**31 - 1
"""Behind every resident."""


def attend_sets(
    q: torch.Tensor, sets: Sequence[HeadSets | None], asked: StepResidents, shape: tuple[int, int], call: AttendCall
) -> torch.Tensor:
    """What the last query of each row with sets reads; zero for other rows.

    Args:
        q: ``[B, H, q, D]``, whose tokens are stored; asked: where all residents lie; shape: KV heads, and the size of a value.

    Returns:
        ``[B, H, Dv]`` in the dtype of ``q``.
    """
    kv_heads, value_dim = shape
    mine = [(row, one) for row, one in enumerate(sets) if one is not None]
    most = max(1, *(one.tokens.shape[1] - one.gone for _, one in mine))
    at, queries = np.full((q.shape[0], 2), -1, np.int32), np.full((len(mine), QUERY_COLUMNS), -1, np.int32)
    longest = 0
    for number, (row, one) in enumerate(mine):
        last = asked.counts[row] - 1
        at[row] = number, 0
        queries[number, :8] = row, 0, 1, last, 0, one.rest, 0, 0
        queries[number, 8] = 2 * number
        longest = max(longest, most + last + 1 - one.rest)
    group = q.shape[1] // kv_heads
    fill = asked.processors * RESIDENT // (q.shape[0] * kv_heads * -(-group // heads_together(group)))
    held = torch.stack([_slot(one, most) for _, one in mine])
    out, _ = Sparse(
        q=aligned(q[:, :, -1:]),
        residents=asked.residents,
        queries=asked.upload(queries),
        most_queries=1,
        at=asked.upload(at),
        kv_heads=kv_heads,
        value_dim=value_dim,
        sinks=0,
        window=0,
        stage=0,
        length=1,
        most=most,
        held=held,
        spare=held[:0],
        splits=max(1, min(fill, -(-longest // 64))),
        scale=call.scale,
        softcap=call.softcap or 0.0,
        sink_logits=call.sinks,
    ).launch()
    return out[:, 0]


def _slot(one: HeadSets, most: int) -> torch.Tensor:
    """The tokens that each head still reads, ascending, as a choice: int32 ``[Hkv, slot_width(most)]``, see ``Chosen``."""
    heads, chosen = one.tokens.shape
    left, tokens = max(chosen - one.gone, 0), one.tokens
    if one.gone > 0:
        tokens = torch.where(one.order >= one.gone, tokens, FAR).sort(dim=1).values[:, :left]
    slot = torch.zeros(heads, slot_width(most), dtype=torch.int32, device=tokens.device)
    slot[:, 0] = left
    slot[:, 4 : 4 + left] = tokens
    return slot
