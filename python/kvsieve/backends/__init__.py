"""The same operations, once per backend: ``reference`` (the specification, any device), ``cpu`` (Rust), ``cuda`` (CUDA, CuPy).

What they share stands here: protocols and capabilities (`base`), attention and its merge (`attention`), the plan of a prompt's
chunk (`prefill_plan`), attention scores (`attention_scores`), runs of slots (`runs`), the table of selection rules (`rules`).
A backend is a folder with the same files in each: capabilities, backend, store, selection, `select/` with one rule a file.
No backend imports another.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import torch

from kvsieve.backends.capabilities import FLOATS
from kvsieve.checks import told
from kvsieve.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvsieve.backends.base import Backend

__all__ = ["BACKENDS", "choose", "get"]

BACKENDS = {"reference": "ReferenceBackend", "cpu": "CpuBackend", "cuda": "CudaBackend"}
"""Every backend by name: the class in its folder's ``backend.py``."""


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        BackendError: for an unknown name, or one that cannot run here.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendError(f"unknown backend {told(name)}; known: {', '.join(BACKENDS)}")
    module = importlib.import_module(f"kvsieve.backends.{name}.backend")
    return cast("Callable[[], Backend]", getattr(module, BACKENDS[name]))()


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend for tensors on ``device`` in ``dtype``.

    On a CUDA device that is ``cuda``, whether or not what it needs is installed: a slower one is taken by name, never in silence.
    """
    return device.type if dtype in FLOATS and device.type in ("cpu", "cuda") else "reference"
