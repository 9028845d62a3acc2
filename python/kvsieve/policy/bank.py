"""The end of a chain that outlives its stream: what evicted tokens flow into, and what is found there by content."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from kvsieve.errors import PolicyError

if TYPE_CHECKING:
    from kvsieve.bank.book import Book

__all__ = ["BankRule"]


class BankRule:
    """How a bank is written and read. It stands last in a chain: ``StreamingLLM(1024) >> MemoryBank()``.

    Attributes:
        layers: indices of the layers that have a bank; None for every full-attention layer.
        chunk: tokens that are found together.
        top_k: tokens that a query reads.
        per_head: whether each KV head finds tokens of its own.
        bias: what is added to the log-sum-exp of the bank's logits; ``-inf`` reads nothing.
        read_only: whether nothing is ever written.
        reads: which queries read it: ``"all"``, or with ``"answers"`` none of what `stream.feed` reads.
        distance: at which every token of the bank is seen; None for that of the oldest token of what stands before it.
        names: namespaces, one for each row of a batch.
    """

    layers: tuple[int, ...] | None
    chunk: int
    top_k: int
    per_head: bool = True
    bias: float
    read_only: bool
    reads: str = "all"
    distance: int | None
    names: tuple[str, ...]

    @property
    def book(self) -> Book:
        """What it holds; read from its file at first use.

        Raises:
            BankError: if the file cannot be read, or another process writes it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define book")

    def _alone(self, *_: object) -> NoReturn:
        raise PolicyError(f"{self!r} is the end of a chain: write a policy before it, such as StreamingLLM(1024) >> {self!r}")

    __or__ = __ror__ = __rshift__ = _alone
