"""Attention of one layer as one operation of a compiled graph.

Without it `torch.compile` ends its graph at every layer, because what a stream decides is Python. The operation is opaque: to
the compiler it is a function of the new queries, keys and values, whose shapes are the same however many tokens the stream holds,
and it writes to the tensor that names its layer. That tensor stands for what the stream holds of the layer: nothing is written to
it, but an operation that writes is neither dropped, nor done twice, nor moved across another one on the same tensor.

What runs is what runs without a compiler: the layer's cache attends. Planning and eviction stay outside of the graph, in the hooks
of the model and its decoder. Which stream's forward this is says the thread that runs it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import library

from kvsieve.errors import StateError
from kvsieve.locks import shared_lock
from kvsieve.model.attention import attend, attention_forward
from kvsieve.model.handoff import hand_off, state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsieve.model.cache import StreamCache

__all__ = ["graphed_attention", "mark", "unmark"]

_LAYER = "_kvsieve_layer"
"""The attribute of an attention module that names its layer: int64 ``[1]`` on the host. An int would be built into what is
compiled, so that layers compiled one by one could not share it."""


_marked: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
"""Modules that have a name now, and for how many models: two models may share a decoder."""
_lock = shared_lock()


def mark(modules: Sequence[torch.nn.Module]) -> None:
    """Name the layers of attention ``modules``, in order."""
    # It is written to in the graph, whatever mode and default device the caller opened the stream under.
    with _lock, torch.inference_mode(False):
        for index, module in enumerate(modules):
            module.__dict__.setdefault(_LAYER, torch.tensor([index], device="cpu"))
            _marked[module] = _marked.get(module, 0) + 1


def unmark(modules: Sequence[torch.nn.Module]) -> None:
    """Undo :func:`mark`, where no other model needs the names."""
    with _lock:
        for module in modules:
            left = _marked.pop(module, 0) - 1
            if left > 0:
                _marked[module] = left
            else:
                module.__dict__.pop(_LAYER, None)


def graphed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`~kvsieve.model.attention.attention_forward`, of a stream's layer, inside of a graph."""
    layer = module.__dict__.get(_LAYER)
    if layer is None or dropout or kwargs.get("output_attentions"):
        return _outside(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]
    out: torch.Tensor = torch.ops.kvsieve.attend_layer(
        query,
        key,
        value,
        layer,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        sliding_window=kwargs.get("sliding_window"),
        position_ids=kwargs.get("position_ids"),
        mask=attention_mask,
    )
    return out, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    """What a graph does not hold is done, or refused, where there is none."""
    cache: Any = state.cache
    hand_off(cache.layers[module.layer_idx])
    return attention_forward(module, query, key, value, mask, **kwargs)


_SCHEMA = (
    "attend_layer(Tensor query, Tensor key, Tensor value, Tensor(a!) layer, float scale, *, float? softcap, Tensor? sinks, "
    "SymInt? sliding_window, Tensor? position_ids, Tensor? mask) -> Tensor"
)
"""Queries ``[B, H, q, D]``, keys and values ``[B, Hkv, q, D]`` of the new tokens, the layer int64 ``[1]``; to ``[B, q, H, Dv]``."""


def _tags() -> tuple[Any, ...]:
    """That no CUDA graph may hold it. Before torch 2.8 there is no such word, and a CPU tensor among the operands says the same."""
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    return () if unsafe is None else (unsafe,)


_operations = library.Library("kvsieve", "FRAGMENT")  # type: ignore[no-untyped-call]
_operations.define(_SCHEMA, tags=_tags())  # type: ignore[no-untyped-call]


def _attend_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    *,
    softcap: float | None,
    sinks: torch.Tensor | None,
    sliding_window: int | None,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    through = state.through
    cache: StreamCache | None = None if through is None else through.cache  # type: ignore[assignment]
    if through is None or cache is None:
        raise StateError("a compiled layer of a stream ran outside of its forward; call the model, and not what was compiled of it")
    index = int(layer.item())
    through.attended += 1
    if mask is None and through.mask is not None:
        mask = through.columns(query.shape[2])
    return attend(
        cache.layers[index],
        cache.engine.facts.modules[index],
        query,
        key,
        value,
        mask,
        scale,
        {"softcap": softcap, "s_aux": sinks, "position_ids": position_ids, "sliding_window": sliding_window},
    )


def _like(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    batch, heads, width, _ = query.shape
    return value.new_empty((batch, width, heads, value.shape[3]))


_operations.impl("attend_layer", _attend_layer, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
library.register_fake("kvsieve::attend_layer", _like, lib=_operations)
