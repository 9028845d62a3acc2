"""Read packed tokens back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Shaped, Table, check_heads, operation, require
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.launch import Argument, module, start

__all__ = ["Unpack", "unpack"]


class Unpack(NamedTuple):
    """Write the tokens of packed ``runs`` to ``k`` ``[Hkv, tokens, D]``, zero where a channel was dropped, and ``v``.

    ``runs`` is int32 ``[n, 4]`` (block counted from the first packed one, lo, hi, tokens before). Without ``v``, ``k`` is float32
    ``[Hkv, tokens, wide]`` and takes the kept channels alone.
    """

    packed: Annotated[torch.Tensor, Table(torch.int64, PACKED_COLUMNS)]
    runs: Annotated[torch.Tensor, Table(torch.int32, 4)]
    k: Annotated[torch.Tensor, Shaped(("heads", "tokens", "channels")), WRITTEN]
    v: Annotated[torch.Tensor | None, Shaped(("heads", "tokens", "channels")), WRITTEN]
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    format: Sequence[int]

    def check(self) -> None:
        made, k, v, dtype = Format(*self.format), self.k, self.v, self.dtype
        made.check(self.key_dim, self.value_dim)
        check_heads(dtype, self.key_dim, self.value_dim)
        width, kind = (made.wide(dtype), torch.float32) if v is None else (self.key_dim, dtype)
        good = k.shape[2] == width and k.dtype is kind and k.is_contiguous()
        require(good, f"k must be contiguous {kind} [heads, tokens, {width}], got {k.dtype} {tuple(k.shape)}")
        if v is not None:
            good = v.shape == (*k.shape[:2], self.value_dim) and v.dtype is dtype and v.is_contiguous()
            require(good, f"v must be contiguous {dtype} [heads, tokens, {self.value_dim}], got {v.dtype} {tuple(v.shape)}")

    def launch(self) -> None:
        made, k = Format(*self.format), self.k
        kernel = module("unpack", "unpack", self.dtype, made.key_bits, made.value_bits, self.v is None)
        sizes = (self.key_dim, made.kept, made.wide(self.dtype), self.value_dim, made.log_group)
        args: list[Argument] = [self.packed, self.runs, k, self.v, k.shape[1], *sizes]
        start(kernel, (self.runs.shape[0], k.shape[0], 1), args, k.device)


unpack = operation(Unpack)
