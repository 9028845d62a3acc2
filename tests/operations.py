"""Every CUDA operation by its name: ``ops.top_k(x, k)``."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Operations:
    """What the files in ``kvsieve/backends/cuda/ops`` define."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"kvsieve.backends.cuda.ops.{name}"), name)


ops = Operations()
