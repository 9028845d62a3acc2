"""Cosines and sines of positions."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import WRITTEN, Table, Vector, operation, require
from kvsieve.backends.cuda.ops.launch import THREADS, Argument, module, start

__all__ = ["Rotations", "rotations"]


class Rotations(NamedTuple):
    """Fill rows of ``table`` (float32 ``[n, 2 * pairs]``) with cosines and sines of int64 ``positions`` ``[n]``.

    ``frequencies`` is float64 ``[pairs]``. With ``counts`` only the first ``counts[0]`` positions count.
    """

    positions: Annotated[torch.Tensor, Vector(torch.int64)]
    counts: Annotated[torch.Tensor | None, Vector(torch.int32, 1)]
    frequencies: Annotated[torch.Tensor, Vector(torch.float64, 1)]
    table: Annotated[torch.Tensor, Table(torch.float32, lambda op: 2 * op.frequencies.shape[0]), WRITTEN]

    def check(self) -> None:
        rows, num = self.table.shape[0], self.positions.shape[0]
        require(rows >= num, f"a table of {rows} rows for {num} positions")

    def launch(self) -> None:
        num, pairs = self.positions.shape[0], self.frequencies.shape[0]
        args: list[Argument] = [self.positions, num, self.counts, self.frequencies, pairs, self.table]
        start(module("rotate", "turns"), (min(-(-num * pairs // THREADS), 4096), 1, 1), args, self.positions.device)


rotations = operation(Rotations)
