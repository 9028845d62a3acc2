"""Copy runs of plain blocks into dense tensors, and back."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Table, check_heads, operation
from kvsieve.backends.cuda.ops.launch import module, start

__all__ = ["Gather", "copy_runs", "gather"]


def copy_runs(blocks: torch.Tensor, runs: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, back: bool = False) -> None:
    """:class:`Gather` into dense tensors that are there, or ``back``: the inverse. All of them are known to fit."""
    kernel = module("gather", "gather", k.dtype, k.shape[2], v.shape[2], back)
    start(kernel, (runs.shape[0], k.shape[0], 1), [blocks, runs, k, v, k.shape[1]], k.device)


class Gather(NamedTuple):
    """Keys ``[Hkv, tokens, D]`` and values ``[Hkv, tokens, Dv]`` of ``runs``, int32 ``[n, 4]`` (block, lo, hi, tokens before)."""

    blocks: Annotated[torch.Tensor, Table(torch.int64, 4)]
    runs: Annotated[torch.Tensor, Table(torch.int32, 4)]
    tokens: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def check(self) -> None:
        check_heads(self.dtype, self.key_dim, self.value_dim)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.blocks.new_empty((self.kv_heads, self.tokens, self.key_dim), dtype=self.dtype)
        return k, self.blocks.new_empty((self.kv_heads, self.tokens, self.value_dim), dtype=self.dtype)

    def launch(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.outputs()
        copy_runs(self.blocks, self.runs, k, v)
        return k, v


gather = operation(Gather)
