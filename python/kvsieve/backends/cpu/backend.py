"""The Rust backend: a block store per layer, for tensors on the CPU in float32, bfloat16 and float16."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import torch

from kvsieve._core import TierFile, surprisal
from kvsieve.backends.cpu.capabilities import CAPABILITIES
from kvsieve.backends.cpu.selection import CpuSelection
from kvsieve.backends.cpu.store import CpuStore, Plans
from kvsieve.backends.cpu.tensors import DTYPES, view

if TYPE_CHECKING:
    from kvsieve.policy.select import SparseSelection

__all__ = ["CpuBackend"]


class CpuBackend:
    """Rust kernels for tensors on the CPU."""

    name = "cpu"
    capabilities = CAPABILITIES

    def __init__(self) -> None:
        self._plans = Plans()

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> CpuStore:
        self.capabilities.check_layer(k.device, k.dtype, k.shape[3], v.shape[3])
        return CpuStore(self._plans, k, v)

    def make_selection(self, rule: SparseSelection) -> CpuSelection:
        return CpuSelection(rule)

    def make_tier(self, folder: str | None) -> TierFile:
        return TierFile(folder or tempfile.gettempdir())

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        targets = ids.detach().contiguous().numpy()
        return torch.from_numpy(surprisal(view(logits), targets, DTYPES[logits.dtype], torch.get_num_threads()))
