"""How many tokens of a prompt are read at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["MAX_CHUNK", "WHOLE_CHUNK", "chunk_of"]

MAX_CHUNK = 512
"""Most prompt tokens in a forward."""

WHOLE_CHUNK = 2048
"""The same under the full cache: products of more rows are faster, and nothing else depends on the pieces."""


def chunk_of(engine: Engine) -> int:
    """Tokens per forward: small beside the budget where chunks change what is kept, and within the trained length."""
    facts = engine.facts
    specs = engine.policy.specs(facts.bytes_per_token)
    sizes = [spec.evict.budget for spec in specs] + [spec.evict.window for spec in specs[:-1]]
    # In a layer with a sliding window more queries at a time are compared with more keys that they do not see.
    slides = len(facts.modules) > len(facts.layers)
    most = WHOLE_CHUNK if engine.policy.is_full and not slides else MAX_CHUNK
    chunk: int = min([most, *(max(size // 2, 16) for size in sizes if size)])
    return chunk if facts.trained_length is None else max(min(chunk, facts.trained_length // 2), 1)
