"""Which of some scores are the greatest."""

from __future__ import annotations

import torch

__all__ = ["greatest"]


def greatest(scores: torch.Tensor, count: int, newest: bool = False) -> torch.Tensor:
    """The ``count`` greatest of each row of ``scores`` ``[..., n]``, of equal ones the first, or the ``newest``: int64
    ``[..., count]``, ascending; all there are where there are no more.

    Nothing is sorted but where the last place is shared by equal scores.
    """
    held = scores.shape[-1]
    if count >= held:
        return torch.arange(held, device=scores.device).expand(*scores.shape[:-1], held)
    best = scores.topk(count, dim=-1, sorted=False)
    found = best.indices
    if count and bool(((scores >= best.values.amin(-1, keepdim=True)).sum(-1) > count).any()):
        ranked = (scores.flip(-1) if newest else scores).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        found = held - 1 - ranked if newest else ranked
    return found.sort(dim=-1).values
