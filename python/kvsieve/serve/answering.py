"""From tokens of the model thread to pieces of text on the event loop, for the answers of one request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvsieve.serve.detokenize import Pieces, Stops, text_of
from kvsieve.serve.jobs import Reason, Token, Usage
from kvsieve.serve.tool_calls import Call, Finder

__all__ = ["AnswerText", "Answers", "Delta", "Events", "Failed", "Gone", "Shown"]

LEAST = -9999.0
"""The logarithm that is told of what is impossible: JSON has no infinity, and OpenAI's clients know this number."""


class Failed(Exception):
    """A job that failed; ``error`` says how."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Gone(Exception):
    """The client went away."""


@dataclass(frozen=True)
class Shown:
    """A token with its probability: its text, where that begins in the answer, and the alternatives' texts."""

    text: str
    start: int
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Delta:
    """What answer ``choice`` says next, ``calls`` of tools behind ``text``; with a ``reason`` it is the last."""

    choice: int
    text: str
    tokens: tuple[Shown, ...] = ()
    reason: Reason | None = None
    calls: tuple[Call, ...] = ()


class Events:
    """A sink whose events are handled on an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def begin(self, usage: Usage) -> None:
        self._put("begin", usage)

    def token(self, choice: int, token: Token) -> None:
        self._put("token", choice, token)

    def end(self, choice: int, reason: Reason, usage: Usage) -> None:
        self._put("end", choice, reason, usage)

    def fail(self, error: Exception) -> None:
        self._put("fail", error)

    def _put(self, *event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def tell(self, name: Literal["gone", "wait"]) -> None:
        """Told on the event loop: the client went away, or a while has passed."""
        self._queue.put_nowait((name,))

    async def next(self) -> tuple[Any, ...]:
        """The next event: its name, then its arguments."""
        return await self._queue.get()


class AnswerText:
    """One answer as text.

    Args:
        stop: strings that end it.
        before: the tokens that it stands behind.
        finder: finds calls of tools in it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], before: Sequence[int], finder: Finder | None = None) -> None:
        self._tokenizer, self._pieces, self.stops = tokenizer, Pieces(tokenizer, before), Stops(stop)
        self._settled, self._delivered, self._finder = 0, 0, finder
        self._waiting: list[Shown] = []
        self.said = 0
        self.over: tuple[Reason, Usage] | None = None

    def push(self, token: Token) -> tuple[str, tuple[Shown, ...]]:
        """What one more token settles, and the tokens that are told with it."""
        self.said += 1
        if self.stops.hit is not None:
            return "", ()
        if token.logprob is not None and (text := self._told(token.id)):  # an end token is no part of the text
            top = tuple((self._told(other, special=True), max(logprob, LEAST)) for other, logprob in token.top)
            self._waiting.append(Shown(text, self._settled, max(token.logprob, LEAST), top))
        piece = self._pieces.push(token.id)
        self._settled += len(piece)
        return self._deliver(self.stops.push(piece))

    def end(self) -> tuple[str, tuple[Shown, ...]]:
        """What was held back."""
        text = self.stops.push(self._pieces.end()) + self.stops.end()
        return self._deliver(text, last=True)

    def apart(self, text: str, last: bool = False) -> tuple[str, tuple[Call, ...]]:
        """``text``, which was settled, without the calls of tools in it, and those."""
        if self._finder is None:
            return text, ()
        said, calls = self._finder.push(text)
        more, others = self._finder.end() if last else ("", [])
        return said + more, (*calls, *others)

    def _told(self, token: int, special: bool = False) -> str:
        return text_of(self._tokenizer, [token]) or (str(self._tokenizer.decode([token])) if special else "")

    def _deliver(self, text: str, last: bool = False) -> tuple[str, tuple[Shown, ...]]:
        """``text`` and the tokens that begin in it."""
        self._delivered += len(text)
        everything = last and self.stops.hit is None
        out = tuple(one for one in self._waiting if everything or one.start < self._delivered)
        self._waiting = self._waiting[len(out) :]
        return text, out


class Answers:
    """The answers of one request, in pieces.

    Args:
        events: the job's sink.
        choices: the text of each.
        stopped: called once all answers have reached a stop string, should the model thread go on.

    Attributes:
        began: what was read; None before that.
        reasons: why each answer ended.
    """

    def __init__(self, events: Events, choices: Sequence[AnswerText], stopped: Callable[[], None]) -> None:
        self._events, self._choices, self._stopped = events, choices, stopped
        self.began: Usage | None = None
        self.reasons: list[Reason | None] = [None] * len(choices)

    @property
    def over(self) -> bool:
        return all(reason is not None for reason in self.reasons)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """What is said, as it is settled; an empty piece once the prompt was read, and whenever a while has passed
        before that.

        Raises:
            Failed: if the job fails.
            Gone: if the client does not wait for it.
        """
        while not self.over:
            name, *event = await self._events.next()
            if name == "fail":
                raise Failed(event[0])
            if name == "gone":
                raise Gone
            if name == "wait" and self.began is not None:  # told while the prompt's end was
                continue
            if name in ("begin", "wait"):
                self.began = event[0] if event else self.began
                yield Delta(0, "")
            elif name == "token":
                if (delta := self._token(*event)) is not None:
                    yield delta
            else:
                yield self._end(*event)

    def _token(self, at: int, token: Token) -> Delta | None:
        choice = self._choices[at]
        was = choice.stops.hit
        text, tokens = choice.push(token)
        if was is None and choice.stops.hit is not None and all(one.stops.hit or one.over for one in self._choices):
            self._stopped()
        text, calls = choice.apart(text)
        return Delta(at, text, tokens, calls=calls) if text or tokens or calls else None

    def _end(self, at: int, reason: Reason, usage: Usage) -> Delta:
        choice = self._choices[at]
        text, tokens = choice.end()
        text, calls = choice.apart(text, last=True)
        reason = "stop" if choice.stops.hit is not None else reason
        choice.over, self.reasons[at] = (reason, usage), reason
        return Delta(at, text, tokens, reason, calls)

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and ``kvsieve``'s: what was read for this request, and what the conversation that holds most holds."""
        ends = [choice.over[1] for choice in self._choices if choice.over is not None]
        begun = self.began or (ends[0] if ends else Usage(0, 0))
        said = sum(choice.over[1].said if choice.over is not None else choice.said for choice in self._choices)
        latest = ends or [begun]
        return {
            "prompt_tokens": begun.prompt,
            "completion_tokens": said,
            "total_tokens": begun.prompt + said,
            "prompt_tokens_details": {"cached_tokens": begun.cached},
            "kvsieve": {
                "newly_read": begun.read,
                "retained": max(one.resident for one in latest),
                "evicted": max(one.evicted for one in latest),
                "read_again": begun.read_again,
                "timed_out": "timeout" in self.reasons,
            },
        }
