"""The specification as a backend: plain torch, any device, any float dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvsieve.backends.block_tier import HostCopies
from kvsieve.backends.reference.capabilities import CAPABILITIES
from kvsieve.backends.reference.selection import ReferenceSelection
from kvsieve.backends.reference.store import ReferenceStore

if TYPE_CHECKING:
    from kvsieve.policy.select import SparseSelection

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """Plain torch on any device."""

    name = "reference"
    capabilities = CAPABILITIES

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> ReferenceStore:
        return ReferenceStore(k, v)

    def make_selection(self, rule: SparseSelection) -> ReferenceSelection:
        return ReferenceSelection(rule)

    def make_tier(self, folder: str | None) -> HostCopies:
        return HostCopies()

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        wide = logits.float()
        score = torch.logsumexp(wide, -1) - wide.gather(-1, ids[:, None])[:, 0]
        return score.clamp(max=torch.finfo(torch.float32).max)
