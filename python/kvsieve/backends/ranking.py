"""Which of some scores are the greatest, and which summaries of blocks suit queries best."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["best", "best_summaries", "greatest", "suitability"]


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


def suitability(summaries: Sequence[torch.Tensor], asked: torch.Tensor, per_head: bool) -> torch.Tensor:
    """How well summaries suit what queries ask: float32 ``[Hkv, n]``, or with heads that choose together ``[1, n]``.

    Args:
        summaries: float32 ``[m, Hkv, R]`` each, in order, ``n`` in all.
        asked: float32 ``[Hkv, R]``; the products with it are added up, over the heads too where ``per_head`` is false.
    """
    pieces = list(summaries)
    if not per_head:
        pieces, asked = [piece.flatten(1) for piece in pieces], asked.flatten()
    # A matrix product would add up equal summaries in other orders, so that the first of them need not win.
    scores = torch.cat([(piece * asked).sum(-1) for piece in pieces])
    return scores.T.contiguous() if per_head else scores[None]


def best(scores: torch.Tensor, most: int) -> list[list[int]]:
    """The ``most`` greatest of each row of ``scores`` ``[lists, n]``, ``n >= most``, of equal ones the first, ascending. What is
    nan or minus infinity is none of them."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    found = greatest(scores, most)
    kept = scores.gather(-1, found) > -torch.inf
    return [row[mine].tolist() for row, mine in zip(found, kept)]


def best_summaries(summaries: Sequence[torch.Tensor], asked: torch.Tensor, most: int, per_head: bool) -> list[list[int]]:
    """See :meth:`kvsieve.backends.base.Store.best_summaries`."""
    return best(suitability(summaries, asked, per_head), most)
