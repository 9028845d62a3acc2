"""The text that the model reads for a request: what the tokenizer's chat template makes of its messages, and where they end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.serve.openai import Refusal

__all__ = ["Prompt", "opening_of", "public_text", "render", "tail_of", "template_of"]

FIRST, LAST = 2, 4
"""Messages from the beginning and from the end whose ends are looked for. A system prompt and a first document are shared, and the
last messages are edited or asked again; a conversation of a thousand messages is not rendered a thousand times."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        boundaries: where messages end, offsets in ``text``, ascending.
        answered: where the newest earlier answer begins; 0 where there is none, or where that cannot be told.
    """

    text: str
    boundaries: tuple[int, ...] = ()
    answered: int = 0


def template_of(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]) -> Prompt:
    """The prompt that messages make.

    A message's end is where the text of the messages up to it ends, if that is how the whole begins: a template that writes earlier
    messages otherwise once there are later ones has no end there.

    Raises:
        Refusal: without a template, for messages that it refuses, tools that it leaves out, and variables that are not its own.
    """
    if not template_of(tokenizer):
        raise Refusal(400, "this model has no chat template; /v1/completions continues a text", code="unsupported_model")
    _check_variables(tokenizer, variables)
    text = _rendered(tokenizer, messages, tools, variables, asks=True)
    if tools and text == _rendered(tokenizer, messages, None, variables, asks=True):
        raise Refusal(400, "this model's chat template does not know tools", param="tools", code="unsupported_parameter")
    # The message before the last answer; there may be any number of calls' results behind that.
    answer = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    counts = {*range(1, FIRST + 1), answer, *range(len(messages) - LAST + 1, len(messages) + 1)}
    ends = {count: _end(tokenizer, messages[:count], tools, variables, text) for count in counts if 0 < count <= len(messages)}
    return Prompt(text, tuple(sorted({end for end in ends.values() if end})), ends.get(answer) or 0)


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Variables of a template are not arguments of the call that renders it, the template itself among them."""
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    for name in variables:
        if name in taken:
            raise Refusal(400, f"chat_template_kwargs: {name} is not to be set", param="chat_template_kwargs", code="invalid_value")


def _end(
    tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any], text: str
) -> int | None:
    try:
        part = _rendered(tokenizer, messages, tools, variables, asks=False)
    except Refusal:  # a template may want a question, which the first messages do not have
        return None
    return len(part) if text.startswith(part) else None


def _rendered(
    tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any], *, asks: bool
) -> str:
    given = dict(variables) | ({} if tools is None else {"tools": list(tools)})
    try:
        # A template may change what it is given.
        told = [dict(message) for message in messages]
        text = str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=asks, **given))
    except Exception as error:  # a template is a program, and raises what it likes
        raise Refusal(400, f"the chat template refuses these messages: {error}", param="messages", code="invalid_value") from None
    return text


def public_text(tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """What every prompt begins with that begins with these messages.

    Raises:
        Refusal: for messages that the template refuses, or renders otherwise once a question follows.
    """
    asked = {"role": "user", "content": "?"}
    text = render(tokenizer, [*messages, asked], tools, {}).text
    end = _end(tokenizer, messages, tools, {}, text)
    if not end:
        raise Refusal(400, "the chat template does not write these messages as the beginning of what follows")
    return text[:end]


def opening_of(tokenizer: Any) -> str:
    """What the tokenizer puts before every text, as text: the token of the beginning, where the model has one."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return str(tokenizer.decode(whole[:start])) if start else ""
    return ""


def tail_of(tokenizer: Any, text: str) -> list[int]:
    """The last few tokens of a prompt, about: what decides how the first word of an answer is written."""
    return list(tokenizer(text[-32:], add_special_tokens=False)["input_ids"])
