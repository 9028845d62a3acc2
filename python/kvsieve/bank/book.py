"""The namespaces of a bank: what each holds, who writes it, which model it belongs to, and the file that outlives the process."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsieve.bank import file
from kvsieve.bank.entries import BankLayer, Entries, Shape
from kvsieve.errors import CacheMismatchError, PolicyError, StateError
from kvsieve.locks import shared_lock

__all__ = ["Book", "Terms"]


@dataclass(frozen=True)
class Terms:
    """What a bank is asked to hold.

    Attributes:
        path: its file; None for a bank that ends with the process.
        capacity: most tokens of a namespace; chunk: tokens that are found together.
        layers: indices of its layers; None for all.
        read_only: whether nothing may be written.
    """

    path: Path | None
    capacity: int
    chunk: int
    layers: tuple[int, ...] | None
    read_only: bool


class Book:
    """What a bank holds.

    Attributes:
        shape: its layers; None until a stream is opened with it.
        identity: what it knows of the model that it belongs to; empty until then.
        changed: whether it holds what its file does not.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.shape: Shape | None = None
        self.identity: dict[str, Any] = {}
        self.changed = False
        self._entries: dict[str, Entries] = {}
        self._writers: dict[str, weakref.ref[Any]] = {}
        self._lock = shared_lock()
        self._release: weakref.finalize[..., Any] | None = None
        self._open()

    def _open(self) -> None:
        terms = self.terms
        if terms.path is None:
            return
        if not terms.read_only:
            self._release = weakref.finalize(self, file.unlock, file.lock(terms.path))
        try:
            if terms.read_only or terms.path.exists():
                self._read(terms.path)
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        shape, identity, entries = file.read(path)
        layers = tuple(layer.index for layer in shape.layers)
        for name, mine, theirs in (("chunk", self.terms.chunk, shape.chunk), ("layers", self.terms.layers or layers, layers)):
            if mine != theirs:
                raise PolicyError(
                    f"the bank at {path} was written with {name}={theirs!r}, not {mine!r}; MemoryBank.load(path) takes it"
                )
        self.shape, self.identity = replace(shape, capacity=self.terms.capacity), identity
        self._entries = {name: held.with_capacity(self.shape) for name, held in entries.items()}

    # ------------------------------------------------------------------------------------------------------------------- model

    def bind(self, layers: Sequence[BankLayer], identity: dict[str, Any]) -> Shape:
        """The bank belongs to a model from now on: to the one that it belongs to already, or this is refused.

        Args:
            layers: the model's full-attention layers.
            identity: what tells the model from others, by names for people.

        Raises:
            CacheMismatchError: naming what differs.
            PolicyError: if the model does not have the layers that were asked for.
        """
        wanted = self.terms.layers
        missing = sorted(set(wanted or ()) - {layer.index for layer in layers})
        if missing:
            raise PolicyError(
                f"MemoryBank(layers={list(wanted or ())}): layers {missing} are no full-attention layers of this model, which has "
                f"{[layer.index for layer in layers]}"
            )
        chosen = tuple(layer for layer in layers if wanted is None or layer.index in wanted)
        with self._lock:
            if self.shape is None:
                self.shape = Shape(chosen, self.terms.chunk, self.terms.capacity)
            elif self.shape.layers != chosen:
                mine, theirs = chosen, self.shape.layers
                differs = next((pair for pair in zip(theirs, mine) if pair[0] != pair[1]), None)
                found = f"{len(theirs)} layers, this model {len(mine)}" if differs is None else "{}, this model {}".format(*differs)
                raise CacheMismatchError(f"the bank holds {found}; it belongs to another model, or to another choice of layers")
            self.know(identity)
            return self.shape

    def know(self, identity: dict[str, Any]) -> None:
        """What the bank knows of its model is this as well, or this is refused.

        Raises:
            CacheMismatchError: naming what differs.
        """
        with self._lock:
            for name, mine in identity.items():
                if mine != self.identity.get(name, mine):
                    raise CacheMismatchError(
                        f"the bank was written by another model: other {name}; what it holds would mean nothing to this one"
                    )
            new = {name: mine for name, mine in identity.items() if name not in self.identity}
            if new:
                self.identity, self.changed = {**self.identity, **new}, True

    # -------------------------------------------------------------------------------------------------------------- namespaces

    @property
    def names(self) -> list[str]:
        """The namespaces that hold something."""
        with self._lock:
            return [name for name, held in self._entries.items() if held.written]

    def entries(self, name: str) -> Entries:
        """What a namespace holds now."""
        assert self.shape is not None
        with self._lock:
            return self._entries.get(name) or Entries(self.shape)

    def put(self, name: str, entries: Entries) -> None:
        """A namespace holds ``entries`` from now on."""
        with self._lock:
            if self._entries.get(name) is not entries and (entries.written or name in self._entries):
                self._entries[name], self.changed = entries, True

    def lead(self, names: Sequence[str], writer: object) -> None:
        """``writer`` alone writes these namespaces, until it says otherwise or is gone.

        Raises:
            StateError: if another one writes one of them.
        """
        with self._lock:
            for name in names:
                found = self._writers.get(name)
                other = None if found is None else found()
                if other is not None and other is not writer:
                    raise StateError(
                        f"namespace {name!r} of the bank is written by another stream; close that one, or name another namespace: "
                        "bank.namespace(name)"
                    )
            self._writers.update({name: weakref.ref(writer) for name in names})

    def leave(self, writer: object) -> None:
        """``writer`` writes no more."""
        with self._lock:
            self._writers = {name: found for name, found in self._writers.items() if found() not in (None, writer)}

    def forget(self, name: str) -> None:
        """A namespace holds nothing.

        Raises:
            StateError: if a stream writes it.
        """
        self._check_writable()
        with self._lock:
            self.lead([name], self)
            self.leave(self)
            if self._entries.pop(name, None) is not None:
                self.changed = True

    @property
    def bytes_held(self) -> int:
        """Bytes of all segments."""
        with self._lock:
            segments = {id(s): s for held in self._entries.values() for s in held.segments()}
        return sum(segment.nbytes for segment in segments.values())

    # -------------------------------------------------------------------------------------------------------------------- file

    def _check_writable(self) -> None:
        if self.terms.read_only:
            raise StateError("this bank is read-only; open it with read_only=False")

    def save(self) -> None:
        """Write the bank to its file.

        Raises:
            StateError: for a bank without a file, or one that is read-only.
            BankError: if it cannot be written; the old file is as it was.
        """
        self._check_writable()
        if self.terms.path is None:
            raise StateError("this bank has no file: MemoryBank(path) gives it one")
        if self._release is None:
            raise StateError("this bank is closed")
        with self._lock:
            if self.shape is not None and (self.changed or not self.terms.path.exists()):
                held = {name: entries for name, entries in self._entries.items() if entries.written}
                file.write(self.terms.path, (self.shape, self.identity, held))
                self.changed = False

    def check_written(self) -> None:
        """Refuse to end while a stream writes.

        Raises:
            StateError: naming what it writes.
        """
        with self._lock:
            names = [name for name, found in self._writers.items() if found() is not None]
        if names:
            raise StateError(
                f"this bank cannot be closed: a stream writes it (namespaces {', '.join(names)}); close that one first"
            )

    def close(self) -> None:
        """Give the lock back. What was not saved is lost with the process."""
        if self._release is not None:
            self._release()
            self._release = None
