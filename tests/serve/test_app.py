"""The HTTP side alone, over a service that says what a test tells it to: shapes, refusals, keys, streams, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from kvsieve.errors import ArgumentError, BudgetError, PromptTooLongError, ServiceBusyError, ServiceClosedError, ServiceFullError
from kvsieve.serve import app as http_app
from kvsieve.serve.access import Access
from kvsieve.serve.answering import Answers, AnswerText, Events
from kvsieve.serve.jobs import Job, Usage
from kvsieve.serve.openai import IGNORED, Refusal, asked_chat, asked_text, parsed
from kvsieve.serve.replies import Reply
from prometheus_client.parser import text_string_to_metric_families
from serving import CHAT, Scripted, call, events, ids, post, prompt, says, until

TEXT = "/v1/completions"
KEYS = ("first-key-of-some-length", "other-key-of-some-length")
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Scripted, str]]:
    service = Scripted()
    with serving.serving(service, max_new_tokens=50, seconds=30.0, body=20_000, facts={"policy": "full()"}) as address:
        yield service, address


@pytest.fixture
def service(served: tuple[Scripted, str]) -> Iterator[Scripted]:
    made = served[0]
    yield made
    made.script, made.refusal = says("Hello."), None
    made.jobs.clear()
    made.cancelled.clear()


@pytest.fixture
def address(served: tuple[Scripted, str], service: Scripted) -> str:
    return served[1]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def chat(address: str, **fields: Any) -> Any:
    """The answer to a message, as JSON."""
    status, _, body = post(address, CHAT, {**ASK, **fields})
    assert status == 200, body
    return json.loads(body)


def error(address: str, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, told = post(address, path, body, **headers)
    found = json.loads(told)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return status, found["error"]


# ------------------------------------------------------------------------------------------------------------------------- answers


def test_a_chat_is_answered(service: Scripted, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["x"],
        user="me",
    )
    assert answer.choices[0].message.content == "Hello."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny"
    [job] = service.jobs
    assert job.text == prompt(("system", "Be kind."), ("user", "Hi"))
    assert [job.text[:end] for end in job.boundaries] == [
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ]
    assert job.options == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_new_tokens": 7}
    assert (job.stop, job.n, job.logprobs, job.seconds) == (("x",), 1, None, 30.0)
    assert answer.usage is not None
    count = len(ids(job.text))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (count, 7, count + 7)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == count - 3
    wanted = {"newly_read": 3, "retained": count - 4, "evicted": 4, "read_again": False, "timed_out": False}
    assert answer.usage.model_extra == {"kvsieve": wanted}


def test_what_a_client_leaves_out_is_the_models_own(service: Scripted, address: str) -> None:
    chat(address)
    assert service.jobs[0].options == {"max_new_tokens": 50}
    assert service.jobs[0].owner == ""


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0, "top_p": 0.5, "seed": 4}, {"do_sample": False}),
        ({"temperature": 1e-40}, {"do_sample": False}),
        ({"temperature": 1}, {"do_sample": True, "temperature": 1.0}),
        ({"top_k": -1}, {"do_sample": True, "top_k": 0}),
        ({"min_p": 0.1, "repetition_penalty": 1.2}, {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.2}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"logit_bias": {"5": 2, "6": -100}}, {"sequence_bias": {(5,): 2.0, (6,): -100.0}}),
        ({"max_tokens": 9}, {"max_new_tokens": 9}),
    ],
)
def test_sampling_is_passed_on(fields: dict[str, Any], options: dict[str, Any], service: Scripted, address: str) -> None:
    chat(address, **fields)
    assert service.jobs[0].options == {"max_new_tokens": 50, **options}


def test_a_stream_says_what_the_whole_answer_says(service: Scripted, client: openai.OpenAI) -> None:
    service.script = says("Grüße, 世界! 🌊")
    chunks = list(
        client.chat.completions.create(model="tiny", messages=ASK["messages"], stream=True, stream_options={"include_usage": True})
    )
    *parts, last = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in parts]
    assert "".join(texts) == "Grüße, 世界! 🌊"
    assert not any("\ufffd" in text for text in texts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ids("Grüße, 世界! 🌊")) + 1
    assert all(chunk.usage is None for chunk in parts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_events_are_framed_as_clients_read_them(service: Scripted, address: str) -> None:
    service.script = says("a\nb\n\ndata: c\r")
    status, headers, body = post(address, CHAT, {**ASK, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, done = events(body)
    assert done == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "a\nb\n\ndata: c\r"
    assert not any("usage" in json.loads(chunk) for chunk in chunks)


def test_a_text_is_continued(service: Scripted, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="The sea", max_tokens=4, logprobs=2)
    assert (answer.choices[0].text, answer.object, answer.choices[0].finish_reason) == ("Hello.", "text_completion", "stop")
    assert service.jobs[0].text == "The sea"
    assert service.jobs[0].boundaries == ()
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens == list("Hello.")
    assert told.text_offset == list(range(6))
    assert told.token_logprobs == [-0.5] * 6
    assert [len(top) for top in told.top_logprobs or ()] == [2] * 6
    parts = list(client.completions.create(model="tiny", prompt=["The sea"], stream=True))
    assert "".join(part.choices[0].text for part in parts) == "Hello."
    assert parts[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_said(stream: bool, service: Scripted, client: openai.OpenAI) -> None:
    """Also where the service would go on: it is told to stop."""

    def endless(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        sink.begin(Usage(9, 9))
        for token in ids("one STO two ST"):
            sink.token(0, service.token(token, job))
        for token in ids("OP three"):
            sink.token(0, service.token(token, job))
        assert cancelled.wait(20)
        sink.end(0, "cancelled", Usage(9, 9, 22))

    service.script = endless
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK["messages"], "stop": ["STOP", "##"]}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **asked))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        whole = client.chat.completions.create(logprobs=True, **asked)
        said, reason = whole.choices[0].message.content or "", whole.choices[0].finish_reason
        told = whole.choices[0].logprobs
        assert told is not None
        assert "".join(one.token for one in told.content or ()) == "one STO two "
    assert (said, reason) == ("one STO two ", "stop")


def test_the_beginning_of_a_stop_string_is_said_in_the_end(service: Scripted, address: str) -> None:
    service.script = says("one ST", end=False)
    choice = chat(address, stop="STOP")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ST", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_come_with_their_tokens(stream: bool, service: Scripted, client: openai.OpenAI) -> None:
    service.script = says("aé")
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK["messages"], "logprobs": True, "top_logprobs": 3}
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(stream=True, **asked)]
        content = [one for part in parts if part is not None for one in part.content or ()]
    else:
        told = client.chat.completions.create(**asked).choices[0].logprobs
        assert told is not None
        content = list(told.content or ())
    assert [one.token for one in content] == ["a", "\ufffd", "\ufffd"], "a token a byte, and none for the end"
    assert [one.bytes for one in content] == [[97], None, None]
    assert all(one.logprob == -0.5 and [top.logprob for top in one.top_logprobs] == [-0.5, -1.5, -2.5] for one in content)
    assert service.jobs[0].logprobs == 3


def test_several_answers_have_their_numbers(service: Scripted, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK["messages"], n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(at, "Hello.") for at in range(3)]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3 * 7
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=ASK["messages"], n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello."] * 3
    assert [job.n for job in service.jobs] == [3, 3]


TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {"at": {"default": None}}}}}


def test_tools_and_what_was_called_go_through_the_template(service: Scripted, client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "When is high tide?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"at": "Brest"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "at noon"},
    ]
    client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], tool_choice="auto")  # type: ignore[list-item]
    text = service.jobs[0].text
    assert text.startswith(f"<|im_start|>tools\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>system\nBe\nkind.<|im_end|>\n")
    said = '<tool_call>{"name": "tide", "arguments": {"at": "Brest"}}</tool_call>'
    assert f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>tool\nat noon<|im_end|>\n" in text
    client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], tool_choice="none")  # type: ignore[list-item]
    assert not service.jobs[1].text.startswith("<|im_start|>tools")


CALLED = 'Let me look.\n<tool_call>\n{"name": "tide", "arguments": {"at": "Brest"}}\n</tool_call>'


def test_what_a_model_calls_comes_back_as_calls_of_tools(service: Scripted, client: openai.OpenAI) -> None:
    """Whole and streamed; what the client then sends back is the text that the model said."""
    service.script = says(CALLED + CALLED.replace("Brest", "Le Havre").removeprefix("Let me look."))
    asked: Any = {"model": "tiny", "messages": ASK["messages"], "tools": [TOOL]}
    [choice] = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
    calls: Any = choice.message.tool_calls
    found = [(one.type, one.function.name, json.loads(one.function.arguments)) for one in calls]
    assert found == [("function", "tide", {"at": place}) for place in ("Brest", "Le Havre")]
    assert calls[0].id != calls[1].id
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    parts: Any = [call for one in deltas for call in one.delta.tool_calls or []]
    assert "".join(one.delta.content or "" for one in deltas) == "Let me look."
    assert [(one.index, one.function.name, json.loads(one.function.arguments)) for one in parts] == [
        (0, "tide", {"at": "Brest"}),
        (1, "tide", {"at": "Le Havre"}),
    ]
    assert deltas[-1].finish_reason == "tool_calls"
    service.script = says(CALLED, end=False)
    assert client.chat.completions.create(**asked).choices[0].finish_reason == "length", "it was cut"
    service.script = says(CALLED)
    client.chat.completions.create(**asked | {"messages": [*ASK["messages"], choice.message, {"role": "tool", "content": "noon"}]})
    assert '<tool_call>{"name": "tide", "arguments": {"at": "Brest"}}</tool_call>' in service.jobs[-1].text


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}], ids=["no tools", "none wanted"])
def test_without_tools_what_looks_like_a_call_is_text(fields: dict[str, Any], service: Scripted, address: str) -> None:
    service.script = says(CALLED)
    [choice] = chat(address, **fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALLED, "stop")
    assert "tool_calls" not in choice["message"]


def rewriting(messages: list[dict[str, Any]], **_: Any) -> str:
    """A template that leaves the thoughts of all answers but the last out, and wants a question."""
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question")
    last = max(at for at, message in enumerate(messages) if message["role"] != "assistant")
    told = [one["content"].partition("</think>")[2] if at < last else one["content"] for at, one in enumerate(messages)]
    return "".join(f"[{one['role']}]{text or one['content']}" for one, text in zip(messages, told)) + "[assistant]"


def test_messages_that_a_template_rewrites_have_no_end(service: Scripted, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serving.tokenizer(),
        "apply_chat_template",
        lambda told, **given: rewriting(told).removesuffix("[assistant]" * (not given["add_generation_prompt"])),
    )
    told = [("system", "S"), ("user", "A"), ("assistant", "hm</think>B"), ("user", "C")]
    chat(address, messages=[{"role": role, "content": content} for role, content in told])
    [job] = service.jobs
    assert job.text[: job.answered] == "[system]S[user]A"
    assert job.text == "[system]S[user]A[assistant]B[user]C[assistant]"
    ends = [job.text[:end] for end in job.boundaries]
    assert ends == ["[system]S[user]A", "[system]S[user]A[assistant]B[user]C"]


def test_a_long_conversation_is_not_rendered_once_for_each_message(
    service: Scripted, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    rendered = serving.tokenizer().apply_chat_template
    monkeypatch.setattr(serving.tokenizer(), "apply_chat_template", lambda *a, **k: calls.append(a) or rendered(*a, **k))
    chat(address, messages=[{"role": ("user", "assistant")[at % 2], "content": str(at)} for at in range(101)])
    assert len(calls) <= 8
    [job] = service.jobs
    assert len(job.boundaries) == 6
    assert job.text[job.answered :].startswith(f"{serving.STARTS}assistant\n99<")


# ------------------------------------------------------------------------------------------------------------------------ refusals

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


# ------------------------------------------------------------------------------------------------------------------------- access


@pytest.fixture(scope="module")
def locked() -> Iterator[tuple[Scripted, str]]:
    service = Scripted()
    with serving.serving(service, keys=KEYS) as address:
        yield service, address


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **headers}


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer(""), bearer(KEYS[0][:-1]), bearer(KEYS[0] + "x"), {"Authorization": f"Basic {KEYS[0]}"}]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/models/tiny", "/metrics"])
def test_nobody_gets_in_without_a_key(headers: dict[str, str], path: str, locked: tuple[Scripted, str]) -> None:
    service, address = locked
    status, told, body = (post(address, path, ASK, **headers)) if path == CHAT else call(address, "GET", path, headers=headers)
    assert (status, json.loads(body)["error"]["code"], told["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert not [job for job in service.jobs if job.owner == ""]
    assert KEYS[0] not in body.decode()


def test_health_is_told_to_everybody(locked: tuple[Scripted, str]) -> None:
    status, _, body = call(locked[1], "GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok"})


def test_health_is_that_of_the_model_thread(service: Scripted, address: str) -> None:
    service.alive = False
    try:
        status, _, body = call(address, "GET", "/health")
    finally:
        service.alive = True
    assert (status, json.loads(body)["error"]["code"]) == (503, "closing")


def test_owners_are_keys_and_sessions(locked: tuple[Scripted, str]) -> None:
    service, address = locked
    asked = [
        *[({}, bearer(key)) for key in (*KEYS, KEYS[0])],
        *[({"user": user}, bearer(KEYS[0])) for user in ("ann", "bob")],
        *[({"user": user}, bearer(KEYS[0], **{"X-Session-Key": "s"})) for user in ("ann", "bob")],
        ({}, bearer(KEYS[1], **{"X-Session-Key": "s"})),
    ]
    for fields, headers in asked:
        assert post(address, CHAT, {**ASK, **fields}, **headers)[0] == 200
    first, other, same, ann, bob, session, still, others = [job.owner for job in service.jobs]
    assert (first, session) == (same, still)
    assert len({first, other, ann, bob, session, others, ""}) == 7
    assert not any(key in owner for key in KEYS for owner in (first, other))
    assert all(len(owner) == 64 and int(owner, 16) for owner in (first, other, ann, bob, session, others))


def test_without_keys_only_this_machine_is_a_host(service: Scripted, address: str) -> None:
    """A page in a browser may have its own name point to 127.0.0.1."""
    port = address.partition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", "[2001:db8::1]", "127.0.0.1.evil.example"):
        assert error(address, ASK, Host=host)[0] == 403
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert post(address, CHAT, ASK, Host=host)[0] == 200
    assert len(service.jobs) == 3


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 15, "a key with its spaces", "schlüssel-of-some-length", "line-of-some\nlength"]
)
def test_what_is_no_key_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ArgumentError, match="API key 2 must be") as refused:
        Access([KEYS[0], key])
    assert not key or key not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- clients that leave


def holds(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
    """Says one token and waits until it is cancelled."""
    sink.begin(Usage(9, 9))
    sink.token(0, service.token(ids("a")[0], job))
    assert cancelled.wait(20)
    sink.end(0, "cancelled", Usage(9, 9, 1))


def reading(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
    """Reads the prompt until it is cancelled."""
    assert cancelled.wait(20)
    sink.end(0, "cancelled", Usage(9, 9, 1))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [holds, reading])
def test_a_client_that_leaves_cancels_its_answer(script: Any, stream: bool, service: Scripted, address: str) -> None:
    service.script = script
    before = gone(address)
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", CHAT, json.dumps({**ASK, "stream": stream}), {"Content-Type": "application/json"})
    until(lambda: service.jobs)
    if stream and script is holds:
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
    assert connection.sock is None or connection.sock.shutdown(socket.SHUT_RDWR) is None
    connection.close()
    assert service.cancelled[0].wait(20)
    until(lambda: gone(address) == before + 1)


def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(service: Scripted, address: str) -> None:
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n".encode()
            + b'{"'
        )
    assert chat(address)["choices"][0]["message"]["content"] == "Hello."
    assert len(service.jobs) == 1


def gone(address: str) -> float:
    return samples(address)[("kvsieve_clients_gone_total", ())]


def test_a_stream_that_waits_says_that_it_lives(service: Scripted, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_app, "PULSE", 0.02)
    go = threading.Event()

    def slow(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        assert go.wait(20)
        says("Hello.")(service, job, sink, cancelled)

    service.script = slow
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", CHAT, json.dumps({**ASK, "stream": True}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    lines = []
    while b": reading\n" not in lines:
        lines.append(answer.readline())
    go.set()
    rest = b"".join(lines) + answer.read()
    connection.close()
    assert events(rest)[-1] == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events(rest)[:-1]) == "Hello."


def test_an_answer_that_has_ended_stays_so_while_another_goes_on() -> None:
    """The pulse of a prompt that is being read may come when it was read, and the first answer is over."""

    async def ended() -> list[Any]:
        events = Events(asyncio.get_running_loop())
        texts = [AnswerText(serving.tokenizer(), (), ()) for _ in range(2)]
        reply = Reply(chat=True, model="tiny", n=2)
        for told in ("begin", "end", "wait", "last"):
            if told == "wait":
                events.tell("wait")
            elif told == "begin":
                events.begin(Usage(9, 9))
            else:
                events.end(int(told == "last"), "stop", Usage(9, 9, 1))
            await asyncio.sleep(0)  # what is told by other threads comes by the loop
        async for delta in Answers(events, texts, lambda: None):
            reply.add(delta)
        return [choice["finish_reason"] for choice in reply.whole({})["choices"]]

    assert asyncio.run(ended()) == ["stop", "stop"]


# ------------------------------------------------------------------------------------------------------------------------- metrics


def samples(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    status, headers, body = call(address, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(body.decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_metrics_are_what_prometheus_reads(service: Scripted, address: str) -> None:
    before = samples(address)
    chat(address)
    error(address, b"{")
    post(address, "/elsewhere", ASK)
    after = samples(address)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert grown("kvsieve_http_requests_total", path=CHAT, status="200") == 1
    assert grown("kvsieve_http_requests_total", path=CHAT, status="400") == 1
    assert grown("kvsieve_http_requests_total", path="other", status="404") == 1
    assert grown("kvsieve_request_seconds_count") == 1
    assert grown("kvsieve_first_token_seconds_count") == 1
    steps = {name: after[("kvsieve_step_seconds_bucket", (("le", name),))] for name in ("0.01", "0.1", "+Inf")}
    assert steps == {"0.01": 3, "0.1": 5, "+Inf": 6}
    assert (after[("kvsieve_step_seconds_count", ())], after[("kvsieve_step_seconds_sum", ())]) == (6, 0.75)
    assert after[("kvsieve_answers_total", (("reason", "stop"),))] == 5
    assert after[("kvsieve_memory_limit_bytes", ())] == 2**30


# ---------------------------------------------------------------------------------------------------------------------------- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(address: str) -> None:
    asked = json.dumps({**ASK, "stream": True})
    command = ["curl", "-sN", f"http://{address}{CHAT}", "-H", "Content-Type: application/json", "-d", asked]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert events(done.stdout)[-1] == "[DONE]"
