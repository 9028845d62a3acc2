"""Weights in 8 or 4 bits on a CPU: a token reads all of them, so their bytes are most of its time.

What multiplies are kernels of torch: of 8-bit integers, and its int4 kernel for weights alone. torch's dynamic int8 layers were not
taken: all activations of a forward share one scale there, which cost 1.1 nats a token on SmolLM2-135M, and lets conversations that
are answered together change each other's answers. What else was measured is in docs/guides/weights.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvsieve.arguments import WEIGHTS
from kvsieve.checks import told
from kvsieve.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Int4Linear", "Int8Linear", "quantize_weights"]

GROUP = 32
"""Neighbouring weights of an output that share a scale and a zero in 4 bits."""

MULTIPLE = 16
"""Outputs of a layer in 4 bits are a multiple of this: torch's kernel packs so many together."""

FEW = 16
"""Tokens of a row for which the int4 kernel is the faster one."""


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are ``codes * scale`` with one scale for each output.

    Activations are rounded to 8 bits with a scale for each token, so that a token's result depends on no other; products are sums
    of integers, which are exact.

    Attributes:
        codes: int8 ``[out, in]``; scale: float32 ``[out]``; bias: float32 ``[out]`` or None.
        rounds_activations: for who compares two answers of a model: the least difference may become a step of a large activation.
    """

    rounds_activations = True
    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("codes", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, in its dtype."""
        rows = x.reshape(-1, self.in_features).float()
        scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        out = torch._int_mm((rows / scale).round().to(torch.int8), self.codes.t()).float() * scale * self.scale
        out = out if self.bias is None else out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int4Linear(torch.nn.Module):
    """A linear layer whose weights are 4-bit codes: ``w = (code - 8) * scale + zero``, one scale and zero for 32 of them.

    Codes are the nearest ones between the least and the greatest weight of a group, so that weights that came from such a format
    (GGUF's Q4_1) come back as they were, up to the rounding of scales to bfloat16. Products are computed in bfloat16. The kernel
    is made for few tokens; a row of more than 16 goes through :attr:`many`.

    Attributes:
        packed: the codes, as torch's kernel lays them out on this machine.
        scales_and_zeros: bfloat16 ``[in / 32, out, 2]``; bias: float32 ``[out]`` or None.
        many: the same layer in 8 bits, for prompts.
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.many = linear.in_features, linear.out_features, Int8Linear(linear)
        groups = linear.weight.detach().float().view(linear.out_features, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny)
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        both = torch.cat([scale, low + 8 * scale], -1)
        self.register_buffer("scales_and_zeros", both.transpose(0, 1).to(torch.bfloat16).contiguous())
        self.register_buffer("bias", self.many.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, in its dtype."""
        if x.dim() > 1 and x.shape[-2] > FEW:
            done: torch.Tensor = self.many(x)
            return done
        # The scales are cast with their model, by `model.half()` for one.
        rows, scales = x.reshape(-1, self.in_features).to(torch.bfloat16), self.scales_and_zeros.to(torch.bfloat16)
        out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, scales).float()
        out = out if self.bias is None else out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


_MAKE: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantize_weights(model: PreTrainedModel, kind: str) -> None:
    """The weights of all linear layers of ``model``, the head among them, are rounded in place. Embeddings stay as they are.

    Args:
        model: on the CPU, in any dtype.
        kind: ``"int8"`` or ``"int4"``; see :class:`Int8Linear` and :class:`Int4Linear`, which replace the layers.

    Raises:
        ArgumentError: for another kind.
        UnsupportedError: for a model elsewhere than on the CPU, that is quantized already, or whose layers the kind does not suit;
            the model is then as it was.
    """
    if kind not in WEIGHTS:
        raise ArgumentError(f"weights come in {' or '.join(WEIGHTS)}, got {told(kind)}")
    for name, linear in _linear_layers(model, kind).items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, _MAKE[kind](linear))


def _linear_layers(model: PreTrainedModel, kind: str) -> dict[str, torch.nn.Linear]:
    """The layers that are rounded, by name.

    Raises:
        UnsupportedError: if that is impossible.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"quantize_weights takes a model, got {told(model)}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no linear layers left; are its weights quantized already?")
    for name, linear in found.items():
        weight = linear.weight
        if type(linear) is not torch.nn.Linear:
            raise UnsupportedError(f"{name} is a {type(linear).__name__}, whose weights are in a form of their own already")
        if weight.device.type != "cpu":
            raise UnsupportedError(f"weights are rounded on the CPU, and {name} is on {weight.device}; load the model there")
        if kind == "int4" and (linear.in_features % GROUP or linear.out_features % MULTIPLE):
            shape = f"[{linear.out_features}, {linear.in_features}]"
            raise UnsupportedError(
                f"int4 needs inputs in groups of {GROUP} and outputs of {MULTIPLE}, and {name} is {shape}; use int8"
            )
    return found
