"""What a server is made of, as plain data that another process can be given, and the service and app that come of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsieve.errors import ArgumentError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kvsieve.serve.service import Service

__all__ = ["Plan", "public_prompt"]


@dataclass(frozen=True)
class Plan:
    """A server that is not there yet.

    Attributes:
        model, weights, compile, dtype, device, backend: the model, and how it runs; as the command's arguments.
        name: what clients call it.
        policy: as text.
        memory, sessions, disk, durable, most, queue, chunk, longest: see :class:`~kvsieve.serve.service.Service`.
        public: files of texts that every prompt may begin with: name and content.
        keys, max_new_tokens, seconds, body: see :class:`~kvsieve.serve.app.Settings`.
    """

    model: str
    name: str
    policy: str
    memory: int
    dtype: str = "float32"
    weights: str | None = None
    compile: bool = False
    device: str = "cpu"
    backend: str | None = None
    sessions: str | None = None
    disk: int | None = None
    durable: bool = False
    public: tuple[tuple[str, bytes], ...] = ()
    most: int = 32
    queue: int = 256
    chunk: int | None = None
    longest: int | None = None
    keys: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    seconds: float | None = None
    body: int = 8 * 2**20

    def open(self) -> tuple[Service, FastAPI]:
        """The model is loaded; a service on it that was not started, and its app.

        Raises:
            KvsieveError: for what cannot be; see :class:`~kvsieve.serve.service.Service`.
        """
        from kvsieve.loading import load_asked
        from kvsieve.methods import parse
        from kvsieve.serve.app import Settings, create_app
        from kvsieve.serve.service import Service

        policy = parse(self.policy)
        model, tokenizer = load_asked(self)
        service = Service(
            model,
            tokenizer,
            policy,
            backend=self.backend,
            memory=self.memory,
            sessions=self.sessions,
            most=self.most,
            queue=self.queue,
            longest=self.longest,
            disk=self.disk,
            durable=self.durable,
            public=[public_prompt(tokenizer, name, data) for name, data in self.public],
            **({} if self.chunk is None else {"chunk": self.chunk}),
        )
        settings = Settings(
            name=self.name,
            keys=self.keys,
            max_new_tokens=self.max_new_tokens,
            seconds=self.seconds,
            body=self.body,
            vocabulary=int(model.config.get_text_config(decoder=True).vocab_size),
            facts={"policy": repr(policy)},
        )
        # A copy: the model thread uses the other one at the same time.
        return service, create_app(service, copy.deepcopy(tokenizer), settings)


def public_prompt(tokenizer: Any, name: str, data: bytes) -> str:
    """What prompts begin with that begin as the file ``name`` says.

    Raises:
        ArgumentError: for a file that holds no messages, or those that the chat template does not begin with.
    """
    from kvsieve.serve.openai import Refusal, asked_chat, parsed
    from kvsieve.serve.prompts import opening_of, public_text, template_of

    try:
        if name.endswith(".json"):
            told = data if data.lstrip()[:1] == b"{" else b'{"messages": ' + data + b"}"
            asked = asked_chat(parsed(told))
            return public_text(tokenizer, asked.messages, asked.tools)
        text = data.decode().strip()
        if not text:
            raise ArgumentError(f"{name} is empty")
        if not template_of(tokenizer):
            return opening_of(tokenizer) + text
        return public_text(tokenizer, [{"role": "system", "content": text}])
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except Refusal as refusal:
        raise ArgumentError(f"{name}: {refusal.message}") from refusal
