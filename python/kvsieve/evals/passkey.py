"""Five digits hidden in monotony: is the passkey still resident, and can the model still say it?

A passkey is the extreme case of a surprising token: a memory that keeps surprisal keeps it, a recency window loses it
as soon as it slides out. Wording of our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Passkey", "PasskeyResult", "make_passkey", "score_passkey"]

_HAY = (
    " The road goes on between the fields.",
    " The clouds move slowly over the hills.",
    " A fence runs along the side of the road.",
    " Now and then a bird sits on the fence.",
)
_QUESTION = "\nQuestion: what is the secret number?\nAnswer: the secret number is"


@dataclass(frozen=True)
class Passkey:
    """`ids [n]` of the text without the question, the key's digits, and the positions in `ids` that spell it."""

    ids: tuple[int, ...]
    key: str
    positions: tuple[int, ...]
    question_ids: tuple[int, ...]


@dataclass(frozen=True)
class PasskeyResult:
    """Share of the key's tokens still resident before the question, and whether the generated answer is the key."""

    retention: float
    found: bool
    answer: str


def make_passkey(tokenizer: Any, *, num_tokens: int, depth: float = 0.25, seed: int = 0) -> Passkey:
    """A text of `num_tokens` tokens with a key at `depth` (0 start, 1 end), the same for the same arguments.

    Raises `ValueError` when `depth` is outside 0 to 1 or the text is too short for the sentence with the key.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be 0 to 1, got {depth}")
    rng = random.Random(seed)
    key = "".join(str(rng.randrange(10)) for _ in range(5))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, number, after = encode(" The secret number is"), encode(f" {key}"), encode(". Remember the secret number.")
    room = num_tokens - len(before) - len(number) - len(after)
    if room < 0:
        raise ValueError(f"num_tokens must be at least {num_tokens - room}, got {num_tokens}")
    hay: list[int] = []
    while len(hay) < room:
        hay += encode(rng.choice(_HAY))
    cut = round(depth * room)
    ids = [*hay[:cut], *before, *number, *after, *hay[cut:room]]
    first = cut + len(before)
    return Passkey(tuple(ids), key, tuple(range(first, first + len(number))), tuple(encode(_QUESTION)))


def score_passkey(stream: Any, tokenizer: Any, passkey: Passkey, *, device: Any = "cpu") -> PasskeyResult:
    """Feeds the text into an open, empty `stream`, then asks on a fork and generates greedily."""
    stream.feed(torch.tensor([passkey.ids], device=device))
    stream.end_turn()
    retention = float(np.isin(passkey.positions, stream.kept()[0].positions).mean())
    question = torch.tensor([passkey.question_ids], device=device)
    with stream.fork() as asked:
        ids = asked.generate(question, max_new_tokens=len(passkey.positions) + 2, do_sample=False)
    answer = tokenizer.decode(ids[0, question.shape[1] :])
    return PasskeyResult(retention, passkey.key in answer, answer)
