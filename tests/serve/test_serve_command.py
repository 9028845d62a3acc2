"""`kvsieve serve`: what is wrong is said in a line before a model is loaded; a server that is told to end answers first."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from kvsieve.cli import main
from kvsieve.errors import ArgumentError
from kvsieve.serve.building import public_prompt
from kvsieve.serve.commands import KEY, _name
from kvsieve.serve.jobs import Job, Usage
from kvsieve.serve.running import Server, bound
from kvsieve.serve.shared import file_system, store_url
from serving import STARTS, Scripted, ids, post, until

GOOD = "a-key-of-some-length\n"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.delenv(KEY, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that is said of a command that cannot be."""
    assert main(["serve", "--port", "0", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kvsieve: ")
    assert said.count("\n") == 1
    return said


def test_help_imports_nothing_that_serves() -> None:
    code = (
        "import sys; from kvsieve.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--api-key-file" in done.stdout


@pytest.mark.usefixtures("no_model")
def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "uvicorn" else found(name, *_))
    assert "kvsieve serve needs uvicorn; pip install 'kvsieve[serve]'" in refused(capsys)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_reach_it_with_a_key_only(host: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "ask for a key" in refused(capsys, "--host", host)
    (tmp_path / "keys").write_text("# none yet\n\n")
    assert "holds no key" in refused(capsys, "--host", host, "--api-key-file", str(tmp_path / "keys"))


@pytest.mark.usefixtures("no_model")
def test_a_key_that_is_none_is_refused_and_not_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(GOOD + "secret\n")
    said = refused(capsys, "--api-key-file", str(tmp_path / "keys"))
    assert "API key 2 must be" in said
    assert "secret" not in said
    monkeypatch.setenv(KEY, "secret")
    assert "API key 1 must be" in refused(capsys)
    assert "No such file" in refused(capsys, "--api-key-file", str(tmp_path / "nothing"))


@pytest.mark.usefixtures("no_model")
def test_an_address_that_is_taken_or_not_ours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot serve 127.0.0.1 port {port}" in refused(capsys, "--port", port)
    assert "there is no address a..b" in refused(capsys, "--host", "a..b")
    monkeypatch.setenv(KEY, GOOD.strip())
    assert "cannot serve 192.0.2.1" in refused(capsys, "--host", "192.0.2.1")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--policy", "juggle(3)"], "juggle"),
        (["--public", "nothing.txt"], "nothing.txt"),
        (["--device", "abacus"], "cannot run a model on the device abacus"),
        (["--device", "meta"], "cannot run a model on the device meta"),
        (["--durable"], "--durable needs a folder"),
        (["--sessions", "nowhere://a"], "cannot keep conversations at nowhere://a"),
        (["--replicas", "2"], "--replicas is for --ray"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *argv)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--ray needs a store that the replicas share: --sessions"),
        (["--sessions", "memory://a"], "memory://a is of one process"),
        (["--sessions", "kept", "--device", "cuda:1"], "--device cuda, not cuda:1"),
        (["--sessions", "kept", "--host", "0.0.0.0"], "ask for a key"),
        (["--sessions", "kept", "--model", "nothing"], "no model at "),
    ],
)
def test_what_replicas_cannot_be_is_said_before_ray_is_started(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray need not be there, nor is it asked: it stands in here as an empty module that has no `init`."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: found("json" if name == "ray" else name, *more))
    assert said in refused(capsys, "--ray", *argv)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    assert "pip install 'kvsieve[ray]'" in refused(capsys, "--ray", *argv)


def test_replicas_keep_conversations_where_all_of_them_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_url("kept here") == f"file://{tmp_path}/kept here"
    assert file_system(store_url("kept here"))[1] == f"{tmp_path}/kept here"
    assert store_url("s3://bucket/kept") == "s3://bucket/kept"


@pytest.mark.parametrize(
    "argv",
    [
        ["--memory", "lots"],
        ["--memory", "5"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--queue", "0"],
        ["--timeout", "soon"],
        ["--timeout", "nan"],
        ["--grace", "-1"],
        ["--replicas", "0"],
        ["--replicas", "3-2"],
        ["--replicas", "2-"],
        ["--replicas", "two"],
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *argv])
    assert stop.value.code == 2
    assert f"argument {argv[0]}" in capsys.readouterr().err


def test_a_free_port_of_each_kind() -> None:
    for host, family in (("127.0.0.1", socket.AF_INET), ("localhost", None)):
        with bound(host, 0, keys=False) as made:
            assert made.getsockname()[1] > 0
            assert family is None or made.family == family


@pytest.mark.parametrize(
    ("model", "name"), [("smollm2", "smollm2"), ("a/Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("x/Smol.Q4.gguf", "Smol.Q4")]
)
def test_a_model_is_called_as_its_folder_or_file(model: str, name: str) -> None:
    assert _name(model) == name


def test_a_second_signal_does_not_wait() -> None:
    server = Server(lambda *_: None, Scripted())
    server.handle_exit(signal.SIGINT, None)
    assert (server.should_exit, server.force_exit) == (True, False)
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit


# ------------------------------------------------------------------------------------------------------------------ shared prompts


def test_a_public_text_is_what_prompts_begin_with() -> None:
    tokenizer = serving.tokenizer()
    text = public_prompt(tokenizer, "kind.txt", b"Be kind.\n")
    assert text == f"{STARTS}system\nBe kind.{serving.ENDS}\n"
    assert serving.prompt(("system", "Be kind."), ("user", "Hi")).startswith(text)
    messages = [{"role": "developer", "content": "Be"}, {"role": "user", "content": "Read"}]
    assert public_prompt(tokenizer, "a.json", json.dumps(messages).encode()) == "".join(
        f"{STARTS}{role}\n{said}{serving.ENDS}\n" for role, said in (("system", "Be"), ("user", "Read"))
    )
    tool = {"type": "function", "function": {"name": "tide"}}
    told = json.dumps({"messages": messages, "tools": [tool]}).encode()
    assert public_prompt(tokenizer, "a.json", told).startswith(f"{STARTS}tools\n{json.dumps(tool)}")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.json", b"\xff", "is not JSON"),
        ("a.json", b"[", "is not JSON"),
        ("a.json", b'[{"role": "wizard", "content": ""}]', "messages.0.role"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused(name: str, data: bytes, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        public_prompt(serving.tokenizer(), name, data)


# --------------------------------------------------------------------------------------------------------------------- the end


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    serving.model().save_pretrained(tmp_path / "small")
    serving.tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command itself, with a key, and a folder for its conversations."""
    (tmp_path / "key").write_text(GOOD)
    options = ["--policy", "sirllm(64)", "--port", "0", "--api-key-file", "key", "--sessions", "kept", "--threads", "1"]
    command = [sys.executable, "-m", "kvsieve.cli", "serve", "--model", str(folder), "--grace", "30", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


@pytest.mark.slow
def test_a_signal_ends_the_command_after_what_it_was_saying(process: subprocess.Popen[str], tmp_path: Path) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"small under SirLLM\(.*\): http://(127\.0\.0\.1:\d+)/v1 \(Ctrl-C ends\)\n", line)
    assert found, (line, process.communicate()[1])
    asked = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 300, "stream": True}
    asked |= {"logit_bias": {str(ids("z")[0]): 100}}
    connection = http.client.HTTPConnection(found[1], timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {GOOD.strip()}"}
    connection.request("POST", serving.CHAT, json.dumps(asked), headers)
    answer = connection.getresponse()
    begun = b"".join(answer.readline() for _ in range(4))
    process.send_signal(signal.SIGTERM)
    chunks = serving.events(begun + answer.read())
    connection.close()
    assert chunks.pop() == "[DONE]"
    texts = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "z" * 300
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in err
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files), "the conversation is kept"
    assert not [path for path in files if path.stat().st_mode & 0o077], "and for its owner alone"


def slow(go: threading.Event) -> Any:
    """An answer that is half said, and goes on when it may."""

    def script(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        sink.begin(Usage(9, 9))
        sink.token(0, service.token(ids("a")[0], job))
        assert go.wait(20)
        sink.token(0, service.token(ids("b")[0], job))
        sink.end(0, "stop", Usage(9, 9, 2))

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_being_answered_is_answered_when_the_server_ends(stream: bool) -> None:
    service, go, answers = Scripted(), threading.Event(), list[Any]()
    service.script = slow(go)
    with serving.serving(service, grace=20) as address:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        client = threading.Thread(target=lambda: answers.append(post(address, serving.CHAT, asked)))
        client.start()
        until(lambda: service.jobs)
        serving.ending(address).should_exit = True
        until(lambda: service.closed)
        with pytest.raises(OSError, match="refused"):
            post(address, serving.CHAT, asked)
        go.set()
    client.join(20)
    [(status, _, body)] = answers
    assert status == 200
    if stream:
        parts = [json.loads(one)["choices"][0]["delta"].get("content", "") for one in serving.events(body)[:-1]]
        assert "".join(parts) == "ab"
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == "ab"
    assert service.closed == [20]
