"""Four things have a number each, and all are asked for at once.

Hsieh et al., COLM 2024, arXiv 2404.06654 (RULER); wording and prose are kvsieve's own.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.needles import needles
from kvsieve.evals.task import Case, Task, found

__all__ = ["TASK"]

NAME = "niah-multiquery"


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A text with four numbers of four things, which are all asked for."""
    return needles(NAME, tokenizer, length, seed, index, keys=4, asked=4)


TASK = Task(
    name=NAME,
    summary="the numbers of four things in a long text (RULER)",
    metric="share of the numbers that the answer contains",
    source="RULER, Hsieh et al., COLM 2024, arXiv 2404.06654",
    build=build,
    score=found,
)
