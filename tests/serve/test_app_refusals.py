"""What the HTTP side alone refuses: bodies, texts, models, paths, methods; failures and their status."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvsieve.errors import BudgetError, PromptTooLongError, ServiceBusyError, ServiceClosedError, ServiceFullError
from kvsieve.serve.jobs import Job, Usage
from kvsieve.serve.openai import IGNORED, Refusal, asked_chat, asked_text, parsed
from serving import ASK, CHAT, Scripted, call, chat, error, ids, post

TEXT = "/v1/completions"

WRONG: list[tuple[Any, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[1]", None),
    (b"\xff\xfe", None),
    (b'{"messages": NaN}', None),
    (b"[" * 15_000, None),
    (b'{"seed": ' + b"9" * 5_000 + b"}", None),
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "Hi", "audio": {"id": "a"}}]}, "messages.0.audio"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "prompt"),
    ({**ASK, "max_tokens": 0}, "max_tokens"),
    ({**ASK, "max_tokens": "5"}, "max_tokens"),
    ({**ASK, "max_tokens": 5.5}, "max_tokens"),
    ({**ASK, "n": 0}, "n"),
    ({**ASK, "n": 1000}, "n"),
    ({**ASK, "temperature": -1}, "temperature"),
    ({**ASK, "temperature": 1e999}, None),
    ({**ASK, "repetition_penalty": 1e-40}, "repetition_penalty"),
    ({**ASK, "top_p": 2}, "top_p"),
    ({**ASK, "stop": [""]}, "stop"),
    ({**ASK, "stop": ["x"] * 17}, "stop"),
    ({**ASK, "stop": "\udfff"}, "stop"),
    ({**ASK, "stream": "yes"}, "stream"),
    ({**ASK, "seed": 2**63}, "seed"),
    ({**ASK, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**ASK, "logit_bias": {"264": 1}}, "logit_bias"),
    ({**ASK, "top_logprobs": 2}, "top_logprobs"),
    ({**ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({**ASK, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({**ASK, "frequency_penalty": 0.5}, "frequency_penalty"),
    ({**ASK, "audio": {"voice": "x"}}, "audio"),
    ({**ASK, "modalities": ["text", "audio"]}, "modalities"),
    ({**ASK, "tool_choice": "required"}, "tool_choice"),
    ({**ASK, "tools": [{"type": "retrieval"}]}, "tools.0.type"),
    ({**ASK, "guided_regex": "x"}, "guided_regex"),
    ({**ASK, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({**ASK, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_what_is_wrong_is_refused_and_named(body: Any, param: str | None, service: Scripted, address: str) -> None:
    status, told = error(address, body)
    assert (status, told["type"], told["param"]) == (400, "invalid_request_error", param)
    assert not service.jobs


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_what_is_wrong_with_a_text_is_refused_and_named(body: Any, param: str, service: Scripted, address: str) -> None:
    status, told = error(address, body, TEXT)
    assert status == 400
    assert (told["param"] or "").split(".")[0] == param
    assert not service.jobs


def test_fields_that_ask_for_nothing_are_taken(service: Scripted, address: str) -> None:
    harmless = {name: {"any": ["thing"]} for name in IGNORED}
    neutral = {"response_format": {"type": "text"}, "frequency_penalty": 0, "presence_penalty": 0.0, "audio": None, "functions": []}
    chat(address, **harmless, **neutral, chat_template_kwargs={"enable_thinking": False})
    assert len(service.jobs) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "messages",
    "prompt",
    "stop",
    "logit_bias",
    "tools",
    "tool_choice",
    "stream_options",
    "n",
    "logprobs",
    "user",
    "audio",
    "x",
)


@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON), ask=st.sampled_from([asked_chat, asked_text]))
@settings(max_examples=150, deadline=None)
def test_a_body_is_understood_or_refused(body: dict[str, Any], ask: Any) -> None:
    """Whatever it is, and nothing else happens."""
    whole = {"messages": [{"role": "user", "content": "Hi"}]} if ask is asked_chat else {"prompt": "a"}
    for given_body in (body, {**whole, **body}):
        with contextlib.suppress(Refusal):
            asked = ask(parsed(json.dumps(given_body).encode()))
            assert asked.prompt or asked.messages


def test_an_unknown_model_is_not_found(address: str, client: openai.OpenAI) -> None:
    status, told = error(address, {**ASK, "model": "gpt-9"})
    assert (status, told["code"], told["param"]) == (404, "model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_models_are_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.model_extra) == ("tiny", "kvsieve", {"kvsieve": {"policy": "full()"}})
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("path", ["/", "/v1/embeddings", "/docs", "/openapi.json"])
def test_other_paths_are_not_found(path: str, address: str) -> None:
    status, _, body = call(address, "GET", path)
    assert (status, json.loads(body)["error"]["type"]) == (404, "invalid_request_error")


def test_other_methods_are_refused(address: str) -> None:
    status, headers, body = call(address, "GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    assert "error" in json.loads(body)


FAILURES = [
    (ServiceBusyError("the queue is full"), 429, "rate_limit_error", "queue_full"),
    (ServiceClosedError("closing"), 503, "server_error", "closing"),
    (ServiceFullError("it needs 3 GiB"), 503, "server_error", "memory_full"),
    (PromptTooLongError("9,000 tokens, at most 4,096"), 400, "invalid_request_error", "context_length_exceeded"),
    (BudgetError("a budget of 2 cannot hold it"), 400, "invalid_request_error", "invalid_value"),
    (RuntimeError("secret path /root"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "kind", "code"), FAILURES)
@pytest.mark.parametrize("late", [False, True])
def test_failures_have_their_status(
    failure: Exception, status: int, kind: str, code: str, late: bool, stream: bool, service: Scripted, address: str
) -> None:
    """Whether the service refuses the job, or fails while it reads the prompt."""
    if late:
        service.script = lambda service, job, sink, cancelled: sink.fail(failure)
    else:
        service.refusal = failure
    got, headers, body = post(address, CHAT, {**ASK, "stream": stream})
    told = json.loads(body)["error"]
    assert (got, told["type"], told["code"]) == (status, kind, code)
    assert headers.get("retry-after") == {429: "7", 503: "1"}.get(status), "a queue's is the mean wait, 13 s for 2 jobs"
    assert ("secret" in told["message"]) is False


def test_a_failure_in_the_middle_of_a_stream_is_an_event(service: Scripted, client: openai.OpenAI) -> None:
    def fails(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        sink.begin(Usage(9, 9))
        sink.token(0, service.token(ids("a")[0], job))
        sink.fail(RuntimeError("the model broke"))

    service.script = fails
    chunks = client.chat.completions.create(model="tiny", messages=ASK["messages"], stream=True)
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match="the server failed"):
        next(chunks)


def test_time_that_runs_out(service: Scripted, address: str) -> None:
    def cut(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        if job.n == 1:
            sink.begin(Usage(9, 9))
            sink.token(0, service.token(ids("a")[0], job))
        for choice in range(job.n):
            sink.end(choice, "timeout", Usage(9, 9, 1))

    service.script = cut
    answer = chat(address)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("a", "length")
    assert answer["usage"]["kvsieve"]["timed_out"] is True
    for stream in (False, True):
        status, told = error(address, {**ASK, "n": 2, "stream": stream})
        assert (status, told["code"]) == (504, "timeout")


def test_a_body_that_is_too_long_is_refused(service: Scripted, address: str) -> None:
    long = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    assert error(address, long)[0] == 413
    status, _, _ = call(address, "POST", CHAT, iter([long[:9_000], long[9_000:]]), {"Content-Type": "application/json"})
    assert status == 413, "also where its length is not told before"
    assert not service.jobs


def test_a_body_of_another_kind_is_refused(address: str) -> None:
    """A form is what a page of another site may send without asking."""
    status, _, _ = call(address, "POST", CHAT, json.dumps(ASK).encode(), {"Content-Type": "text/plain"})
    assert status == 415
