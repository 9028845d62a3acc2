"""Attention of many queries: torch's fused attention does the matrix work.

Whole where everything is seen, and for windows the middle that all queries of a band see, with the two ragged edges done plainly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve.backends.attention import Partial, attend, concatenate, join

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.backends.cuda.plan import DevicePart

__all__ = ["BAND", "attend_part", "fused"]

BAND = 256
"""Queries of a prefill that share one band of keys."""


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> Partial:
    """Out ``[H, m, Dv]`` and lse ``[H, m]`` of ``q`` ``[H, m, D]`` over all keys, or, causal, over as many keys as queries."""
    heads, m, dim = q.shape
    group = heads // k.shape[0]
    if causal:
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    else:
        # Without a mask the queries of a group are just more queries: keys need not be repeated.
        q = q.reshape(k.shape[0], group * m, dim)
    out: torch.Tensor
    lse: torch.Tensor
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q[None].float(), k[None].float(), v[None].float(), 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q[None], k[None], v[None], None, True, 0.0, causal, scale=scale)[:2]
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q[None], k[None], v[None], 0.0, causal, scale=scale)[:2]
    return out[0].reshape(heads, m, -1).float(), lse[0, :, : q.shape[1]].reshape(heads, m)


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: DevicePart, call: AttendCall, queries: slice, keys: slice
) -> Partial:
    return attend(q[:, queries].float(), k[:, keys].float(), v[:, keys].float(), p.visible(queries, keys), call.scale, call.softcap)


def attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: DevicePart, call: AttendCall) -> Partial:
    """Attention of a chunk to one part: float32 out ``[H, m, Dv]``, lse ``[H, m]``."""
    bands = [slice(lo, min(lo + BAND, q.shape[1])) for lo in range(0, q.shape[1], BAND)]
    if p.part.far or call.softcap is not None or k.shape[-1] != v.shape[-1]:
        return concatenate([_plain(q, k, v, p, call, band, slice(None)) for band in bands])
    if p.part.near is None:
        old = p.num_old
        pieces = [fused(q, k[:, :old], v[:, :old], call.scale)] if old else []
        if k.shape[1] > old:
            pieces.append(fused(q, k[:, old:], v[:, old:], call.scale, causal=True))
        return join(pieces)
    return concatenate([_attend_band(q, k, v, p, call, band) for band in bands])


def _attend_band(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: DevicePart, call: AttendCall, band: slice) -> Partial:
    """Queries of one band over a window: the keys that all of them see go to the fused kernel, those that some see do not."""
    first, last = int(p.query_true[band.start]), int(p.query_true[band.stop - 1])
    near = p.part.near or 0
    at = p.key_true
    begin, middle = (int(np.searchsorted(at, edge - near, side="right")) for edge in (first, last))
    after, end = (int(np.searchsorted(at, edge, side="right")) for edge in (first, last))
    if middle >= after:
        return _plain(q, k, v, p, call, band, slice(begin, end))
    pieces = [fused(q[:, band], k[:, middle:after], v[:, middle:after], call.scale)]
    pieces += [_plain(q, k, v, p, call, band, keys) for keys in (slice(begin, middle), slice(after, end)) if keys.stop > keys.start]
    return join(pieces)
