"""What stands in front of replicas, over replicas that end when a test says so: who is asked, what a client gets; without Ray."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

import pytest
import serving
import uvicorn
from kvsieve.errors import ServiceBusyError
from kvsieve.serve.access import Access
from kvsieve.serve.app import Settings, create_app
from kvsieve.serve.jobs import Job, Usage
from kvsieve.serve.openai import Refusal
from kvsieve.serve.relay import TRIES, Call, FullError, LostError, Relay, affinity, answers, merged
from kvsieve.serve.running import bound
from prometheus_client.parser import text_string_to_metric_families
from serving import ASK, CHAT, Scripted, call, events, ids, post, says, until
from starlette.types import Message

KEY = "a-key-of-some-length"


class Several:
    """Replicas, each a scripted service with an app. Those in ``dying`` end behind so many messages of an answer."""

    def __init__(self, count: int = 3, keys: tuple[str, ...] = ()) -> None:
        self.services = [Scripted() for _ in range(count)]
        settings = Settings("tiny", keys, vocabulary=serving.VOCABULARY)
        self.apps = [create_app(service, serving.tokenizer(), settings) for service in self.services]  # type: ignore[arg-type]
        self.dying: dict[int, int] = {}
        self.gone: set[int] = set()
        self.asked: list[tuple[int, str]] = []
        self.full = False

    async def ask(self, call: Call, key: str) -> AsyncGenerator[Message, None]:
        if self.full:
            raise FullError("7 requests wait already")
        there = [at for at in range(len(self.apps)) if at not in self.gone]
        if not there:
            raise LostError("nobody")
        at = there[int(key[:8] or "0", 16) % len(there)]
        self.asked.append((at, key))
        count = 0
        async with contextlib.aclosing(answers(self.apps[at], call, str(at))) as messages:
            async for message in messages:
                if self.dying.get(at) == count:
                    self.gone.add(at)
                    raise LostError(f"replica {at}")
                count += 1
                yield message

    async def ask_all(self, call: Call) -> Mapping[str, Sequence[Message]]:
        found = {}
        for at, app in enumerate(self.apps):
            found[f"host:{at}"] = [one async for one in answers(app, call)]
        return found


@contextlib.contextmanager
def relayed(several: Any, *keys: str, body: int = 20_000) -> Iterator[str]:
    """The address of a relay over replicas."""
    socket = bound("127.0.0.1", 0, keys=False)
    server = uvicorn.Server(uvicorn.Config(Relay(several, keys, body), lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def told(several: Several, script: Any) -> None:
    for service in several.services:
        service.script = script


def test_an_answer_is_that_of_a_replica_whole_and_streamed() -> None:
    several = Several()
    told(several, says("Hello."))
    with relayed(several) as address:
        status, headers, body = post(address, CHAT, ASK)
        assert status == 200
        assert json.loads(body)["choices"][0]["message"]["content"] == "Hello."
        assert headers["x-kvsieve-replica"] in "012"
        status, headers, body = post(address, CHAT, {**ASK, "stream": True})
        assert headers["content-type"].startswith("text/event-stream")
        chunks = events(body)
        assert chunks.pop() == "[DONE]"
        assert "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in chunks) == "Hello."
        status, headers, _ = call(address, "GET", "/v1/models")
        assert status == 200
        assert call(address, "GET", "/nothing")[0] == 404
        assert call(address, "GET", "/health")[0] == 200
        status, _, body = post(address, CHAT, {"messages": []})
        assert (status, json.loads(body)["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sent", [0, 1])
def test_a_replica_that_ends_before_it_answers_is_not_seen(sent: int, stream: bool) -> None:
    """With its status, and without: the client hears of neither until something follows."""
    several = Several()
    told(several, says("Hello."))
    several.dying = dict.fromkeys(range(2), sent)
    with relayed(several) as address:
        for text in ("one", "two", "three", "four"):
            status, _, body = post(address, CHAT, {"messages": [{"role": "user", "content": text}], "stream": stream})
            assert status == 200
            assert b"replica_lost" not in body
            assert b"Hello." in body or stream
    assert several.gone
    assert {key for _, key in several.asked} == {key for at, key in several.asked if at not in several.gone}


def test_a_stream_that_has_begun_says_that_it_is_broken_off() -> None:
    several = Several(2)
    told(several, says("Hello."))
    with relayed(several) as address:
        post(address, CHAT, ASK)
        [(at, _)] = several.asked
        several.dying[at] = 4
        status, _, body = post(address, CHAT, {**ASK, "stream": True})
        assert status == 200
        last = events(body)[-1]
        assert json.loads(last)["error"]["code"] == "replica_lost"
        assert json.loads(post(address, CHAT, ASK)[2])["choices"], "another one answers when it is asked again"
    assert several.gone == {at}


def test_a_stream_that_has_only_comments_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt was being read: the client was told that its stream lives, and nothing else."""
    monkeypatch.setattr("kvsieve.serve.app.PULSE", 0.01)
    several, go = Several(2), threading.Event()

    def slow(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        assert go.wait(20)
        says("Hello.")(service, job, sink, cancelled)

    with relayed(several) as address:
        go.set()
        post(address, CHAT, ASK)
        [(at, _)] = several.asked
        go.clear()
        several.services[at].script = slow
        several.dying[at] = 4
        status, _, body = post(address, CHAT, {**ASK, "stream": True})
        go.set()
        assert status == 200
        assert body.startswith(b":")
        assert body.count(b'"role":"assistant"') == 1
        assert events(body)[-1] == "[DONE]"
        several.gone.clear()
        go.clear()
        other = several.services[1 - at]
        other.refusal = ServiceBusyError("9 requests wait already")
        status, _, body = post(address, CHAT, {**ASK, "stream": True})
        go.set()
        assert json.loads(events(body)[-1])["error"]["code"] == "replica_lost", "the other one has no place"


def test_a_request_that_ends_replicas_does_not_end_all_of_them() -> None:
    several = Several(TRIES + 2)
    several.dying = dict.fromkeys(range(TRIES + 2), 0)
    with relayed(several) as address:
        status, headers, body = post(address, CHAT, ASK)
        assert status == 503
        assert json.loads(body)["error"]["code"] == "replica_lost"
        assert headers["retry-after"] == "1"
    assert len(several.gone) == TRIES


def test_too_many_requests_are_told_so() -> None:
    several = Several()
    several.full = True
    with relayed(several) as address:
        status, headers, body = post(address, CHAT, ASK)
        assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
        assert headers["retry-after"] == "1"


def test_nobody_reaches_a_replica_without_a_key() -> None:
    several = Several(keys=(KEY,))
    with relayed(several, KEY) as address:
        assert post(address, CHAT, ASK)[0] == 401
        assert call(address, "GET", "/metrics")[0] == 401
        assert call(address, "GET", "/v1/models")[0] == 401
        assert several.asked == []
        assert post(address, CHAT, ASK, Authorization=f"Bearer {KEY}")[0] == 200
        assert call(address, "GET", "/health")[0] == 200
    with relayed(Several()) as address:
        assert post(address, CHAT, ASK, Host="pages.example")[0] == 403


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"x" * 30_000, {}, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
    ],
)
def test_a_body_that_is_none_reaches_nobody(body: bytes, headers: dict[str, str], status: int) -> None:
    several = Several()
    with relayed(several) as address:
        found, _, told_of_it = post(address, CHAT, body, **headers)
        assert found == status
        assert set(json.loads(told_of_it)) == {"error"}
    assert several.asked == []


