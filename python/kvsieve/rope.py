"""Rotary positions, found by watching the model rather than by reading its configuration.

A layer's rotation is a list of frequencies, a pairing of channels, and a factor. All three are *measured* on the model in hand: its
queries before and after rotation are compared with every candidate, so partial rotary, scaled frequencies, interleaved layouts and
layers without positions are told apart by what they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from kvsieve._core import Rope

__all__ = ["LayerRope", "measure"]

Layout = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class LayerRope:
    """The rotation of one layer.

    Attributes:
        inv_freq: float64 ``[R/2]``, radians per position.
        layout: ``"half"`` pairs channel ``i`` with ``i + R/2``; ``"interleaved"`` pairs ``2i`` with ``2i + 1``. The first
            R channels rotate, the rest pass through.
        factor: what the model multiplies cosines and sines by (YaRN and longrope; 1 otherwise).
    """

    inv_freq: torch.Tensor = field(repr=False)
    layout: Layout
    factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Channels that rotate."""
        return 2 * self.inv_freq.numel()

    @cached_property
    def core(self) -> Rope:
        """The same rotation for the Rust kernels."""
        from kvsieve._core import Rope

        return Rope(self.inv_freq.tolist(), self.layout, self.factor)

    def table(self, positions: torch.Tensor, dtype: torch.dtype, *, factor: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[n, R/2]`` of int64 ``positions`` ``[n]``; the phases are exact for any position."""
        angle = positions.to(torch.float64)[:, None] * self.inv_freq.to(positions.device)[None, :]
        scale = self.factor if factor else 1.0
        return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)

    def turn(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``x`` ``[..., n, D]`` rotated by a table of :meth:`table`."""
        cos, sin = table
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.layout == "half":
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, *, factor: bool = True) -> torch.Tensor:
        """``x`` ``[..., n, D]`` rotated by ``positions`` (int64 ``[n]``), in ``x``'s dtype."""
        return self.turn(x, self.table(positions, x.dtype, factor=factor))


def measure(raw: torch.Tensor, rotated: torch.Tensor, frequencies: list[tuple[torch.Tensor, float]]) -> LayerRope | None:
    """The rotation that turned ``raw`` into ``rotated``, or None if nothing turned.

    Args:
        raw, rotated: queries ``[H, n, D]`` of positions ``0 .. n-1`` before and after the model's rotation.
        frequencies: candidates (inv_freq, factor), as found in the model's rotary modules.

    Raises:
        LookupError: if no candidate explains the change.
    """
    raw, rotated = raw.double(), rotated.double()
    size = raw.norm().clamp_min(1e-12)
    tolerance = 0.02
    if (raw - rotated).norm() / size < 1e-6:
        return None
    positions = torch.arange(raw.shape[1], device=raw.device)
    best: tuple[float, LayerRope] | None = None
    for inv_freq, factor in frequencies:
        for layout in ("half", "interleaved"):
            rope = LayerRope(inv_freq.double().cpu(), layout, factor)
            if rope.rotary_dim <= raw.shape[-1]:
                error = float((rope.rotate(raw, positions) - rotated).norm() / size)
                if best is None or error < best[0]:
                    best = (error, rope)
    if best is None or best[0] > tolerance:
        raise LookupError(f"no rotation explains its queries (closest: {'none' if best is None else f'{best[0]:.3f}'} off)")
    return best[1]
