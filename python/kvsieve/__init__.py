"""kvsieve: a KV cache with a budget around any Hugging Face `generate` loop.

    with kvsieve.stream(model, kvsieve.SirLLM(budget=1024)) as stream:
        model.generate(**inputs, past_key_values=stream.cache, max_new_tokens=200)
        stream.stats()

Importing kvsieve changes nothing in `transformers`, and imports neither its models nor CuPy. Names load what they need when
they are first used, so that `kvsieve --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvsieve._core import __version__

if TYPE_CHECKING:
    from kvsieve import errors, policies, roles
    from kvsieve.errors import KvsieveError
    from kvsieve.policies import Full, LMInfinite, SirLLM, StreamingLLM
    from kvsieve.roles import Memory
    from kvsieve.snapshot import load
    from kvsieve.streams import Kept, Stats, Stream, stream

__all__ = [
    "Full",
    "Kept",
    "KvsieveError",
    "LMInfinite",
    "Memory",
    "SirLLM",
    "Stats",
    "Stream",
    "StreamingLLM",
    "__version__",
    "errors",
    "load",
    "policies",
    "roles",
    "stream",
]

_MODULES = ("errors", "policies", "roles")
_HOMES = {
    "KvsieveError": "errors",
    "Full": "policies",
    "LMInfinite": "policies",
    "SirLLM": "policies",
    "StreamingLLM": "policies",
    "Memory": "roles",
    "load": "snapshot",
    "Kept": "streams",
    "Stats": "streams",
    "Stream": "streams",
    "stream": "streams",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kvsieve.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvsieve' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"kvsieve.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
