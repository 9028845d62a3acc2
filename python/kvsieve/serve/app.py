"""The HTTP side: OpenAI's chat completions and completions over one model thread, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvsieve.errors import KvsieveError, PromptTooLongError, ServiceBusyError, ServiceClosedError, ServiceFullError
from kvsieve.serve.access import Access
from kvsieve.serve.answering import Answers, AnswerText, Delta, Events, Failed, Gone
from kvsieve.serve.jobs import Job, Reason
from kvsieve.serve.metrics import CONTENT_TYPE, Metrics
from kvsieve.serve.openai import Asked, Refusal, asked_chat, asked_text, parsed
from kvsieve.serve.prompts import Prompt, opening_of, render, tail_of
from kvsieve.serve.replies import DONE, Reply, event
from kvsieve.serve.tool_calls import finder_of

if TYPE_CHECKING:
    from kvsieve.serve.service import Service

__all__ = ["Settings", "body_of", "create_app", "refusal_of", "response_of"]

log = logging.getLogger("kvsieve.serve")

PULSE = 10.0
"""Seconds after which a stream whose prompt is still being read says that it lives: what stands between may close silent ones."""

LONGEST_UPLOAD = 60.0
"""Seconds in which a body has to be here."""

CLOSED_REQUEST = 499
"""The status of a request whose client is gone, for the metrics; nobody reads it."""

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


@dataclass(frozen=True)
class Settings:
    """What an app needs to know besides the service.

    Attributes:
        name: of the model, as clients call it.
        keys: that open the server; none: whoever reaches it may ask.
        max_new_tokens: of an answer, where the client does not say.
        seconds: until an answer is cut; None: never.
        body: most bytes of a request.
        vocabulary: token ids that the model knows.
        facts: told of the model under ``kvsieve``.
    """

    name: str
    keys: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    seconds: float | None = None
    body: int = 8 * 2**20
    vocabulary: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def create_app(service: Service, tokenizer: Any, settings: Settings) -> FastAPI:
    """The app over a service that was started.

    Raises:
        ArgumentError: for keys that are none.
    """
    desk = _Desk(service, tokenizer, settings)
    app = FastAPI(title="kvsieve", openapi_url=None)
    app.add_middleware(_Counted, metrics=desk.metrics)

    async def broken(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        desk.metrics.requests.labels(_path(request.scope), refusal.status).inc()  # it does not come by the middleware
        return response_of(refusal)

    handlers: dict[type[Exception], Any] = {Refusal: _refused, HTTPException: _no_such, Exception: broken}
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await desk.answer(request, asked_chat)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await desk.answer(request, asked_text)

    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        desk.access.check(request.headers)
        return JSONResponse({"object": "list", "data": [desk.model]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(request: Request, name: str) -> Response:
        desk.access.check(request.headers)
        desk.check_model(name)
        return JSONResponse(desk.model)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if not service.alive:
            raise Refusal(503, "the server is ending, or its model thread has ended", kind="server_error", code="closing")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        desk.access.check(request.headers)
        return Response(desk.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return app


# ------------------------------------------------------------------------------------------------------------------------- errors


async def _refused(_: Request, refusal: Refusal) -> Response:
    return response_of(refusal)


async def _no_such(request: Request, error: HTTPException) -> Response:
    said = f"there is no {request.url.path} here" if error.status_code == 404 else str(error.detail)
    return JSONResponse(Refusal(error.status_code, said).body, error.status_code, headers=error.headers)


def response_of(refusal: Refusal) -> Response:
    """A refusal as a client gets it."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refusal.body, refusal.status, headers=headers)


