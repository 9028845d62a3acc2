"""Move packed tokens between slots bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Table, operation
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.launch import Argument, module, start

__all__ = ["Carry", "carry"]


class Carry(NamedTuple):
    """Move packed tokens between slots bit for bit, in the order of ``moves``: all of a token but keys that are codes.

    ``moves`` is as for :class:`Move`, blocks counted from the first packed one.
    """

    packed: Annotated[torch.Tensor, Table(torch.int64, PACKED_COLUMNS), WRITTEN]
    moves: Annotated[torch.Tensor, Table(torch.int32, 4)]
    kv_heads: int
    value_dim: int
    dtype: torch.dtype
    format: Sequence[int]

    def launch(self) -> None:
        made, count = Format(*self.format), self.moves.shape[0]
        key, _, value, scale = made.rows(self.dtype, self.value_dim)
        rows = (0 if made.key_bits else key, value, scale)
        pieces = sum(row // min(row & -row, 16) for row in rows if row)
        args: list[Argument] = [self.packed, self.moves, count, *rows]
        start(module("carry", "carry"), (pieces if count else 0, self.kv_heads, 1), args, self.packed.device, block=64)


carry = operation(Carry)
