"""Products of linear layers in compiled code, by the core's kernel where that is faster than torch's matrix library.

A compiled token spends most of its time there, reading weights. Libraries' products are made for many rows; the core's kernel
(``linear.rs``) reads weights about as fast as the machine does, for one row and for a few. In the graph of a decoder the products
of the same input are one operation, so that a layer has four of them: queries, keys and values; output; gate and up; down.

Torch's library is left alone for one row on Intel's processors, which it was made for, and wherever a product has more than
:data:`~kvsieve.model.linears.MOST_ROWS` rows, another dtype than float32, or weights that the graph computes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import library
from torch.nn.modules import module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvsieve import _core
from kvsieve.model.handoff import GRAPH, state
from kvsieve.model.linears import MOST_ROWS, product

__all__ = ["Head", "replace_products"]

_IN_PLACE = {
    "iadd",
    "iand",
    "iconcat",
    "ifloordiv",
    "ilshift",
    "imatmul",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
}
_IN_PLACE |= {"ixor", "setitem", "delitem"}
"""Python's operations that write."""

_LEAST = 2 if _core.is_intel() else 1
"""Fewer rows are torch's."""


def _products(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [product(x, weight, bias) for weight, bias in zip(weights, biases)]


def _like(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


_operations = library.Library("kvsieve", "FRAGMENT")  # type: ignore[no-untyped-call]
_operations.define("products(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]")  # type: ignore[no-untyped-call]
_operations.impl("products", _products, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
library.register_fake("kvsieve::products", _like, lib=_operations)


def replace_products(graph: torch.fx.GraphModule) -> int:
    """Make the linear layers of a few rows in ``graph``, of torch's operations as Dynamo writes them, operations of the core.

    Returns:
        how many layers.
    """
    found: list[list[torch.fx.Node]] = []
    open_ones: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch.nn.functional.linear:
            if _fits(node):
                if node.args[0] not in open_ones:
                    found.append(open_ones.setdefault(node.args[0], []))
                open_ones[node.args[0]].append(node)
        elif _may_write(node):
            open_ones.clear()  # what comes later may have another input, though it is the same tensor
    for nodes in found:
        x = nodes[0].args[0]
        weights, biases = zip(*(_weights(node) for node in nodes))
        with graph.graph.inserting_before(nodes[0]):
            made = graph.graph.call_function(torch.ops.kvsieve.products.default, (x, list(weights), list(biases)))
            outs = [graph.graph.call_function(operator.getitem, (made, at)) for at in range(len(nodes))]
        for node, out in zip(nodes, outs):
            out.meta.update(node.meta)
            node.replace_all_uses_with(out)
            graph.graph.erase_node(node)
    if found:
        graph.recompile()
    return sum(map(len, found))


def _may_write(node: torch.fx.Node) -> bool:
    """Whether a node may write into a tensor that was there before: by its name, as torch and Python name what does."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        return True  # an operation that says so
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs


def _weights(node: torch.fx.Node) -> tuple[Any, Any]:
    """The nodes of a layer's weights and of its bias, if it has one."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"), bias


def _fits(node: torch.fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], torch.fx.Node):
        return False
    weight, bias = _weights(node)
    given = [one for one in (weight, bias) if one is not None]
    if not all(isinstance(one, torch.fx.Node) and one.op in ("placeholder", "get_attr") for one in given):
        return False
    out, x, *others = (one.meta.get("example_value") for one in (node, node.args[0], *given))
    # Under autocast the answer has another dtype than what it is of.
    known = all(isinstance(one, torch.Tensor) for one in (out, x, *others)) and out.dtype is torch.float32
    return known and _fit(x, others[0], others[1] if bias is not None else None)


def _fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the core's product is the better one: what is not told by a number now may be another later."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(t.dtype is torch.float32 and t.device.type == "cpu" and t.layout is torch.strided for t in tensors)
        and not any(is_traceable_wrapper_subclass(t) for t in tensors)
        and all(type(n) is int for n in x.shape)
        and weight.ndim == 2
        and weight.stride(1) == 1
        and x.shape[-1] == weight.shape[1] > 0
        and (bias is None or (bias.ndim == 1 and bias.is_contiguous()))
        and _LEAST * x.shape[-1] <= x.numel() <= MOST_ROWS * x.shape[-1]
    )


class Head:
    """How the layer that gives a compiled model its logits is called: it stands outside of its decoder, so in no graph.

    It is where `torch.nn.Module.compile` keeps its own, which copies and pickles of a module leave out.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        if state.mode == GRAPH and len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor and _is_plain(layer):
            (x,) = args
            if not torch.compiler.is_compiling() and _fit(x, layer.weight, layer.bias):
                return product(x, layer.weight, layer.bias)
        return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _is_plain(layer: torch.nn.Linear) -> bool:
    """Whether nobody hooked it, and its weights are what they seem to be."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or module._global_forward_hooks or module._global_forward_pre_hooks
    return not hooked and "forward" not in layer.__dict__ and type(layer.weight) is torch.nn.Parameter
