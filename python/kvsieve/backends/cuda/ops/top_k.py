"""The largest of each row."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Shaped, operation, require
from kvsieve.backends.cuda.ops.launch import module, start

__all__ = ["TopK", "top_k"]


class TopK(NamedTuple):
    """Columns (int64 ``[rows, k]``, ascending) of the k largest of float32 ``x`` ``[rows, n]``; the smallest of them, ``[rows]``.

    Of equal values the first columns are taken; nan ranks below everything.
    """

    x: Annotated[torch.Tensor, Shaped(("rows", "n"), torch.float32, any_stride=True)]
    k: int

    def check(self) -> None:
        require(1 <= self.k <= self.x.shape[1], f"k must lie between 1 and {self.x.shape[1]}, got {self.k}")

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.new_empty((self.x.shape[0], self.k), dtype=torch.int64), self.x.new_empty((self.x.shape[0],))

    def launch(self) -> tuple[torch.Tensor, torch.Tensor]:
        columns, kth = self.outputs()
        x = self.x if self.x.stride(1) == 1 else self.x.contiguous()
        start(module("top_k", "top_k"), (x.shape[0], 1, 1), [x.data_ptr(), x.stride(0), x.shape[1], self.k, columns, kth], x.device)
        return columns, kth


top_k = operation(TopK)
