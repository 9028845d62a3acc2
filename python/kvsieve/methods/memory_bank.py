"""A bank of what was evicted, without training (after LongMem, Wang et al., NeurIPS 2023, arXiv 2306.07174).

Departures from the published method, and why:

* LongMem trains a side network that reads the bank, and a gate that mixes two softmaxes. A frozen model has neither: a fixed gate
  takes a share of attention whether or not anything was found. Here own and found keys take part in one softmax, and ``bias`` says
  how much more or less those found count; its gate is ``sigmoid(lse_found + bias - lse_own)``.
* Every full-attention layer has a bank by default, not one.
* The published bank never holds its capacity, reads a row of zeros where it holds fewer chunks than are asked for, and is shared
  by the rows of a batch. This one is full when it is, reads what there is, and gives every row a namespace of its own.
* Keys and queries that share a KV head ask together: the sum over the query heads. Queries of a prompt ask in blocks of 16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.budget import check_choice, check_count
from kvsieve.checks import check_flag, check_path, integer, plain, real, told
from kvsieve.errors import BankError, PolicyError, StateError
from kvsieve.methods.streaming_llm import StreamingLLM
from kvsieve.policy.bank import BankRule

if TYPE_CHECKING:
    import torch

    from kvsieve.bank.book import Book
    from kvsieve.stats import BankStats

__all__ = ["SEAM", "MemoryBank"]

MOST_LAYERS = 2**16
"""No model has more."""

DEFAULT = "default"
"""The namespace of a bank that was given none."""

SEAM: list[Callable[[], Any]] = []
"""How a bank reaches streams and models, which lie above it: the package puts it in."""


class _Opened:
    """What all handles of one bank share."""

    def __init__(self, *terms: Any) -> None:
        self.terms = terms
        self.book: Book | None = None
        self.closed = False


class MemoryBank(BankRule):
    """What a policy evicts goes to a bank that outlives the stream; queries read there what they find by content.

    It is the end of a chain: ``kvsieve.StreamingLLM(1024) >> kvsieve.MemoryBank("notes.bank")``. Keys before RoPE, values and the
    mean key of every chunk are held for each layer and KV head, in host memory. A query asks for the chunks whose mean keys have
    the highest inner product with it, sees their tokens at one ``distance``, and its attention to them joins its own in one
    softmax. What a forward itself reads is never found by it.

    A file is read when the bank is first used and written by :meth:`save` and :meth:`close`, whole or not at all. It has one writer
    at a time, over all processes, and any number of readers. A namespace has one writing stream at a time; forks of it keep what
    they evict to themselves.

    Args:
        path: the file; None for a bank that ends with the process.
        capacity: most tokens of a namespace, a multiple of ``chunk``; the oldest chunk goes first.
        layers: indices of the full-attention layers that have a bank; None for all of them.
        chunk: tokens that are found together; the published ones are 2 to 8.
        top_k: tokens that a query reads, a multiple of ``chunk``.
        read_only: nothing is ever written.
        bias: added to the bank's logits; ``-inf`` reads nothing.
        distance: at which its tokens are seen; by default that of the oldest token that the policy before it can show.
        namespace: the name under which a stream reads and writes, or one for each row of a batch.
        per_head: whether each KV head finds chunks of its own, as published. Else all heads of a layer find the same ones, by the
            sum of their scores.
        reads: which queries read the bank: ``"all"``, as published; or ``"answers"``: those of a turn that is answered
            (`stream.generate`, `model.generate`, forwards of a caller), and none of a text that :meth:`kvsieve.Stream.feed` reads:
            a long text is read faster, and its keys and values are those of the policy before the bank.

    Raises:
        PolicyError: for numbers that cannot be right. What the file says is looked at when it is first used.

    >>> StreamingLLM(1024) >> MemoryBank(capacity=4096)
    StreamingLLM(budget=1024, sinks=4) >> MemoryBank(capacity=4096)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        capacity: int = 65536,
        layers: Sequence[int] | None = None,
        chunk: int = 16,
        top_k: int = 64,
        read_only: bool = False,
        bias: float = 0.0,
        distance: int | None = None,
        namespace: str | Sequence[str] | None = None,
        per_head: bool = True,
        reads: str = "all",
    ) -> None:
        if path is not None:
            path = check_path("path", path, PolicyError)
        chunk, capacity, top_k, distance, bias = map(plain, (chunk, capacity, top_k, distance, bias))
        check_count("chunk", chunk, least=1)
        for name, value in (("capacity", capacity), ("top_k", top_k)):
            check_count(name, value, least=1)
            if value % chunk:
                raise PolicyError(f"{name} must be a multiple of chunk={chunk}, got {value}")
        if distance is not None:
            check_count("distance", distance)
        if real(bias) is None and not (isinstance(bias, float) and bias == -math.inf):
            raise PolicyError(f"bias must be a finite number, or -inf for a bank that is not read, got {told(bias)}")
        read_only, per_head = (check_flag(name, x, PolicyError) for name, x in (("read_only", read_only), ("per_head", per_head)))
        check_choice("reads", reads, ("all", "answers"))
        self.path = None if path is None else Path(path)
        self.capacity, self.chunk, self.top_k, self.read_only = capacity, chunk, top_k, read_only
        self.bias, self.distance, self.per_head, self.reads = float(bias), distance, per_head, reads
        self.layers = None if layers is None else _indices(layers)
        self.names = (DEFAULT,) if namespace is None else _names(namespace)
        self._shared = _Opened(self.path, capacity, chunk, self.layers, read_only)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changes: Any) -> MemoryBank:
        """The bank that was saved at ``path``, opened now, with the ``chunk``, ``capacity`` and ``layers`` that it has there.

        Args:
            changes: other arguments of :class:`MemoryBank`, such as ``read_only=True``.

        Raises:
            BankError: if there is none, it is damaged, or (without ``read_only``) another process writes it.
        """
        from kvsieve.bank import file

        path = check_path("path", path, BankError)
        shape = file.read(Path(path))[0]
        layers = tuple(layer.index for layer in shape.layers)
        return cls(path, **{"capacity": shape.capacity, "chunk": shape.chunk, "layers": layers, **changes}).open()

    # ----------------------------------------------------------------------------------------------------------------- lifetime

    @property
    def book(self) -> Book:
        """What it holds; its file is read, and its lock taken, at first use.

        Raises:
            BankError: if the file cannot be read, or another process writes it.
            StateError: if the bank is closed.
        """
        shared = self._shared
        if shared.closed:
            raise StateError("this bank is closed; MemoryBank.load(path) opens it again")
        if shared.book is None:
            from kvsieve.bank.book import Book, Terms

            shared.book = Book(Terms(*shared.terms))
        return shared.book

    def open(self) -> MemoryBank:
        """Read the file and take the lock now; the bank itself.

        Raises:
            BankError: as :attr:`book`.
        """
        _ = self.book
        return self

    def save(self, *, tokenizer: Any = None) -> None:
        """Write the bank to its file; one that is there is replaced once the new one is complete and on the disk.

        Args:
            tokenizer: if given, its fingerprint is written, and compared with that of any other that is given for this bank.

        Raises:
            StateError: for a bank without a file, or a read-only one.
            BankError: if it cannot be written; the old file is as it was.
        """
        if tokenizer is not None:
            self.book.know(_seam().banks.tokenizer_of(tokenizer))
        self.book.save()

    def close(self) -> None:
        """Save, if there is a file and anything to write, and give the lock back. Closing twice is fine.

        Raises:
            StateError: while a stream writes it.
            BankError: if it cannot be written; the bank is then still open.
        """
        shared = self._shared
        if shared.book is not None and not shared.closed:
            shared.book.check_written()
            if self.path is not None and not shared.book.terms.read_only:
                shared.book.save()
            shared.book.close()
            shared.closed = self.path is not None

    def __enter__(self) -> MemoryBank:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------------------- namespaces

    def namespace(self, name: str | Sequence[str]) -> MemoryBank:
        """The same bank under another name, such as that of a user or a document; a list has one for each row of a batch.

        What one namespace holds no other one ever reads.
        """
        return self._like(names=_names(name))

    def like(self, **changes: Any) -> MemoryBank:
        """The same bank, read in another way.

        Args:
            changes: any of ``top_k``, ``per_head``, ``bias``, ``distance``, ``reads`` and ``read_only``.

        Raises:
            PolicyError: for anything else, or numbers that cannot be right.
        """
        others = sorted(set(changes) - {"top_k", "per_head", "bias", "distance", "reads", "read_only"})
        if others:
            raise PolicyError(f"{', '.join(others)} cannot be changed: all that read a bank share them")
        if self.read_only and not changes.get("read_only", True):
            raise PolicyError("this bank is read-only")
        MemoryBank(**{"capacity": self.capacity, "chunk": self.chunk, "top_k": self.top_k, **changes})
        return self._like(**changes)

    def _like(self, **changes: Any) -> MemoryBank:
        made = object.__new__(MemoryBank)
        vars(made).update(vars(self), **changes)
        return made

    def forget(self, name: str) -> None:
        """A namespace holds nothing any more.

        Raises:
            StateError: if a stream writes it, or the bank is read-only. PolicyError: for what is no name.
        """
        if not isinstance(name, str):
            raise PolicyError(f"a namespace is a name, got {told(name)}")
        self.book.forget(name)

    def stats(self) -> BankStats:
        """What the bank holds, by namespace."""
        from kvsieve.stats import BankStats, NamespaceStats

        book = self.book
        held = {name: book.entries(name) for name in book.names}
        spaces = {n: NamespaceStats(e.num_tokens, e.num_chunks, e.tail, e.dropped, e.written) for n, e in held.items()}
        return BankStats(sum(s.tokens for s in spaces.values()), self.capacity, book.bytes_held, spaces)

    # ----------------------------------------------------------------------------------------------------------------- ingesting

    def ingest(
        self,
        source: Any,
        text: str | torch.Tensor | Mapping[str, Any],
        *,
        namespace: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        window: int = 1024,
        backend: str | None = None,
    ) -> int:
        """Read a text into the bank, piece by piece, and end its last chunk.

        Args:
            source: a model, which reads it through ``StreamingLLM(window)`` without looking into the bank; or an open stream with
                this bank, which reads it after what it has read, and then begins a new text.
            text: a text, with a tokenizer; int64 ids ``[n]`` or ``[B, n]``; or what a tokenizer returned.
            namespace: where it goes, one for each row; by default that of this bank. A stream has its own.
            tokenizer: for a text; the bank remembers its fingerprint and refuses another one.
            window: tokens that the model's window holds.
            backend: as for :func:`kvsieve.stream`.

        Returns:
            Tokens that were written.

        Raises:
            StateError: for a read-only bank, a stream without this bank, or one in use elsewhere.
            PolicyError: for a text without a tokenizer.
            CacheMismatchError: if the bank belongs to another model, or there are other rows than namespaces.
        """
        book = self.book
        if self.read_only:
            raise StateError("this bank is read-only; open it with read_only=False")
        ids = self._ids(text, tokenizer)
        if hasattr(source, "remember"):
            if namespace is not None:
                raise StateError("a stream writes to the namespaces that it was opened with; give it no other one")
            mine = getattr(source.policy, "bank", None)
            if mine is None or mine.book is not book:
                raise StateError("this stream has no bank, or another one; open it with a policy that ends with this bank")
            return self._read(source, ids, mine.names)
        target = self._like(bias=-math.inf, names=self.names if namespace is None else _names(namespace))
        with _seam().stream(source, StreamingLLM(window) >> target, backend) as stream:
            return self._read(stream, ids, target.names)

    def _ids(self, text: Any, tokenizer: Any) -> Any:
        if tokenizer is not None:
            self.book.know(_seam().banks.tokenizer_of(tokenizer))
        if isinstance(text, str):
            if tokenizer is None:
                raise PolicyError("a text needs a tokenizer: bank.ingest(model, text, tokenizer=tokenizer)")
            return tokenizer(text, return_tensors="pt")
        return text[None] if not isinstance(text, Mapping) and getattr(text, "ndim", 2) == 1 else text

    def _read(self, stream: Any, ids: Any, names: tuple[str, ...]) -> int:
        before = sum(self.book.entries(name).written for name in names) if self.book.shape is not None else 0
        stream.feed(ids)
        stream.remember()
        return sum(self.book.entries(name).written for name in names) - before

    def __repr__(self) -> str:
        names = self.names[0] if len(self.names) == 1 else list(self.names)
        told: dict[str, Any] = {
            "path": None if self.path is None else str(self.path),
            "capacity": self.capacity,
            "layers": self.layers,
            "chunk": self.chunk,
            "top_k": self.top_k,
            "read_only": self.read_only,
            "bias": self.bias if math.isfinite(self.bias) else -1e999,
            "distance": self.distance,
            "namespace": None if names == DEFAULT else names,
            "per_head": self.per_head,
            "reads": self.reads,
        }
        plain: dict[str, Any] = {"path": None, "capacity": 65536, "layers": None, "chunk": 16, "top_k": 64}
        plain |= {"read_only": False, "bias": 0.0, "per_head": True, "reads": "all"}
        shown = {name: value for name, value in told.items() if value != plain.get(name)}
        return f"MemoryBank({', '.join(f'{name}={_literal(value)}' for name, value in shown.items())})"


