"""Loads kernels with CuPy; the only file that knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.backends.cuda import nvrtc
from kvsieve.backends.cuda.ops.launch import Argument, Size, _launchers, register, values_of
from kvsieve.errors import BackendError
from kvsieve.locks import shared_lock

if TYPE_CHECKING:
    from kvsieve.backends.cuda.nvrtc import Module

__all__ = ["CupyLauncher", "require"]


class _Stream:
    """A torch stream, as CuPy asks for it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class CupyLauncher:
    """Loads kernels with CuPy and starts them on torch's current stream."""

    def __init__(self) -> None:
        wheel = f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
        if not torch.cuda.is_available():
            raise BackendError(
                "backend 'cuda' needs an NVIDIA GPU, its driver, and a CUDA build of torch; torch finds no CUDA device here. "
                "Use backend='reference' on other devices, or a model on the CPU"
            )
        try:
            import cupy
        except ImportError as err:
            raise BackendError(
                f"backend 'cuda' needs CuPy: pip install {wheel} (for CUDA 13: pip install 'kvsieve[cuda]'), "
                f"or use backend='reference' ({err})"
            ) from err
        nvrtc.version()
        self._cupy = cupy
        self._functions: dict[tuple[Module, int], Any] = {}
        self._streams: dict[int, Any] = {}
        self._processors: dict[int, int] = {}

    def processors(self, device: torch.device) -> int:
        index = device.index or 0
        if index not in self._processors:
            self._processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
        return self._processors[index]

    def launch(self, module: Module, grid: Size, block: int, args: Sequence[Argument], device: torch.device) -> None:
        function = self._functions.get((module, device.index)) or self._load(module, device)
        address = torch.cuda.current_stream(device).cuda_stream
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = self._cupy.cuda.Stream.from_external(_Stream(address))
        values = values_of(args)
        if device.index == torch.cuda.current_device():
            function(grid, (block, 1, 1), values, stream=stream)
        else:
            with torch.cuda.device(device):
                function(grid, (block, 1, 1), values, stream=stream)

    def _load(self, module: Module, device: torch.device) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        made = nvrtc.compiled(module, 10 * major + minor)
        with torch.cuda.device(device):
            loaded = self._cupy.cuda.function.Module()
            loaded.load(made.cubin)
            function = loaded.get_function(made.symbols[module.expressions[0]])
        self._functions[module, device.index] = function
        return function


_lock = shared_lock()


def require() -> None:
    """Make sure that kernels can be launched on this machine's GPU.

    Raises:
        BackendError: if there is no GPU, CuPy or NVRTC; the message says what to install.
    """
    with _lock:
        if "cuda" not in _launchers:
            register("cuda", CupyLauncher())
