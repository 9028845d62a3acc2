"""Which of some scores are the greatest."""

from __future__ import annotations

import torch

__all__ = ["greatest"]


def greatest(scores: torch.Tensor, count: int, newest: bool = False) -> torch.Tensor:
    """The ``count`` greatest of each row of ``scores`` ``[..., n]``, of equal ones the first, or the ``newest``: int64
    ``[..., count]``, ascending; all there are where there are no more.

    Nothing is sorted but where the last place is shared by equal scores. On another device than the CPU, which would have to be
    waited for to know that, whoever shares it is counted instead. Where scores are nan, it is not told which are found.
    """
    held = scores.shape[-1]
    if count >= held:
        return torch.arange(held, device=scores.device).expand(*scores.shape[:-1], held)
    if scores.device.type != "cpu":
        return _counted(scores, count, newest)
    best = scores.topk(count, dim=-1, sorted=False)
    found = best.indices
    if count and bool(((scores >= best.values.amin(-1, keepdim=True)).sum(-1) > count).any()):
        ranked = (scores.flip(-1) if newest else scores).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        found = held - 1 - ranked if newest else ranked
    return found.sort(dim=-1).values


def _counted(scores: torch.Tensor, count: int, newest: bool) -> torch.Tensor:
    """:func:`greatest` of more than ``count`` scores, without waiting for the device."""
    held = scores.shape[-1]
    if not count:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.long, device=scores.device)
    last = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, shared = scores > last, scores == last
    places = (shared.flip(-1) if newest else shared).cumsum(-1)
    taken = above | (shared & ((places.flip(-1) if newest else places) <= count - above.sum(-1, keepdim=True)))
    numbers = torch.where(taken, torch.arange(held, device=scores.device), held - 1)
    return numbers.topk(count, dim=-1, largest=False, sorted=True).values
