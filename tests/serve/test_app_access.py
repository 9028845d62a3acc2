"""The HTTP side alone: who gets in, clients that leave, what its metrics count."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import serving
from kvsieve.errors import ArgumentError
from kvsieve.serve import app as http_app
from kvsieve.serve.access import Access
from kvsieve.serve.answering import Answers, AnswerText, Events
from kvsieve.serve.jobs import Job, Usage
from kvsieve.serve.replies import Reply
from serving import ASK, CHAT, Scripted, call, chat, error, events, ids, post, samples, says, until

KEYS = ("first-key-of-some-length", "other-key-of-some-length")


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
