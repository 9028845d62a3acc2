"""Decoding by compiled code: what ``torch.compile`` gains under a stream, without compiling what is read once.

A forward over one token of each row has the same shapes however many tokens a stream holds, because a layer's attention is one
operation of the graph (:mod:`kvsieve.model.graphed`). So it is compiled once. Prompts come in all lengths; they stay as they were.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from kvsieve.checks import check_flag
from kvsieve.errors import ArgumentError, UnsupportedModelError
from kvsieve.model.handoff import GRAPH, state
from kvsieve.model.hooks import between
from kvsieve.model.products import Head, replace_products
from kvsieve.model.support import look_through, refuse

__all__ = ["compile"]


class _Decoding:
    """How a decoder is called: by compiled code where a stream's forward reads one token of each row, else as it was.

    It is where `torch.nn.Module.compile` keeps its own, which copies and pickles of a module leave out.
    """

    def __init__(self, decoder: torch.nn.Module, options: dict[str, Any]) -> None:
        self._plain = decoder._call_impl
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            # torch limits the variants of a function, and all models of transformers share some; here it counts them by model.
            options = {"isolate_recompiles": True, **options}
        self._compiled = torch.compile(decoder._call_impl, **options)
        if options.get("backend", "inductor") == "inductor" and hasattr(torch, "_TorchCompileInductorWrapper"):
            # Its mode and options are right, or that would have raised; torch takes them for no backend of others.
            rest = {name: value for name, value in options.items() if name not in ("mode", "options")}
            own = _Inductor(options.get("mode"), options.get("options"), options.get("dynamic"))
            self._compiled = torch.compile(decoder._call_impl, **{**rest, "backend": own})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decoding = state.mode == GRAPH and _columns(args, kwargs) == 1
        return (self._compiled if decoding else self._plain)(*args, **kwargs)


class _Inductor:
    """torch's own compiler, given graphs whose products of a few rows are the core's."""

    def __init__(self, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> None:
        self._compile = torch._TorchCompileInductorWrapper(mode, options, dynamic)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        replace_products(graph)
        return self._compile(graph, inputs)


def compile(model: Any, *, disable: bool = False, **options: Any) -> None:
    """Compile the decoder of ``model``, in place, for decoding under streams: one token of each row at a time.

    It holds for every stream of the model and every policy, for `model.generate`, :meth:`kvsieve.Stream.generate` and
    :class:`kvsieve.Batch`, until it is undone. The first token takes as long as the compiler does (again for policies that store
    keys before their rotation, and for other numbers of rows); none is compiled again because the text has grown. Prompts, forwards
    without a stream, with gradients or under autocast run as before.

    Args:
        model: a transformers causal language model, or what wraps one.
        disable: undo it.
        options: for `torch.compile`: ``backend``, ``mode``, ``options``, ``dynamic``. A graph of the whole decoder has none of
            kvsieve's hooks in it, so ``fullgraph`` is not among them.

    Raises:
        UnsupportedModelError: for a model that no stream opens on, or whose masks are made outside of its decoder (one that sees
            images). ArgumentError: for options that `torch.compile` does not take. Nothing has changed then.
    """
    disable = check_flag("disable", disable)
    model = look_through(model)
    refuse(model)
    decoder: torch.nn.Module = model.get_decoder()
    if between(model, decoder):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes masks outside of its decoder, which compiled code would not see; stream it as it is"
        )
    head = model.get_output_embeddings()
    if disable:
        decoder._compiled_call_impl = None
        if isinstance(head, torch.nn.Module) and type(head._compiled_call_impl) is Head:
            head._compiled_call_impl = None
        return
    if "fullgraph" in options:
        raise ArgumentError("fullgraph cannot be chosen: the hooks of a stream run in Python, before and after the decoder's graph")
    try:
        decoding = _Decoding(decoder, options)
    except Exception as error:
        raise ArgumentError(f"torch.compile does not take these options: {str(error)[:200]}") from error
    decoder._compiled_call_impl = decoding
    if type(head) is torch.nn.Linear and head._compiled_call_impl is None:
        head._compiled_call_impl = Head(head)


def _columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of each row that a decoder is given."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((t.shape[1] for t in given if isinstance(t, torch.Tensor) and not t.is_nested and t.dim() > 1), 0)
