"""Which resident tokens a query reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvsieve.budget import check_count
from kvsieve.checks import check_flag, plain_fields, real, told
from kvsieve.errors import PolicyError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = [
    "Dense",
    "FetchedSelection",
    "HeaviestValues",
    "Parameter",
    "Piece",
    "RecycledSelection",
    "SelectionRule",
    "SparseSelection",
    "TopKTokens",
    "check_summary",
]


Parameter = bool | int | float | str | Sequence[tuple[int, int]]
"""What a rule may be told by a name of its own."""


class SelectionRule:
    """Which resident tokens a query reads."""

    reads_all: ClassVar[bool] = False
    """Whether every resident token is read."""
    sparse: ClassVar[bool] = False
    """Whether what is read is selected per layer and key-value head."""
    needs_all_tokens: bool = False
    """Whether it goes only with a memory that keeps every token."""
    recycles: ClassVar[bool] = False
    """Whether tokens are read again that heads chose at an earlier step: none may be evicted, or moved."""
    thins_values: ClassVar[bool] = False
    """Whether every key is compared, but only some values are added up."""
    fetches: ClassVar[bool] = False
    """Whether blocks of the text are read where the rule places them, and not where they stand. Others may lie in a
    file (:class:`kvsieve.policy.Tiered`)."""
    top_k: int = 0
    """Tokens with the highest logits that the last query of a forward reads; 0 for a rule that does not count them so."""
    from_layer: int = 0
    """The first layer of such a rule."""


@dataclass(frozen=True)
class Dense(SelectionRule):
    """Every resident token."""

    reads_all: ClassVar[bool] = True


@dataclass(frozen=True)
class TopKTokens(SelectionRule):
    """The ``k`` tokens with the highest logits, per head, for the last query of each forward, in layers from ``from_layer`` on."""

    k: int
    from_layer: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("k", self.k, least=1)
        check_count("from_layer", self.from_layer)

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.k


@dataclass(frozen=True)
class HeaviestValues(SelectionRule):
    """A single new token compares itself with every key, and adds up only the values with the highest probabilities, of each query
    head its own: ``top``, or fewer that have ``mass`` of the probability already. Of equal ones the earlier.

    ``renormalise`` scales the probabilities of those that are added up to the sum of all. Without it, with a mass ``M`` of what was
    added up, the result is off by at most ``(1 - M) * max |v|``; with it by twice that.
    """

    thins_values: ClassVar[bool] = True
    top: int | None = 100
    mass: float | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.top is not None:
            check_count("top_m", self.top, least=1)
        mass = real(self.mass)
        if self.mass is not None and not (mass is not None and 0 < mass < 1):
            raise PolicyError(f"mass must be between 0 and 1, got {told(self.mass)}")
        check_flag("renormalise", self.renormalise, PolicyError)
        if self.top is None and self.mass is None:
            raise PolicyError("say how many values are added up: top_m, mass, or both")


class SparseSelection(SelectionRule):
    """What a query reads is selected per layer and key-value head: sinks, window and some tokens between them.

    Residents are counted in text order; ``sinks`` and ``window`` are counts of residents.
    """

    sparse: ClassVar[bool] = True
    kind: ClassVar[str]
    """The name by which a backend finds the algorithm."""
    sinks: int
    window: int
    query_block: int
    """Queries of a prompt that share a choice: those of equal ``position // query_block``."""
    query_stride: int
    """Of those the last one is compared with keys, and every so many before it."""
    page_bounds: bool = False
    """Whether blocks of 64 residents are judged by page bounds."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """What the rule adds to the numbers above, by name: what its implementation in Rust is told."""
        return {}

    @property
    def paces(self) -> tuple[int, ...]:
        """Generated tokens between two selections, of each stage."""
        return (1,)

    @property
    def always_read(self) -> tuple[int, int]:
        """How many of the first and of the newest tokens a query reads, whatever is selected."""
        return self.sinks, self.window

    @property
    def num_found(self) -> int:
        """Most tokens that are read between the sinks and the window."""
        return self.dense_until - self.sinks - self.window

    @property
    def dense_until(self) -> int:
        """Everything is read while no more tokens than these are resident."""
        raise NotImplementedError

    def for_layer(self, index: int, past_trained_length: bool = False) -> SparseSelection | None:
        """The rule of layer ``index``; None if the layer reads everything, as none does past the trained length."""
        return self

    def choose(self, scores: npt.NDArray[np.floating[Any]], lo: int, hi: int) -> Sequence[npt.NDArray[np.int64]]:
        """What a block of queries reads between sinks and window: the definition, which ``backend="reference"`` follows.

        A rule of one stage writes it here. One that needs more than scores has a file in the reference's ``select/`` instead.

        Args:
            scores: float64 ``[Hkv, n]``, of each key the best product with a query that sees it outside its window, or -inf.
            lo, hi: where sinks end and the window begins; more than :attr:`num_found` keys lie between them.

        Returns:
            For each KV head int64 ``[c, 2]``: ranges of keys between ``lo`` and ``hi``, ascending, none empty.
        """
        raise NotImplementedError

    @property
    def defines_itself(self) -> bool:
        """Whether :meth:`choose` is its definition."""
        return type(self).choose is not SparseSelection.choose


class RecycledSelection(SelectionRule):
    """Most steps of decode read, for each layer and KV head, tokens that the head chose at an earlier step, and what came since.

    A *full* step reads everything, and each head chooses anew by the attention that its newest query gave to each token. Forwards
    over several tokens of a row are full steps. Of the steps after them every :attr:`stride`-th may be one; see :attr:`similarity`.
    A text of :attr:`budget` tokens is read whole, and the first token that it does not hold takes a full step.
    """

    sparse: ClassVar[bool] = True
    recycles: ClassVar[bool] = True
    budget: int
    """Tokens that a head chooses. As the text goes on it reads so many before the newest one; the lowest scores go first."""
    stride: int
    """Single tokens between two steps that may be full."""
    similarity: float | None
    """None: every :attr:`stride`-th step is full. Otherwise it is in layers where the cosine of the mean query, before RoPE, with
    that of the layer's last full step is not above this."""

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each head goes on reading.

        Args:
            scores: float ``[Hkv, n]``, the highest probability that the newest query gave to each token, among the query heads of
                the group.

        Returns:
            int64 ``[Hkv, k]``, ``k = min(budget, n)``: tokens, ascending, and the order in which they go, 0 first.
        """
        raise NotImplementedError


class Piece(NamedTuple):
    """Tokens ``lo..hi`` of a row, and where some of its queries, which follow each other, see them.

    Attributes:
        lo, hi: residents in text order, at least one.
        distance: how far the first query sees the first token. Each token after it is nearer by one, for each query after it all
            of them are further by one.
        fixed: whether all queries see all tokens at ``distance`` instead.
        nearest, within: a query sees only those that stand at least ``nearest``, and less than ``within``, tokens before it in the
            text; None for no limit. Never any behind it.
        head: the KV head that reads them; None for all.
    """

    lo: int
    hi: int
    distance: int
    fixed: bool = False
    nearest: int = 0
    within: int | None = None
    head: int | None = None


def check_summary(summary: str, kinds: Sequence[str]) -> None:
    """Raises :class:`PolicyError` for a kind of summary that is none of ``kinds``."""
    if not isinstance(summary, str) or summary not in kinds:
        known = ", ".join(map(repr, kinds))
        raise PolicyError(f"summary must be one of {known}; got {told(summary)}")


class FetchedSelection(SelectionRule):
    """Blocks of the text are summed up once, and queries fetch those whose summaries suit them best, to where the rule places them.

    Queries of a prompt with equal ``position // query_block`` share what they fetch, so it does not matter where a text is cut, if
    it is at multiples of ``query_block``; every token that is decoded chooses alone. All layers fetch.
    """

    sparse: ClassVar[bool] = True
    fetches: ClassVar[bool] = True
    needs_all_tokens: bool = True
    summary: str
    """How a block is summed up, by the name of its kind in :mod:`kvsieve.runtime.summaries`."""
    start: int
    """The first token of the first block."""
    block: int
    """Tokens of a block."""
    query_block: int
    """Queries of a prompt that share what they fetch."""
    per_head: bool
    """Whether every KV head fetches blocks of its own."""
    representatives: int = 0
    """Tokens that stand for a block, for summaries that are made of some."""
    compared_at: int
    """The distance at which queries are compared with summaries."""

    longest: int = 0
    """Tokens that are shown side by side, which no model may be trained for less of; 0 where that is not so."""

    @property
    def always_read(self) -> tuple[int, int]:
        """How many of the first and of the newest tokens a query reads, whatever it fetches."""
        return 0, 1

    def num_blocks(self, seen: int) -> int:
        """Blocks that are summed up once ``seen`` tokens have been read."""
        raise NotImplementedError

    def candidates(self, first: int) -> range:
        """The blocks among which queries from token ``first`` on choose."""
        raise NotImplementedError

    def limit(self, first: int) -> int:
        """How many of them they fetch, at most."""
        raise NotImplementedError

    def pieces(self, first: int, count: int, chosen: Sequence[Sequence[int]]) -> list[Piece]:
        """What ``count`` queries from token ``first`` on read, disjoint for each head.

        Args:
            chosen: ascending blocks for each KV head, or one list for all of them.

        Returns:
            What all heads see at true distances comes first.
        """
        raise NotImplementedError

    def query_blocks(self, first: int, count: int) -> list[tuple[int, int]]:
        """``count`` queries from token ``first`` on as ranges of tokens that share a choice."""
        ends = [*range((first // self.query_block + 1) * self.query_block, first + count, self.query_block), first + count]
        return list(zip([first, *ends[:-1]], ends))
