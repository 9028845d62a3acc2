"""Needles in a haystack of prose: what RULER's retrieval tasks have in common.

Hsieh et al., COLM 2024, arXiv 2404.06654: sentences that give a thing its number, between sentences that say nothing of it. Wording
and prose are kvsieve's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from kvsieve.evals.prose import sentences, things
from kvsieve.evals.task import Case, Question, ask, encode, largest, opening, rng, spread

__all__ = ["between", "needles"]


def between(hay: Sequence[str], told: Sequence[tuple[float, str]]) -> str:
    """The sentences of ``hay`` with what is told at depths, 0 (start) to 1 (end), between them."""
    ends = sorted((round(depth * len(hay)), at, text) for at, (depth, text) in enumerate(told))
    found: list[str] = []
    start = 0
    for end, _, text in ends:
        found += [*hay[start:end], text]
        start = end
    return "".join([*found, *hay[start:]])


def needles(
    name: str, tokenizer: Any, length: int, seed: int, index: int, *, keys: int = 1, values: int = 1, asked: int = 1
) -> Case:
    """A text in which ``keys`` things have ``values`` numbers each, and a question for all numbers of ``asked`` of them.

    What is asked of one number alone lies at depths that the cases go through evenly; all else lies anywhere.
    """
    random_ = rng(name, seed, index)
    named = things(random_, keys)
    numbers = {thing: _numbers(random_, values) for thing in named}
    told = [(random_.random(), f" The number of the {thing} is {number}.") for thing in named for number in numbers[thing]]
    if asked * values == 1:
        told[0] = (spread(seed, index), told[0][1])
    question = _question(tokenizer, {thing: numbers[thing] for thing in named[:asked]})
    first, hay = opening(tokenizer), list(itertools.islice(sentences(random_), length))

    def made(count: int) -> Case:
        return Case(((*first, *encode(tokenizer, between(hay[:count], told).lstrip())),), (question,))

    return largest(name, length, made)


def _numbers(random_: random.Random, count: int) -> list[str]:
    return [str(random_.randrange(1_000_000, 10_000_000)) for _ in range(count)]


def _question(tokenizer: Any, numbers: dict[str, list[str]]) -> Question:
    expected = [number for thing in numbers.values() for number in thing]
    things = [f"the {thing}" for thing in numbers]
    named = things[0] if len(things) == 1 else ", ".join(things[:-1]) + f" and {things[-1]}"
    if len(expected) == 1:
        text = f"\nQuestion: What is the number of {named}?\nAnswer: The number of {named} is"
    else:
        text = f"\nQuestion: What are all {len(expected)} numbers of {named}?\nAnswer: The {len(expected)} numbers of {named} are"
    return ask(tokenizer, text, expected)
