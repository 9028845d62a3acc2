"""Four things have a number each, and one of them is asked for.

Hsieh et al., COLM 2024, arXiv 2404.06654 (RULER); wording and prose are kvsieve's own.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.needles import needles
from kvsieve.evals.task import Case, Task, found

__all__ = ["TASK"]

NAME = "niah-multikey"


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A text with four numbers of four things, of which one is asked for."""
    return needles(NAME, tokenizer, length, seed, index, keys=4)


TASK = Task(
    name=NAME,
    summary="one of four numbers in a long text (RULER)",
    metric="share of the numbers that the answer contains",
    source="RULER, Hsieh et al., COLM 2024, arXiv 2404.06654",
    build=build,
    score=found,
)
