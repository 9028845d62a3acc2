"""Coded words whose frequencies fall as the square of their rank; the three most frequent are asked for.

Hsieh et al., COLM 2024, arXiv 2404.06654 (RULER): a zeta distribution with exponent 2, of words of six letters. The first rank is
a row of dots and not asked for.
"""

from __future__ import annotations

import string
from typing import Any

from kvsieve.evals.task import Case, Task, ask, encode, found, largest, opening, rng

__all__ = ["TASK"]

NAME = "frequent-words"
ASKED, LETTERS, DOTS = 3, 6, "..."


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A text of coded words."""
    first = opening(tokenizer)
    head = "Below is a text of coded words. Leave the dots out of account, and watch how often each word stands in it.\n"
    asked = (
        f"\nQuestion: Which {ASKED} coded words stand in the text most often?\n"
        f"Answer: The {ASKED} coded words that stand in it most often are:"
    )

    def made(count: int) -> Case:
        random = rng(NAME, seed, index)
        ranks = range(2, max(ASKED + 3, count // 20))
        coded = {"".join(random.choices(string.ascii_lowercase, k=LETTERS)): rank for rank in ranks}
        whole = sum(rank**-2.0 for rank in (1, *ranks))
        shown = [word for word, rank in coded.items() for _ in range(max(1, round(count * rank**-2.0 / whole)))]
        shown += [DOTS] * max(0, count - len(shown))
        random.shuffle(shown)
        question = ask(tokenizer, asked, list(coded)[:ASKED])
        return Case(((*first, *encode(tokenizer, head + " ".join(shown))),), (question,))

    return largest(NAME, length, made, least=80)


TASK = Task(
    name=NAME,
    summary="the three most frequent of coded words (RULER)",
    metric="share of the three words that the answer contains",
    source="RULER, Hsieh et al., COLM 2024, arXiv 2404.06654",
    build=build,
    score=found,
)
