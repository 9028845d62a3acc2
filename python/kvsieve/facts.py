"""What a probe found out about a model. Plain data: the runtime reads it and knows no transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from kvsieve._core import Rope

__all__ = ["AttentionLayer", "LayerRope", "ModelFacts", "Ranks"]

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

    @cached_property
    def rotary_dim(self) -> int:
        """Channels that rotate."""
        return 2 * self.inv_freq.numel()

    def equals(self, other: LayerRope) -> bool:
        """Whether ``other`` is the same rotation."""
        same = (self.layout, self.factor) == (other.layout, other.factor)
        return same and torch.equal(self.inv_freq, other.inv_freq)

    @cached_property
    def core(self) -> Rope:
        """The same rotation for the Rust kernels."""
        from kvsieve._core import Rope

        return Rope(self.inv_freq.tolist(), self.layout, self.factor)

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """:attr:`inv_freq` on ``device``, where it is copied once: a copy waits for the device."""
        if device == self.inv_freq.device:
            return self.inv_freq
        if device not in self._copies:
            self._copies[device] = self.inv_freq.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def table(self, positions: torch.Tensor, dtype: torch.dtype, *, factor: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[n, R/2]`` of int64 ``positions`` ``[n]``; the phases are exact for any position."""
        angle = positions.to(torch.float64)[:, None] * self.frequencies(positions.device)[None, :]
        scale = self.factor if factor else 1.0
        return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)

    def span(self, first: int, count: int, like: torch.Tensor, *, factor: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``[count, R/2]`` of :meth:`table` from position ``first >= 0`` on, on ``like``'s device and in its dtype.

        They are cut out of a table of all positions up to the farthest that was asked for, which is made once: all layers that
        share the rotation, chunks and forwards read it. It takes as many bytes as the rotated channels of so many keys of a head.
        """
        known = like.device, like.dtype, factor
        end, held = first + count, self._spans.get(known)
        if held is None or len(held[0]) < end:
            # A tensor made in inference mode could not take part in autograd outside of it.
            with torch.inference_mode(False):
                held = self.table(
                    torch.arange(max(256, 1 << (end - 1).bit_length()), device=like.device), like.dtype, factor=factor
                )
            self._spans[known] = held
        return held[0][first:end], held[1][first:end]

    @cached_property
    def _spans(self) -> dict[tuple[torch.device, torch.dtype, bool], tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def turn(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``x`` ``[..., n, D]`` rotated by a table of :meth:`table`."""
        cos, sin = table
        rotary = self.rotary_dim
        turned, rest = (x, None) if rotary == x.shape[-1] else (x[..., :rotary], x[..., rotary:])
        if self.layout == "half":
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return turned if rest is None else torch.cat([turned, rest], -1)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, *, factor: bool = True) -> torch.Tensor:
        """``x`` ``[..., n, D]`` rotated by ``positions`` (int64 ``[n]``), in ``x``'s dtype."""
        return self.turn(x, self.table(positions, x.dtype, factor=factor))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` rotated to position 0."""
        if self.factor == 1.0:
            return x
        return torch.cat([x[..., : self.rotary_dim] * self.factor, x[..., self.rotary_dim :]], -1)

    def rotate_to(self, x: torch.Tensor, places: Sequence[range], *, factor: bool = True) -> torch.Tensor:
        """:meth:`rotate` to runs of positions, none of them negative; a single position is that of all ``n`` tokens."""
        if len(places) == 1 and places[0] == range(1):
            return self._scaled(x) if factor else x
        tables = [self.span(run.start, len(run), x, factor=factor) for run in places]
        return self.turn(
            x, tables[0] if len(tables) == 1 else (torch.cat([c for c, _ in tables]), torch.cat([s for _, s in tables]))
        )


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that a model is spread over (tensor parallel): each holds some of the KV heads of every layer.

    Attributes:
        group: of ``torch.distributed``.
        size: processes in it.
    """

    group: Any = field(repr=False)
    size: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, the same to the last bit in each of them."""
        import torch.distributed

        total = x.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def agree(self, mine: bytes, device: torch.device) -> bool:
        """Whether all processes come with the same bytes, of one length; all of them are told the same."""
        import torch.distributed

        told = torch.tensor(list(mine), dtype=torch.int64, device=device)
        both = torch.stack([told, -told])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool((both[0] == -both[1]).all())


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One full-attention layer of a model, as the probe saw it.

    Attributes:
        index: the layer's index in the model.
        module: its attention module.
        num_kv_heads, key_dim, value_dim: KV heads, and the sizes of a key and a value.
        dtype, device: of the keys that the module computes without autocast.
        rope: its rotation; None of a layer without rotary positions.
    """

    index: int
    module: torch.nn.Module
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    rope: LayerRope | None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in this layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What kvsieve knows about a model.

    Attributes:
        layers: its full-attention layers, in order.
        modules: the attention module of every layer, the sliding ones included.
        layer_types: the type of every layer; the others keep their own caches.
        layer_kwargs: what the stock cache layers of those types need.
        trained_length: tokens the model was trained for; None when the configuration does not say.
        logits_of: maps hidden states ``[n, hidden]`` after the final norm to the model's logits ``[n, V]`` with the head that is in
            use at that moment; None when unknown.
        longrope: whether the model changes its frequencies with the length it has seen.
        dynamic_rope: whether it does so in a way that cannot be re-placed.
        ranks: the processes that share its heads; None of a model in one process. Heads and bytes are those of this process.
    """

    layers: tuple[AttentionLayer, ...]
    modules: tuple[torch.nn.Module, ...]
    layer_types: tuple[str, ...]
    layer_kwargs: tuple[dict[str, Any], ...]
    trained_length: int | None
    logits_of: Callable[[torch.Tensor], torch.Tensor] | None
    longrope: bool
    dynamic_rope: bool
    ranks: Ranks | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def has_rope(self) -> bool:
        """Whether any full-attention layer rotates."""
        return any(layer.rope is not None for layer in self.layers)
