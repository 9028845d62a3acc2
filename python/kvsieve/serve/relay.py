"""Requests on their way to one of several replicas of a server, and their answers back. Plain ASGI: nothing of Ray, no torch.

The relay checks who asks, reads the body, and gives the request to the replica that :func:`affinity` names. A replica that is gone
before anything of an answer was sent costs the client nothing: the request goes to another one. Behind the first event of a stream
the client is told, and asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvsieve.serve.access import Access
from kvsieve.serve.app import body_of, refusal_of, response_of
from kvsieve.serve.metrics import CONTENT_TYPE
from kvsieve.serve.openai import Refusal, parsed
from kvsieve.serve.replies import event

__all__ = ["Call", "FullError", "LostError", "Relay", "Replicas", "affinity", "answers", "merged"]

REPLICA = b"x-kvsieve-replica"
"""The header of an answer that names the process that gave it."""

TRIES = 3
"""Replicas that a request is given to, at most: one that ends every process that reads it does not end all of them."""

BEGINNING = 256
"""Characters of a text without messages that tell it from others."""

log = logging.getLogger("kvsieve.serve")


class LostError(Exception):
    """A replica ended before it had answered."""


class FullError(Exception):
    """As many requests wait for replicas as may."""


@dataclass(frozen=True)
class Call:
    """A request, as another process is given it."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: tuple[str, int] | None

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
        client = scope.get("client")
        return cls(scope["method"], scope["path"], scope.get("query_string", b""), headers, body, tuple(client) if client else None)

    def scope(self) -> Scope:
        """As an app is called with it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


class Replicas(Protocol):
    """Several processes with the same app."""

    def ask(self, call: Call, key: str) -> AsyncGenerator[Message, None]:
        """What the app of one of them sends; calls with the same key go to the same one while it is there. No key: to any.

        Raises:
            LostError, FullError: see there.
        """

    async def ask_all(self, call: Call) -> Mapping[str, Sequence[Message]]:
        """What the app of each of them sends, by its name."""


async def answers(app: ASGIApp, call: Call, name: str = "") -> AsyncGenerator[Message, None]:
    """What an app sends for a call. Where nobody listens any more, the app is told that its client is gone."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone, given = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(call.scope(), receive, sent.put)
        except Exception:  # the app has answered with 500 before it raises
            log.exception("a request failed")
        finally:
            await sent.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            if name and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (REPLICA, name.encode())]}
            yield message
    finally:
        gone.set()
        _ending.add(task)
        task.add_done_callback(_ending.discard)


_ending: set[asyncio.Task[None]] = set()
"""Apps that end by themselves: the loop alone would forget them."""


def affinity(access: Access, headers: Mapping[str, str], body: bytes) -> str:
    """What sends the requests of one conversation to the same replica: who asks, and their session; of those who name none, the
    conversation's first message, with what is said before it, or the first characters of a text.

    Raises:
        Refusal: for a body that is no JSON, or somebody who may not ask.
    """
    told = parsed(body)
    user = told["user"] if isinstance(told.get("user"), str) else None
    owner = access.owner(headers, user)
    if headers.get("x-session-key") or user:
        return owner
    messages, prompt, first = told.get("messages"), told.get("prompt"), list[object]()
    if isinstance(messages, list):
        for message in messages:
            first.append(message)
            if isinstance(message, dict) and message.get("role") == "user":
                break
    elif isinstance(prompt, str):
        first.append(prompt[:BEGINNING])
    return hashlib.sha256(f"{owner} {json.dumps(first, sort_keys=True)}".encode()).hexdigest()


class Relay:
    """The app in front of replicas.

    Args:
        keys: that open the server; see :class:`Access`.
        body: most bytes of a request.
    """

    def __init__(self, replicas: Replicas, keys: Sequence[str], body: int) -> None:
        self._replicas, self._access, self._body = replicas, Access(keys), body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        begun = False

        async def begins(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._answer(scope, receive, begins)
        except ClientDisconnect:
            return
        except Exception as error:
            if begun:
                raise  # the connection is cut, which is what a client can see of it
            await response_of(refusal_of(error))(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, key, body = Request(scope, receive), "", b""
        if scope["path"] != "/health":
            self._access.check(request.headers)
        if scope["method"] == "POST":
            body = await body_of(request, self._body)
            key = await asyncio.to_thread(affinity, self._access, request.headers, body)
        call = Call.of(scope, body)
        if (call.method, call.path) == ("GET", "/metrics"):
            text = merged({name: _body_of(messages) for name, messages in (await self._replicas.ask_all(call)).items()})
            await Response(text, headers={"content-type": CONTENT_TYPE})(scope, receive, send)
            return
        asking, gone = asyncio.create_task(self._ask(call, key, send)), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not asking.done():
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
        if asking.done() and not asking.cancelled():
            asking.result()

    async def _ask(self, call: Call, key: str, send: Send) -> None:
        passed = _Passed(send)
        for _ in range(TRIES):
            try:
                async with contextlib.aclosing(self._replicas.ask(call, key)) as messages:
                    async for message in messages:
                        await passed.on(message)
                return
            except FullError as error:
                raise Refusal(429, str(error), kind="rate_limit_error", code="queue_full", retry_after=1) from error
            except LostError as error:
                log.warning("a replica ended while it answered: %s", error)
                if passed.said:
                    break
        await passed.broken_off()


class _Passed:
    """What was sent to a client of an answer, which may begin again as long as nothing of it was."""

    def __init__(self, send: Send) -> None:
        self._send, self._open = send, False
        self._start: Message | None = None
        self.said = False
        """Whether anything but comments of a stream was sent."""

    async def on(self, message: Message) -> None:
        """One message further. A beginning waits for what follows it."""
        if message["type"] == "http.response.start":
            if self._open and message["status"] != 200:
                self.said = True  # the stream is open, and now it cannot be had
                raise LostError(f"another replica answers with status {message['status']}")
            self._start = message
            return
        if self._start is not None and not self._open:
            self._open = True
            await self._send(self._start)
        self.said |= not message.get("body", b"").startswith(b":")
        await self._send(message)

    async def broken_off(self) -> None:
        """Tell a client that nothing follows.

        Raises:
            Refusal: where no stream is open.
        """
        lost = Refusal(503, "what answered this has ended; ask again", kind="server_error", code="replica_lost", retry_after=1)
        kinds = [value for name, value in (self._start or {}).get("headers", ()) if name == b"content-type"]
        if not self._open or not any(kind.startswith(b"text/event-stream") for kind in kinds):
            raise lost
        await self._send({"type": "http.response.body", "body": event(lost.body), "more_body": False})


async def _gone(request: Request) -> None:
    """Until the client is."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _body_of(messages: Sequence[Message]) -> str:
    return b"".join(message.get("body", b"") for message in messages if message["type"] == "http.response.body").decode()


def merged(texts: Mapping[str, str]) -> str:
    """The metrics of several replicas in one text, each with the label ``replica``: what is said of a metric is said once."""
    heads, samples = dict[str, list[str]](), dict[str, list[str]]()
    for name, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                metric, brace, rest = line.partition("{")
                label = f'replica="{name}"'
                if not brace:
                    metric, _, rest = line.partition(" ")
                samples.setdefault(family, []).append(f"{metric}{{{label},{rest}" if brace else f"{metric}{{{label}}} {rest}")
    return "".join(f"{line}\n" for family in heads for line in (*heads[family], *samples.get(family, ())))
