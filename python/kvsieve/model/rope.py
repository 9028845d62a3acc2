"""Rotary positions, found by watching the model rather than by reading its configuration.

A layer's rotation is a list of frequencies, a pairing of channels, and a factor. All three are *measured* on the model in hand: its
queries before and after rotation are compared with every candidate, so partial rotary, scaled frequencies, interleaved layouts and
layers without positions are told apart by what they do.
"""

from __future__ import annotations

import torch

from kvsieve.facts import LayerRope

__all__ = ["measure"]


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
