"""Attention of many queries through torch's fused matrix kernels: in float32, or in bfloat16 where that is the faster one.

In bands where the policy has a window, so that cost is linear in the chunk, and in pieces where one call would be long.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from kvsieve.backends.attention import Partial, attend, concatenate, join, visibility
from kvsieve.backends.prefill_plan import BAND, PrefillPlan

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall

__all__ = ["attend_part", "dense", "flash", "multiplies_bfloat16"]

QUERIES = 256
"""A long prompt is cut at multiples of so many queries."""

WORK = 10 << 30
"""Floating-point operations of one call into torch, about: less than a fifth of a second of one core."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for products of bfloat16 matrices (Intel's AMX).

    With them torch's kernel takes a half to a third of the time that it takes in float32. Without, on processors that have mere
    instructions for bfloat16, it takes twice as long (docs/log.md). Both answers are those of the instruction set, not of a
    measurement, so that a machine gives the same numbers every time.
    """
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Partial:
    """float32 out ``[H, m, Dv]`` and lse ``[H, m]`` of ``q`` ``[H, m, D]`` over ``k``, ``v`` ``[Hkv, n, D]``, all of one dtype."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale
    )
    return out[0].float(), lse[0]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_old: int, scale: float) -> Partial:
    """Causal attention of ``q`` ``[H, m, D]`` over ``num_old`` keys that all see, and then their own; as :func:`flash`.

    In pieces of about :data:`WORK` where that is needed, because nothing can interrupt torch inside one: first by key-value head,
    which costs nothing, then by queries and keys.
    """
    (heads, count, dim), num_new = q.shape, k.shape[1] - num_old
    if 4 * heads * count * dim * (num_old + num_new // 2) <= WORK:
        return _causal(q, k, v, num_old, num_new, scale)
    group = heads // k.shape[0]
    size = max(QUERIES, WORK // (4 * group * dim * k.shape[1]) // QUERIES * QUERIES)
    if 4 * group * count * dim * (num_old + num_new // 2) <= WORK:
        size = count
    columns = []
    for head in range(k.shape[0]):
        mine, keys, values = q[head * group : (head + 1) * group], k[head : head + 1], v[head : head + 1]
        rows = []
        for lo in range(0, count, size):
            hi = min(lo + size, count)
            seen, own = (num_old + lo, hi - lo) if num_new else (num_old, 0)
            rows.append(_causal(mine[:, lo:hi], keys[:, : seen + own], values[:, : seen + own], seen, own, scale))
        columns.append(concatenate(rows))
    return torch.cat([out for out, _ in columns]), torch.cat([lse for _, lse in columns])


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_old: int, num_new: int, scale: float) -> Partial:
    """:func:`dense`, with at most :data:`WORK` in a call over old keys."""
    most = max(QUERIES, WORK // (4 * q.shape[0] * q.shape[1] * q.shape[2]))
    cuts = [slice(at, min(at + most, num_old)) for at in range(0, num_old, most)]
    pieces = [flash(q, k[:, cut], v[:, cut], scale) for cut in cuts]
    if num_new:
        pieces.append(flash(q, k[:, num_old:], v[:, num_old:], scale, causal=True))
    return join(pieces)


def attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefillPlan, call: AttendCall, *, narrow: bool = False
) -> Partial:
    """Attention of a prefill to one part: float32 out ``[H, m, Dv]``, lse ``[H, m]``; ``narrow``: by products of bfloat16 matrices,
    where nothing is chosen by them."""
    part = plan.part
    if part.far or part.top_k or call.softcap is not None or k.shape[-1] != v.shape[-1]:
        if plan.visible is None:
            plan.visible = visibility(part, q.device)
        q, k, v = q.float(), k.float(), v.float()
        # Many tokens may be pinned: so many queries at a time, or the logits of all of them would be held at once.
        done = [
            attend(q[:, lo : lo + BAND], k, v, plan.visible[lo : lo + BAND], call.scale, call.softcap, part.top_k)
            for lo in range(0, q.shape[1], BAND)
        ]
        return concatenate(done)
    computed = torch.bfloat16 if narrow else torch.float32
    q, k, v = q.to(computed), k.to(computed), v.to(computed)
    if part.near is None:
        return dense(q, k, v, plan.num_old, call.scale)
    outs = [flash(q[:, queries], k[:, keys], v[:, keys], call.scale, bias=bias) for queries, keys, bias in plan.band_list()]
    return concatenate(outs)
