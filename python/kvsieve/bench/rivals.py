"""What else computes the same attention: transformers' own call, and every exact formulation of eager torch that we know of.

All take queries ``[1, H, m, D]``, keys and values ``[1, Hkv, n, D]``. Those for one query return
``[1, H, 1, D]`` or ``[1, 1, H, D]``, which are the same memory; those for chunks return ``[1, m, H, D]``, as transformers wants it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

__all__ = ["DECODE", "IN_F32", "PREFILL", "Way", "exact", "generate_default"]

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Module(torch.nn.Module):
    """As much of an attention module as transformers' attention function looks at."""

    is_causal = True

    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


_modules: dict[int, _Module] = {}


def generate_default(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """What ``generate`` calls unless a user asks for something else: transformers' own function. ``[1, m, H, D]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    group = q.shape[1] // k.shape[1]
    module = _modules.setdefault(group, _Module(group))
    out: torch.Tensor = sdpa_attention_forward(module, q, k, v, None, scaling=scale)[0]
    return out


# ------------------------------------------------------------------------------------------------------------------ one query


def _packed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The query heads of a group as queries of their key-value head."""
    return q.reshape(1, k.shape[1], q.shape[1] // k.shape[1], q.shape[3])


def packed_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return sdpa(_packed(q, k), k, v, scale=scale).reshape(q.shape)


def packed_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = _flash(_packed(q, k), k, v, 0.0, False, scale=scale)[0]
    return out.reshape(q.shape)


def packed_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(_packed(q, k), k, v, None, 0.0, False, scale=scale)[0]
    return out.reshape(q.shape)


def bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    logits = torch.bmm(_packed(q, k)[0] * scale, k[0].transpose(1, 2))
    return torch.bmm(logits.softmax(-1), v[0]).reshape(q.shape)


def bmm_wide_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    logits = torch.bmm(_packed(q, k)[0] * scale, k[0].transpose(1, 2))
    return torch.bmm(logits.softmax(-1, dtype=torch.float32).to(v.dtype), v[0]).reshape(q.shape)


def bmm_keys_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    logits = torch.bmm(k[0], (_packed(q, k)[0] * scale).transpose(1, 2))
    return torch.bmm(v[0].transpose(1, 2), logits.softmax(1)).transpose(1, 2).reshape(q.shape)


def mm_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    heads = zip((_packed(q, k)[0] * scale).unbind(), k[0].unbind(), v[0].unbind())
    return torch.cat([torch.mm(torch.mm(x, y.t()).softmax(-1), z) for x, y, z in heads]).reshape(q.shape)


def packed_in_f32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return sdpa(_packed(q, k).float(), k.float(), v.float(), scale=scale).reshape(q.shape).to(q.dtype)


DECODE: dict[str, Way] = {
    "packed_sdpa": packed_sdpa,
    "packed_flash": packed_flash,
    "packed_math": packed_math,
    "bmm": bmm,
    "bmm_wide_softmax": bmm_wide_softmax,
    "bmm_keys_first": bmm_keys_first,
    "mm_by_head": mm_by_head,
    "packed_in_f32": packed_in_f32,
}
"""Formulations for one query, by name."""


# --------------------------------------------------------------------------------------------------------- as many queries as keys


def repeated_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return sdpa(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = _flash(q, k, v, 0.0, True, scale=scale)[0]
    return out.transpose(1, 2)


def flash_in_f32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = _flash(q.float(), k.float(), v.float(), 0.0, True, scale=scale)[0]
    return out.transpose(1, 2).to(q.dtype)


PREFILL: dict[str, Way] = {"repeated_sdpa": repeated_sdpa, "flash": flash, "flash_in_f32": flash_in_f32}
"""Formulations for a causal chunk, by name; they return ``[1, m, H, D]``."""


IN_F32 = {"packed_in_f32", "flash_in_f32"}
"""Formulations for 16-bit elements; in float32 they are others under another name."""


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> torch.Tensor:
    """The answer in float64, head by head: ``[1, m, H, D]`` from the shapes above. ``causal``: the last query sees everything."""
    group, (_, _, m, _), n = q.shape[1] // k.shape[1], q.shape, k.shape[2]
    out = torch.empty(1, m, q.shape[1], v.shape[3], dtype=torch.float64)
    hidden = torch.arange(n)[None, :] > torch.arange(n - m, n)[:, None] if causal else None
    for head in range(k.shape[1]):
        keys, values = k[0, head].double(), v[0, head].double()
        for at in range(head * group, (head + 1) * group):
            logits = (q[0, at].double() @ keys.T) * scale
            if hidden is not None:
                logits.masked_fill_(hidden, -torch.inf)
            out[0, :, at] = logits.softmax(-1) @ values
    return out
