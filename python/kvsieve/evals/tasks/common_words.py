"""A numbered list in which ten words stand often and many others seldom; the ten are asked for.

Hsieh et al., COLM 2024, arXiv 2404.06654 (RULER): 30 times and 3 times. A list that is too short for that has the ten in six places
of ten, and the others a tenth as often. There is no example before the list.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.prose import words
from kvsieve.evals.task import Case, Task, ask, encode, found, largest, opening, rng

__all__ = ["TASK"]

NAME = "common-words"
COMMON, MOST = 10, 30


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A list of words with ten common ones."""
    first = opening(tokenizer)
    head = "Below is a numbered list of words. Some of them stand in it more often than others.\n"
    asked = (
        f"\nQuestion: Which {COMMON} words stand in the list most often?\n"
        f"Answer: The {COMMON} words that stand in the list most often are:"
    )

    def made(entries: int) -> Case:
        random = rng(NAME, seed, index)
        often = min(MOST, 6 * entries // (10 * COMMON))
        seldom = max(1, often // 10)
        others = (entries - often * COMMON) // seldom
        drawn = words(random, COMMON + others)
        common, rest = drawn[:COMMON], drawn[COMMON:]
        shown = [*common * often, *rest * seldom]
        random.shuffle(shown)
        text = head + " ".join(f"{at}. {word}" for at, word in enumerate(shown, 1))
        return Case(((*first, *encode(tokenizer, text)),), (ask(tokenizer, asked, common),))

    return largest(NAME, length, made, least=70)


TASK = Task(
    name=NAME,
    summary="the ten most common words of a long list (RULER)",
    metric="share of the ten words that the answer contains",
    source="RULER, Hsieh et al., COLM 2024, arXiv 2404.06654",
    build=build,
    score=found,
)
