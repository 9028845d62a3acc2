"""What the operations that select share: where the residents of rows lie, blocks of queries, and the slots of choices.

See residents.cuh.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Table, Vector, check_heads, require

__all__ = [
    "QUERY_COLUMNS",
    "Residents",
    "check_queries",
    "check_slots",
    "queries_together",
    "slot_width",
]

STAGES = 8
"""Stages of a selection, at most."""

NODES = 1024
"""Blocks that a beam can follow at once: its nodes lie in shared memory."""

SEARCHERS = 256
"""Threads of a thread block that selects."""

QUERY_COLUMNS = 8 + STAGES
"""Integers of a block of queries, see residents.cuh: row, first column, queries, first position, the region's ends, the first stage
to search, one to fill up; the slot of each stage."""

BAND = 32768
"""Blocks of queries in a launch."""

SCRATCH = 64 << 20
"""Bytes of scores that a launch of `narrow` may need."""


def slot_width(most: int) -> int:
    """Integers of a choice of at most ``most`` ranges, for one key-value head."""
    return (most + 7) // 4 * 4


class Residents(NamedTuple):
    """Where the residents of rows lie, all of them, in text order.

    Attributes:
        blocks: int64 ``[n, 4]``, as for :class:`Append`.
        starts: int32 ``[rows * items + 1]``; spans: int32 ``[m, 4]``: row ``r`` holds the spans of item ``(r + 1) * items - 1``.
        items: of each row.
    """

    blocks: Annotated[torch.Tensor, Table(torch.int64, 4)]
    starts: Annotated[torch.Tensor, Vector(torch.int32, lambda op: op.q.shape[0] * op.residents.items + 1)]
    spans: Annotated[torch.Tensor, Table(torch.int32, 4)]
    items: int


def check_queries(op: Any, *dims: int) -> None:
    """Of every operation that selects: its head sizes and its heads."""
    check_heads(op.q.dtype, *dims)
    heads = op.q.shape[1]
    require(op.kv_heads > 0 and heads % op.kv_heads == 0, f"{heads} query heads are no multiple of {op.kv_heads} key-value heads")


def check_slots(name: str, slots: tuple[torch.Tensor, torch.Tensor], kv_heads: int, most: int) -> None:
    """Slots that outlive a step, and those that only it needs."""
    for x in slots:
        good = x.dtype is torch.int32 and x.dim() == 3 and x.shape[1:] == (kv_heads, slot_width(most)) and x.is_contiguous()
        require(good, f"{name} must be contiguous int32 [slots, {kv_heads}, {slot_width(most)}], got {x.dtype} {tuple(x.shape)}")


def queries_together(op: Any) -> int:
    """Queries that a warp scores keys for at once."""
    num = op.q.shape[1] // op.kv_heads * ((op.most_queries - 1) // op.stride + 1)
    return 1 if num <= 1 else 2 if num == 2 else 4
