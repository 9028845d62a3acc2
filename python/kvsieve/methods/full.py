"""The full cache: every token stays, as the model rotated it."""

from __future__ import annotations

from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import KeepAll
from kvsieve.policy.position import Original

__all__ = ["Full"]


def Full() -> Memory:
    """Keep every token. The baseline, without the concatenation that the stock cache pays at every step.

    Memory grows with the text. Logits equal the stock cache's.

    >>> Full()
    Full()
    """
    return Memory(evict=KeepAll(), position=Original(), text="Full()")
