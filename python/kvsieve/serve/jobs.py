"""What the HTTP side and the model thread of a server say to each other. Plain data; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["Histogram", "Job", "Reason", "Sink", "Snapshot", "Ticket", "Token", "Usage"]

Reason = Literal["stop", "length", "timeout", "cancelled"]
"""Why an answer ended: an end token or a stop string; ``max_new_tokens``; the job's seconds; its client."""


@dataclass(frozen=True)
class Job:
    """One request: a prompt, and how it is answered.

    Attributes:
        owner: whose conversation it is. Nothing that was read for one owner is ever used for another.
        text: the whole prompt as the chat template renders it, special tokens as text (that of the beginning among them, where the
            model needs one): nothing is added to it.
        boundaries: where messages end, offsets in ``text``, ascending, ``0 < b <= len(text)``. A conversation can be continued,
            edited or asked again from there. Without them it is remembered where its answers end.
        answered: where the newest of its earlier answers begins; 0 without one. What :attr:`Usage.read_again` goes by.
        options: for :meth:`kvsieve.Batch.add`: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ``seed`` and others.
            With ``n`` answers, the seed of answer ``i`` is ``seed + i``.
        stop: texts that end an answer; the tokens that complete one are delivered.
        n: answers to the same prompt, which is read once.
        shorter: whether answers have fewer tokens than ``max_new_tokens`` where the service's ``longest`` leaves less, instead of
            being refused.
        logprobs: alternatives of each token, the most probable first; 0: that of the token alone; None: neither.
        seconds: from submission until the answer is cut; its end is told as ``"timeout"``.
    """

    owner: str
    text: str
    boundaries: tuple[int, ...] = ()
    answered: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    n: int = 1
    shorter: bool = False
    logprobs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: its number.
        logprob: natural logarithm of the model's own probability, before temperature and other processors; None unless asked for.
        top: the most probable ids and their logarithms.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What one answer took, in tokens. With ``n`` answers, ``prompt`` and ``read`` are the same for all, and were read once.

    Attributes:
        prompt: of the prompt, as the conversation has seen them.
        read: of these, read for this request; the others were remembered.
        said: of this answer so far.
        resident: held for attention now.
        evicted: seen by this conversation and no longer held.
        read_again: whether an earlier answer in the prompt was read as text: the state that held it was dropped, damaged, not
            written before a server was killed, or the client changed it or brought it from elsewhere.
    """

    prompt: int
    read: int
    said: int = 0
    resident: int = 0
    evicted: int = 0
    read_again: bool = False

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were not read for this request."""
        return self.prompt - self.read


class Sink(Protocol):
    """Where a job's answers go. Called on the model thread: it must not block, and may still be called after a cancel."""

    def begin(self, usage: Usage) -> None:
        """The prompt was read."""

    def token(self, choice: int, token: Token) -> None:
        """Answer ``choice``, from 0 to ``n - 1``, got a token. An end token is one as well."""

    def end(self, choice: int, reason: Reason, usage: Usage) -> None:
        """Answer ``choice`` is over."""

    def fail(self, error: Exception) -> None:
        """The job is over, with all of its answers; nothing follows."""


@dataclass(frozen=True)
class Ticket:
    """What a job was given for :meth:`~kvsieve.serve.service.Service.cancel`."""

    number: int


@dataclass(frozen=True)
class Histogram:
    """How often a value was at most so large.

    Attributes:
        bounds: ascending.
        counts: how many values were at most each bound, and more than the one before; one more for those above all.
        total: the sum of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Snapshot:
    """What a service holds and has done since it began.

    Attributes:
        queued: jobs that wait; reading: whose prompts are being read; answering: answers that are being said.
        states: states of conversations in memory; stored: in files.
        bytes_held: bytes of keys and values of all states and running conversations; shared ones count once.
        memory: most of them.
        bytes_stored: bytes of the session files.
        jobs: jobs that were taken; refused: for which there was no room; failed: that ended with an error.
        ends: answers by why they ended.
        tokens_read, tokens_cached, tokens_said: tokens of prompts that were read, that were remembered, and of answers.
        steps: seconds of the joint forwards in which every answer gets a token.
        waits: seconds from a job's submission until its prompt was read.
        evictions: states that left the memory for a file; dropped: that left it altogether.
        saves, loads: session files written and read.
        rereads: known conversations that were read from their beginning.
        unusable: files that were no states.
        errors: errors of the loop itself; after each the service went on.
    """

    queued: int
    reading: int
    answering: int
    states: int
    stored: int
    bytes_held: int
    memory: int
    bytes_stored: int
    jobs: int
    refused: int
    failed: int
    ends: Mapping[Reason, int]
    tokens_read: int
    tokens_cached: int
    tokens_said: int
    steps: Histogram
    waits: Histogram
    evictions: int
    dropped: int
    saves: int
    loads: int
    rereads: int
    unusable: int
    errors: int
