"""Rotate keys or queries by their positions."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Shaped, Vector, operation, require
from kvsieve.backends.cuda.ops.launch import DTYPES, THREADS, Argument, module, start

__all__ = ["Rotate", "rotate"]


class Rotate(NamedTuple):
    """``x`` ``[H, n, D]`` rotated by int64 ``positions`` ``[n]``, contiguous, in ``dtype`` (default: that of x).

    ``frequencies`` is float64 ``[R / 2]``; the first R channels rotate and are multiplied by ``factor``.
    """

    x: Annotated[torch.Tensor, Shaped(("heads", "tokens", "channels"))]
    positions: Annotated[torch.Tensor, Vector(torch.int64)]
    frequencies: Annotated[torch.Tensor, Vector(torch.float64, 1)]
    layout: int
    factor: float = 1.0
    dtype: torch.dtype | None = None

    def check(self) -> None:
        x, pairs, dtype = self.x, self.frequencies.shape[0], self.dtype
        require(
            x.dtype in DTYPES and (dtype is None or dtype in DTYPES), f"rotate takes {', '.join(map(str, DTYPES))}, got {x.dtype}"
        )
        require(self.positions.shape == x.shape[1:2], f"{tuple(self.positions.shape)} positions for {x.shape[1]} tokens")
        require(2 * pairs <= x.shape[2], f"{2 * pairs} rotated channels in rows of {x.shape[2]}")
        require(self.layout in (1, 2), f"layout must be 1 (half) or 2 (interleaved), got {self.layout}")

    def outputs(self) -> torch.Tensor:
        return self.x.new_empty(self.x.shape, dtype=self.dtype or self.x.dtype)

    def launch(self) -> torch.Tensor:
        x, out, pairs = self.x, self.outputs(), self.frequencies.shape[0]
        heads, tokens, dim = x.shape
        args: list[Argument] = [x.data_ptr(), *x.stride()[:2], self.positions, self.frequencies, pairs, self.layout]
        args += (float(self.factor), heads, tokens, dim, out)
        grid = min(-(-tokens * (dim - pairs) // THREADS), 4096) if heads else 0
        start(module("rotate", "rotate", x.dtype, out.dtype), (grid, 1, 1), args, x.device)
        return out


rotate = operation(Rotate)
