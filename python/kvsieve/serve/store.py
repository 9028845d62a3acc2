"""Where states of conversations are kept outside of memory: what every store does, whatever it is made of.

A state is written once and never changed. A store that several processes write (:attr:`Store.shared`) is asked for what they have
written; one that a single process owns tells what it holds when it is opened.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from kvsieve import streams
from kvsieve.errors import PolicyError, ServiceError, UnsupportedError
from kvsieve.methods.parser import parse
from kvsieve.model import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy

__all__ = ["VERSION", "Store", "Stored", "is_url", "owner_key"]

VERSION = 1


def owner_key(owner: str) -> str:
    """What an owner is called here: 32 hexadecimal digits."""
    return hashlib.sha256(b"kvsieve owner " + owner.encode()).hexdigest()[:32]


def is_url(where: object) -> bool:
    """Whether states are kept where a URL says (``s3://``, ``file://``), and not in a folder of this process alone."""
    return isinstance(where, str) and "://" in where


@dataclass(frozen=True)
class Stored:
    """A state in a store.

    Attributes:
        owner: see :func:`owner_key`.
        name: of its files, without their endings.
        length: characters of its text; digest: SHA-256 of that, in hexadecimal digits.
        tokens: of the conversation that the model has read; unread: of it, said and not read.
        size: bytes of the stream's file.
        used: when it was written or used last, seconds since 1970.
    """

    owner: str
    name: str
    length: int
    digest: str
    tokens: int
    unread: int
    size: int
    used: float


class Store(ABC):
    """States that one model under one policy has written, and reads.

    Attributes:
        identity: digest of the model, the tokenizer and the policy; states of another one are none.
        found: states that were there when the store was opened; unusable: files that are none. A shared store finds states when
            they are asked for.

    Raises:
        UnsupportedError: for a policy that cannot be written as text.
    """

    shared = False
    """Whether other processes write to it as well."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, policy: Policy, backend: str | None) -> None:
        self._model, self._policy, self._backend = model, policy, backend
        self.found: Sequence[Stored] = ()
        self.unusable = 0
        try:
            written: object = parse(repr(policy))
        except PolicyError:
            written = None
        if repr(written) != repr(policy):
            raise UnsupportedError(f"the policy {policy!r} cannot be written as text, so its conversations cannot be kept in files")
        told = [VERSION, repr(policy), fingerprint.weights(model), fingerprint.tokenizer(tokenizer)]
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def named(self, length: int, digest: str) -> str:
        """40 hexadecimal digits: what the state of a text is called."""
        return hashlib.sha256(f"{self.identity} {length} {digest}".encode()).hexdigest()[:40]

    @abstractmethod
    def save(self, owner: str, length: int, digest: str, stream: streams.Stream) -> Stored:
        """Write a state; it outlives this process when this returns.

        Raises:
            SaveError: if it cannot be written; there is then no such state.
        """

    @abstractmethod
    def load(self, stored: Stored) -> streams.Stream:
        """The stream of a state.

        Raises:
            SessionNotFoundError: if it is gone. CacheMismatchError, ServiceError: if it is damaged, or not what it was said to be.
            OSError: if it cannot be read now.
        """

    @abstractmethod
    def holds(self, stored: Stored) -> bool:
        """Whether a state is there still."""

    @abstractmethod
    def remove(self, stored: Stored) -> None:
        """Remove a state that is not needed any more."""

    def spoiled(self, stored: Stored) -> None:
        """A state that was loaded is none, and is not to be found again."""
        self.remove(stored)

    def find(self, owner: str, text: str) -> list[Stored]:
        """States of the beginnings of a text that others may have written; none where nobody else does."""
        return []

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Nothing is written any more."""

    def _opened(self, path: str | PathLike[str], stored: Stored) -> streams.Stream:
        """The stream in a file, if it is what was said to be there."""
        stream = streams.load(path, self._model, self._backend)
        try:
            held = stream.ids
            if repr(stream.policy) != repr(self._policy) or len(held) != 1:
                raise ServiceError(f"the state {stored.name} holds another policy, or not one conversation")
            if (stream.seen, len(held[0]) - stream.seen) != (stored.tokens, stored.unread):
                raise ServiceError(f"the state {stored.name} has seen {stream.seen} tokens, its description says {stored.tokens}")
        except BaseException:
            stream.close()
            raise
        return stream
