"""The registered attention function: the only place where queries and fresh keys meet."""

from __future__ import annotations

import sys
from typing import Any

import torch

from kvsieve.errors import StateError
from kvsieve.model.configs import original
from kvsieve.model.handoff import HandedLayer, state, take
from kvsieve.runtime.modes import autocast_enabled, refuse_backward, without_modes

__all__ = ["attend", "attention_forward"]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A stream's layer if one was handed over, the model's own attention otherwise. Compiled code ends here.

    Args:
        query: ``[B, H, q, D]``; key, value: ``[B, Hkv, q, D]`` of the new tokens.
        attention_mask: what the mask function returned: bool-like ``[B, q]`` or None for a stream's layer.

    Returns:
        ``[B, q, H, Dv]``, and None in place of probabilities.
    """
    run = _outside if torch.compiler.is_compiling() else _forward
    return run(module, query, key, value, attention_mask, scaling, dropout, kwargs)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    watch = state.watch
    if watch is not None:
        watch.saw(module, query, key, value)
    layer = take()
    if layer is None:
        answer = _stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if watch is not None:
            watch.answered(module, answer[0])
        return answer
    if kwargs.get("output_attentions"):
        raise StateError("output_attentions is not available inside a stream: probabilities are never materialised")
    if dropout:
        raise StateError(
            f"this model is in train mode with an attention dropout of {dropout}, which a stream does not apply; call model.eval()"
        )
    through = state.through
    if attention_mask is None and through is not None and through.mask is not None:
        attention_mask = through.columns(query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = attend(layer, module, query, key, value, attention_mask, scale, kwargs)
    if watch is not None:
        watch.answered(module, out)
    return out, None


_outside = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
"""For compiled code. What is not compiled need not pay for it: that is a fifth of what a layer costs beside its attention."""


def attend(
    layer: HandedLayer,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    extra: dict[str, Any],
) -> torch.Tensor:
    """The layer's answer, computed free of torch's modes, in the dtype that the model's own attention would give it."""
    autocast = autocast_enabled(query.device.type)
    if (
        not autocast
        and query.dtype == key.dtype == value.dtype
        and not torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    ):
        return _run(layer, module, (query, key, value), mask, scale, extra)
    mixed = not query.dtype == key.dtype == value.dtype
    dtype = getattr(layer, "stored_dtype", None) if mixed or autocast else None

    def compute() -> torch.Tensor:
        return without_modes(query.device.type, lambda: _run(layer, module, (query, key, value), mask, scale, extra, dtype))

    if torch.is_grad_enabled():
        return _guarded(layer, compute, [t for t in (query, key, value, extra.get("s_aux")) if t is not None and t.requires_grad])
    return compute()


def _run(
    layer: HandedLayer,
    module: torch.nn.Module,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
    extra: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    q, k, v = given
    found = v.dtype
    if q.is_inference() or k.is_inference() or v.is_inference():
        q, k, v = (t.clone() if t.is_inference() else t for t in (q, k, v))
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = layer.attend(
        module,
        q,
        k,
        v,
        mask,
        scale=scale,
        softcap=extra.get("softcap"),
        sinks=extra.get("s_aux"),
        position_ids=extra.get("position_ids"),
        sliding_window=extra.get("sliding_window"),
    )
    # Some models take a view of it.
    return (out if out.dtype == found else out.to(found)).contiguous()


def _guarded(layer: Any, compute: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """With gradients on: right outputs, and a `backward` that raises instead of leaving out what flowed into the memory."""
    if inputs:
        layer.had_gradients = True
    if not getattr(layer, "had_gradients", False):
        out: torch.Tensor = compute()
        return out
    # What is remembered had gradients, so even new tokens without any depend on it.
    return refuse_backward(compute, *(inputs or [torch.zeros((), requires_grad=True)]))


def _stock(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that the model's own configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = original(module.config)._attn_implementation
    if state.watch is not None and state.watch.implementation is not None:
        name = state.watch.implementation
    result: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, *args, **kwargs)
    return result