def test_what_fails_otherwise_is_a_500() -> None:
    class Broken(Several):
        async def ask(self, call: Call, key: str) -> AsyncGenerator[Message, None]:
            raise RuntimeError("a bug")
            yield {}

    with relayed(Broken()) as address:
        status, _, body = post(address, CHAT, ASK)
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")


def test_a_client_that_leaves_is_told_to_the_replica() -> None:
    several = Several(1)

    def endless(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        sink.begin(Usage(9, 9))
        sink.token(0, service.token(ids("a")[0], job))
        assert cancelled.wait(20)
        sink.end(0, "cancelled", Usage(9, 9, 1))

    told(several, endless)
    with relayed(several) as address:
        for stream in (True, False):
            connection = http.client.HTTPConnection(address, timeout=30)
            connection.request("POST", CHAT, json.dumps({**ASK, "stream": stream}), {"Content-Type": "application/json"})
            if stream:
                connection.getresponse().read(10)
            until(lambda stream=stream: len(several.services[0].jobs) == (1 if stream else 2))
            connection.close()
            until(lambda: several.services[0].cancelled[-1].is_set())
    several.services[0].close()


def test_a_conversation_goes_to_one_replica_and_others_elsewhere() -> None:
    access = Access()

    def key(messages: Any, headers: Mapping[str, str] | None = None, **more: Any) -> str:
        body = json.dumps({"messages": messages, **more}).encode()
        return affinity(access, {"host": "localhost", **(headers or {})}, body)

    def user(text: Any) -> dict[str, Any]:
        return {"role": "user", "content": text}

    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Yes."}
    first = key([system, user("Hi")])
    assert key([system, user("Hi"), answer, user("And?")]) == first
    assert key([system, user("Hi"), answer, user("And?")], temperature=0.5) == first
    assert len({first, key([user("Hi")]), key([system, user("Ho")]), key([system, user([{"type": "text", "text": "Hi"}])])}) == 4
    mine = key([user("Hi")], {"x-session-key": "ada"})
    assert key([user("Ho")], {"x-session-key": "ada"}) == mine
    assert key([user("Ho")], user="ada") == mine
    assert key([user("Ho")], {"x-session-key": "bob"}) != mine
    assert "ada" not in mine
    for wrong in (None, 3, [3], {"a": 1}, []):
        assert len(key(wrong, user=7)) == 64
    text = "a" * 300
    assert affinity(access, {"host": "localhost"}, json.dumps({"prompt": text}).encode()) == affinity(
        access, {"host": "localhost"}, json.dumps({"prompt": text + "b"}).encode()
    )
    keyed = Access([KEY, "another-key-of-length"])
    told_keys = {
        affinity(keyed, {"authorization": f"Bearer {one}"}, json.dumps(ASK).encode()) for one in (KEY, "another-key-of-length")
    }
    assert len(told_keys) == 2
    with pytest.raises(Refusal):
        affinity(keyed, {}, json.dumps(ASK).encode())


def test_metrics_of_all_replicas_are_one_text() -> None:
    several = Several(2)
    with relayed(several) as address:
        for text in "abcdef":
            assert post(address, CHAT, {"messages": [{"role": "user", "content": text}]})[0] == 200
        status, _, body = call(address, "GET", "/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert len(families) == len(list(text_string_to_metric_families(body.decode()))), "each is told once"
    jobs = {sample.labels["replica"]: sample.value for sample in families["kvsieve_jobs"].samples}
    assert jobs.keys() == {"host:0", "host:1"}
    assert sum(jobs.values()) == 6
    ends = [sample for sample in families["kvsieve_answers"].samples if sample.labels["reason"] == "stop"]
    assert [sample.value for sample in ends] == [5.0, 5.0]
    assert merged({}) == ""
    assert (
        merged({"a": "# HELP x y\nx 1\n", "b": '# HELP x y\nx{c="d"} 2\n'})
        == '# HELP x y\nx{replica="a"} 1\nx{replica="b",c="d"} 2\n'
    )
