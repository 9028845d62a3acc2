"""A long list of things and their numbers, and four questions on it: what was read once serves all of them.

After SCBench, Li et al., ICLR 2025, arXiv 2412.10319 (retrieval from key-value pairs, several requests on one context). None of the
questions is known while the list is read, so that what a policy evicted then is there for none of them.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.prose import things
from kvsieve.evals.task import Case, Task, ask, encode, first_line, largest, opening, rng

__all__ = ["TASK"]

NAME = "kv-turns"
QUESTIONS = 4


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A list, and a question in each quarter of it."""
    first = opening(tokenizer)
    draw = rng(NAME, seed, index)
    named = things(draw, max(QUESTIONS, length // 4))
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in named]
    places = [(quarter + draw.random()) / QUESTIONS for quarter in range(QUESTIONS)]

    def made(count: int) -> Case:
        text = "The register of all things and their numbers:\n" + "".join(
            f"{thing}: {number}\n" for thing, number in zip(named[:count], numbers)
        )
        asked = [int(place * min(count, len(named))) for place in places]
        questions = tuple(ask(tokenizer, f"\nFrom the register:\n{named[at]}:", [numbers[at]]) for at in asked)
        return Case(((*first, *encode(tokenizer, text)),), questions)

    return largest(NAME, length, made, least=QUESTIONS)


TASK = Task(
    name=NAME,
    summary="four questions on one long list, which is read once (after SCBench)",
    metric="share of the questions whose answer contains the number in its first line",
    source="after SCBench, Li et al., ICLR 2025, arXiv 2412.10319",
    build=build,
    score=first_line,
)
