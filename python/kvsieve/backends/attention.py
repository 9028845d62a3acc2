"""What attention is, and what every backend takes from its definition: plain torch, any device, any float dtype.

For one row and one memory (a *part* of the step):

    keys     = the memory's residents, then the new tokens, in text order
    visible  = 0 <= d < near and d >= far          with d = true position of the query - true position of the key
    logits   = scale * <rotate(q), rotate(k)>      rotated to the positions the policy assigns
    lse      = logsumexp(logits), out = softmax(logits) @ v

and the parts merge by ``softmax`` over their ``lse``, which equals one softmax over all their keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from kvsieve._core import Part
    from kvsieve.facts import LayerRope

__all__ = ["Partial", "attend", "concatenate", "join", "merge", "rotate_part", "total", "visibility"]

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys: out ``[H, m, Dv]``, and the log-sum-exp ``[H, m]`` that lets it merge with the rest."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    top_k: int = 0,
) -> Partial:
    """The primitive: softmax attention, and the log-sum-exp that lets results merge.

    Args:
        q: ``[H, m, D]``; k: ``[Hkv, n, D]``; v: ``[Hkv, n, Dv]``, already rotated. ``H`` is a multiple of ``Hkv``.
        visible: bool ``[m, n]``.
        scale: factor on the logits; softcap: their cap; top_k: keep only the best so many keys per head (0 for all).

    Returns:
        out ``[H, m, Dv]`` (zero where nothing is visible) and lse ``[H, m]`` (-inf there).
    """
    (heads, count, dim), (kv_heads, size, _) = q.shape, k.shape
    # The query heads of a group meet the same keys, one after another.
    rows = heads // kv_heads * count
    # What a long prompt has of them is large, so that each step is taken in place.
    logits = (q.reshape(kv_heads, rows, dim) @ k.transpose(-1, -2)).view(heads, count, size).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(~visible, -torch.inf)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits.masked_fill_(logits < kth, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = logits.sub_(torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp_()
    return (weights.view(kv_heads, rows, size) @ v).view(heads, count, v.shape[2]), lse


def merge(parts: list[Partial], sink_logits: torch.Tensor | None = None) -> torch.Tensor:
    """One softmax over the union of the parts' keys: ``[H, m, Dv]`` from pairs (out ``[H, m, Dv]``, lse ``[H, m]``).

    ``sink_logits`` (``[H]``) are learned logits that take part in the softmax without a value.
    """
    if len(parts) == 1 and sink_logits is None:
        return parts[0][0]
    lse = torch.stack([part[1] for part in parts])
    every = lse if sink_logits is None else torch.cat([lse, sink_logits.to(lse.dtype)[None, :, None].expand(1, *lse.shape[1:])])
    total = torch.logsumexp(every, 0)
    weights = torch.exp(lse - torch.where(total.isneginf(), 0.0, total))
    return sum((w[..., None] * part[0] for w, part in zip(weights, parts)), torch.zeros_like(parts[0][0]))


def total(parts: list[Partial], sink_logits: torch.Tensor | None = None) -> torch.Tensor:
    """The log-sum-exp ``[H, m]`` of what :func:`merge` joins, learned logits among them."""
    lse = [part[1] for part in parts]
    if sink_logits is not None:
        lse.append(sink_logits.to(lse[0].dtype)[:, None].expand_as(lse[0]))
    return lse[0] if len(lse) == 1 else torch.logsumexp(torch.stack(lse), 0)


def join(pieces: list[Partial]) -> Partial:
    """Out ``[H, m, Dv]`` and lse ``[H, m]`` over the union of the pieces' keys, which are disjoint."""
    if len(pieces) == 1:
        return pieces[0]
    return merge(pieces), torch.logsumexp(torch.stack([lse for _, lse in pieces]), 0)


def concatenate(bands: list[Partial]) -> Partial:
    """Bands of queries over the same keys, one after another."""
    if len(bands) == 1:
        return bands[0]
    return torch.cat([out for out, _ in bands], 1), torch.cat([lse for _, lse in bands], 1)


def _long(values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def rotate_part(
    q: torch.Tensor, k: torch.Tensor, part: Part, frame: str, rope: LayerRope | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` ``[H, m, D]`` and ``k`` ``[Hkv, n, D]`` rotated to the distances that ``part`` assigns."""
    if rope is None:
        return q, k
    q_at, k_at = (_long(p, q.device) for p in (part.query_positions(), part.key_positions()))
    if part.fixed is not None:
        return rope.rotate(q, torch.full_like(q_at, part.fixed)), rope.rotate(k, torch.zeros_like(k_at))
    if frame == "post_rope":
        q_at, k_at = q_at - _long(part.query_true(), q.device), k_at - _long(part.key_true(), q.device)
        moved = [rope.rotate(x, at, factor=False) if at.any() else x for x, at in ((q, q_at), (k, k_at))]
        return moved[0], moved[1]
    return rope.rotate(q, q_at), rope.rotate(k, k_at)


def visibility(part: Part, device: torch.device) -> torch.Tensor:
    """Which key each query of ``part`` sees: bool ``[m, n]``."""
    distance = _long(part.query_true(), device)[:, None] - _long(part.key_true(), device)[None, :]
    visible = (distance >= 0) & (distance >= part.far)
    if part.near is not None:
        visible &= distance < part.near
    if part.top_k:
        visible[:-1] = False
    return visible
