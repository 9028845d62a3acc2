"""Attention of a sliding layer over the tokens that it holds and the new ones, under masks made of positions.

A query at position ``p`` of its row sees the positions ``p - size + 1`` to ``p`` (transformers' convention: a window of ``size``
tokens, the query's own among them). Positions count a row's own tokens, so the pads of a batch take no room in any window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.runtime.part import Forward

__all__ = ["QUERIES", "Piece", "plan", "windowed"]

QUERIES = 512
"""Queries of one piece of a prompt: each piece reads only the keys within its windows, and its mask stays small."""

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries ``first .. last`` of a forward, the columns ``low .. high`` of held and new keys that they read, and who sees what.

    ``mask`` is bool ``[B or 1, 1, queries, keys]``; None where everything is seen, or (``causal``) everything up to the query.
    """

    first: int
    last: int
    low: int
    high: int
    mask: torch.Tensor | None = None
    causal: bool = False


# ------------------------------------------------------------------------------------------------------------------------- masks


def plan(forward: Forward, counts: Sequence[int], size: int, device: torch.device) -> list[Piece]:
    """The pieces of a forward in layers with a window of ``size``, where row ``r`` holds ``counts[r]`` tokens."""
    held, width, whole = max(counts, default=0), forward.width, all(new == forward.width for new in forward.lens)
    if whole and width == 1:
        sees = [min(seen, size - 1) for seen in forward.seen]
        if len(set(sees)) == 1:
            return [Piece(0, 1, held - sees[0], held + 1)]
    if whole and not held and width <= size:
        return [Piece(0, width, 0, width, causal=True)]
    seen, lens, had = (np.asarray(x, np.int64)[:, None] for x in (forward.seen, forward.lens, counts))
    if len({*zip(forward.seen, forward.lens, counts)}) == 1:
        seen, lens, had = seen[:1], lens[:1], had[:1]
    old = np.arange(held)[None]
    old = np.where(held - old <= had, seen - (held - old), -1)
    new = np.arange(width)[None]
    # A pad has a position that nothing else has, and sees itself only: no row of a mask is empty.
    new = np.where(new < width - lens, -2 - new, seen + new - (width - lens))
    keys = np.concatenate([old, new], 1)
    pieces, known = [], {}
    for first in range(0, width, QUERIES):
        last = min(first + QUERIES, width)
        queries = new[:, first:last]
        low = _first_column(keys[:, : held + last], queries, size)
        near = keys[:, low : held + last]
        # Inside a long prompt all pieces look alike from where they stand.
        origin = seen * 0 if (near < 0).any() or (queries < 0).any() else queries[:, :1]
        alike = (queries - origin).tobytes(), (near - origin).tobytes(), bool(origin.any())
        if alike not in known:
            known[alike] = torch.from_numpy(_visible(queries, near, size))[:, None].to(device)
        pieces.append(Piece(first, last, low, held + last, known[alike]))
    return pieces


def _visible(queries: Positions, keys: Positions, size: int) -> npt.NDArray[np.bool_]:
    """Who sees what, bool ``[B, q, k]``, from positions ``[B, q]`` and ``[B, k]``; negative ones are pads or unused places."""
    q, k = queries[:, :, None], keys[:, None, :]
    seen: npt.NDArray[np.bool_] = ((k <= q) & (k > np.maximum(q - size, -1))) | (k == q)
    return seen


def _first_column(keys: Positions, queries: Positions, size: int) -> int:
    """The first column of ``keys`` that any of the last columns' ``queries`` sees."""
    real = np.where(queries >= 0, queries, np.iinfo(np.int64).max).min(1, keepdims=True)
    columns = np.flatnonzero(((keys >= 0) & (keys > real - size)).any(0))
    own: int = keys.shape[1] - queries.shape[1]
    return min(own, int(columns[0])) if len(columns) else own


# --------------------------------------------------------------------------------------------------------------------- attention


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, call: AttendCall) -> torch.Tensor:
    """Attention of one piece of a forward.

    Args:
        q: ``[B, H, q, D]``, all queries of the forward; k, v: ``[B, Hkv, n, D]``, what is held and what is new.
        piece: which queries and keys.
        call: scale, cap and sink logits of the layer.

    Returns:
        ``[B, queries of the piece, H, Dv]``, in the widest dtype of the three.
    """
    if q.shape[2] != piece.last - piece.first:
        q = q[:, :, piece.first : piece.last]
    if k.shape[2] != piece.high - piece.low:
        k, v = k[:, :, piece.low : piece.high], v[:, :, piece.low : piece.high]
    if not q.dtype == k.dtype == v.dtype:
        common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(common), k.to(common), v.to(common)
    plain = call.softcap is None and call.sink_logits is None
    out = _fused(q, k, v, piece, call.scale) if plain else _explicit(q, k, v, piece, call)
    return out.transpose(1, 2).contiguous()


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, scale: float) -> torch.Tensor:
    """torch's own attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    batch, heads, count, dim = q.shape
    group = heads // k.shape[1]
    if piece.causal:
        return attention(q, k, v, is_causal=count > 1, scale=scale, enable_gqa=group > 1)
    # The queries of one key-value head stand side by side, so that no key is repeated.
    mask = piece.mask if piece.mask is None or count == 1 else piece.mask.repeat(1, 1, group, 1)
    out = attention(q.reshape(batch, -1, group * count, dim), k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, -1)


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, call: AttendCall) -> torch.Tensor:
    """Attention with capped logits, with learned logits that join the softmax without a value, or with both."""
    batch, heads, count, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    logits = q.reshape(batch, kv_heads, group * count, dim) @ k.transpose(2, 3)
    logits = logits.view(batch, kv_heads, group, count, -1).float() * call.scale
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    mask = piece.mask
    if piece.causal:
        mask = torch.ones(count, k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    weights = logits.softmax(-1)
    if call.sink_logits is not None:
        # exp(sink) joins the denominator: every weight shrinks by what the sink takes.
        sinks = call.sink_logits.float().view(1, kv_heads, group, 1, 1)
        weights = weights * torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks)
    out = weights.to(v.dtype).view(batch, kv_heads, group * count, -1) @ v
    return out.view(batch, heads, count, -1)