def _literal(value: Any) -> str:
    """``value`` as a literal; minus infinity has none but a number too large for a float."""
    return "-1e999" if value == -math.inf else repr(value)


def _indices(layers: Any) -> tuple[int, ...]:
    layers = plain(layers)
    if isinstance(layers, int):
        layers = (layers,)
    if not isinstance(layers, tuple | list | range) or not layers or len(layers) > MOST_LAYERS:
        raise PolicyError(f"layers must name at least one layer, and each once, got {told(layers)}")
    found = [integer("layers", layer, 0, MOST_LAYERS, PolicyError) for layer in layers]
    if len(set(found)) != len(found):
        raise PolicyError(f"layers must name at least one layer, and each once, got {told(layers)}")
    return tuple(sorted(found))


def _names(namespace: Any) -> tuple[str, ...]:
    names = (namespace,) if isinstance(namespace, str) else tuple(namespace) if isinstance(namespace, tuple | list) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise PolicyError(f"a namespace is a name, or a list of different ones, one for each row of a batch; got {told(namespace)}")
    if any("\ud800" <= letter <= "\udfff" for name in names for letter in name):
        raise PolicyError(f"a namespace must be a text that can be written to a file, got {names!a}")
    return names


def _seam() -> Any:
    if not SEAM:
        raise StateError("import kvsieve first")
    return SEAM[0]()
