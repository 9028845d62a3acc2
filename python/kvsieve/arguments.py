"""What the arguments of several commands have in common: their types, the words of their help, and which machine they run on.

It imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from kvsieve.budget import parse_bytes
from kvsieve.errors import BackendError, BudgetError
from kvsieve.methods.registry import SYSTEMS

__all__ = [
    *(
        "BACKENDS",
        "MODEL",
        "POLICIES",
        "WEIGHTS",
        "add_compile",
        "add_machine",
        "add_speed",
        "add_weights",
        "need_torch",
        "output",
        "positive",
        "seconds",
        "size",
    ),
    "whole",
]

MODEL = "smollm2, a local model folder, or a GGUF file"
POLICIES = "known: " + ", ".join(system.text_name for system in SYSTEMS)
BACKENDS = ("reference", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("int8", "int4")


def output(text: str) -> Path:
    """A file that can be written when the work is done, as far as that can be known before."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} into")
    return path


def whole(text: str) -> int:
    """A whole number; commas and underscores may group its digits."""
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def size(text: str) -> int:
    """Bytes, written as budgets are: ``64MiB``, ``2GB``."""
    try:
        return parse_bytes(text)
    except BudgetError:
        raise argparse.ArgumentTypeError(f"must be bytes such as 64MiB or 2GB, got {text!r}") from None


def seconds(text: str) -> float:
    """Seconds, from 0 to a year."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 31_536_000:
        raise argparse.ArgumentTypeError(f"must be seconds from 0 on, got {text!r}")
    return number


def add_machine(parser: argparse.ArgumentParser, *, dtype_help: str) -> None:
    """The arguments `--dtype`, `--threads` and `--backend`."""
    parser.add_argument("--dtype", choices=DTYPES, help=dtype_help)
    parser.add_argument("--threads", type=positive, help="CPU threads for torch; default: torch's own choice")
    parser.add_argument("--backend", help=f"{', '.join(BACKENDS)}; default: the fastest that can run here")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The argument `--weights`."""
    parser.add_argument("--weights", choices=WEIGHTS, help="linear layers in 8 or 4 bits, on a CPU; default: as --dtype says")


def add_speed(parser: argparse.ArgumentParser) -> None:
    """The arguments `--weights` and `--compile`, which make tokens faster."""
    add_weights(parser)
    add_compile(parser)


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The argument `--compile`."""
    what = "compile the decoder by torch: the first tokens take up to a minute or two, the rest less; needs a C++ compiler"
    parser.add_argument("--compile", action="store_true", help=what)


def need_torch(threads: int | None) -> None:
    """Says what to install where torch or transformers is missing, and sets torch's threads."""
    for need in ("torch", "transformers"):
        if importlib.util.find_spec(need) is None:
            raise BackendError(f"{need} is not installed; pip install {need}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
