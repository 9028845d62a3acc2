"""How keys that are stored before RoPE are turned where a selection compares or reads them."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Table, require
from kvsieve.backends.cuda.ops.launch import Argument

__all__ = ["Angles", "angle_arguments", "check_angles"]


class Angles(NamedTuple):
    """Turns of queries and keys.

    Attributes:
        table: float32 ``[n, 2 * pairs]``, cosines and sines of the positions ``0 .. n - 1``; None where keys are as the model
            rotated them, or nothing rotates.
        layout: 1 half, 2 interleaved; factor: multiplies the rotated channels of the queries.
        alone: a search turns the queries alone, to the window's edge, as if all keys were there; attention numbers what a head
            reads ``0, 1, ...``. Else keys and queries are turned to their numbers among the residents.
    """

    table: Annotated[torch.Tensor | None, Table(torch.float32, lambda op: op.angles.table.shape[-1])] = None
    layout: int = 0
    factor: float = 1.0
    alone: bool = False


def check_angles(op: Any, key_dim: int) -> None:
    """Of every operation that selects: what it turns by."""
    angles: Angles = op.angles
    if angles.table is not None:
        width = angles.table.shape[1]
        require(angles.layout in (1, 2), f"layout must be 1 or 2 where keys turn, got {angles.layout}")
        require(0 < width <= key_dim and width % 2 == 0, f"{width} rotated channels in keys of {key_dim}")


def angle_arguments(angles: Angles) -> list[Argument]:
    """The kernels' last arguments."""
    pairs = 0 if angles.table is None else angles.table.shape[1] // 2
    return [angles.table, pairs, angles.layout, float(angles.factor), int(angles.alone)]
