"""Runs of slots, and picking tokens of each head."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Columns", "columns", "pick"]

Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Runs as int64 arrays of blocks, first slots, and slots past the end."""


def columns(runs: list[tuple[int, int, int]]) -> Columns:
    """Runs (block, lo, hi) as three int64 arrays."""
    table = np.asarray(runs, np.int64).reshape(-1, 3)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]), np.ascontiguousarray(table[:, 2])


def pick(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Tokens ``keep`` (int64 ``[Hkv, m]``) of each head of ``x`` ``[Hkv, n, D]``: ``[Hkv, m, D]``."""
    return x.gather(1, keep.to(x.device)[..., None].expand(-1, -1, x.shape[2]))
