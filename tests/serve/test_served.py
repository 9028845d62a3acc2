"""Clients of a real server: HTTP, the model thread and a tiny model, beside what the model itself says."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kvsieve
import openai
import pytest
import serving
import torch
from kvsieve.serve.service import Service
from serving import CHAT, ids, post, prompt, until

PUBLIC = serving.tokenizer().apply_chat_template([{"role": "system", "content": "Everybody knows this."}], tokenize=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return serving.model()


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[tuple[Service, str]]:
    with (
        Service(model, serving.tokenizer(), kvsieve.Full(), memory=2**28, public=[PUBLIC], longest=6_000) as service,
        serving.serving(service, max_new_tokens=12) as address,
    ):
        yield service, address


@pytest.fixture
def service(served: tuple[Service, str]) -> Service:
    return served[0]


@pytest.fixture
def address(served: tuple[Service, str]) -> str:
    return served[1]


def stock(model: Any, text: str, new: int) -> str:
    """What the model itself says after ``text``, without kvsieve."""
    told = torch.tensor([ids(text)])
    said = model.generate(told, attention_mask=torch.ones_like(told), max_new_tokens=new, do_sample=False)
    return str(serving.tokenizer().decode(said[0, told.shape[1] :], skip_special_tokens=True))


def ask(client: openai.OpenAI, *messages: tuple[str, str], session: str, **fields: Any) -> Any:
    told: Any = [{"role": role, "content": said} for role, said in messages]
    fields = {"temperature": 0, **fields}
    return client.chat.completions.create(model="tiny", messages=told, extra_headers={"X-Session-Key": session}, **fields)


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_a_conversation_is_that_of_the_model_and_is_not_read_twice(client: openai.OpenAI, model: Any) -> None:
    told: list[tuple[str, str]] = []
    for number, question in enumerate(("Who are you?", "And what do you do all day?", "Why?")):
        told.append(("user", question))
        text = prompt(*told)
        answer = ask(client, *told, session="a")
        assert said(answer) == stock(model, text, 12)
        new = len(ids(text)) if not number else len(ids(question)) + 60
        usage = answer.usage
        assert usage.prompt_tokens == len(ids(text))
        assert usage.kvsieve["newly_read"] <= new
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - usage.kvsieve["newly_read"]
        assert usage.kvsieve["read_again"] is False
        assert usage.kvsieve["evicted"] == 0
        told.append(("assistant", said(answer)))


def test_a_message_that_is_edited_or_asked_again_costs_itself(client: openai.OpenAI, model: Any) -> None:
    first = [("system", "Be kind. " * 20), ("user", "Who are you?")]
    answer = ask(client, *first, session="b")
    later = [*first, ("assistant", said(answer))]
    before = ask(client, *later, ("user", "And then?"), session="b")
    edited = ask(client, *later, ("user", "And now?"), session="b")
    again = ask(client, *later, ("user", "And then?"), session="b")
    for found, question in ((edited, "And now?"), (again, "And then?")):
        assert said(found) == stock(model, prompt(*later, ("user", question)), 12)
        assert found.usage.kvsieve["newly_read"] < 60 < found.usage.prompt_tokens
    assert said(again) == said(before)


def test_nothing_of_one_session_is_used_for_another(client: openai.OpenAI) -> None:
    told = [("system", "A secret that only one client has. " * 8), ("user", "Hi")]
    first, other = ask(client, *told, session="c"), ask(client, *told, session="d")
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert ask(client, *told, session="c").usage.prompt_tokens_details.cached_tokens > 250
    by_user = [ask(client, *told, session="", user=name).usage.prompt_tokens_details.cached_tokens for name in ("x", "y")]
    assert by_user == [0, 0]


def test_what_is_public_is_read_for_everybody(client: openai.OpenAI, model: Any) -> None:
    told = [("system", "Everybody knows this."), ("user", "Hi")]
    for session in ("e", "f"):
        answer = ask(client, *told, session=session)
        assert answer.usage.prompt_tokens_details.cached_tokens == len(ids(PUBLIC))
        assert said(answer) == stock(model, prompt(*told), 12)


def test_a_stop_string_ends_it_at_once(client: openai.OpenAI, model: Any) -> None:
    whole = stock(model, prompt(("user", "Go on")), 12)
    stop = whole[5:7]
    cut = ask(client, ("user", "Go on"), session="g", stop=stop)
    at = whole.index(stop)
    assert (said(cut), cut.choices[0].finish_reason) == (whole[:at], "stop")
    assert cut.usage.completion_tokens <= len(ids(whole[: at + len(stop)]))
    streamed = ask(client, ("user", "Go on"), session="h", stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[:at]


def test_sampling_follows_the_seed(client: openai.OpenAI) -> None:
    def sampled(seed: int, n: int = 1) -> list[str]:
        answer = ask(client, ("user", "Sing"), session="i", temperature=1.5, seed=seed, n=n)
        return [str(choice.message.content) for choice in answer.choices]

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1, n=3) == [*sampled(1), *sampled(2), *sampled(3)]


def test_probabilities_are_the_models(client: openai.OpenAI, model: Any) -> None:
    answer = ask(client, ("user", "Count"), session="j", logprobs=True, top_logprobs=2, max_completion_tokens=4)
    text = ids(prompt(("user", "Count")))
    known = model.generate(torch.tensor([text]), do_sample=False, max_new_tokens=4)[0, len(text) :].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([text + known])).logits[0, len(text) - 1 : -1]
    wanted = torch.log_softmax(logits.double(), -1)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4 - (known[-1] == serving.tokenizer().eos_token_id)
    for at, one in enumerate(content):
        assert one.logprob == pytest.approx(float(wanted[at, known[at]]), abs=1e-4)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(wanted[at].topk(2).values.tolist(), abs=1e-4)


def test_a_bias_decides(client: openai.OpenAI) -> None:
    [token] = ids("z")
    answer = ask(client, ("user", "Hi"), session="k", logit_bias={str(token): 100}, max_completion_tokens=3)
    assert said(answer) == "zzz"


def test_a_prompt_that_is_too_long_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, ("user", "x" * 6_000), session="l")
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        ask(client, ("user", "x" * 900), session="l", max_completion_tokens=5_900)


def test_an_answer_whose_length_is_not_said_takes_what_the_prompt_leaves(client: openai.OpenAI) -> None:
    around = len(ids(prompt(("user", ""))))
    answer = ask(client, ("user", "x" * (6_000 - around - 3)), session="l", logit_bias={str(ids("z")[0]): 100})
    assert (said(answer), answer.choices[0].finish_reason) == ("zzz", "length")


def test_several_clients_get_what_each_gets_alone(client: openai.OpenAI, model: Any) -> None:
    def talk(number: int) -> list[str]:
        told: list[tuple[str, str]] = []
        for question in (f"Who is number {number}?" * (1 + number % 3), "And then?"):
            told.append(("user", question))
            told.append(("assistant", said(ask(client, *told, session=f"m{number}", stream=False))))
        return [content for _, content in told]

    with ThreadPoolExecutor(5) as pool:
        talks = list(pool.map(talk, range(5)))
    for first, answer, second, last in talks:
        assert answer == stock(model, prompt(("user", first)), 12)
        assert last == stock(model, prompt(("user", first), ("assistant", answer), ("user", second)), 12)


def test_a_client_that_leaves_frees_its_place(service: Service, client: openai.OpenAI, address: str, model: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 5_000, "logit_bias": {str(ids("z")[0]): 100}}
    for stream in (True, False):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("POST", CHAT, json.dumps({**asked, "stream": stream}), {"Content-Type": "application/json"})
        until(lambda: service.snapshot().answering == 1)
        if stream:
            answer = connection.getresponse()
            answer.readline()
            answer.close()
        connection.close()
        until(lambda: service.snapshot().answering == 0)
    assert service.snapshot().ends["cancelled"] == 2
    assert said(ask(client, ("user", "Go on"), session="n")) == stock(model, prompt(("user", "Go on")), 12)


def test_health_ends_with_the_service() -> None:
    service = Service(serving.model(), serving.tokenizer(), kvsieve.Full(), memory=2**24)
    with serving.serving(service) as address:
        found = [serving.call(address, "GET", "/health")[0]]
        service.start()
        found.append(serving.call(address, "GET", "/health")[0])
        service.close()
        found.append(serving.call(address, "GET", "/health")[0])
        status, headers, _ = post(address, CHAT, {"messages": [{"role": "user", "content": "Hi"}]})
    assert found == [503, 200, 503]
    assert (status, headers["retry-after"]) == (503, "1")


def test_a_full_queue_is_told_and_others_wait() -> None:
    asked = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 3_000, "logit_bias": {str(ids("z")[0]): 100}}
    short, answers = {**asked, "max_tokens": 2}, list[Any]()
    with (
        Service(serving.model(), serving.tokenizer(), kvsieve.SirLLM(128), memory=2**28, most=1, queue=1) as service,
        serving.serving(service) as address,
    ):
        first = http.client.HTTPConnection(address, timeout=30)
        first.request("POST", CHAT, json.dumps({**asked, "stream": True}), {"Content-Type": "application/json"})
        until(lambda: service.snapshot().answering == 1)
        waits = threading.Thread(target=lambda: answers.append(post(address, CHAT, short)))
        waits.start()
        until(lambda: service.snapshot().queued == 1)
        status, headers, _ = post(address, CHAT, short)
        assert (status, headers["retry-after"].isdecimal()) == (429, True)
        first.close()
        waits.join(30)
    [(status, _, body)] = answers
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "zz")
