"""What the tests of a service share: a tokenizer of letters, a chat template, a listener, and what the library answers alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import kvsieve
import pytest
import tiny
import torch
from kvsieve.runtime.chunks import chunk_of
from kvsieve.serve.jobs import Job, Snapshot, Token, Usage
from kvsieve.serve.service import Service

FIRST = [("user", "where do the ships go that leave at night?")]
THEN = ("user", "and those that leave in the morning?")
"""A turn, and the message after its answer."""

END = ord("$")
"""The token that ends a message."""

CHUNK = 24
LEAST = 16
"""What :mod:`kvsieve.serve.texts` says of moments that are remembered."""


class Letters:
    """A token a letter, and a letter a token; messages stand between marks as in ChatML."""

    all_special_ids: tuple[int, ...] = (END,)
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(tiny.VOCAB)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        assert not add_special_tokens, "the template writes them"
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(chr(one) for one in ids if not (skip_special_tokens and one == END))


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[ord(letter) for letter in text]])


def rendered(messages: Sequence[tuple[str, str]]) -> tuple[str, tuple[int, ...], int]:
    """The prompt of a chat, where its messages end, and where its newest answer begins."""
    text, ends, answered = "", [], 0
    for role, content in messages:
        answered = len(text) if role == "assistant" else answered
        text += f"<{role}>{content}$\n"
        ends.append(len(text))
    return text + "<assistant>", tuple(ends), answered


def job(messages: Sequence[tuple[str, str]] | str, new: int = 8, owner: str = "ada", **more: Any) -> Job:
    """A request to go on from these messages, or from a text."""
    text, ends, answered = (messages, (), 0) if isinstance(messages, str) else rendered(messages)
    names = ("n", "logprobs", "stop", "seconds")
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": END, **more}
    given = {name: options.pop(name) for name in names if name in options}
    return Job(owner, text, ends, answered, options, **given)


class Heard:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.begun: Usage | None = None
        self.tokens: dict[int, list[Token]] = {}
        self.ends: dict[int, tuple[str, Usage]] = {}
        self.error: Exception | None = None
        self.over = threading.Event()
        self.started = threading.Event()
        self.expected = 1

    def begin(self, usage: Usage) -> None:
        assert self.begun is None
        self.begun = usage
        self.started.set()

    def token(self, choice: int, token: Token) -> None:
        assert choice not in self.ends
        self.tokens.setdefault(choice, []).append(token)

    def end(self, choice: int, reason: str, usage: Usage) -> None:
        assert choice not in self.ends
        self.ends[choice] = reason, usage
        if len(self.ends) == self.expected:
            self.over.set()

    def fail(self, error: Exception) -> None:
        assert self.error is None
        self.error = error
        self.over.set()

    # ------------------------------------------------------------------------------------------------------------------ reading

    def wait(self) -> Heard:
        assert self.over.wait(60), "nothing was heard"
        return self

    def ids(self, choice: int = 0) -> list[int]:
        return [token.id for token in self.tokens.get(choice, [])]

    def text(self, choice: int = 0) -> str:
        """What the client sees, and sends back."""
        return Letters().decode(self.ids(choice), skip_special_tokens=True)

    def reason(self, choice: int = 0) -> str:
        return self.ends[choice][0]

    def usage(self, choice: int = 0) -> Usage:
        return self.ends[choice][1]


def ask(service: Service, one: Job) -> Heard:
    """Submit a job, and return at once."""
    heard = Heard()
    heard.expected = one.n
    service.submit(one, heard)
    return heard


def answer(service: Service, messages: Any, new: int = 8, **more: Any) -> Heard:
    """What a service answers."""
    heard = ask(service, job(messages, new, **more)).wait()
    if heard.error is not None:
        raise heard.error
    return heard


def settled(service: Service) -> Snapshot:
    """What a service holds once nobody is being answered."""
    while (found := service.snapshot()).answering or found.reading or found.queued:
        threading.Event().wait(0.001)
    return found


def service(policy: Any, model: Any = None, **changes: Any) -> Service:
    given = {"memory": 1 << 30, "chunk": CHUNK, "backend": "cpu", **changes}
    return Service(model or tiny.model(), Letters(), policy, **given)


def read(stream: kvsieve.Stream, text: str, start: int, ends: Sequence[int]) -> torch.Tensor:
    """The library reads the rest of a prompt with the cuts of a service; returns the last token, which is not read.

    Cuts are where the first message ends and where the last one begins and ends, if 16 tokens lie between two.
    """
    inside, chunk = [end for end in ends if end < len(text)], min(CHUNK, chunk_of(stream._engine))
    begin = start
    for end in sorted({*inside[-2:], *inside[:1]}):
        if end - begin + waits(stream) >= LEAST:
            feed(stream, text[begin:end], chunk)
            begin = end
    if len(text) - begin > 1:
        feed(stream, text[begin:-1], chunk)
    return ids_of(text[-1])


def waits(stream: kvsieve.Stream) -> int:
    """Tokens that were said and not read: they are read with the new ones."""
    return len(stream.ids[0]) - stream.seen if stream.ids else 0


def feed(stream: kvsieve.Stream, text: str, chunk: int) -> None:
    lo = 0
    while lo < len(text):
        hi = lo + chunk - waits(stream)
        stream.feed(ids_of(text[lo:hi]), chunk=chunk)
        lo = hi


def say(
    stream: kvsieve.Stream, messages: Sequence[tuple[str, str]], start: int, new: int = 8, **more: Any
) -> tuple[list[int], int]:
    """What the library's own stream answers, and how much of the next prompt it has read."""
    text, ends, _ = rendered(messages)
    last = read(stream, text, start, ends)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": END, **more}
    said = stream.generate(last, **options)[0, 1:].tolist()
    if said[-1] == END:  # the next prompt begins with the text of that token
        stream._engine.transcript.say([torch.zeros(0, dtype=torch.int64)])
    return said, len(text) + len([one for one in said if one != END])


def said(service: Service, name: str = "ada", text: str = FIRST[0][1]) -> list[tuple[str, str]]:
    """One turn, and the message after it."""
    messages = [("user", text)]
    return [*messages, ("assistant", answer(service, messages, owner=name).text()), THEN]


def same(found: Heard, want: Heard) -> None:
    assert found.ids() == want.ids()
    assert found.usage() == want.usage()
    for one, other in zip(found.tokens[0], want.tokens[0]):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-6)
        assert dict(one.top) == pytest.approx(dict(other.top), abs=2e-6)
