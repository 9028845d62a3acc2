"""The model that a command's arguments ask for: loaded, its weights rounded, moved to its device, compiled, in that order."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvsieve.compiling import compile
from kvsieve.errors import ArgumentError, BackendError
from kvsieve.evals import models
from kvsieve.quantized_weights import quantize_weights

__all__ = ["check_asked", "load_asked"]


def check_asked(arguments: argparse.Namespace, *, here: bool = True) -> None:
    """What is asked for can be had, as far as that is known before the model is loaded, which takes long.

    Args:
        arguments: those of :func:`load_asked`.
        here: whether this machine will run the model; another one's compiler is not asked.

    Raises:
        ArgumentError: for weights in few bits elsewhere than on a CPU.
        BackendError: if code is to be compiled, and torch cannot do it here.
    """
    if arguments.weights is not None and _device(arguments) != "cpu":
        raise ArgumentError(f"--weights {arguments.weights} is for a CPU, not for --device {_device(arguments)}")
    if arguments.compile and here:
        _check_compiler(_device(arguments))


def load_asked(arguments: Any) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Args:
        arguments: with ``model``, ``dtype``, ``weights`` and ``compile`` as :mod:`kvsieve.arguments` declares them; ``device`` if
            there is one. :func:`check_asked` has found nothing wrong with them.

    Raises:
        as `load_model`, `quantize_weights` and `kvsieve.compile`.
    """
    model, tokenizer = models.load_model(arguments.model, getattr(torch, arguments.dtype or "float32"))
    if arguments.weights is not None:
        quantize_weights(model, arguments.weights)
    model = model.to(_device(arguments))
    if arguments.compile:
        compile(model)
    return model, tokenizer


def _device(arguments: Any) -> str:
    return getattr(arguments, "device", "cpu")


def _check_compiler(device: str) -> None:
    """Compiles something small."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).sum()

    try:
        torch.compile(small)(torch.ones(8, device=device))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise BackendError(
            f"torch cannot compile here ({why}); install a C++ compiler such as g++, or leave --compile out"
        ) from error
