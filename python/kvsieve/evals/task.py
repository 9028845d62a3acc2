"""What an evaluation task is: how one of its cases is made for a tokenizer and a length, and how an answer is scored.

A task is one file of :mod:`kvsieve.evals.tasks` with a :class:`Task` in it, and a line of the list there. It knows no model and no
cache: :mod:`kvsieve.evals.harness` reads its cases through streams. A case depends on tokenizer, length, seed and index alone, so
that every policy is asked the same, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.errors import KvsieveError

__all__ = [
    "Case",
    "Question",
    "Task",
    "ask",
    "encode",
    "first_line",
    "found",
    "largest",
    "lines",
    "opening",
    "rng",
    "spread",
]


@dataclass(frozen=True)
class Question:
    """What is asked of a context.

    Attributes:
        ids: its tokens, the beginning of the answer among them.
        expected: what a right answer contains.
        max_new_tokens: most tokens that the model writes.
        outdated: what a right answer does not contain.
        options: tokens of the answers to choose from. The answer is the one of the highest mean log-probability a token; nothing is
            written.
        after: turns of the context that it follows, from 1 on; None for all of them.
        guesses: what players without a model answer: their names, and their answers.
    """

    ids: tuple[int, ...]
    expected: tuple[str, ...]
    max_new_tokens: int
    outdated: tuple[str, ...] = ()
    options: tuple[tuple[int, ...], ...] = ()
    after: int | None = None
    guesses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Case:
    """A context and what is asked of it.

    Attributes:
        turns: the tokens of the context, turn by turn; most contexts are one turn.
        questions: each is asked of the context before it alone: the stream goes back to where it was. Ascending in ``after``.
    """

    turns: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the context, its longest question, and the room for its answer."""
        return sum(map(len, self.turns)) + max(len(q.ids) + q.max_new_tokens for q in self.questions)

    @property
    def num_read(self) -> int:
        """Tokens that are given to the model: the context once, every question, and the options that it has."""
        return sum(map(len, self.turns)) + sum(len(q.ids) + sum(map(len, q.options)) for q in self.questions)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that another context, question or expected answer does not have."""
        told = [
            self.turns,
            [
                (q.ids, q.expected, q.max_new_tokens, q.outdated, *q.options, *(() if q.after is None else (q.after,)))
                for q in self.questions
            ],
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        name: as the command line has it.
        summary: one line, for help texts.
        metric: what the score of an answer is, 0 to 1.
        source: the paper.
        build: the case of a tokenizer, a length in tokens (see :attr:`Case.num_tokens`), a seed, and a number from 0 on. Raises
            KvsieveError for a length that is too short.
        score: of the text that was written after a question.
    """

    name: str
    summary: str
    metric: str
    source: str
    build: Callable[[Any, int, int, int], Case]
    score: Callable[[Question, str], float]


# ------------------------------------------------------------------------------------------------------------------------ making


def rng(name: str, seed: int, index: int) -> random.Random:
    """The random numbers of one case, the same in every process."""
    return random.Random(f"{name} {seed} {index}")


def spread(seed: int, index: int) -> float:
    """A depth of a text, 0 to 1: those of the indices from 0 on are spread evenly however many there are (golden ratio)."""
    return (random.Random(f"depth {seed}").random() + index * 0.6180339887498949) % 1.0


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of ``text``, without special ones."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The special token that the tokenizer puts before a text, if it does."""
    first = getattr(tokenizer, "bos_token_id", None)
    return () if first is None or list(tokenizer("a")["input_ids"])[:1] != [first] else (first,)


def ask(
    tokenizer: Any, text: str, expected: Sequence[str], *, outdated: Sequence[str] = (), written: str | None = None
) -> Question:
    """The question ``text``. The answer may have an eighth more tokens than the expected one, and at least 16 more.

    Args:
        written: how the expected answer is written, where that is not the expected strings with commas between.
    """
    answer = " " + ", ".join(expected) if written is None else written
    tokens = len(encode(tokenizer, answer))
    return Question(encode(tokenizer, text), tuple(expected), tokens + max(16, tokens // 8), tuple(outdated))


def largest(name: str, length: int, made: Callable[[int], Case], *, least: int = 1) -> Case:
    """The case ``made(n)`` of most pieces ``n``, of a token at least each, that has at most ``length`` tokens.

    Raises:
        KvsieveError: if the case of ``least`` pieces is longer.
    """
    fits, case = least, made(least)
    if case.num_tokens > length:
        raise KvsieveError(f"a case of {name} needs at least {case.num_tokens:,} tokens here, got --length {length}")
    beyond = 2 * fits
    while beyond <= length and (more := made(beyond)).num_tokens <= length:
        fits, case, beyond = beyond, more, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        tried = made(middle)
        if tried.num_tokens <= length:
            fits, case = middle, tried
        else:
            beyond = middle
    return case


# ----------------------------------------------------------------------------------------------------------------------- scoring


def found(question: Question, answer: str) -> float:
    """The share of the expected strings that the answer contains, in letters of either case."""
    return sum(text.lower() in answer.lower() for text in question.expected) / len(question.expected)


def first_line(question: Question, answer: str) -> float:
    """As :func:`found`, of the answer's first line that is not empty; 0 if that contains an outdated string."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    return 0.0 if any(text.lower() in line.lower() for text in question.outdated) else found(question, line)


def lines(question: Question, answer: str) -> float:
    """The share of the expected lines that are lines of the answer, to the letter."""
    written = {line.strip() for line in answer.splitlines()}
    return sum(line in written for line in question.expected) / len(question.expected)
