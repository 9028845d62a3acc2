"""kvsieve: a KV cache with a budget around any Hugging Face `generate` loop.

    with kvsieve.stream(model, kvsieve.SirLLM(budget=1024)) as stream:
        model.generate(**inputs, past_key_values=stream.cache, max_new_tokens=200)
        stream.stats()

Importing kvsieve changes nothing in `transformers`, and imports neither its models nor CuPy; torch is imported when a stream is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvsieve import errors, methods, policy
from kvsieve._core import __version__
from kvsieve.errors import KvsieveError
from kvsieve.methods import memory_bank, registry
from kvsieve.methods.registry import *  # noqa: F403
from kvsieve.policy.compose import Memory

if TYPE_CHECKING:
    from kvsieve.batching import Answer, Batch
    from kvsieve.compiling import compile
    from kvsieve.stats import Kept, Stats
    from kvsieve.streams import Stream, load, stream

__all__ = [
    "Answer",
    "Batch",
    "Kept",
    "KvsieveError",
    "Memory",
    "Stats",
    "Stream",
    "__version__",
    "compile",
    "errors",
    "load",
    "methods",
    "policy",
    "stream",
]
__all__ += registry.__all__

_LAZY = {
    **{"Answer": "batching", "Batch": "batching", "Kept": "stats", "Stats": "stats"},
    **{"compile": "compiling", "load": "streams", "Stream": "streams", "stream": "streams"},
}


memory_bank.SEAM.append(lambda: import_module("kvsieve.streams"))


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'kvsieve' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"kvsieve.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