def refusal_of(error: Exception, retry_after: int = 1) -> Refusal:
    """What a client is told of an error. What it cannot mend is told to the log only."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ServiceBusyError):
        return Refusal(429, str(error), kind="rate_limit_error", code="queue_full", retry_after=retry_after)
    if isinstance(error, ServiceClosedError):
        return Refusal(503, str(error), kind="server_error", code="closing", retry_after=retry_after)
    if isinstance(error, ServiceFullError):
        return Refusal(503, str(error), kind="server_error", code="memory_full", retry_after=retry_after)
    if isinstance(error, PromptTooLongError):
        return Refusal(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, KvsieveError) and isinstance(error, ValueError):
        return Refusal(400, str(error), code="invalid_value")
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed; its log says how", kind="server_error", code="internal_error")


# ------------------------------------------------------------------------------------------------------------------------- bodies


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request, of up to ``most`` bytes.

    Raises:
        Refusal: for one that is no JSON, is longer, or is not here in time. ClientDisconnect: if it does not come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body must be JSON: Content-Type: application/json")
    try:
        return await asyncio.wait_for(_read(request, most), LONGEST_UPLOAD)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body was not here within {LONGEST_UPLOAD:.0f} seconds") from None


async def _read(request: Request, most: int) -> bytes:
    data, length = bytearray(), request.headers.get("content-length", "0")
    too_long = Refusal(413, f"a body may have up to {most:,} bytes", code="request_too_large")
    if length.isdecimal() and int(length) > most:
        raise too_long
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise too_long
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------------------ answers


class _Desk:
    """Takes requests for answers."""

    def __init__(self, service: Service, tokenizer: Any, settings: Settings) -> None:
        self.service, self.tokenizer, self.settings = service, tokenizer, settings
        self.access, self.metrics = Access(settings.keys), Metrics(service.snapshot)
        self.model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "kvsieve"}
        self.model |= {"kvsieve": dict(settings.facts)} if settings.facts else {}
        self._opening = opening_of(tokenizer)

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            said = f"there is no model {name!r} here, only {self.settings.name!r}"
            raise Refusal(404, said, param="model", code="model_not_found")

    async def answer(self, request: Request, asked_of: Callable[[dict[str, Any]], Asked]) -> Response:
        began = time.monotonic()
        self.access.check(request.headers)  # before a byte of the body is read
        try:
            body = await body_of(request, self.settings.body)
        except ClientDisconnect:
            return Response(status_code=CLOSED_REQUEST)
        asked = await asyncio.to_thread(lambda: asked_of(parsed(body)))  # some megabytes take their time
        self.check_model(asked.model)
        job = await asyncio.to_thread(self._job, asked, self.access.owner(request.headers, asked.user))
        before = tail_of(self.tokenizer, job.text)
        events = Events(asyncio.get_running_loop())
        try:
            ticket = await asyncio.to_thread(self.service.submit, job, events)
        except Exception as error:
            raise self.failure(error) from error
        finders = [finder_of(str(self.tokenizer.chat_template), asked.tools) if asked.chat else None for _ in range(job.n)]
        texts = [AnswerText(self.tokenizer, job.stop, before, finder) for finder in finders]
        answers = Answers(events, texts, lambda: self.service.cancel(ticket))
        told, usage = asked.logprobs is not None, asked.include_usage
        reply = Reply(chat=asked.chat, model=self.settings.name, n=job.n, logprobs=told, usage=usage)
        talk = _Talk(self, answers, reply, events, lambda: self.service.cancel(ticket), began)
        return talk if asked.stream else await talk.whole(request.receive)

    def _job(self, asked: Asked, owner: str) -> Job:
        if asked.chat:
            prompt = render(self.tokenizer, asked.messages, asked.tools, asked.template)
        else:
            prompt = Prompt(asked.prompt if asked.prompt.startswith(self._opening) else self._opening + asked.prompt)
        for name, value in (("prompt", prompt.text), *(("stop", one) for one in asked.stop)):
            _check_text(name, value)
        options = {**asked.options, "max_new_tokens": asked.most or self.settings.max_new_tokens}
        if asked.bias:
            self._check_bias(asked.bias)
            options["sequence_bias"] = {(token,): value for token, value in asked.bias.items()}
        return Job(
            owner,
            prompt.text,
            prompt.boundaries,
            answered=prompt.answered,
            options=options,
            stop=asked.stop,
            n=asked.n,
            shorter=asked.most is None,
            logprobs=asked.logprobs,
            seconds=self.settings.seconds,
        )

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        most = self.settings.vocabulary
        if most is not None and max(bias) >= most:
            raise Refusal(400, f"logit_bias: token ids are below {most}", param="logit_bias", code="invalid_value")

    def failure(self, error: Exception) -> Refusal:
        """What the client is told; one that finds no room may try again after what others waited, on average."""
        waits = self.service.snapshot().waits if isinstance(error, ServiceBusyError) else None
        mean = waits.total / waits.count if waits is not None and waits.count else 1.0
        return refusal_of(error, retry_after=min(max(math.ceil(mean), 1), 60))


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(400, f"{name} has half a surrogate pair, which is no text", param=name, code="invalid_value") from None


def _unread(reason: Reason | None) -> Refusal:
    """For an answer that ends before it begins."""
    if reason == "timeout":
        return Refusal(504, "there was no time to read the prompt", kind="server_error", code="timeout")
    return Refusal(503, "the server ended this before the prompt was read", kind="server_error", code="closing", retry_after=1)


class _Talk(Response):
    """The answers to one request: a whole one, or, as a response, a stream of server-sent events."""

    def __init__(
        self, desk: _Desk, answers: Answers, reply: Reply, events: Events, cancel: Callable[[], None], began: float
    ) -> None:
        super().__init__(status_code=200)
        self._desk, self._answers, self._reply, self._events = desk, answers, reply, events
        self._cancel, self._began = cancel, began

    async def whole(self, receive: Receive) -> Response:
        try:
            async with self._watched(receive) as deltas:
                async for delta in deltas:
                    self._reply.add(delta)
            return JSONResponse(self._reply.whole(self._answers.usage()))
        except Gone:
            return Response(status_code=CLOSED_REQUEST)
        except Failed as failure:
            raise self._desk.failure(failure.error) from failure.error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Once the first event is there, its status; an error before that is a response of its own."""
        sent = begun = False
        try:
            async with self._watched(receive) as deltas:
                async for delta in deltas:
                    if not sent:
                        await send(_START)
                        sent = True
                    if self._answers.began is None:  # until then another replica could answer instead
                        await _write(send, _COMMENT)
                        continue
                    if not begun:
                        begun = True
                        await _write(send, *map(event, self._reply.first()))
                    await _write(send, *map(event, self._reply.chunks(delta)))
            await _write(send, *map(event, self._reply.last(self._answers.usage())), DONE)
        except Gone:
            return
        except (Failed, Refusal) as failure:
            refusal = failure if isinstance(failure, Refusal) else self._desk.failure(failure.error)
            if not sent:
                await response_of(refusal)(scope, receive, send)
                return
            await _write(send, event(refusal.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[AsyncIterator[Delta]]:
        """The pieces; an answer that nobody waits for is cancelled, however it comes to that."""
        tasks = [asyncio.create_task(self._gone(receive)), asyncio.create_task(self._pulse())]
        try:
            yield self._timed()
        except Gone:
            self._desk.metrics.gone.inc()
            raise
        finally:
            for task in tasks:
                task.cancel()
            if not self._answers.over:
                self._cancel()

    async def _timed(self) -> AsyncIterator[Delta]:
        heard = False
        async for delta in self._answers:
            if not heard and (delta.text or delta.tokens or delta.calls):
                heard = True
                self._desk.metrics.first_token.observe(time.monotonic() - self._began)
            if delta.reason is not None and self._answers.began is None:
                raise _unread(delta.reason)
            yield delta
        self._desk.metrics.seconds.observe(time.monotonic() - self._began)

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.tell("gone")

    async def _pulse(self) -> None:
        while self._answers.began is None:
            await asyncio.sleep(PULSE)
            self._events.tell("wait")


_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_START: Message = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
_COMMENT = b": reading\n\n"


async def _write(send: Send, *parts: bytes) -> None:
    if parts:
        await send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})


class _Counted:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(_path(scope), message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def _path(scope: Scope) -> str:
    return scope["path"] if scope["path"] in PATHS else "other"
