"""Text out of tokens, piece by piece, as far as it is settled.

Tokens are parts of words, and of the bytes of a character: what a token says may be known only after the next one. And the
beginning of a text that ends an answer must not be delivered, in case that the rest of it follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Pieces", "Stops", "text_of"]

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character, or not yet one."""

FEW_TOGETHER = 16
"""Tokens that are decoded together before those that are settled are left behind: a call costs more than a few tokens in it."""

MOST_TOGETHER = 64
"""Tokens that are decoded together at most, where none of them settles what was said before it. A character has four bytes."""


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids``: special tokens left out, spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Pieces:
    """The text of one answer, token by token.

    All pieces together are :func:`text_of` of all tokens. Only a decoder that looks back further than one piece (SentencePiece's
    byte tokens that never become a character) may write the last few otherwise.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens, clean_up_tokenization_spaces)``.
        before: the tokens before the answer, the last few of them: they say whether its first word has a space before it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(before)
        """Tokens that are decoded together: those of a piece that was delivered, as decoders treat the first token of a text in a
        way of its own, and those since."""
        self._said = text_of(tokenizer, self._window) if before else ""
        """What was delivered of the window's text."""
        self._waiting: list[int] = []
        """The window's tokens whose text was not delivered, or not all of it."""

    def push(self, token: int) -> str:
        """What is settled by one more token; empty while a character is unfinished."""
        self._window.append(token)
        self._waiting.append(token)
        if len(self._window) > MOST_TOGETHER:
            return self.end()
        text = text_of(self._tokenizer, self._window)
        if not text.startswith(self._said):  # bytes that are no character yet change those before them
            return ""
        new = text[len(self._said) :]
        settled = new.rstrip(UNFINISHED)
        if len(settled) < len(new):
            self._said += settled
            self._waiting = [token] if settled else self._waiting
        elif new and len(self._window) < FEW_TOGETHER:
            self._said, self._waiting = text, []
        elif new:
            self._window, self._said, self._waiting = self._waiting, text_of(self._tokenizer, self._waiting), []
        else:  # a special token: what follows still has the same word before it
            self._waiting = []
        return settled

    def end(self) -> str:
        """What was still waited for, as it is."""
        text = text_of(self._tokenizer, self._window)
        rest = text[len(self._said) :] if text.startswith(self._said) else text_of(self._tokenizer, self._waiting)
        self._window, self._said, self._waiting = [], "", []
        return rest


class Stops:
    """A text up to the first of some strings that end it.

    Attributes:
        hit: the string that ended the text; None before that.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """What can be delivered now. What might be the beginning of a stop string is held back; nothing follows one."""
        if self.hit is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(string), -len(string), string) for string in self._strings if string in text]
        if found:
            at, _, self.hit = min(found)
            return text[:at]
        keep = self._unsure(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, and is not the beginning of a stop string after all."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """Characters at the end of ``text`` with which a stop string may begin."""
        most = 0
        for string in self._strings:
            at = text.find(string[0], max(len(text) - len(string) + 1, 0))
            while at >= 0 and not string.startswith(text[at:]):
                at = text.find(string[0], at + 1)
            most = max(most, len(text) - at if at >= 0 else 0)
        return most
