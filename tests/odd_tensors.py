"""Tensors as nobody means them: of other dtypes, in other places, repeated, and without memory that others may read, or with none.

And how the arguments of a call are told in a line."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["floats", "odd_tensor", "short"]


def odd_tensor(rng: random.Random, numbers: Any) -> Any:
    """A tensor of ``numbers``, a float32 array of any strides, or one that is odd in some way; sometimes the array itself."""
    if any(stride < 0 for stride in numbers.strides) or numbers.size > 1 << 20:
        numbers = np.ones(numbers.shape[1:], np.float32)
    made = torch.tensor(numbers) if numbers.flags.c_contiguous else torch.from_numpy(numbers.copy())
    ways: list[Callable[[], Any]] = [
        lambda: made.mT if made.ndim > 1 else made.ravel()[:0],
        lambda: made.to(rng.choice((torch.bfloat16, torch.float16, torch.float64, torch.int16))),
        lambda: made[:1].expand(rng.choice((2, 3, 1 << 20)), *made.shape[1:]) if made.ndim and len(made) else made,
        lambda: torch.nn.Parameter(made),
        lambda: made.to("meta"),
        lambda: made.to_sparse() if made.ndim else made,
        lambda: made[None],
        lambda: made.clone().requires_grad_(),
        lambda: _without_memory(made.clone()),
        lambda: numbers,
    ]
    return rng.choice(ways)() if rng.random() < 0.6 else made


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def floats(tensor: torch.Tensor) -> Any:
    """The numbers of ``tensor``, where numpy can tell them; else three others."""
    return tensor.detach().numpy() if tensor.dtype is torch.float32 else np.ones(3, np.float32)


def short(value: Any) -> str:
    """``value`` in so many words as fit a line."""
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} {value.layout} {value.device} {list(value.shape)}>"
    if isinstance(value, np.ndarray):
        return f"<{value.dtype}{list(value.shape)} {value.ravel()[:6].tolist() if value.size < 1 << 20 else '...'}>"
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
