"""Answers in OpenAI's shapes: whole ones, and chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvsieve.serve.answering import Delta, Shown
from kvsieve.serve.jobs import Reason
from kvsieve.serve.tool_calls import Call

__all__ = ["DONE", "Reply", "event"]

FINISHED: Mapping[Reason, str] = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "length"}
"""OpenAI's words. An answer that was cut by time is cut: ``usage.kvsieve.timed_out`` says by what. One that called tools, and was
not cut, ended with these."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Reply:
    """The shapes of one request's answers.

    Args:
        chat: of messages, else of a text.
        model: the name that is served.
        n: number of answers.
        logprobs: whether tokens are told with their probabilities.
        usage: whether the stream ends with what the request took.
    """

    def __init__(self, *, chat: bool, model: str, n: int = 1, logprobs: bool = False, usage: bool = False) -> None:
        self._chat, self._logprobs, self._usage = chat, logprobs, usage
        self._texts = [""] * n
        self._tokens: list[list[Shown]] = [[] for _ in range(n)]
        self._calls: list[list[Call]] = [[] for _ in range(n)]
        self._reasons: list[Reason | None] = [None] * n
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def add(self, delta: Delta) -> None:
        """Keep a piece for :meth:`whole`."""
        self._texts[delta.choice] += delta.text
        self._calls[delta.choice] += delta.calls
        self._tokens[delta.choice] += delta.tokens
        self._reasons[delta.choice] = delta.reason

    def whole(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """All that was added, as one answer."""
        choices = []
        for at, text in enumerate(self._texts):
            said = {"message": self._message(text, self._calls[at])} if self._chat else {"text": text}
            choices.append({"index": at, **said, **self._ended(at, self._tokens[at], self._reasons[at])})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def _message(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        return told | {"content": text or None, "tool_calls": [call.body for call in calls]} if calls else told

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any text: who speaks."""
        if not self._chat:
            return []
        return [self._chunk(at, {"role": "assistant", "content": ""}, [], None) for at in range(len(self._texts))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a piece: its text if there is any, the calls of tools, each whole, and its end if that is it."""
        made = []
        if delta.text or delta.tokens:
            made.append(self._chunk(delta.choice, {"content": delta.text}, delta.tokens, None))
        for call in delta.calls:
            calls = self._calls[delta.choice]
            made.append(self._chunk(delta.choice, {"tool_calls": [{"index": len(calls), **call.body}]}, [], None))
            calls.append(call)
        if delta.reason is not None:
            made.append(self._chunk(delta.choice, {}, [], delta.reason))
        return made

    def last(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The chunk after all text, if it was asked for."""
        return [{**self._head, "object": self._object, "choices": [], "usage": usage}] if self._usage else []

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, at: int, said: dict[str, Any], tokens: Sequence[Shown], reason: Reason | None) -> dict[str, Any]:
        delta = {"delta": said} if self._chat else {"text": said.get("content", "")}
        choice = {"index": at, **delta, **self._ended(at, tokens, reason, part=not tokens)}
        return {**self._head, "object": self._object, "choices": [choice], **({"usage": None} if self._usage else {})}

    def _ended(self, at: int, tokens: Sequence[Shown], reason: Reason | None, part: bool = False) -> dict[str, Any]:
        told = None if part or not self._logprobs else _of_messages(tokens) if self._chat else _of_texts(tokens)
        if reason == "stop" and self._calls[at]:
            return {"logprobs": told, "finish_reason": "tool_calls"}
        return {"logprobs": told, "finish_reason": None if reason is None else FINISHED[reason]}


def _of_messages(tokens: Sequence[Shown]) -> dict[str, Any]:
    content = [{**_one(one.text, one.logprob), "top_logprobs": [_one(*other) for other in one.top]} for one in tokens]
    return {"content": content, "refusal": None}


def _one(text: str, logprob: float) -> dict[str, Any]:
    """A token that is a part of a character has no bytes of its own to tell."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _of_texts(tokens: Sequence[Shown]) -> dict[str, Any]:
    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [dict(one.top) for one in tokens],
        "text_offset": [one.start for one in tokens],
    }
