"""The caches of transformers that a whole token is compared with: the same text, the same model, no budget.

`DynamicCache` is what `generate` makes by itself; `StaticCache` holds room for a number of tokens from the start; `QuantizedCache`
stores keys and values in fewer bits, by the first of its backends that can run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["RIVALS", "STOCK", "cache_bytes", "make_cache", "static_of"]

STOCK = "DynamicCache"
"""The one that every other time is compared with."""

_QUANTIZED: tuple[tuple[str, dict[str, Any]], ...] = (("quanto", {"nbits": 4}), ("hqq", {"nbits": 4}), ("fp8", {}))

_Maker = Callable[[Any, int], Any]


def _dynamic(config: Any, most: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _static(config: Any, most: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=config, max_cache_len=most)


def _quantized(config: Any, most: int) -> Any:
    from transformers import QuantizedCache

    said = []
    for backend, kwargs in _QUANTIZED:
        try:
            return QuantizedCache(backend, config, **kwargs)
        except (ImportError, ValueError, TypeError) as error:  # not installed, an older release, or layers that it does not serve
            said.append(f"{backend}: {str(error).split('. ')[0].rstrip('.')}")
    raise NotImplementedError("; ".join(said))


RIVALS: dict[str, _Maker] = {STOCK: _dynamic, "StaticCache": _static, "QuantizedCache": _quantized}
"""What makes each of them, of the model's configuration and the most tokens that it will hold."""


def make_cache(name: str, config: Any, most: int) -> Any:
    """An empty cache of :data:`RIVALS`.

    Raises:
        NotImplementedError: where it cannot be had, with what is missing.
    """
    return RIVALS[name](config, most)


def static_of(cache: Any, config: Any, most: int) -> Any:
    """A ``StaticCache`` with room for ``most`` tokens that holds what the full cache ``cache`` holds."""
    made = _static(config, most)
    for index, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, index)
    return made


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache of transformers holds, each storage once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(cache)}
    return sum(found.values())


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        for held in vars(layer).values():
            yield from (one for one in (held if isinstance(held, tuple) else (held,)) if isinstance(one, torch.Tensor))
