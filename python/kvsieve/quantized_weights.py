"""Weights in 8 or 4 bits on a CPU: a token reads all of them, so their bytes are most of its time.

What computes is torch's own: dynamic int8 (activations are rounded to 8 bits as they come, products of integers), and its int4
kernel for weights alone. What else runs on a CPU was measured and is slower; see docs/guides/weights.md.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.arguments import WEIGHTS
from kvsieve.checks import told
from kvsieve.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Int4Linear", "quantize_weights"]

GROUP = 32
"""Neighbouring weights of an output that share a scale and a zero in 4 bits."""

ROWS = 16
"""Outputs of a layer in 4 bits are a multiple of this: torch's kernel packs so many together."""


class Int4Linear(torch.nn.Module):
    """A linear layer whose weights are 4-bit codes: ``w = (code - 8) * scale + zero``, one scale and zero for 32 of them.

    Codes are the nearest ones between the least and the greatest weight of a group, so that weights that came from such a format
    (GGUF's Q4_1) come back as they were, up to the rounding of scales to bfloat16. Products are computed in bfloat16.

    Attributes:
        packed: the codes, as torch's kernel lays them out on this machine.
        scales_and_zeros: bfloat16 ``[in / 32, out, 2]``.
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.detach().float().view(linear.out_features, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny)
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        both = torch.cat([scale, low + 8 * scale], -1)
        self.register_buffer("scales_and_zeros", both.transpose(0, 1).to(torch.bfloat16).contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, in its dtype."""
        # The scales are cast with their model, by `model.half()` for one.
        rows, scales = x.reshape(-1, self.in_features).to(torch.bfloat16), self.scales_and_zeros.to(torch.bfloat16)
        out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, scales).to(x.dtype)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_weights(model: PreTrainedModel, kind: str) -> None:
    """The weights of all linear layers of ``model``, the head among them, are rounded in place. Embeddings stay as they are.

    Args:
        model: on the CPU, in float32 (``"int4"``: in any dtype).
        kind: ``"int8"``: one scale for each output, activations rounded to 8 bits at each product. ``"int4"``: one scale and zero
            for 32 neighbouring weights, activations in bfloat16; the least time for a token, and twice the time for a prompt.

    Raises:
        ArgumentError: for another kind.
        UnsupportedError: for a model elsewhere than on the CPU, that is quantized already, or whose layers the kind does not suit;
            the model is then as it was.
    """
    if kind not in WEIGHTS:
        raise ArgumentError(f"weights come in {' or '.join(WEIGHTS)}, got {told(kind)}")
    layers = _linear_layers(model, kind)
    if kind == "int8":
        with _engine():
            torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
                model, {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}, inplace=True
            )
        return
    for name, linear in layers.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, Int4Linear(linear))


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
        if kind == "int8" and weight.dtype != torch.float32:
            raise UnsupportedError(f"int8 weights go with a model in float32, and {name} is in {str(weight.dtype)[6:]}")
        if kind == "int4" and (linear.in_features % GROUP or linear.out_features % ROWS):
            shape = f"[{linear.out_features}, {linear.in_features}]"
            raise UnsupportedError(f"int4 needs inputs in groups of {GROUP} and outputs of {ROWS}, and {name} is {shape}; use int8")
    return found


@contextlib.contextmanager
def _engine() -> Iterator[None]:
    """torch's int8 kernels for this processor, and none of its advice to move to an interface that is slower on a CPU.

    Raises:
        UnsupportedError: for a torch without these kernels.
    """
    ao, engines = getattr(torch.ao, "quantization", None), torch.backends.quantized.supported_engines
    engine: Any = next((name for name in ("x86", "onednn", "fbgemm", "qnnpack") if name in engines), None)
    if ao is None or not hasattr(ao, "quantize_dynamic") or engine is None:
        raise UnsupportedError(f"torch {torch.__version__} has no dynamic int8 for this machine; use int4")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = before
