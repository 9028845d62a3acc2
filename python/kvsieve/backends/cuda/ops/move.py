"""Move tokens between slots of plain blocks."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Table, check_heads, operation
from kvsieve.backends.cuda.ops.launch import module, start

__all__ = ["Move", "move"]


class Move(NamedTuple):
    """Move tokens between slots, in the order of ``moves``, int32 ``[n, 4]`` (from, to, from_slot | to_slot << 16, length)."""

    blocks: Annotated[torch.Tensor, Table(torch.int64, 4), WRITTEN]
    moves: Annotated[torch.Tensor, Table(torch.int32, 4)]
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def check(self) -> None:
        check_heads(self.dtype, self.key_dim, self.value_dim)

    def launch(self) -> None:
        pieces, count = (self.key_dim + self.value_dim) * self.dtype.itemsize // 16, self.moves.shape[0]
        kernel = module("move", "move", self.dtype, self.key_dim, self.value_dim)
        grid = (pieces if count else 0, self.kv_heads, 1)
        start(kernel, grid, [self.blocks, self.moves, count], self.blocks.device, block=64)


move = operation(Move)
