"""What clients ask for: bodies of OpenAI's chat completions and completions, checked, and the errors they get.

A field that would change the answer and is not served is refused; :data:`IGNORED` lists those that change nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["IGNORED", "Asked", "Refusal", "asked_chat", "asked_text", "parsed"]

IGNORED = (*("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction"),)
"""Fields that may be anything: they are about a provider's accounts, caches and speed."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "functions": ([],),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "function_call": (),
    "web_search_options": (),
}
"""Fields that are not served, and the values of them that ask for nothing. So does null, of any field."""

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_CHOICES = 16, 256, 20, 16

COLDEST = 1e-6
"""The temperature below which the most probable token is taken: logits over much less are infinite, and nothing can be sampled."""

Kind = Literal["invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"]


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong, for the client's user.
        param: the field of the body that is.
        code: OpenAI's word for it.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: Kind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request, as far as it is the same for both kinds.

    Attributes:
        chat: whether it is of messages; else of a text.
        model: the name that the client gave.
        messages: for the chat template: ``role``, ``content`` (text), ``tool_calls`` with their arguments as objects, and others.
        prompt: the text to continue.
        tools: for the chat template.
        template: further variables of the chat template.
        options: of `generate`, those that the client set.
        most: most tokens of the answer; None: as the server says.
        bias: what is added to the logits of token ids.
        user: who the client says is asking.
    """

    chat: bool
    model: str | None
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    user: str | None = None


# ------------------------------------------------------------------------------------------------------------------------- bodies


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


class _StreamOptions(_Checked):
    include_usage: bool | None = None


class _Body(_Checked):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class _Part(_Checked):
    type: str
    text: str | None = None


class _Called(_Checked):
    name: str
    arguments: str


class _ToolCall(_Checked):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Called


class _Message(_Checked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class _Function(_Checked):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Checked):
    type: Literal["function"]
    function: _Function


class _Chat(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Text(_Body):
    prompt: str | list[str]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None


# ----------------------------------------------------------------------------------------------------------------------- checking


def parsed(data: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        Refusal: for what is no JSON, or no object.
    """
    try:
        body = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        said = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise Refusal(400, f"the body is not JSON: {said}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def asked_chat(body: dict[str, Any]) -> Asked:
    """The request of a chat completion's body.

    Raises:
        Refusal: for a field that is wrong, or that asks for what is not served.
    """
    found = _checked(_Chat, body)
    if found.tool_choice not in (None, "auto", "none"):
        _refuse("tool_choice", 'tool_choice can be "auto" or "none": what a model calls is its own choice here')
    if found.top_logprobs is not None and not found.logprobs:
        _refuse("top_logprobs", "top_logprobs needs logprobs: true", "invalid_value")
    return Asked(
        chat=True,
        messages=[_message(at, message) for at, message in enumerate(found.messages)],
        tools=None if found.tool_choice == "none" else body.get("tools") or None,
        template=found.chat_template_kwargs or {},
        logprobs=(found.top_logprobs or 0) if found.logprobs else None,
        most=found.max_completion_tokens or found.max_tokens,
        **_common(found),
    )


def asked_text(body: dict[str, Any]) -> Asked:
    """The request of a completion's body. Raises as :func:`asked_chat`."""
    found = _checked(_Text, body)
    prompts = [found.prompt] if isinstance(found.prompt, str) else found.prompt
    if len(prompts) != 1:
        _refuse("prompt", f"one prompt a request is served, not {len(prompts)}", "invalid_value")
    if not prompts[0]:
        _refuse("prompt", "the prompt is empty; give at least one character", "invalid_value")
    if found.best_of not in (None, found.n or 1):
        _refuse("best_of", "best_of is not served; ask for n answers")
    return Asked(chat=False, prompt=prompts[0], logprobs=found.logprobs, most=found.max_tokens, **_common(found))


def _checked(shape: type[Any], body: dict[str, Any]) -> Any:
    try:
        found = shape.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "_"))) or None
        raise Refusal(400, f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value") from None
    for name, value in (found.model_extra or {}).items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        _refuse(name, f"{name} is not served" if name in NEUTRAL else f"{name} is not known here")
    return found


def _refuse(param: str, message: str, code: str = "unsupported_parameter") -> NoReturn:
    raise Refusal(400, message, param=param, code=code)


def _common(found: Any) -> dict[str, Any]:
    stop = [found.stop] if isinstance(found.stop, str) else found.stop or []
    if len(stop) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in stop):
        _refuse("stop", f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters", "invalid_value")
    return {
        "model": found.model,
        "options": _options(found),
        "bias": _bias(found.logit_bias or {}),
        "stop": tuple(dict.fromkeys(stop)),
        "n": found.n or 1,
        "stream": bool(found.stream),
        "include_usage": bool(found.stream_options is not None and found.stream_options.include_usage),
        "user": found.user,
    }


def _options(found: Any) -> dict[str, Any]:
    """Settings of `generate`. Those that the client leaves out are the model's own."""
    options: dict[str, Any] = {}
    if found.temperature is not None and found.temperature < COLDEST:
        return {"do_sample": False} | ({} if found.repetition_penalty is None else {"repetition_penalty": found.repetition_penalty})
    for name in ("temperature", "top_p", "min_p"):
        if (value := getattr(found, name)) is not None:
            options |= {"do_sample": True, name: float(value)}
    if found.top_k is not None:
        options |= {"do_sample": True, "top_k": max(found.top_k, 0)}  # -1 and 0: all tokens
    if found.repetition_penalty is not None:
        options["repetition_penalty"] = float(found.repetition_penalty)
    if found.seed is not None:
        options["seed"] = found.seed % 2**63
    return options


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    if any(not key.isdecimal() or len(key) > 9 for key in given):
        _refuse("logit_bias", "logit_bias takes token ids as text", "invalid_value")
    return {int(key): float(value) for key, value in given.items()}


def _message(at: int, message: _Message) -> dict[str, Any]:
    """A message as chat templates read it."""
    where = f"messages.{at}"
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], "") and name not in IGNORED:
            _refuse(f"{where}.{name}", f"{name} of a message is not served")
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": _content(where, message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        if message.role != "assistant":
            _refuse(f"{where}.tool_calls", "tool_calls are of assistant messages", "invalid_value")
        made["tool_calls"] = [_call(call) for call in message.tool_calls]
    return made


def _content(where: str, message: _Message) -> str:
    if message.content is None:
        if not message.tool_calls:
            _refuse(f"{where}.content", f"a message of {message.role} needs content", "invalid_value")
        return ""
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            _refuse(f"{where}.content", f"a part of type {part.type!r} is not served, parts of text are")
    return "\n".join(str(part.text) for part in message.content)


def _call(call: _ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON: they are told the object. What a model wrote that is none stays as it is."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    told = {"name": call.function.name, "arguments": arguments if isinstance(arguments, dict) else call.function.arguments}
    return {"type": "function", "function": told} | ({} if call.id is None else {"id": call.id})
