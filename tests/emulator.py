"""Runs the CUDA kernels on the CPU: the same sources, compiled by g++ under the shim of ``tests/cuda/shim.h``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvsieve.backends.cuda import graphs, launcher, tier
from kvsieve.backends.cuda.backend import CudaBackend
from kvsieve.backends.cuda.buffers import StepBuffer, upload
from kvsieve.backends.cuda.nvrtc import SOURCES, Module
from kvsieve.backends.cuda.ops import launch
from kvsieve.backends.cuda.ops.launch import values_of
from kvsieve.backends.cuda.storage import PackedStore, PlainStore

SHIM = Path(__file__).resolve().parent / "cuda"
# With everything else that clones share; a kernel is compiled once for every state of the files that it includes.
SHARED = os.environ.get("KVSIEVE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvsieve"
CACHE = Path(SHARED) / "emulator"
FLAGS = ["-std=c++17", "-O1", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-fPIC"]
if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text():
    FLAGS.append("-mfma")  # fmaf is an instruction then and no call, with the same result

_one_at_a_time = threading.Lock()


class EmulatorError(AssertionError):
    """What no kernel may do: threads that never meet, memory written beyond its end."""


class Emulator:
    """A launcher for tensors on the CPU.

    Args:
        folder: where the kernels' sources are.
        seed: of the schedules; each launch draws its own.
        processors: how many multiprocessors to pretend.
    """

    def __init__(self, folder: Path = SOURCES, seed: int = 1, processors: int = 1) -> None:
        self.folder, self.seed, self.count = folder, seed, processors
        self.launches: list[tuple[Module, tuple[int, int, int], int, list[Any]]] | None = None
        self._functions: dict[Module, tuple[Any, int]] = {}

    def processors(self, device: torch.device) -> int:
        return self.count

    def launch(self, module: Module, grid: tuple[int, int, int], block: int, args: Sequence[Any], device: torch.device) -> None:
        assert device.type == "cpu"
        args = values_of(args)
        if self.launches is not None:
            self.launches.append((module, grid, block, list(args)))
        self.run(module, grid, block, args)

    def replay(self, launches: list[tuple[Module, tuple[int, int, int], int, list[Any]]]) -> None:
        """Run recorded launches again, with the very same arguments: what replaying a captured graph does."""
        for given in launches:
            self.run(*given)

    def run(self, module: Module, grid: tuple[int, int, int], block: int, args: Sequence[Any]) -> None:
        if module not in self._functions:
            self._functions[module] = self._load(module)
        function, arity = self._functions[module]
        assert len(args) == arity, f"{module.expressions[0]} takes {arity} arguments, got {len(args)}"
        packed = b"".join(struct.pack("d", a) if isinstance(a, float) else struct.pack("q", a or 0) for a in args)
        with _one_at_a_time:
            self.seed += 1
            error = function(packed, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(block, 1, 1), self.seed)
        if error:
            raise EmulatorError(f"{module.expressions[0]}: {error.decode()}")

    def _load(self, module: Module) -> tuple[Any, int]:
        library = ctypes.CDLL(str(self._build(module)))
        function = library.run_kernel
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
        return function, int(library.arity_kernel())

    def _build(self, module: Module) -> Path:
        source = f'#include "shim.h"\n#include "{module.file}"\n#include "half.h"\nKV_EXPORT(kernel, {module.expressions[0]})\n'
        digest = hashlib.sha256("\n".join([source, *FLAGS]).encode())
        for path in included(self.folder / module.file, [SHIM / "shim.h", SHIM / "shim.cpp", SHIM / "half.h"]):
            digest.update(path.read_bytes())
        shim = shim_built()
        arguments = ["-shared", f"-I{shim}", f"-I{SHIM}", f"-I{self.folder}", str(shim / "shim.o")]
        return built(f"{digest.hexdigest()}.so", source, *arguments)


@functools.cache
def shim_built() -> Path:
    """A folder with what g++ makes once for all kernels: ``shim.h.gch``, the shim as it was parsed, and ``shim.o``."""
    sources = [(SHIM / name).read_text() for name in ("shim.h", "shim.cpp")]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join([*sources, version, *FLAGS]).encode()).hexdigest()
    built(f"{digest}/shim.o", '#include "shim.cpp"\n', "-c", "-O2", f"-I{SHIM}")
    return built(f"{digest}/shim.h.gch", '#include "shim.h"\n', "-x", "c++-header", f"-I{SHIM}").parent


def built(name: str, source: str, *arguments: str) -> Path:
    """The file ``name`` of the cache, made of ``source`` unless it is there."""
    made = CACHE / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            (Path(scratch) / "kernel.cpp").write_text(source)
            command = ["g++", *FLAGS, *arguments, "kernel.cpp", "-o", "made"]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(Path(scratch) / "made", made)
    return made


def included(file: Path, found: list[Path]) -> list[Path]:
    """``found``, then ``file`` and all that it includes from its folder, each once. A kernel's machine code depends on no other."""
    found = [*found, file]
    for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
        if file.parent / name not in found:
            found = included(file.parent / name, found)
    return found


