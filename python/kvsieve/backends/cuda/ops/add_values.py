"""Add up chosen values, by weights that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Shaped, Table, Vector, check_heads, operation, require
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.launch import Argument, module, start

__all__ = ["AddValues", "add_values"]


class AddValues(NamedTuple):
    """Weighted sums of values, each query head's own.

    Attributes:
        columns: int64 ``[rows, H, m]``: keys of a row's item, counted over its spans in their order.
        weights: float32 ``[rows, H, m]``; a value whose weight is zero is not read.
        items: int32 ``[rows]``: which item a row reads.
        blocks, starts, spans: as for :class:`Attend`.
        packed, format: as for :class:`Attend`.
        dtype: of the values.

    Returns:
        ``[rows, H, Dv]`` in ``dtype``.
    """

    columns: Annotated[torch.Tensor, Shaped(("rows", "heads", "m"), torch.int64)]
    weights: Annotated[torch.Tensor, Shaped(("rows", "heads", "m"), torch.float32)]
    items: Annotated[torch.Tensor, Vector(torch.int32, lambda op: op.columns.shape[0])]
    blocks: Annotated[torch.Tensor, Table(torch.int64, 4)]
    starts: Annotated[torch.Tensor, Vector(torch.int32, 1)]
    spans: Annotated[torch.Tensor, Table(torch.int32, 4)]
    kv_heads: int
    value_dim: int
    dtype: torch.dtype
    packed: Annotated[torch.Tensor | None, Table(torch.int64, PACKED_COLUMNS)] = None
    format: Sequence[int] | None = None

    def check(self) -> None:
        columns, weights = self.columns, self.weights
        check_heads(self.dtype, self.value_dim)
        require(columns.is_contiguous() and weights.is_contiguous(), "columns and weights must be contiguous")
        require(weights.shape == columns.shape, f"weights must be {tuple(columns.shape)}, got {tuple(weights.shape)}")
        good = self.kv_heads > 0 and columns.shape[1] % self.kv_heads == 0
        require(good, f"{columns.shape[1]} query heads are no multiple of {self.kv_heads} key-value heads")
        require((self.packed is None) == (self.format is None), "packed blocks need a format, and a format packed blocks")

    def outputs(self) -> torch.Tensor:
        return self.weights.new_empty((*self.columns.shape[:2], self.value_dim), dtype=self.dtype)

    def launch(self) -> torch.Tensor:
        out = self.outputs()
        rows, heads, num = self.columns.shape
        parameters = [self.dtype, self.value_dim]
        log_group = 0
        if self.format is not None:
            made = Format(*self.format)
            parameters, log_group = [*parameters, made.value_bits], made.log_group
        args: list[Argument] = [self.columns, self.weights, self.items, num, self.blocks, self.starts, self.spans]
        args += (heads // self.kv_heads, self.packed, log_group, out)
        start(module("add_values", "add_values", *parameters), (heads, rows, 1), args, out.device)
        return out


add_values = operation(AddValues)
