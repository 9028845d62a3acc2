"""CUDA kernels for tensors on a GPU in float32, bfloat16 and float16.

Kernels are compiled at first use and loaded with CuPy, run on torch's current stream, and get their scratch from torch's allocator.

A decoding step is planned once and uploaded once: one pinned buffer to one device buffer of stable address, for all layers. Kernels
read their counts from it, so a captured graph can be replayed with the next step's plan. Nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvsieve.backends.block_tier import HostCopies
from kvsieve.backends.cuda import launcher
from kvsieve.backends.cuda.capabilities import CAPABILITIES
from kvsieve.backends.cuda.context import Context
from kvsieve.backends.cuda.ops.surprisal import surprisal
from kvsieve.backends.cuda.selection import CudaSelection
from kvsieve.backends.cuda.telling import TellingStore
from kvsieve.errors import BackendError

if TYPE_CHECKING:
    from kvsieve.policy.select import SparseSelection

__all__ = ["CudaBackend"]


class CudaBackend:
    """CUDA kernels.

    Raises:
        BackendError: if there is no GPU, CuPy or NVRTC; the message says what to install.
    """

    name = "cuda"
    capabilities = CAPABILITIES

    def __init__(self) -> None:
        launcher.require()
        self.context = Context()

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> TellingStore:
        self.capabilities.check_layer(k.device, k.dtype, k.shape[3], v.shape[3])
        return TellingStore(self.context, k, v)

    def make_selection(self, rule: SparseSelection) -> CudaSelection:
        return CudaSelection(rule)

    def make_tier(self, folder: str | None) -> HostCopies:
        if folder is not None:
            raise BackendError(
                f"backend 'cuda' holds blocks that are not on the device in memory of the host, and none in a file; leave disk="
                f"{folder!r} out, or use backend='reference'"
            )
        return HostCopies()

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return surprisal(logits, ids)
