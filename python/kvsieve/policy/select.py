"""Which resident tokens a query reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvsieve.budget import check_count

__all__ = ["Everything", "Search", "Select", "TopKTokens"]


class Select:
    """Which resident tokens a query reads."""

    reads_all: ClassVar[bool] = False
    """Whether every resident token is read."""
    searches: ClassVar[bool] = False
    """Whether what is read is searched for, per layer and key-value head."""
    needs_all_tokens: bool = False
    """Whether it goes only with a memory that keeps every token."""
    needs_plain_storage: bool = False
    """Whether it goes only with keys that are stored as they came."""
    top_k: int = 0
    """Tokens with the highest logits that the last query of a forward reads; 0 for a rule that does not count them so."""
    from_layer: int = 0
    """The first layer of such a rule."""

    def spec(self) -> dict[str, Any]:
        """This rule in the control plane's terms."""
        raise NotImplementedError


@dataclass(frozen=True)
class Everything(Select):
    """Every resident token."""

    reads_all: ClassVar[bool] = True

    def spec(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class TopKTokens(Select):
    """The ``k`` tokens with the highest logits, per head, for the last query of each forward, in layers from ``from_layer`` on."""

    k: int
    from_layer: int = 0

    def __post_init__(self) -> None:
        check_count("k", self.k, least=1)
        check_count("from_layer", self.from_layer)

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.k

    def spec(self) -> dict[str, Any]:
        return {"top_k": self.k}


class Search(Select):
    """What a query reads is searched for, per layer and key-value head: sinks, window and what was found between them.

    Residents are counted in text order; ``sinks`` and ``window`` are counts of residents.
    """

    searches: ClassVar[bool] = True
    kind: ClassVar[str]
    """``"hip"`` or ``"infinite"``: which search of :mod:`kvsieve.backends.search`."""
    algorithm: ClassVar[Literal["tree", "stages"]]
    """How a backend finds it: by a beam search in one tree, or by stages that narrow the tokens down."""
    sinks: int
    window: int
    query_block: int
    """Queries of a prompt that share a choice: those of equal ``position // query_block``."""
    query_stride: int
    """Of those the last one searches, and every so many before it."""
    bounded: bool = False
    """Whether blocks are judged by the bounds of their keys, which are kept of whole, plain blocks of an unbroken text only."""

    @property
    def needs_all_tokens(self) -> bool:  # type: ignore[override]
        return self.bounded

    @property
    def needs_plain_storage(self) -> bool:  # type: ignore[override]
        return self.bounded

    @property
    def paces(self) -> tuple[int, ...]:
        """Generated tokens between two searches, of each stage."""
        raise NotImplementedError

    @property
    def num_found(self) -> int:
        """Most tokens that are read between the sinks and the window."""
        return self.dense_until - self.sinks - self.window

    @property
    def dense_until(self) -> int:
        """Everything is read while no more tokens than these are resident."""
        raise NotImplementedError

    def for_layer(self, index: int, beyond: bool = False) -> Search | None:
        """The rule of layer ``index``; None if the layer reads everything, as none does ``beyond`` the trained length."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        return {}
