"""CUDA sources to machine code, without a GPU and without CuPy: NVRTC through ctypes, and a cache on disk.

A *module* is one kernel file with the instantiations wanted of it. Its machine code is kept under ``$KVSIEVE_CUDA_CACHE``, else
``$XDG_CACHE_HOME/kvsieve/cuda``, else ``~/.cache/kvsieve/cuda``, keyed by the sources, the options, the architecture and the
version of NVRTC. Files appear whole or not at all (written aside, then renamed). Without a place to write, modules are compiled
anew in each process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvsieve.errors import BackendError

__all__ = ["SOURCES", "Compiled", "Module", "cache_dir", "compile_module", "compiled", "version"]

SOURCES = Path(__file__).resolve().parent / "kernels"
"""Where the kernels are, in the package."""

OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")

_HINT = "pip install nvidia-cuda-nvrtc (torch's CUDA builds bring it), or use backend='reference'"


@dataclass(frozen=True)
class Module:
    """One kernel file and the instantiations wanted of it, such as ``attend<bf16, 128, 128, 4, 1, false>``."""

    file: str
    expressions: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """Machine code (a cubin), the symbol of each expression, and what the assembler said about registers and memory."""

    cubin: bytes
    symbols: dict[str, str]
    log: str


def _candidates(stem: str) -> list[str]:
    """Paths and names under which a library of NVRTC may be found, the ones that pip installs first."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec is not None else []:
        for folder in ("cu13/lib", "cuda_nvrtc/lib", "cu12/lib", "cu13/bin", "cu13/bin/x86_64"):
            # The `.alt` variants belong with builtins of their own.
            paths = (p for p in Path(root, folder).glob(f"*{stem}*") if p.suffix != ".a" and ".alt." not in p.name)
            found += sorted(str(path) for path in paths)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found += sorted(str(path) for path in Path(home, "lib64").glob(f"lib{stem}.so*"))
    return [*found, f"lib{stem}.so.13", f"lib{stem}.so.12", f"lib{stem}.so"]


def _load(stem: str, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL | None:
    for name in _candidates(stem):
        if stem == "nvrtc" and "builtins" in name:
            continue
        try:
            return ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    # NVRTC looks for its builtins by name; loaded before, they are found wherever pip put them.
    _load("nvrtc-builtins", ctypes.RTLD_GLOBAL)
    library = _load("nvrtc")
    if library is None:
        raise BackendError(f"backend 'cuda' compiles its kernels with NVRTC, which is not installed: {_HINT}")
    return library


def _check(code: int, what: str, log: str = "") -> None:
    if code:
        name = _library().nvrtcGetErrorString
        name.restype = ctypes.c_char_p
        raise BackendError(f"NVRTC failed to {what}: {name(code).decode()}{': ' + log.strip() if log.strip() else ''}")


@functools.cache
def version() -> tuple[int, int]:
    """The version of NVRTC that compiles here.

    Raises:
        BackendError: if there is none; the message says what to install.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "tell its version")
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities (as 80, 90, ...) that this NVRTC can compile for."""
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "count architectures")
    values = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(values), "list architectures")
    return tuple(values)


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"give the {what}")
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer), f"give the {what}")
    return buffer.raw[: size.value]


def compile_module(module: Module, arch: int, folder: Path = SOURCES) -> Compiled:
    """Compile, whatever the cache holds.

    Args:
        module: what to compile.
        arch: compute capability, as 80 for 8.0.
        folder: where the sources are.

    Raises:
        BackendError: if NVRTC is missing, does not know the architecture, or refuses the source; the message holds its log.
    """
    if arch not in architectures():
        known = ", ".join(f"{a // 10}.{a % 10}" for a in architectures())
        raise BackendError(
            f"this NVRTC ({version()[0]}.{version()[1]}) compiles for compute capabilities {known}, and the GPU has "
            f"{arch // 10}.{arch % 10}; install an NVRTC that knows it, or use backend='reference'"
        )
    library, program = _library(), ctypes.c_void_p()
    source = (folder / module.file).read_bytes()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source, module.file.encode(), 0, None, None), "take the source")
    try:
        for expression in module.expressions:
            _check(library.nvrtcAddNameExpression(program, expression.encode()), f"take {expression}")
        options = [*OPTIONS, f"-arch=sm_{arch}", f"-I{folder}"]
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = library.nvrtcCompileProgram(program, len(options), flags)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        _check(code, f"compile {module.file} ({', '.join(module.expressions)}) for sm_{arch}", log)
        symbols = {}
        for expression in module.expressions:
            name = ctypes.c_char_p()
            _check(library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)), f"name {expression}")
            symbols[expression] = (name.value or b"").decode()
        return Compiled(_read(program, "CUBIN"), symbols, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cache_dir() -> Path:
    """The folder of compiled modules."""
    own = os.environ.get("KVSIEVE_CUDA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvsieve" / "cuda"


@functools.cache
def _sources_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(module: Module, arch: int, folder: Path) -> str:
    facts = [_sources_hash(folder), module.file, *module.expressions, *OPTIONS, str(arch), *map(str, version())]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def compiled(module: Module, arch: int, folder: Path = SOURCES) -> Compiled:
    """As :func:`compile_module`, once per machine: from the cache where it is there, into the cache where it is not."""
    path = cache_dir() / f"{_key(module, arch, folder)}.cubin"
    try:
        head, _, cubin = path.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if len(cubin) == facts["bytes"]:
            return Compiled(cubin, facts["symbols"], facts["log"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = compile_module(module, arch, folder)
    head = json.dumps({"symbols": made.symbols, "log": made.log, "bytes": len(made.cubin)}).encode()
    _write(path, head + b"\n" + made.cubin)
    return made


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
