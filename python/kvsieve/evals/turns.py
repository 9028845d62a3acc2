"""Conversations as plain text, a line for each who speaks, which needs no model's template."""

from __future__ import annotations

import random

from kvsieve.evals.shopping_text import FILLERS

__all__ = ["small_talk", "turn"]


def turn(user: str, assistant: str) -> str:
    """What both said."""
    return f"User: {user}\nAssistant: {assistant}\n"


def small_talk(rng: random.Random, length: int) -> list[str]:
    """More turns than ``length`` tokens hold: all that there are, in another order each time round."""
    turns: list[str] = []
    while len(turns) < max(length // 16, 2):
        turns += [turn(*filler) for filler in rng.sample(FILLERS, len(FILLERS))]
    return turns
