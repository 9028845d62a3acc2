"""torch's modes (gradients, inference mode, autocast), and how kvsieve's own work stays clear of them.

What a stream stores outlives the mode under which a forward ran: a tensor made in inference mode cannot be written to outside of
it, and arithmetic under autocast would change the dtype of the store. So kvsieve works without gradients, outside of inference
mode, and where it does arithmetic of its own without autocast. Where none of the modes is on, which is the usual case inside
``generate``, nothing is entered: this runs once a layer and token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch

from kvsieve.errors import UnsupportedError
from kvsieve.locks import shared_lock

__all__ = ["autocast_enabled", "refuse_backward", "uncompiled", "unrecorded", "without_modes"]

P = ParamSpec("P")
T = TypeVar("T")


def unrecorded(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call(*args, **kwargs)`` without gradients and outside of inference mode; autocast stays as it is."""
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return call(*args, **kwargs)
    with torch.inference_mode(False), torch.no_grad():
        return call(*args, **kwargs)


def without_modes(device: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call(*args, **kwargs)`` without gradients, outside of inference mode, and without autocast for ``device`` (its type)."""
    autocast = autocast_enabled(device)
    if not autocast and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return call(*args, **kwargs)
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        if autocast:
            modes.enter_context(torch.autocast(device, enabled=False))
        return call(*args, **kwargs)


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for ``device`` (a device type)."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device type that autocast does not know
        return False


_eager_lock = shared_lock()
_eager: list[ExitStack] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """Code that `torch.compile` wrapped runs as it was written. torch has one such switch for all threads: what others have
    compiled is slower meanwhile."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import would take a second
        yield
        return
    with _eager_lock:
        _eager.append(ExitStack())
        if len(_eager) == 1:
            with suppress(RuntimeError):  # called from compiled code, where it cannot be switched: what this compiles is not used
                _eager[0].enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            first = _eager.pop(0) if len(_eager) == 1 else _eager.pop()
            first.close()


class _NoBackward(torch.autograd.Function):
    """The result of ``call()``, which nothing can be differentiated through."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "gradients do not flow through a stream's attention: what it remembers is stored without them; "
            "read with torch.no_grad(), or train with the model's own cache and no stream"
        )


def refuse_backward(call: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """``call()``; a later ``backward()`` that would reach ``inputs`` through it raises.

    Raises:
        UnsupportedError: at ``backward()``; the message names gradients and ``torch.no_grad()``.
    """
    result: torch.Tensor = _NoBackward.apply(call, *inputs)
    return result
