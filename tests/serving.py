"""Servers for the tests: a byte-level tokenizer with a chat template, a scripted service, and an app on a port of its own."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tiny
from kvsieve.serve.app import Settings, create_app
from kvsieve.serve.jobs import Histogram, Job, Snapshot, Ticket, Token, Usage
from kvsieve.serve.running import Server, bound
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

STARTS, ENDS = "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools, as such templates are written."""

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}

VOCABULARY = 264


@functools.cache
def tokenizer() -> Any:
    """A token a byte, and those that begin and end messages."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(STARTS, special=True), AddedToken(ENDS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=ENDS, chat_template=TEMPLATE)


def ids(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def model(**changes: Any) -> Any:
    """A tiny model whose answers end with the end of a message, and are of letters until then: bytes that are no characters are
    not the ones that a client sends back."""
    made, end = tiny.fresh(vocab_size=VOCABULARY, **changes), tokenizer().eos_token_id
    made.generation_config.eos_token_id = end
    known = {end, *ids("abcdefghijklmnopqrstuvwxyz ,.")}
    made.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in known]
    return made


def prompt(*messages: tuple[str, str]) -> str:
    """What the template makes of messages, and of the answer's beginning."""
    return "".join(f"{STARTS}{role}\n{said}{ENDS}\n" for role, said in messages) + f"{STARTS}assistant\n"


Script = Callable[["Scripted", Job, Any, threading.Event], None]


def says(text: str, *, end: bool = True, logprobs: Mapping[str, Any] | None = None) -> Script:
    """Every answer is ``text``, a token a byte, and an end token."""

    def script(service: Scripted, job: Job, sink: Any, cancelled: threading.Event) -> None:
        count = len(ids(job.text))
        sink.begin(Usage(count, 3, resident=count))
        said = [*ids(text), *(ids(ENDS) if end else [])]
        for choice in range(job.n):
            for token in said:
                sink.token(choice, service.token(token, job))
        for choice in range(job.n):
            usage = Usage(count, 3, len(said), count - 4, 4)
            sink.end(choice, "stop" if end else "length", usage)

    return script


class Scripted:
    """A service without a model: each job does what the script says, on a thread of its own."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cancelled: list[threading.Event] = []
        self.script: Script = says("Hello.")
        self.refusal: Exception | None = None
        self.closed: list[float] = []
        self.alive = True
        self._threads: list[threading.Thread] = []

    def submit(self, job: Job, sink: Any) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        self.jobs.append(job)
        self.cancelled.append(threading.Event())
        self._threads.append(threading.Thread(target=self.script, args=(self, job, sink, self.cancelled[-1])))
        self._threads[-1].start()
        return Ticket(len(self.jobs) - 1)

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled[ticket.number].set()

    def close(self, grace: float = 10.0) -> None:
        self.closed.append(grace)
        for thread in self._threads:
            thread.join(30)

    @staticmethod
    def token(token: int, job: Job) -> Token:
        if job.logprobs is None:
            return Token(token)
        return Token(token, -0.5, tuple((token - at, -0.5 - at) for at in range(job.logprobs)))

    def snapshot(self) -> Snapshot:
        steps = Histogram((0.01, 0.1), (3, 2, 1), 0.75)
        waits = Histogram((1.0,), (0, 2), 13.0)
        numbers = dict.fromkeys(Snapshot.__dataclass_fields__, 0)
        told = {
            **numbers,
            "ends": {"stop": 5, "length": 1},
            "steps": steps,
            "waits": waits,
            "jobs": len(self.jobs),
            "memory": 2**30,
        }
        return Snapshot(**told)  # type: ignore[arg-type]


_servers: dict[str, Server] = {}


def ending(address: str) -> Server:
    """The server at an address, to be ended."""
    return _servers[address]


@contextlib.contextmanager
def serving(service: Any, grace: float = 5.0, **settings: Any) -> Iterator[str]:
    """An app over ``service`` on a free port of this machine; its address."""
    given = Settings(**{"name": "tiny", "vocabulary": VOCABULARY, **settings})
    socket = bound("127.0.0.1", 0, keys=False)
    server = Server(create_app(service, tokenizer(), given), service, grace=grace)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        until(lambda: server.started)
        address = f"127.0.0.1:{socket.getsockname()[1]}"
        _servers[address] = server
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits until something is true; a failure if it never is."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of an answer. ``body`` is sent as it is if it is bytes, else as JSON."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(address, "POST", path, sent, {"Content-Type": "application/json", **headers})


def call(address: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def events(data: bytes) -> list[str]:
    """The data of server-sent events, comments left out; each event is one line of data and an empty line."""
    blocks = data.decode().split("\n\n")
    assert blocks[-1] == ""
    lines = [block for block in blocks[:-1] if not block.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def chat(address: str, **fields: Any) -> Any:
    """The answer to a message, as JSON."""
    status, _, body = post(address, CHAT, {**ASK, **fields})
    assert status == 200, body
    return json.loads(body)


def error(address: str, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    """What a refused request is told, and its status."""
    status, _, told = post(address, path, body, **headers)
    found = json.loads(told)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return status, found["error"]


def samples(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What is counted, by its name and labels."""
    status, headers, body = call(address, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(body.decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}
