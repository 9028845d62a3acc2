"""Linear layers of a step of several conversations, whose weights are read once for all of them.

Libraries' products are made for many rows: Intel's, which torch calls, reads the weights for eight rows of float32 at half the rate
at which it reads them for one. The core's (``linear.rs``) reads as fast as the machine does. A row's sums do not depend on what
stands beside it, so that an answer does not depend on who else is answered.

Where a thread is inside of :class:`FewRows`, float32 layers of a model on the CPU find it as their instance's ``forward``; in other
threads, and outside, a layer does what its class says. Layers that compiled code holds stay as they are, as do classes of others.
"""

from __future__ import annotations

import threading
import types
import weakref
from typing import Any

import torch

from kvsieve import _core
from kvsieve._core import linear_lent
from kvsieve.backends.cpu.tensors import LENT
from kvsieve.locks import shared_lock
from kvsieve.runtime.modes import autocast_enabled

__all__ = ["MOST_ROWS", "FewRows", "product"]

MOST_ROWS = 32
"""Above, products are bound by arithmetic, and the time of a library's comes near."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.inside: list[bool] = [False]
        """Whether layers take few rows by the core, innermost last."""


_thread = _Thread()


class _Forward:
    """A layer's ``forward`` while some thread is inside. Copies and pickles of the layer get their class's."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        if _thread.inside[-1] and _fits(input, layer.weight, layer.bias):
            return product(input, layer.weight, layer.bias)
        return torch.nn.Linear.forward(layer, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(torch.nn.Linear.forward, memo[id(self._layer)])

    def __reduce__(self) -> Any:
        return getattr, (self._layer, "forward")  # which is read before the layer's own attributes are


class FewRows:
    """The linear layers of a model: its only one for all batches, see :meth:`of`.

    A context: inside of it, in the thread that entered, they take up to :data:`MOST_ROWS` rows by the core's product.
    """

    def __init__(self, model: torch.nn.Module, decoder: torch.nn.Module) -> None:
        self._decoder, self._lock, self._users = weakref.ref(decoder), shared_lock(), 0
        inner = {id(module) for module in decoder.modules()}
        found = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and _is_plain(module)]
        # Weakly: a layer that is replaced takes its weights with it.
        self._layers = [weakref.ref(layer) for layer in found if id(layer) in inner]
        self._others = [weakref.ref(layer) for layer in found if id(layer) not in inner]
        self._shadowed: list[torch.nn.Linear] = []

    @classmethod
    def of(cls, model: Any) -> FewRows:
        """That of ``model``, made when it is first asked for."""
        with _lock:
            found = _known.get(model)
            if found is None:
                found = _known[model] = cls(model, model.get_decoder())
            return found

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                compiled = getattr(self._decoder(), "_compiled_call_impl", None) is not None
                for reference in [*([] if compiled else self._layers), *self._others]:
                    layer = reference()
                    if layer is not None and "forward" not in layer.__dict__:
                        layer.__dict__["forward"] = _Forward(layer)
                        self._shadowed.append(layer)
        _thread.inside.append(not autocast_enabled("cpu") and not torch.is_grad_enabled())

    def __exit__(self, *error: object) -> None:
        _thread.inside.pop()
        with self._lock:
            self._users -= 1
            if not self._users:
                for layer in self._shadowed:
                    layer.__dict__.pop("forward", None)
                self._shadowed.clear()


_known: weakref.WeakKeyDictionary[Any, FewRows] = weakref.WeakKeyDictionary()
_lock = shared_lock()


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and "forward" not in module.__dict__


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        type(x) is torch.Tensor
        and type(weight) is torch.nn.Parameter
        and x.dtype is torch.float32 is weight.dtype
        and x.shape[-1] == weight.shape[1]
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and x.is_cpu
        and weight.is_cpu
        and weight.stride(1) == 1
        and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()))
        and not torch.compiler.is_compiling()
    )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` ``[..., in]`` to ``[..., out]``, all float32 on the CPU, by the core. ``weight`` ``[out, in]`` has contiguous rows."""
    shape, width = x.shape, x.shape[-1]
    out = x.new_empty((*shape[:-1], weight.shape[0]))
    threads = torch.get_num_threads()
    if LENT:
        one = out.numel() == weight.shape[0]
        rows, made = (x, out) if one or len(shape) == 2 else (x.reshape(-1, width), out.view(-1, weight.shape[0]))
        if linear_lent(rows, weight, bias, made, threads):
            return out
    added = None if bias is None else bias.detach().numpy()
    rows = x.detach().reshape(-1, width)
    _core.linear(rows.numpy(), weight.detach().numpy(), added, out.numpy().reshape(len(rows), -1), threads)
    return out
