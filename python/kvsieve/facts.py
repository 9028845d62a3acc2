"""What a probe found out about a model. Plain data: the runtime reads it and knows no transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvsieve.rope import LayerRope

__all__ = ["AttentionLayer", "ModelFacts"]


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
        layer_types: the type of every layer; the others keep their own caches.
        layer_kwargs: what the stock cache layers of those types need.
        trained_length: tokens the model was trained for; None when the configuration does not say.
        logits_of: maps hidden states ``[n, hidden]`` after the final norm to the model's logits ``[n, V]`` with the head that is in
            use at that moment; None when unknown.
        longrope: whether the model changes its frequencies with the length it has seen.
        dynamic_rope: whether it does so in a way that cannot be re-placed.
    """

    layers: tuple[AttentionLayer, ...]
    layer_types: tuple[str, ...]
    layer_kwargs: tuple[dict[str, Any], ...]
    trained_length: int | None
    logits_of: Callable[[torch.Tensor], torch.Tensor] | None
    longrope: bool
    dynamic_rope: bool

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def has_rope(self) -> bool:
        """Whether any full-attention layer rotates."""
        return any(layer.rope is not None for layer in self.layers)