def without(folder: Path, file: str, pattern: str, which: int, to: Path) -> Path:
    """A copy of the kernels in which the ``which``-th match of ``pattern`` in ``file`` is gone."""
    for path in folder.glob("*.cu*"):
        (to / path.name).write_text(path.read_text())
    text = (to / file).read_text()
    found = list(re.finditer(pattern, text))[which]
    (to / file).write_text(text[: found.start()] + text[found.end() :])
    return to


class LateStream:
    """In the place of a stream of copies: each is made when it is waited for, in order, and until then there is nan.

    Whoever waits for what comes to the device need not wait for copies to the host that were begun later.
    """

    def __init__(self, device: torch.device) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arriving = 0
        """The first so many of the queue: up to the last one that goes to the device."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.fill_(torch.nan)
        self.queue.append((to, source))
        # Both lie on the CPU: what is copied from there was copied there before.
        if getattr(source, "is_on_host", False):
            self.arriving = len(self.queue)
        else:
            to.is_on_host = True  # type: ignore[attr-defined]

    def join(self, whole: bool = False) -> None:
        count = len(self.queue) if whole else self.arriving
        for to, source in self.queue[:count]:
            to.copy_(source)
        del self.queue[:count]
        self.arriving = 0


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the host did inside a graph what a replay will not do")


def refuse_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor may be uploaded to the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kvsieve.backends.cuda.") and getattr(module, "upload", None) is upload:
            monkeypatch.setattr(module, "upload", refuse)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """In the place of a captured graph: a replay runs it again, and the host may not plan, upload or reserve meanwhile."""
    run()

    def replay() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StepBuffer, "fill", refuse)
            patched.setattr(PlainStore, "reserve", refuse)
            patched.setattr(PackedStore, "reserve", refuse)
            refuse_uploads(patched)
            run()

    return replay


@contextmanager
def emulated(made: Emulator) -> Iterator[Emulator]:
    """While it is open, ``backends.get("cuda")`` is the emulated one, for tensors on the CPU.

    It is as unkind as a GPU may be: memory is nan until it is written, copies of blocks are made when they are waited for
    (:class:`LateStream`), and a graph replays the device's work alone (:func:`record`).
    """
    was = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launcher, "require", lambda: None)
        patched.setattr(CudaBackend, "capabilities", replace(CudaBackend.capabilities, devices=frozenset({"cpu"})))
        patched.setitem(launch._launchers, "cpu", made)
        patched.setattr(tier, "SideStream", LateStream)
        patched.setattr(graphs, "record", record)
        torch.use_deterministic_algorithms(True)
        try:
            yield made
        finally:
            torch.use_deterministic_algorithms(was)
