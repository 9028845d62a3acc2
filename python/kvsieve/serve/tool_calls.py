"""Calls of tools in what a model says, found in its text while it comes.

Two ways of writing them are known, by the model's chat template:

    tagged    <tool_call>{"name": ..., "arguments": {...}}</tool_call>      Hermes, Qwen, SmolLM2; any text before and between
    bare      {"name": ..., "parameters": {...}}                            Llama 3: the whole answer is one call

A call is told once it is whole. What only looked like one, because it is no JSON or was cut off, is text after all; so is a bare
one that names no tool of the request.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Call", "Finder", "finder_of"]

OPENS, CLOSES = "<tool_call>", "</tool_call>"

LONGEST = 1 << 20
"""Characters of a call; what goes on for longer is text."""


@dataclass(frozen=True)
class Call:
    """One call: the tool's name, and its arguments as JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Found = tuple[str, list[Call]]
"""Text that is no part of a call, and the calls that are whole now."""


class Finder(Protocol):
    """Takes an answer apart while it comes."""

    def push(self, text: str) -> Found:
        """What is settled by ``text`` too."""

    def end(self) -> Found:
        """What was held back, once the answer is over."""


def finder_of(template: str, tools: Sequence[Mapping[str, Any]] | None) -> Finder | None:
    """For answers by a model with this chat template that was told of ``tools``; None where no calls are looked for."""
    if not tools:
        return None
    if OPENS in template:
        return _Tagged()
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return _Bare({str(tool["function"]["name"]) for tool in tools})
    return None


class _Tagged:
    """Calls between tags."""

    def __init__(self) -> None:
        self._held, self._gap = "", ""
        """What is not told yet, behind the tag where one is open; and the space before that tag."""
        self._inside = False

    def push(self, text: str) -> Found:
        self._held += text
        said, calls = "", list[Call]()
        while True:
            tag = CLOSES if self._inside else OPENS
            before, found, rest = self._held.partition(tag)
            if not found:
                break
            if not self._inside:
                said += before.rstrip()
                self._gap, self._held = before[len(before.rstrip()) :], rest
            else:
                made = _calls(before)
                said += "" if made else self._gap + OPENS + before + CLOSES
                calls += made
                self._held = rest
            self._inside = not self._inside
        if self._inside and len(self._held) > LONGEST:
            said, self._held, self._inside = said + self._gap + OPENS + self._held, "", False
        if not self._inside:
            settled = len(self._held) - _pending(self._held)
            said, self._held = said + self._held[:settled], self._held[settled:]
        return said, calls

    def end(self) -> Found:
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        # A model may end its answer instead of closing the tag.
        self._inside = False
        calls = _calls(held)
        return ("", calls) if calls else (self._gap + OPENS + held, [])


def _pending(text: str) -> int:
    """How many characters of its end may belong to a tag, or to the space before one."""
    part = next((n for n in range(min(len(text), len(OPENS) - 1), 0, -1) if OPENS.startswith(text[-n:])), 0)
    body = text[: len(text) - part]
    return part + len(body) - len(body.rstrip())


class _Bare:
    """An answer that is a call, as a whole."""

    def __init__(self, tools: Collection[str]) -> None:
        self._tools, self._held, self._is_text = tools, "", False

    def push(self, text: str) -> Found:
        if not self._is_text:
            self._held += text
            begin = self._held.lstrip()
            self._is_text = bool(begin) and (not begin.startswith("{") or len(begin) > LONGEST)
            if not self._is_text:
                return "", []
            text, self._held = self._held, ""
        return text, []

    def end(self) -> Found:
        held, self._held = self._held, ""
        calls = [call for call in _calls(held) if call.name in self._tools]
        return ("", calls) if calls else (held, [])


def _calls(text: str) -> list[Call]:
    """The call that ``text`` is, or the calls of a list; none if it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or not one["name"]:
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):  # some write JSON in JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(arguments, dict):
            return []
        calls.append(Call(one["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls
