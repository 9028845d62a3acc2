"""The maximum and the minimum of every key channel of whole blocks."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Table, Vector, check_heads, operation, require
from kvsieve.backends.cuda.ops.launch import module, start

__all__ = ["PageBounds", "page_bounds"]


class PageBounds(NamedTuple):
    """Write the bounds of whole blocks to where the table says that they lie.

    Attributes:
        blocks: as for :class:`Append`, with addresses of bounds ``[Hkv, 2, D]`` in its last column; which: int32 ``[n]``, blocks.
        kv_heads, key_dim, dtype: of the keys.
    """

    blocks: Annotated[torch.Tensor, Table(torch.int64, 4), WRITTEN]
    which: Annotated[torch.Tensor, Vector(torch.int32)]
    kv_heads: int
    key_dim: int
    dtype: torch.dtype

    def check(self) -> None:
        check_heads(self.dtype, self.key_dim)
        require(self.kv_heads > 0, f"{self.kv_heads} key-value heads; at least 1")

    def outputs(self) -> None:
        """Nothing."""

    def launch(self) -> None:
        kernel = module("page_bounds", "page_bounds", self.dtype, self.key_dim)
        start(kernel, (self.which.shape[0], self.kv_heads, 1), [self.blocks, self.which], self.which.device)


page_bounds = operation(PageBounds)
