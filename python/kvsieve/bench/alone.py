"""One cache in a process of its own: it reads a text, and says what a token takes and how much memory the process has.

What a process has in memory belongs to one policy only if nothing else was in it. The process is told what to do through a pipe,
one thing at a time, so that those of a table take turns: nobody works while another one is measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import kvsieve
from kvsieve.backends.heap import trim_heap
from kvsieve.bench.caches import RIVALS, STOCK, cache_bytes, make_cache, static_of
from kvsieve.bench.measure import steady
from kvsieve.bench.options import MOST_ROUNDS
from kvsieve.bench.subject import Layers, load, text_ids, token, weight_bytes
from kvsieve.errors import KvsieveError
from kvsieve.evals.models import quietly
from kvsieve.model.support import cache_name

__all__ = ["Job", "resident_bytes", "serve"]

ROOM = MOST_ROUNDS + 14
"""Tokens for which a static cache has room beside those that were read."""

_LOADED = transformers.LlamaForCausalLM, transformers.DynamicCache
"""transformers reads its files when they are asked for: here once, by the process that all others come from."""

SAMPLE = 256
"""Logits that are told of a token, out of the whole vocabulary."""


@dataclass(frozen=True)
class Job:
    """What a process holds: a cache of transformers by its name, or a policy as text; and how it works."""

    name: str
    model: str
    dtype: str
    longest: int
    chunk: int
    threads: int


def resident_bytes() -> int | None:
    """Bytes of memory that this process has; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmRSS:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


class Held(Protocol):
    """A cache that a process holds."""

    cache: Any
    """What the model's forward takes."""

    def read(self, ids: torch.Tensor) -> None:
        """Reads tokens ``[1, n]``."""

    def read_on(self, seen: int) -> None:
        """Called before a text is read on, ``seen`` tokens of which were read."""

    def settle(self, seen: int) -> None:
        """Called when ``seen`` tokens of a text were read, before tokens are timed."""

    @property
    def bytes_held(self) -> int:
        """Keys and values, and what goes with them."""


class Bounded:
    """A stream under a policy."""

    def __init__(self, made: Any, job: Job, left: ExitStack) -> None:
        self._stream = left.enter_context(kvsieve.stream(made, kvsieve.methods.parse(job.name), backend="cpu"))
        self.cache: Any = self._stream.cache

    def read(self, ids: torch.Tensor) -> None:
        self._stream.feed(ids)

    def read_on(self, seen: int) -> None:
        return

    def settle(self, seen: int) -> None:
        return

    @property
    def bytes_held(self) -> int:
        return int(self._stream.stats().bytes_held)


class Stock:
    """A cache of transformers. A static one is made of a full one that has read the text, with room for little more."""

    def __init__(self, made: Any, job: Job, left: ExitStack) -> None:
        self._made, self._static = made, job.name == "StaticCache"
        self.cache = make_cache(STOCK if self._static else job.name, made.config, job.longest + ROOM)
        if self._static and not all(type(layer).__name__ == "DynamicLayer" for layer in self.cache.layers):
            raise NotImplementedError("a layer of this model is no full attention")

    def read(self, ids: torch.Tensor) -> None:
        with torch.no_grad():
            self._made(ids, **{cache_name(self._made): self.cache}, logits_to_keep=1)

    def read_on(self, seen: int) -> None:
        if self._static and seen:
            static, self.cache = self.cache, make_cache(STOCK, self._made.config, 0)
            for index, layer in enumerate(static.layers):
                self.cache.update(layer.keys[:, :, :seen].clone(), layer.values[:, :, :seen].clone(), index)

    def settle(self, seen: int) -> None:
        if self._static:
            self.cache = static_of(self.cache, self._made.config, seen + ROOM)

    @property
    def bytes_held(self) -> int:
        return cache_bytes(self.cache)


class Work:
    """What a process is told to do."""

    def __init__(self, job: Job, left: ExitStack) -> None:
        self.job = job
        self.made, tokenizer = load(job.model, getattr(torch, job.dtype))
        self.ids = text_ids(job.model, tokenizer, job.longest)
        self.clock = left.enter_context(steady(job.threads))
        token(self.made, None)  # what a first forward sets up belongs to no cache
        trim_heap()
        self.before = resident_bytes()
        self.held: Held = (Stock if job.name in RIVALS else Bounded)(self.made, job, left)
        self.seen = 0

    def opened(self) -> dict[str, Any]:
        """What the process is before it holds anything, and what a token of the full cache takes."""
        config = self.made.config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = Layers(config.num_hidden_layers, heads, dim).token_bytes(self.made.dtype.itemsize)
        return {"weight_bytes": weight_bytes(self.made), "base_bytes": self.before, "token_bytes": size}

    def read(self, length: int) -> dict[str, Any]:
        """Reads on up to ``length`` tokens; gives seconds, bytes and memory, and some logits of the token after them."""
        self.held.read_on(self.seen)
        began = self.clock()
        for start in range(self.seen, length, self.job.chunk):
            self.held.read(self.ids[:, start : min(start + self.job.chunk, length)])
        seconds, read = self.clock() - began, max(length - self.seen, 0)
        self.seen = max(length, self.seen)
        self.held.settle(self.seen)
        trim_heap()
        told = {"read": read, "read_seconds": seconds, "bytes_held": self.held.bytes_held, "resident_bytes": resident_bytes()}
        self.seen += 1
        logits = token(self.made, self.held.cache)[0, -1].float()
        return {**told, "logits": logits[:: max(1, len(logits) // SAMPLE)].tolist()}

    def token(self) -> float:
        """Seconds of one more token, which counts as one of the text."""
        self.seen += 1
        began = self.clock()
        token(self.made, self.held.cache)
        return float(self.clock() - began)


def serve(pipe: Connection, job: Job) -> None:
    """Does what comes through the pipe, one call after the other, until it is closed: ``(name, *arguments)``.

    An answer is ``("ok", value)``, or ``("error", text)`` and the end.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with ExitStack() as left:
        try:
            with quietly():
                work = Work(job, left)
                pipe.send(("ok", work.opened()))
                for call, *arguments in calls(pipe):
                    pipe.send(("ok", getattr(work, call)(*arguments)))
        except (KvsieveError, NotImplementedError, MemoryError, OSError, ValueError) as error:
            with suppress(OSError):  # nobody may be there any more
                pipe.send(("error", f"{error}" or type(error).__name__))
        except KeyboardInterrupt:
            return


def calls(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """What is asked for, until nobody asks any more."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return
