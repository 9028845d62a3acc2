"""Packed tokens in plain torch: the specification of what every backend stores.

A group of numbers ``x`` is kept as ``b``-bit codes with one scale and one zero point, both float16 (KIVI, Liu et al., ICML 2024,
arXiv 2402.02750):

    zero_point = min(x) rounded down,  scale = (max(x) - zero_point) / (2**b - 1),  code = round((x - zero_point) / scale)

so that ``zero_point + scale * code`` is within half a scale of ``x``. A group with a number that is not finite, or too large
for float16, is NaN throughout. Keys are grouped by channel over tokens, values by token over channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsieve.budget import BLOCK
from kvsieve.policy.storage import Channels, Packing

__all__ = ["PackedBlock", "dequantize", "quantize"]


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of groups of numbers.

    Args:
        x: ``[..., group]``; bits: 2, 4 or 8.

    Returns:
        codes uint8 ``[..., group]``; scale and zero point, float16 ``[..., 1]``.
    """
    wide, top = x.float(), 2**bits - 1
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    zero_point = low.half()
    # The next float16 below: one bit pattern down for positive numbers, up for negative ones; below 0 the least negative one.
    pattern = zero_point.view(torch.int16)
    down = torch.where(zero_point > 0, pattern - 1, torch.where(zero_point == 0, pattern.new_tensor(-32767), pattern + 1))
    zero_point = torch.where(zero_point.float() > low, down.view(torch.float16), zero_point)
    scale = ((high - zero_point.float()) / top).half()
    bad = ~(torch.isfinite(wide).all(-1, keepdim=True) & torch.isfinite(zero_point) & torch.isfinite(scale))
    scale, zero_point = scale.masked_fill(bad, torch.nan), zero_point.masked_fill(bad, torch.nan)
    codes = ((wide - zero_point.float()) / scale.float() + 0.5).floor().clamp(0, top)
    return torch.where(scale > 0, codes, 0.0).nan_to_num(0.0).to(torch.uint8), scale, zero_point


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`quantize`: float32, rounded once."""
    return (zero_point.double() + scale.double() * codes).float()


@dataclass(eq=False)
class PackedBlock:
    """One block of packed tokens: for each head 64 keys of the kept channels, and 64 values."""

    packing: Packing
    channels: Channels
    keys: torch.Tensor
    """``[Hkv, 64, kept]``, numbers or codes."""
    values: torch.Tensor
    """``[Hkv, 64, Dv]``, numbers or codes."""
    key_scales: tuple[torch.Tensor, torch.Tensor] | None
    """Scale and zero point, ``[Hkv, 64 / group, 1, kept]``."""
    value_scales: tuple[torch.Tensor, torch.Tensor] | None
    """Scale and zero point, ``[Hkv, 64, Dv / group, 1]``."""

    @classmethod
    def empty(cls, packing: Packing, channels: Channels, k: torch.Tensor, v: torch.Tensor) -> PackedBlock:
        """A block for keys and values like ``k``, ``v`` ``[n, Hkv, 64, D]``."""
        heads, kept, dim, group = k.shape[1], packing.key_kept, v.shape[3], packing.group

        def zeros_of(bits: int, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.uint8 if bits else k.dtype, device=k.device)

        def scales(bits: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor] | None:
            zeros = torch.zeros(shape, dtype=torch.float16, device=k.device)
            return (zeros, zeros.clone()) if bits else None

        return cls(
            packing,
            channels,
            zeros_of(packing.key_bits, heads, BLOCK, kept),
            zeros_of(packing.value_bits, heads, BLOCK, dim),
            scales(packing.key_bits, heads, BLOCK // group, 1, kept),
            scales(packing.value_bits, heads, BLOCK, dim // group if packing.value_bits else 0, 1),
        )

    @property
    def nbytes(self) -> tuple[int, int, int]:
        """Bytes of keys, of values, and of scales; codes are counted at their width, though each has a byte of its own here."""
        scales = [x for pair in (self.key_scales, self.value_scales) if pair is not None for x in pair]
        keys, values = (
            x.shape[0] * x.shape[1] * -(-x.shape[2] * bits // 8) if bits else x.nbytes
            for x, bits in ((self.keys, self.packing.key_bits), (self.values, self.packing.value_bits))
        )
        return keys, values, sum(x.nbytes for x in scales)

    def thin_keys(self) -> torch.Tensor:
        """Keys of the kept channels, float32 ``[Hkv, 64, kept]`` where they are codes."""
        if self.key_scales is None:
            return self.keys
        codes = self.keys.view(len(self.keys), -1, self.packing.group, self.keys.shape[2])
        return dequantize(codes, *self.key_scales).flatten(1, 2)

    def read(self, lo: int, hi: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[Hkv, hi - lo, dim]``, zero where a channel was dropped, and values: float32 where they are codes."""
        thin = self.thin_keys()[:, lo:hi]
        index = self._index().to(thin.device)
        keys = thin.new_zeros(thin.shape[0], hi - lo, dim).scatter_(2, index[:, None].expand_as(thin), thin)
        if self.value_scales is None:
            return keys, self.values[:, lo:hi]
        codes = self.values.view(*self.values.shape[:2], -1, self.packing.group)
        return keys, dequantize(codes, *self.value_scales).flatten(2)[:, lo:hi]

    def write(self, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store tokens ``[Hkv, n, D]`` from ``slot`` on.

        Where keys share a scale, what lies before ``slot`` in its group is kept, and what lies behind is forgotten.
        """
        index, end = self._index().to(k.device), slot + k.shape[1]
        thin = k.gather(2, index[:, None].expand(-1, k.shape[1], -1))
        thin = thin.masked_fill((self.channels.index < 0).to(k.device)[:, None], 0)
        if self.key_scales is None:
            self.keys[:, slot:end] = thin
        else:
            group, held = self.packing.group, self.thin_keys()
            for start in range(slot // group * group, end, group):
                lo, hi = max(start, slot), min(start + group, end)
                x = torch.cat([held[:, start:lo], thin[:, lo - slot : hi - slot].float()], 1)
                codes, scale, zero_point = quantize(x.transpose(1, 2), self.packing.key_bits)
                self.keys[:, start:hi] = codes.transpose(1, 2)
                for held_of, new in zip(self.key_scales, (scale, zero_point)):
                    held_of[:, start // group] = new.transpose(1, 2)
        if self.value_scales is None:
            self.values[:, slot:end] = v
        else:
            codes, scale, zero_point = quantize(v.reshape(*v.shape[:2], -1, self.packing.group), self.packing.value_bits)
            self.values[:, slot:end] = codes.flatten(2)
            for held_of, new in zip(self.value_scales, (scale, zero_point)):
                held_of[:, slot:end] = new

    def _index(self) -> torch.Tensor:
        index = self.channels.index
        return torch.where(index < 0, -1 - index, index)
