"""The full cache: every token stays, as the model rotated it."""

from __future__ import annotations

from kvsieve.roles import All, AsRotated, Memory

__all__ = ["Full"]


def Full() -> Memory:
    """Keep every token. The baseline, without the concatenation that the stock cache pays at every step.

    Memory grows with the text. Logits equal the stock cache's.

    >>> Full()
    Full()
    """
    return Memory(retain=All(), place=AsRotated(), text="Full()")
