"""Copy dense tensors into runs of plain blocks."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Shaped, Table, check_heads, operation, require
from kvsieve.backends.cuda.ops.gather import copy_runs

__all__ = ["Scatter", "scatter"]


class Scatter(NamedTuple):
    """The inverse of :class:`Gather`: ``k`` ``[Hkv, tokens, D]`` and ``v``, contiguous, go to ``runs``."""

    k: Annotated[torch.Tensor, Shaped(("heads", "tokens", "channels"), aligned=True)]
    v: Annotated[torch.Tensor, Shaped(("heads", "tokens", "channels"), aligned=True)]
    blocks: Annotated[torch.Tensor, Table(torch.int64, 4), WRITTEN]
    runs: Annotated[torch.Tensor, Table(torch.int32, 4)]

    def check(self) -> None:
        k, v = self.k, self.v
        check_heads(k.dtype, k.shape[-1], v.shape[-1])
        good = k.is_contiguous() and v.is_contiguous() and k.shape[:2] == v.shape[:2] and k.dtype == v.dtype
        require(good, f"k and v must be contiguous [heads, tokens, channels] alike, got {k.shape} and {v.shape}")

    def launch(self) -> None:
        copy_runs(self.blocks, self.runs, self.k, self.v, back=True)


scatter = operation(Scatter)
