"""Five digits in a monotonous text: :mod:`kvsieve.evals.passkey`'s text, at depths that the cases go through evenly.

Mohtashami & Jaggi, NeurIPS 2023, arXiv 2305.16300; wording of our own.
"""

from __future__ import annotations

from typing import Any

from kvsieve.errors import KvsieveError
from kvsieve.evals.passkey_text import make_passkey
from kvsieve.evals.task import Case, Question, Task, found, opening, rng, spread

__all__ = ["TASK"]

NAME = "passkey"


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A text with one passkey."""
    key = f"{rng(NAME, seed, index).randrange(100_000):05}"
    first, depth = opening(tokenizer), spread(seed, index)
    # A first one tells how many tokens question and answer take.
    tried = make_passkey(tokenizer, num_tokens=max(length, 1024), seed=index, key=key)
    most = len(tried.positions) + 2
    rest = len(first) + len(tried.question_ids) + most
    try:
        made = make_passkey(tokenizer, num_tokens=length - rest, depth=depth, seed=index, key=key)
    except ValueError as error:
        raise KvsieveError(f"a case of {NAME} needs more tokens here than --length {length}: {error}") from error
    return Case(((*first, *made.ids),), (Question(made.question_ids, (key,), most),))


TASK = Task(
    name=NAME,
    summary="passkey retrieval: five digits in a long text",
    metric="1 if the answer contains the digits, else 0",
    source="Mohtashami & Jaggi, NeurIPS 2023, arXiv 2305.16300",
    build=build,
    score=found,
)
