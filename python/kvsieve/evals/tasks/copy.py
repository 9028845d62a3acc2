"""A table that is to be written again, line by line: as long an output as the input.

The definition is our own. It is the repeat that Transformer-XL-like memories and state-space models are asked for (Jelassi et al.,
ICML 2024, arXiv 2402.01032), with lines that a reader can tell apart, so that one that is left out does not spoil the others.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.prose import things
from kvsieve.evals.task import Case, Task, ask, encode, largest, lines, opening, rng

__all__ = ["TASK"]

NAME = "copy"


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A table. The room for the answer counts to the length, so that the table takes less than half of it."""
    first, draw = opening(tokenizer), rng(NAME, seed, index)
    named = things(draw, max(2, length // 8))
    rows = [f"{at:03} | {thing} | {draw.randrange(100, 1000)}" for at, thing in enumerate(named, 1)]
    head = "number | thing | amount\n"

    def made(count: int) -> Case:
        table = "".join(f"{row}\n" for row in rows[:count])
        context = encode(tokenizer, f"The table:\n{head}{table}")
        question = ask(tokenizer, f"\nThe same table, copied line by line:\n{head}", rows[:count], written=table)
        return Case(((*first, *context),), (question,))

    return largest(NAME, length, made, least=2)


TASK = Task(
    name=NAME,
    summary="a long table, written again line by line",
    metric="share of the lines that are written again to the letter",
    source="after Jelassi et al., ICML 2024, arXiv 2402.01032",
    build=build,
    score=lines,
)
