"""Attention of many queries: by the core's kernel or torch's fused one, whichever is faster on this processor (docs/log.md).

Torch's in bands where the policy has a window, so that cost is linear in the chunk, and in pieces where one call would be long.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvsieve import _core
from kvsieve.backends.attention import Partial, attend, concatenate, join, visibility
from kvsieve.backends.cpu.tensors import DTYPES, view
from kvsieve.backends.prefill_plan import BAND, PrefillPlan

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall

__all__ = ["Kernels", "attend_part", "dense", "flash", "kernels", "multiplies_bfloat16"]

QUERIES = 256
"""A long prompt is cut at multiples of so many queries."""

WORK = 10 << 30
"""Floating-point operations of one call into torch, about: less than a fifth of a second of one core."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for products of bfloat16 matrices (Intel's AMX), which torch's kernel uses."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


class Kernels(NamedTuple):
    """By what a prefill is computed."""

    own: bool
    """By the core's kernel wherever it can, in float32; else by torch's wherever that can."""
    bfloat16: str | None
    """Whose products of bfloat16 matrices are faster than those of float32: ``"own"``, ``"torch"``, or nobody's."""


@functools.cache
def kernels() -> Kernels:
    """What is faster on this processor: by its maker and instruction set, not by a measurement, so that a machine gives the same
    numbers every time.

    Torch's kernel multiplies by MKL, which runs its fast code on Intel's processors alone. In float32 the core's takes 0.6 to 0.9
    of its time on others, and 0.7 to 0.85 on Intel's with AVX-512; Intel's with no more than AVX2 were not tried. With AMX torch's
    takes a half to a third of its own time in bfloat16; with mere instructions for pairs of bfloat16 it takes twice as long, and
    the core's a third.
    """
    isa = _core.isa()
    own = isa in ("avx512", "avx512bf16") or (isa == "avx2" and not _core.is_intel())
    if multiplies_bfloat16():
        return Kernels(own, "torch")
    return Kernels(own, "own" if isa == "avx512bf16" else None)


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


def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefillPlan, call: AttendCall) -> Partial:
    """Attention to a part by the core's kernel, of whatever its queries see; operands of one dtype, result as :func:`flash`."""
    heads, count, value_dim = q.shape[0], q.shape[1], v.shape[2]
    out, lse = torch.empty(count, heads, value_dim), torch.empty(heads, count)
    first, last = plan.seen_by()
    asked = view(q), view(k), view(v), first, last, call.scale, call.softcap
    _core.attend_dense(*asked, out=view(out), lse=view(lse), dtype=DTYPES[q.dtype], threads=torch.get_num_threads())
    return out.transpose(0, 1), lse


def attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefillPlan, call: AttendCall, *, exact: bool = True
) -> Partial:
    """Attention of a prefill to one part: float32 out ``[H, m, Dv]``, lse ``[H, m]``. Unless ``exact``, keys and values that are of
    bfloat16 are multiplied as such where that is faster."""
    part, chosen = plan.part, kernels()
    if part.top_k:
        if plan.visible is None:
            plan.visible = visibility(part, q.device)
        q, k, v = q.float(), k.float(), v.float()
        # Many tokens may be pinned: so many queries at a time, or the logits of all of them would be held at once.
        done = [
            attend(q[:, lo : lo + BAND], k, v, plan.visible[lo : lo + BAND], call.scale, call.softcap, part.top_k)
            for lo in range(0, q.shape[1], BAND)
        ]
        return concatenate(done)
    narrow = chosen.bfloat16 if v.dtype == torch.bfloat16 and not exact else None
    computed = torch.float32 if narrow is None else torch.bfloat16
    q, k, v = q.to(computed), k.to(computed), v.to(computed)
    # Torch's kernel knows neither caps nor values of other channels than the keys.
    unknown = bool(part.far) or call.softcap is not None or k.shape[-1] != v.shape[-1]
    if unknown or narrow == "own" or (chosen.own and narrow is None):
        return seen(q, k, v, plan, call)
    if part.near is None:
        return dense(q, k, v, plan.num_old, call.scale)
    outs = [flash(q[:, queries], k[:, keys], v[:, keys], call.scale, bias=bias) for queries, keys, bias in plan.band_list()]
    return concatenate(outs)
