"""A variable gets a value, and four more get it one from the other, with prose between; all five are asked for.

Hsieh et al., COLM 2024, arXiv 2404.06654 (RULER): one chain of four hops. Wording and prose are kvsieve's own.
"""

from __future__ import annotations

import itertools
from typing import Any

from kvsieve.evals.needles import between
from kvsieve.evals.prose import sentences
from kvsieve.evals.task import Case, Task, ask, encode, found, largest, opening, rng

__all__ = ["TASK"]

NAME = "variable-tracking"
HOPS = 4


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A text with a chain of assignments."""
    random = rng(NAME, seed, index)
    value = str(random.randrange(10_000, 100_000))
    names = ["".join(letters) for letters in zip(*(random.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", HOPS + 1) for _ in range(5)))]
    depths = sorted(random.random() for _ in names)
    said = [f" VAR {names[0]} = {value}.", *(f" VAR {new} = VAR {old}." for old, new in itertools.pairwise(names))]
    question = ask(
        tokenizer,
        f"\nQuestion: Which variables have the value {value}?\nAnswer: By the chain of assignments in the text, {HOPS + 1} "
        f"variables have the value {value}. They are:",
        names,
    )
    first, hay = opening(tokenizer), list(itertools.islice(sentences(random), length))

    def made(count: int) -> Case:
        return Case(((*first, *encode(tokenizer, between(hay[:count], list(zip(depths, said))).lstrip())),), (question,))

    return largest(NAME, length, made)


TASK = Task(
    name=NAME,
    summary="five variables that get one value from each other, in a long text (RULER)",
    metric="share of the five names that the answer contains",
    source="RULER, Hsieh et al., COLM 2024, arXiv 2404.06654",
    build=build,
    score=found,
)
