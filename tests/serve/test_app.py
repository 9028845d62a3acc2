"""What the HTTP side alone answers, over a service that says what a test tells it to: whole answers and streams, texts, tools."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from typing import Any

import openai
import pytest
import serving
from kvsieve.serve.jobs import Job, Usage
from serving import ASK, CHAT, Scripted, chat, events, ids, post, prompt, says

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


# ---------------------------------------------------------------------------------------------------------------------------- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(address: str) -> None:
    asked = json.dumps({**ASK, "stream": True})
    command = ["curl", "-sN", f"http://{address}{CHAT}", "-H", "Content-Type: application/json", "-d", asked]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert events(done.stdout)[-1] == "[DONE]"
