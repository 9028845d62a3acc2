"""Tensors as the Rust core takes them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from kvsieve._core import lenders

__all__ = ["DTYPES", "LENT", "floats", "view"]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The dtypes of keys and values, by their names in the core."""

LENT = bool(lenders(torch.Tensor, torch.nn.Parameter))
"""Whether the core reads tensors where they lie, by DLPack's table of C functions (torch 2.10): numpy's view of one costs 1 us."""


def view(x: torch.Tensor) -> npt.NDArray[Any]:
    """A numpy view of ``x``; 16-bit floats as their bits."""
    if x.requires_grad:
        x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy()


def floats(x: torch.Tensor | None) -> npt.NDArray[Any] | None:
    """A numpy view of float32 numbers, if there are any."""
    return None if x is None else x.numpy()
