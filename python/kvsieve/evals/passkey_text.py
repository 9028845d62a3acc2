"""The text of passkey retrieval: five digits between sentences that say the same over and over. Wording of our own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

__all__ = ["LEAST", "Passkey", "make_passkey"]

_HAY = (
    " The road goes on between the fields.",
    " The clouds move slowly over the hills.",
    " A fence runs along the side of the road.",
    " Now and then a bird sits on the fence.",
)
LEAST = 32
"""Tokens of a text that has room for the sentence with the key, whatever tokens its digits are."""

_QUESTION = "\nQuestion: what is the secret number?\nAnswer: the secret number is"


@dataclass(frozen=True)
class Passkey:
    """`ids [n]` of the text without the question, the key's digits, and the positions in `ids` that spell it."""

    ids: tuple[int, ...]
    key: str
    positions: tuple[int, ...]
    question_ids: tuple[int, ...]


def make_passkey(tokenizer: Any, *, num_tokens: int, depth: float = 0.25, seed: int = 0, key: str | None = None) -> Passkey:
    """A text of `num_tokens` tokens with a key at `depth` (0 start, 1 end), the same for the same arguments; a `key` may be given.

    Raises `ValueError` when `depth` is outside 0 to 1 or the text is too short for the sentence with the key.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be 0 to 1, got {depth}")
    rng = random.Random(seed)
    drawn = "".join(str(rng.randrange(10)) for _ in range(5))
    key = drawn if key is None else key

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
