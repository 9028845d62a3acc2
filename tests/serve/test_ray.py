"""`kvsieve serve --ray` itself: two replicas, one of which is killed under load; every conversation goes on as if nothing was.

`make test-ray` installs Ray beside the environment; where it is not installed these tests are skipped. What stands in front of
replicas, and the store that they share, are tested without it, by test_relay.py and test_store.py.
"""

from __future__ import annotations

import collections
import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import serving
from kvsieve.cli import main
from kvsieve.serve.service import Service
from prometheus_client.parser import text_string_to_metric_families
from serving import CHAT, call, events, post, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make test-ray"),
]

KEY = "a-key-of-some-length"
CLIENTS, TURNS, SAID = 8, 6, 20
ENDLESS: dict[str, Any] = {"logit_bias": {str(serving.ids("z")[0]): 100}}
MORE = ["And then?", "Why so?", "Tell me more of it, please.", "Go on", "Where was that?", "Who said so?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ray")
    serving.model().save_pretrained(made / "small")
    serving.tokenizer().save_pretrained(made / "small")
    (made / "key").write_text(f"{KEY}\n")
    return made


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, with two replicas, and its address."""
    options = ["--policy", "sirllm(96)", "--port", "0", "--api-key-file", "key", "--sessions", "kept", "--threads", "1", "--ray"]
    command = [sys.executable, "-m", "kvsieve.cli", "serve", "--model", "small", "--grace", "20", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        assert started.stdout is not None
        said = []
        for line in started.stdout:
            said.append(line)
            if found := re.fullmatch(r"small under SirLLM\(.*\), 2 replicas: http://(127\.0\.0\.1:\d+)/v1 \(Ctrl-C ends\)\n", line):
                break
        else:
            pytest.fail("".join(said))
        reading = threading.Thread(target=lambda: said.extend(started.stdout), daemon=True)  # type: ignore[arg-type]
        reading.start()
        yield started, found[1]
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        try:
            started.wait(90)
        finally:
            started.kill()


class Client:
    """One conversation: whole answers and streams by turns. It asks again where it is told that the answer was broken off."""

    def __init__(self, address: str, number: int) -> None:
        self.address, self.number = address, number
        self.messages: list[dict[str, str]] = []
        self.usages: list[dict[str, Any]] = []
        self.replicas: list[str] = []
        self.lost = 0
        self.error: BaseException | None = None

    def turn(self, said: int = SAID) -> None:
        at = len(self.usages)
        first = f"{'abcdefgh'[self.number]} ship leaves the harbour of town {self.number} at night"
        text = MORE[at % len(MORE)] if at else first
        self.messages.append({"role": "user", "content": text})
        while True:
            answer, usage, replica = self._ask(stream=(at + self.number) % 2 == 0, said=said)
            if answer is not None:
                break
            self.lost += 1
            assert self.lost < 10
        self.messages.append({"role": "assistant", "content": answer})
        self.usages.append(usage)
        self.replicas.append(replica)

    def _ask(self, stream: bool, said: int) -> tuple[str | None, dict[str, Any], str]:
        asked: dict[str, Any] = {"messages": self.messages, "max_tokens": said, "temperature": 0, "stream": stream}
        asked |= {"stream_options": {"include_usage": True}} if stream else {}
        status, headers, body = post(self.address, CHAT, asked, Authorization=f"Bearer {KEY}")
        replica = headers.get("x-kvsieve-replica", "")
        if status == 503 and json.loads(body)["error"]["code"] == "replica_lost":
            return None, {}, replica
        assert status == 200, (status, body)
        if not stream:
            told = json.loads(body)
            return told["choices"][0]["message"]["content"], told["usage"], replica
        chunks = events(body)
        if chunks[-1] != "[DONE]":
            assert json.loads(chunks[-1])["error"]["code"] == "replica_lost"
            return None, {}, replica
        found = [json.loads(one) for one in chunks[:-1]]
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in found if one["choices"])
        return text, found[-1]["usage"], replica

    def all_turns(self, count: int) -> None:
        try:
            for _ in range(count):
                self.turn()
        except BaseException as error:
            self.error = error


def alone() -> list[list[dict[str, str]]]:
    """The conversations as one server has them, in one process, that nobody kills."""
    model, tokenizer = serving.model().eval(), serving.tokenizer()
    with (
        Service(model, tokenizer, kvsieve.SirLLM(96), backend="cpu", memory=1 << 30) as service,
        serving.serving(service, keys=(KEY,)) as address,
    ):
        clients = [Client(address, number) for number in range(CLIENTS)]
        for _ in range(TURNS + 1):
            for client in clients:
                client.turn()
    return [client.messages for client in clients]


def replicas(address: str) -> dict[str, float]:
    """Answers that are being said, of each replica by its name: machine and process."""
    status, _, body = call(address, "GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert status == 200, body
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    return {sample.labels["replica"]: sample.value for sample in families["kvsieve_answers_active"].samples}


def answering(address: str) -> set[str]:
    return {name for name, active in replicas(address).items() if active}


def test_conversations_go_on_when_a_replica_is_killed_under_load(process: tuple[subprocess.Popen[str], str], folder: Path) -> None:
    _, address = process
    want = alone()
    assert post(address, CHAT, {"messages": [{"role": "user", "content": "Hi"}]})[0] == 401
    there = replicas(address)
    assert len(there) == 2
    clients = [Client(address, number) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.all_turns, args=(TURNS,)) for client in clients]
    for thread in threads:
        thread.start()
    until(lambda: all(len(client.usages) >= 2 or client.error for client in clients), 60)
    [(victim, count), *_] = collections.Counter(client.replicas[-1] for client in clients).most_common()
    assert victim in there
    until(lambda: victim in answering(address), 10)
    os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()
    assert [client.error for client in clients] == [None] * CLIENTS
    moved = [client for client in clients if victim in client.replicas and client.replicas[-1] != victim]
    assert len(moved) >= count, "those that it had are elsewhere"
    for client in clients:
        assert client.messages == want[client.number][: 2 * TURNS], client.number
        assert [usage["kvsieve"]["read_again"] for usage in client.usages] == [False] * TURNS
        assert all(usage["prompt_tokens_details"]["cached_tokens"] > 0 for usage in client.usages[1:])
    until(lambda: len(replicas(address)) == 2, 60)
    now = replicas(address)
    assert victim not in now, "another one is in its place"
    for client in clients:
        client.turn()
        assert client.messages == want[client.number]
        assert not client.usages[-1]["kvsieve"]["read_again"]
        assert client.replicas[-1] in now
    print("asked again by clients:", sum(client.lost for client in clients))
    files = [path for path in (folder / "kept").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".state"]) == 2 * CLIENTS
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_a_client_that_leaves_frees_its_place(process: tuple[subprocess.Popen[str], str]) -> None:
    _, address = process
    connection = http.client.HTTPConnection(address, timeout=30)
    asked = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 5000, "stream": True, **ENDLESS}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", CHAT, json.dumps(asked), headers)
    assert b"data" in connection.getresponse().read(40)
    connection.close()

    def cancelled() -> bool:
        body = call(address, "GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})[2].decode()
        return bool(re.search(r'kvsieve_answers_total\{replica="[^"]*",reason="cancelled"\} 1\.0', body))

    until(cancelled, 30)


def test_a_signal_ends_the_command_after_what_it_was_saying(process: tuple[subprocess.Popen[str], str]) -> None:
    """And Ray with it."""
    started, address = process
    said = list[Any]()
    asked = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 2000, **ENDLESS}
    thread = threading.Thread(target=lambda: said.append(post(address, CHAT, asked, Authorization=f"Bearer {KEY}")))
    thread.start()
    until(lambda: answering(address), 30)
    started.send_signal(signal.SIGTERM)
    thread.join(60)
    [(status, _, body)] = said
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "z" * 2000)
    assert started.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        call(address, "GET", "/health")


def test_replicas_that_cannot_start_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: Ray is started once in one."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "kvsieve.cli", "serve", "--model", str(tmp_path / "empty"), "--port", "0"]
    done = subprocess.run(
        [*command, "--ray", "--replicas", "1", "--sessions", str(tmp_path / "kept")], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 2, done.stderr
    assert "the replicas do not start" in done.stderr
    assert main(["serve", "--ray", "--port", "0"]) == 2
    assert "--ray needs a store" in capsys.readouterr().err
