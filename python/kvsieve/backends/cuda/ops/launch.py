"""How an operation's kernel gets onto a device: instantiations, and the launcher of each type of device.

Nothing here knows what loads a kernel. That is a :class:`Launcher`: CuPy's in :mod:`kvsieve.backends.cuda.launcher`; in the tests
one that runs the same sources on the CPU. One launcher serves one type of device, see :func:`register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from typing import Protocol

import torch

from kvsieve.backends.cuda.nvrtc import Module
from kvsieve.errors import BackendError

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "THREADS",
    "Argument",
    "Launcher",
    "Size",
    "aligned",
    "is_aligned",
    "launcher_of",
    "module",
    "register",
    "start",
    "values_of",
]

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The dtypes of keys and values, by their names in the kernels."""

LAYOUTS = {"half": 1, "interleaved": 2}
"""Which channels rotate together, by their numbers in the kernels; 0 where nothing rotates."""

THREADS = 128
"""Threads of a thread block, unless an operation says otherwise."""

Argument = int | float | torch.Tensor | None
Size = tuple[int, int, int]


class Launcher(Protocol):
    """Runs kernels on one type of device."""

    def launch(self, module: Module, grid: Size, block: int, args: Sequence[Argument], device: torch.device) -> None:
        """Start ``module``'s first instantiation on the device's current stream.

        Every argument is 8 bytes, see :func:`values_of`: an address or a count (int), or a double (float).
        """

    def processors(self, device: torch.device) -> int:
        """How many multiprocessors the device has."""


_launchers: dict[str, Launcher] = {}


def register(device_type: str, launcher: Launcher) -> None:
    """Let ``launcher`` serve all devices of one type."""
    _launchers[device_type] = launcher


def launcher_of(device: torch.device) -> Launcher:
    """The launcher of a device.

    Raises:
        BackendError: if none was registered.
    """
    found = _launchers.get(device.type)
    if found is None:
        raise BackendError(f"no CUDA kernels run on {device}; move the tensors to a CUDA device, or use another backend")
    return found


@cache
def module(file: str, template: str, *parameters: object) -> Module:
    """The instantiation of ``template`` in ``file.cu`` for these parameters."""
    values = [str(p).lower() if isinstance(p, bool) else DTYPES[p] if isinstance(p, torch.dtype) else str(p) for p in parameters]
    return Module(f"{file}.cu", (f"{template}<{', '.join(values)}>" if values else template,))


def start(kernel: Module, grid: Size, args: Sequence[Argument], device: torch.device, block: int = THREADS) -> None:
    """Start a kernel. Nothing happens where the grid is empty."""
    if 0 not in grid:
        (_launchers.get(device.type) or launcher_of(device)).launch(kernel, grid, block, args, device)


def values_of(args: Sequence[Argument]) -> tuple[int | float, ...]:
    """Arguments as a kernel takes them: tensors as their addresses, None as 0.

    This runs for every launch. A subclass of Tensor is not seen as one: what a caller hands in goes by its address.
    """
    tensor = torch.Tensor
    return tuple([0 if a is None else a.data_ptr() if type(a) is tensor else a for a in args])  # type: ignore[misc]


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows of ``x`` are contiguous and begin at multiples of 16 bytes."""
    *outer, last = x.stride()
    return last == 1 and not x.data_ptr() & 15 and not reduce(or_, outer, 0) * x.element_size() & 15


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy whose rows are contiguous and begin at multiples of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
