"""Pack tokens of plain blocks: kept channels and codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Table, Vector, check_heads, operation
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.launch import Argument, module, start

__all__ = ["Pack", "pack"]


class Pack(NamedTuple):
    """Pack tokens of plain blocks: kept channels and codes.

    Attributes:
        blocks: int64 ``[n, 4]``, as for :class:`Append`; packed: int64 ``[m, 8]``, where packed blocks lie.
        moves: int32 ``[k, 4]`` (from, to, from_slot | to_slot << 16, length), ``to`` counted from the first packed block, those
            into one block together and in their order; starts: int32 ``[blocks + 1]``, where each block's begin.
        dtype: of the layer; format: the four integers of a :class:`Format`.
        pruned: whether ``blocks`` are float32 rows of kept channels alone, without values.
    """

    blocks: Annotated[torch.Tensor, Table(torch.int64, 4)]
    packed: Annotated[torch.Tensor, Table(torch.int64, PACKED_COLUMNS), WRITTEN]
    moves: Annotated[torch.Tensor, Table(torch.int32, 4)]
    starts: Annotated[torch.Tensor, Vector(torch.int32, 1)]
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    format: Sequence[int]
    pruned: bool

    def check(self) -> None:
        Format(*self.format).check(self.key_dim, self.value_dim)
        check_heads(self.dtype, self.key_dim, self.value_dim)

    def launch(self) -> None:
        made = Format(*self.format)
        kernel = module("pack", "pack", self.dtype, made.key_bits, made.value_bits, self.pruned)
        sizes = (self.key_dim, made.kept, made.wide(self.dtype), self.value_dim, made.log_group)
        args: list[Argument] = [self.blocks, self.packed, self.moves, self.starts, *sizes]
        start(kernel, (self.starts.shape[0] - 1, self.kv_heads, 1), args, self.packed.device)


pack = operation(Pack)
