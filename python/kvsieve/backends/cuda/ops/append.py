"""Store new tokens."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Shaped, Table, Vector, check_heads, operation
from kvsieve.backends.cuda.ops.launch import THREADS, Argument, aligned, module, start
from kvsieve.errors import ShapeError

__all__ = ["Append", "append"]


class Append(NamedTuple):
    """Store new tokens where ``appends`` says.

    Attributes:
        k: ``[B, Hkv, q, D]``; v: ``[B, Hkv, q, Dv]``. Copied first if rows do not begin at multiples of 16 bytes.
        blocks: int64 ``[n, 4]`` (key address, value address, tokens between heads, kind 0).
        appends: int32 ``[capacity, 4]`` (row, column, block, slot), of which ``counts[0]`` count.
        tokens: at most how many may count; sizes the launch.
    """

    k: Annotated[torch.Tensor, Shaped(("rows", "heads", "columns", "channels"), any_stride=True)]
    v: Annotated[torch.Tensor, Shaped(("rows", "heads", "columns", "channels"), any_stride=True)]
    blocks: Annotated[torch.Tensor, Table(torch.int64, 4), WRITTEN]
    appends: Annotated[torch.Tensor, Table(torch.int32, 4)]
    counts: Annotated[torch.Tensor, Vector(torch.int32, 1)]
    tokens: int

    def check(self) -> None:
        k, v = self.k, self.v
        check_heads(k.dtype, k.shape[-1], v.shape[-1])
        if k.shape[:3] != v.shape[:3] or k.dtype is not v.dtype:
            raise ShapeError(
                f"k and v must be [rows, heads, columns, channels] alike, got {k.dtype} {tuple(k.shape)} and {v.dtype} "
                f"{tuple(v.shape)}"
            )
        if not 0 <= self.tokens <= self.appends.shape[0]:
            raise ShapeError(f"tokens must be at most {self.appends.shape[0]}, the list's capacity, got {self.tokens}")

    def launch(self) -> None:
        k, v = aligned(self.k), aligned(self.v)
        pieces = (k.shape[3] + v.shape[3]) * k.element_size() // 16
        grid = min(-(-self.tokens * k.shape[1] * pieces // THREADS), 1024)
        tokens = (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3])
        args: list[Argument] = [*tokens, self.blocks, self.appends, self.counts, k.shape[1]]
        start(module("append", "append", k.dtype, k.shape[3], v.shape[3]), (grid, 1, 1), args, k.device)


append = operation(Append)
