"""Prompts as tokens: where they are cut, and which text an answer was.

A conversation is remembered by its text, not by its tokens: what a client sends back is the decoded answer, whose tokens need not
be those that were said. So what comes after a remembered text is tokenized alone, from one message's end to the next one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvsieve.errors import ArgumentError
from kvsieve.locks import shared_lock
from kvsieve.serve.detokenize import text_of

__all__ = ["Kind", "Segment", "Texts", "digests", "segments"]

Kind = Literal["first", "inner", "leaf"]
"""What a remembered moment is: the end of a first message, which other conversations may share; a moment inside of a conversation;
the end of an answer."""

LEAST = 16
"""Tokens after the last remembered moment before another one is worth a forward of its own."""

BEFORE = 8
"""Tokens before an answer that decide how its first one is written."""


@dataclass(frozen=True)
class Segment:
    """A part of a prompt that is read on its own.

    Attributes:
        ids: its tokens, at least one.
        end: where it ends in the text.
        kind: what the moment at its end is remembered as; None: not at all.
    """

    ids: tuple[int, ...]
    end: int
    kind: Kind | None


class Texts:
    """A tokenizer, for one thread at a time.

    Args:
        tokenizer: as transformers' own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._lock = tokenizer, shared_lock()

    def ids(self, text: str) -> list[int]:
        """The tokens of ``text``, with nothing before or after them."""
        if not text:
            return []
        with self._lock:
            return [int(one) for one in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def at_most(self, text: str, most: int) -> bool:
        """Whether ``text`` has at most so many tokens. A token is a byte at least, so short texts are not looked at."""
        return len(text.encode()) <= most or len(self.ids(text)) <= most

    def said(self, before: Sequence[int], ids: Sequence[int]) -> str | None:
        """The text of an answer, as it stands behind the tokens before it; None where that cannot be told."""
        known = list(before[-BEFORE:])
        text, start = text_of(self.tokenizer, [*known, *ids]), text_of(self.tokenizer, known)
        return text[len(start) :] if text.startswith(start) else None


def segments(texts: Texts, text: str, start: int, unread: Sequence[int], boundaries: Sequence[int]) -> list[Segment]:
    """What of a prompt is read, and in which parts.

    Args:
        start: where the remembered text ends; unread: tokens of it that were said and not read.
        boundaries: where messages end, ascending.

    Raises:
        ArgumentError: if there is nothing to read.
    """
    kinds = _kinds(len(text), boundaries)
    found, ids, begin = list[Segment](), list(unread), start
    for end in [*(end for end in boundaries if start < end < len(text)), len(text)]:
        ids += texts.ids(text[begin:end])
        begin = end
        kind = kinds.get(end)
        if ids and (end == len(text) or (kind is not None and len(ids) >= LEAST)):
            found.append(Segment(tuple(ids), end, kind))
            ids = []
    if not found or found[-1].end != len(text):
        raise ArgumentError("the prompt has no token that the conversation has not read")
    return found


def _kinds(length: int, boundaries: Sequence[int]) -> dict[int, Kind]:
    """Which boundaries are remembered: where the first message ends, and where the last one begins and ends."""
    inside = [end for end in boundaries if 0 < end < length]
    found: dict[int, Kind] = dict.fromkeys(inside[-2:], "inner")
    if len(inside) > 1:
        found[inside[0]] = "first"
    return found


def digests(text: str, lengths: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """The SHA-256 of the beginnings of ``text`` of these lengths, ascending."""
    found, at = hashlib.sha256(), 0
    for length in sorted(lengths):
        if length > len(text):
            return
        found.update(text[at:length].encode())
        at = length
        yield length, found.copy().digest()
