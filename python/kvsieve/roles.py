"""The four roles of a memory, and the operators that combine them.

A *memory* answers four questions, one role each: which tokens stay (:class:`Retain`), at which distance a query sees them
(:class:`Place`), which of them it reads (:class:`Select`), and how they are stored (:class:`Pack`). A *policy* is a chain of
memories: what one lets go flows into the next, and their answers merge exactly, by log-sum-exp.

* ``a | b`` joins the roles of two parts in one memory; claiming a role twice is an error.
* ``a >> b`` chains: what ``a`` lets go, ``b`` keeps.

Python binds ``>>`` tighter than ``|``, so ``a | b >> c`` joins ``a`` to ``b`` and ``a >> b | c`` joins ``c`` to ``b``.

A role of one's own is a small class: subclass :class:`Retain` and write :meth:`Retain.keep`, or :class:`PerHead` and write
:meth:`PerHead.scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from kvsieve.budget import check_budget, tokens_for
from kvsieve.errors import BudgetError, PolicyError

if TYPE_CHECKING:
    import torch

    from kvsieve.observe import Observation
    from kvsieve.thin import Channels, LayerShape, Observed, Packing

__all__ = [
    "All",
    "AsRotated",
    "Ceiling",
    "Chain",
    "Codes",
    "Consecutive",
    "Everything",
    "Fixed",
    "HeavyHitters",
    "Memory",
    "ObservationWindow",
    "Pack",
    "PerHead",
    "Place",
    "Plain",
    "Policy",
    "Residents",
    "Retain",
    "Search",
    "Select",
    "Slots",
    "Surprisal",
    "Thin",
    "ThinCodes",
    "TopKTokens",
    "Window",
]

Frame = Literal["rotated", "raw"]
WHEN = ("decode", "prefill")


@dataclass(frozen=True)
class Residents:
    """What a retain role sees of one sequence: its resident tokens, in text order.

    Attributes:
        positions: int64 ``[n]``, the number of each token in its sequence.
        scores: float32 ``[n]``; nan where no score was given.
        seen: tokens the sequence has seen.
        turn_ended: whether this is the end of a turn rather than an overflow.
        pinned: bool ``[n]``, which of them :meth:`kvsieve.Stream.pin` said stay. They stay whether or not the rule keeps them:
            then they take the places of the oldest others.
    """

    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    seen: int
    turn_ended: bool
    pinned: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


# --------------------------------------------------------------------------------------------------------------------- retain


class Retain:
    """Which tokens stay resident. Subclass and write :meth:`keep` for a rule of one's own."""

    budget: int | str | None = None
    """Most residents after the rule ran, in tokens, or bytes as text; None when unbounded."""
    sinks: int = 0
    """First tokens of the sequence, in every keep."""
    recent: int = 0
    """Newest tokens, in every keep."""
    contiguous: ClassVar[bool] = False
    """Whether every keep is the sinks and one run of recent tokens."""
    needs_surprisal: ClassVar[bool] = False

    def keep(self, residents: Residents) -> Sequence[int]:
        """Indices of the residents that stay, ascending; the sinks, the recent ones and at most ``budget`` in all."""
        raise NotImplementedError(f"{type(self).__name__} does not define keep()")

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        """This rule in the control plane's terms."""
        if self.budget is None:
            raise PolicyError(f"{type(self).__name__} needs a budget: set the attribute `budget` to a count of tokens")
        check_budget(self.budget, sinks=self.sinks, recent=self.recent, name=type(self).__name__)
        budget = tokens_for(self.budget, bytes_per_token)
        check_budget(budget, sinks=self.sinks, recent=self.recent, name=type(self).__name__)
        return {"retain": "manual", "budget": budget, "sinks": self.sinks, "recent": self.recent}


@dataclass(frozen=True)
class All(Retain):
    """Every token stays."""

    contiguous: ClassVar[bool] = True

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        return {"retain": "all"}


@dataclass(frozen=True)
class Window(Retain):
    """The first ``sinks`` tokens and the newest ``budget - sinks`` stay. A query sees them and itself."""

    budget: int | str
    sinks: int = 4
    contiguous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("sinks", self.sinks)
        check_budget(self.budget, sinks=self.sinks, recent=1, name="Window")

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        budget = tokens_for(self.budget, bytes_per_token)
        check_budget(budget, sinks=self.sinks, recent=1, name="Window")
        window = budget - self.sinks
        return {"retain": "window", "sinks": self.sinks, "window": window, "visible": window + 1}


@dataclass(frozen=True)
class Surprisal(Retain):
    """The sinks, the newest ``recent`` and the most surprising tokens stay; scores decay by ``decay`` at each end of turn."""

    budget: int | str
    sinks: int = 4
    recent: int | None = None  # type: ignore[assignment]
    decay: float = 1.0
    score: Literal["surprisal", "published"] = "surprisal"
    needs_surprisal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("sinks", self.sinks)
        if self.recent is not None:
            _check_count("recent", self.recent)
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0.0 < self.decay <= 1.0:
            raise PolicyError(f"decay must lie in (0, 1], got {self.decay!r}")
        if self.score not in ("surprisal", "published"):
            raise PolicyError(f"score must be 'surprisal' or 'published', got {self.score!r}")
        check_budget(self.budget, sinks=self.sinks, recent=self.recent or 0, name="Surprisal")

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        budget = tokens_for(self.budget, bytes_per_token)
        recent = (budget - self.sinks) // 2 if self.recent is None else self.recent
        if self.score == "published" and self.recent is None:
            recent = 0
        check_budget(budget, sinks=self.sinks, recent=recent, name="Surprisal")
        published = self.score == "published"
        return {"retain": "surprisal", "budget": budget, "sinks": self.sinks, "recent": recent, "published": published}


class PerHead(Retain):
    """Which tokens each key-value head of each layer keeps. Subclass and write :meth:`scores` for a rule of one's own.

    Every head keeps equally many: the first ``sinks`` and the newest ``recent`` residents, and of the others those that it scores
    highest. The rule acts when it is a whole block over budget, after every longer forward that left it over budget, and at the end
    of a turn. Tokens are seen at their true distance (:class:`AsRotated`).
    """

    observe: int = 0
    """Newest queries that are kept for the rule to look at."""
    accumulates: bool = False
    """Whether the probability that each token was ever given is added up, at every forward."""

    def scores(self, observation: Observation) -> torch.Tensor:
        """A score for every resident of every head: float ``[Hkv, n]``, on any device.

        Equal scores prefer the earlier token; nan comes last. What is given to sinks and recent tokens is not looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define scores()")

    def keep(self, residents: Residents) -> Sequence[int]:
        raise PolicyError(f"{type(self).__name__} keeps other tokens for each head; it has no one answer for all")


@dataclass(frozen=True)
class ObservationWindow(PerHead):
    """The newest ``observe`` tokens stay; their queries vote for the others, by softmax probability, with neighbours of up to
    ``kernel // 2`` tokens sharing the highest vote. Li et al., NeurIPS 2024, arXiv 2404.14469.
    """

    budget: int | str
    observe: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        _check_count("observe", self.observe, least=1)
        _check_count("kernel", self.kernel, least=1)
        if self.kernel % 2 == 0:
            raise PolicyError(f"kernel must be odd, so that it has a middle, got {self.kernel}")
        self._check(self.budget)

    def _check(self, budget: int | str) -> None:
        check_budget(budget, sinks=0, recent=0, name="ObservationWindow")
        if isinstance(budget, int) and budget <= self.observe:
            raise BudgetError(
                f"ObservationWindow: a budget of {budget} tokens cannot hold the {self.observe} observed ones and one more; "
                f"give it at least {self.observe + 1}, or observe fewer"
            )

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        budget = tokens_for(self.budget, bytes_per_token)
        self._check(budget)
        return {"retain": "manual", "budget": budget, "sinks": 0, "recent": self.observe}

    def scores(self, observation: Observation) -> torch.Tensor:
        from torch.nn.functional import max_pool1d, pad

        others = observation.votes()[:, : -self.observe]
        return pad(max_pool1d(others, self.kernel, stride=1, padding=self.kernel // 2), (0, self.observe))


@dataclass(frozen=True)
class HeavyHitters(PerHead):
    """The first ``sinks``, the newest ``recent`` and the tokens that were given the most attention by all queries so far stay.
    Zhang et al., NeurIPS 2023, arXiv 2306.14048.
    """

    budget: int | str
    recent: int | None = None  # type: ignore[assignment]
    sinks: int = 0
    accumulates: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_count("sinks", self.sinks)
        if self.recent is not None:
            _check_count("recent", self.recent)
        check_budget(self.budget, sinks=self.sinks, recent=self.recent or 0, name="HeavyHitters")

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        budget = tokens_for(self.budget, bytes_per_token)
        recent = budget // 2 if self.recent is None else self.recent
        check_budget(budget, sinks=self.sinks, recent=recent, name="HeavyHitters")
        return {"retain": "manual", "budget": budget, "sinks": self.sinks, "recent": recent}

    def scores(self, observation: Observation) -> torch.Tensor:
        assert observation.mass is not None
        return observation.mass


# ---------------------------------------------------------------------------------------------------------------------- place


class Place:
    """At which distance a query sees each resident token."""

    moves: ClassVar[bool] = True
    """Whether a token may be seen at another distance than its true one."""

    def frame(self, retain: Retain) -> Frame:
        """The frame in which keys must be stored for this rule to be exact."""
        return "raw"

    def spec(self) -> dict[str, Any]:
        """This rule in the control plane's terms."""
        raise NotImplementedError


@dataclass(frozen=True)
class AsRotated(Place):
    """At its true distance, as the model rotated it."""

    moves: ClassVar[bool] = False

    def frame(self, retain: Retain) -> Frame:
        return "rotated"

    def spec(self) -> dict[str, Any]:
        return {"place": "true"}


@dataclass(frozen=True)
class Slots(Place):
    """As if the residents stood side by side: the distance counts residents, not tokens of the text."""

    def frame(self, retain: Retain) -> Frame:
        return "rotated" if retain.contiguous else "raw"

    def spec(self) -> dict[str, Any]:
        return {"place": "slots"}


@dataclass(frozen=True)
class Ceiling(Place):
    """At its true distance inside the window; the sinks beyond it at ``distance``."""

    distance: int

    def __post_init__(self) -> None:
        _check_count("ceiling", self.distance, least=1)

    def spec(self) -> dict[str, Any]:
        return {"place": "ceiling", "distance": self.distance}


@dataclass(frozen=True)
class Consecutive(Place):
    """At its true distance while all that was seen lies within ``after`` tokens, by default the model's trained length.

    Beyond, what a query reads stands side by side, ending at the query, in every layer, and a :class:`Search` compares by content
    alone, all keys at one distance. The longest row of a batch decides for all. Lee et al., 2025, arXiv 2502.08910.
    """

    after: int | None = None

    def __post_init__(self) -> None:
        if self.after is not None:
            _check_count("after", self.after)

    def spec(self) -> dict[str, Any]:
        return {"place": "true"}


@dataclass(frozen=True)
class Fixed(Place):
    """Every token at one ``distance``."""

    distance: int

    def __post_init__(self) -> None:
        _check_count("distance", self.distance)

    def spec(self) -> dict[str, Any]:
        return {"place": "fixed", "distance": self.distance}


# --------------------------------------------------------------------------------------------------------------------- select


class Select:
    """Which resident tokens a query reads."""

    from_layer: int = 0

    def spec(self) -> dict[str, Any]:
        """This rule in the control plane's terms."""
        raise NotImplementedError


@dataclass(frozen=True)
class Everything(Select):
    """Every resident token."""

    def spec(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class TopKTokens(Select):
    """The ``k`` tokens with the highest logits, per head, for the last query of each forward, in layers from ``from_layer`` on."""

    k: int
    from_layer: int = 0

    def __post_init__(self) -> None:
        _check_count("k", self.k, least=1)
        _check_count("from_layer", self.from_layer)

    def spec(self) -> dict[str, Any]:
        return {"top_k": self.k}


class Search(Select):
    """What a query reads is searched for, per layer and key-value head: sinks, window and what was found between them.

    Residents are counted in text order; ``sinks`` and ``window`` are counts of residents.
    """

    kind: ClassVar[str]
    """``"hip"`` or ``"infinite"``: which search of :mod:`kvsieve.backends.reference.definition`."""
    sinks: int
    window: int
    query_block: int
    """Queries of a prompt that share a choice: those of equal ``position // query_block``."""
    query_stride: int
    """Of those the last one searches, and every so many before it."""
    bounded: bool = False
    """Whether blocks are judged by the bounds of their keys, which are kept of whole, plain blocks of an unbroken text only."""

    @property
    def dense_until(self) -> int:
        """Everything is read while no more tokens than these are resident."""
        raise NotImplementedError

    def for_layer(self, index: int, beyond: bool = False) -> Search | None:
        """The rule of layer ``index``; None if the layer reads everything, as none does ``beyond`` the trained length."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        return {}


# ----------------------------------------------------------------------------------------------------------------------- pack


class Pack:
    """How tokens are stored once they have settled: when the prompt, or a piece of it, has been read, and then every
    ``flush_every`` tokens.

    Subclass and write :meth:`packing` and :meth:`choose` for a rule of one's own.
    """

    recent: int = 0
    """Newest tokens, stored as they came."""
    observe: int = 0
    """How many of a prompt's last queries :meth:`choose` looks at."""
    flush_every: int | None = None
    """Generated tokens that gather behind the recent ones before they are packed; None to leave them until the next prompt."""
    align: int = 1
    """Tokens are packed in multiples of this, a divisor of 64."""
    when: Literal["decode", "prefill"] = "decode"
    """Whether a prompt is packed once the first token is decoded after it, or its turn ends; or after each of its pieces."""
    keeps_pairs: bool = True
    """Whether what is kept of a key can still be rotated."""

    def packing(self, layer: LayerShape) -> Packing:
        """The format of a layer's packed tokens.

        Raises:
            PolicyError: if such a layer cannot be packed so.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define packing()")

    def idle(self, layer: LayerShape) -> bool:
        """Whether packing would leave such a layer's tokens as they are."""
        packing = self.packing(layer)
        return packing.key_kept == layer.key_dim and not packing.key_bits and not packing.value_bits

    def choose(self, seen: Observed) -> Channels:
        """The channels of one sequence's keys that are kept; asked once per sequence and layer."""
        from kvsieve.thin import Channels

        return Channels.all(seen.keys, seen.rope)

    def joined(self, other: Pack) -> Pack | None:
        """This and ``other`` as one; None if they cannot both be."""
        return None


@dataclass(frozen=True)
class Plain(Pack):
    """As it came, in the model's dtype."""


@dataclass(frozen=True)
class Thin(Pack):
    """Keys keep their heaviest channels (ThinK); see :func:`kvsieve.ThinK`."""

    ratio: float = 0.4
    recent: int = 32
    observe: int = 32
    norm_over: Literal["pruned", "all"] = "pruned"
    channels: Literal["pairs", "single"] = "pairs"
    round_to: int | None = None
    flush_every: int | None = None
    skip_layers: tuple[int, ...] = ()
    mode: Literal["slice", "zero"] = "slice"
    when: Literal["decode", "prefill"] = "decode"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0.0 <= self.ratio < 1.0:
            raise PolicyError(f"ratio must lie in [0, 1), got {self.ratio!r}")
        _check_count("recent", self.recent)
        _check_count("observe", self.observe, least=1)
        for name, value, allowed in (
            ("norm_over", self.norm_over, ("pruned", "all")),
            ("channels", self.channels, ("pairs", "single")),
            ("mode", self.mode, ("slice", "zero")),
            ("when", self.when, WHEN),
        ):
            if value not in allowed:
                raise PolicyError(f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
        for name, count in (("round_to", self.round_to), ("flush_every", self.flush_every)):
            if count is not None:
                _check_count(name, count, least=1)
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        for layer in self.skip_layers:
            _check_count("skip_layers", layer)

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        return self.channels == "pairs"

    def packing(self, layer: LayerShape) -> Packing:
        from kvsieve import thin

        whole = self.mode == "zero" or layer.index in self.skip_layers
        kept = layer.key_dim if whole else thin.kept(layer.key_dim, self.ratio, self.channels, self.round_to)
        return thin.Packing(kept)

    def idle(self, layer: LayerShape) -> bool:
        from kvsieve import thin

        return (
            layer.index in self.skip_layers or thin.kept(layer.key_dim, self.ratio, self.channels, self.round_to) == layer.key_dim
        )

    def choose(self, seen: Observed) -> Channels:
        from kvsieve import thin

        if seen.layer.index in self.skip_layers:
            return thin.Channels.all(seen.keys, seen.rope)
        kept = thin.kept(seen.layer.key_dim, self.ratio, self.channels, self.round_to)
        keys = seen.keys if self.norm_over == "all" else seen.keys[:, : seen.settled]
        chosen = thin.choose(seen.queries, keys, kept, self.channels, seen.rope, raw=seen.raw)
        return chosen.with_zeros(seen.keys, seen.rope) if self.mode == "zero" else chosen

    def joined(self, other: Pack) -> Pack | None:
        return ThinCodes(self, other) if isinstance(other, Codes) else None


@dataclass(frozen=True)
class Codes(Pack):
    """Keys and values as codes of a few bits (KIVI); see :func:`kvsieve.Quantized`."""

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    residual: int = 32
    when: Literal["decode", "prefill"] = "decode"

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise PolicyError(f"when must be {WHEN[0]!r} or {WHEN[1]!r}, got {self.when!r}")
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if isinstance(bits, bool) or bits not in (0, 2, 4, 8):
                raise PolicyError(f"{name} must be 2, 4 or 8 (or 0 to leave them as they are), got {bits!r}")
        if isinstance(self.group, bool) or self.group not in (8, 16, 32, 64):
            raise PolicyError(f"group must be 8, 16, 32 or 64, got {self.group!r}")
        _check_count("residual", self.residual)

    @property
    def recent(self) -> int:  # type: ignore[override]
        return self.residual

    @property
    def align(self) -> int:  # type: ignore[override]
        return self.group if self.key_bits else 1

    @property
    def flush_every(self) -> int:  # type: ignore[override]
        return self.group

    def packing(self, layer: LayerShape) -> Packing:
        from kvsieve.thin import Packing

        if self.value_bits and layer.value_dim % self.group:
            raise PolicyError(
                f"layer {layer.index} has values of {layer.value_dim} channels, which groups of {self.group} do not divide; "
                "choose another group"
            )
        return Packing(layer.key_dim, self.key_bits, self.value_bits, self.group)

    def joined(self, other: Pack) -> Pack | None:
        return ThinCodes(other, self) if isinstance(other, Thin) else None


@dataclass(frozen=True)
class ThinCodes(Pack):
    """The heaviest channels of the keys, and codes of a few bits for what is kept. Packed early if either is."""

    thin: Thin
    codes: Codes

    @property
    def recent(self) -> int:  # type: ignore[override]
        return max(self.thin.recent, self.codes.recent)

    @property
    def observe(self) -> int:  # type: ignore[override]
        return self.thin.observe

    @property
    def align(self) -> int:  # type: ignore[override]
        return self.codes.align

    @property
    def flush_every(self) -> int:  # type: ignore[override]
        return max(self.thin.flush_every or 0, self.codes.flush_every)

    @property
    def when(self) -> Literal["decode", "prefill"]:  # type: ignore[override]
        return "prefill" if "prefill" in (self.thin.when, self.codes.when) else "decode"

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        return self.thin.keeps_pairs

    def packing(self, layer: LayerShape) -> Packing:
        from kvsieve.thin import Packing

        codes = self.codes.packing(layer)
        return Packing(self.thin.packing(layer).key_kept, codes.key_bits, codes.value_bits, codes.group)

    def choose(self, seen: Observed) -> Channels:
        return self.thin.choose(seen)


# --------------------------------------------------------------------------------------------------------------------- policy


class Policy:
    """A chain of one or more memories."""

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories of the chain, the first one first."""
        raise NotImplementedError

    @property
    def frame(self) -> Frame:
        """The frame in which every memory of the chain stores keys."""
        frames = {memory.frame for memory in self.memories}
        return "raw" if "raw" in frames else "rotated"

    @property
    def moves(self) -> bool:
        """Whether a token may be seen at another distance than its true one."""
        return any(memory.place_or_default.moves for memory in self.memories)

    @property
    def packs(self) -> Pack | None:
        """How the policy packs tokens; None if it leaves them as they come."""
        roles = [memory.pack_or_default for memory in self.memories]
        return None if len(roles) > 1 or isinstance(roles[0], Plain) else roles[0]

    @property
    def searches(self) -> Search | None:
        """The search that decides what queries read; None if there is none."""
        select = self.memories[0].select
        return select if isinstance(select, Search) else None

    @property
    def needs_surprisal(self) -> bool:
        """Whether the policy scores tokens by the model's own logits."""
        return any(memory.retain_or_default.needs_surprisal for memory in self.memories)

    def specs(self, bytes_per_token: int) -> list[dict[str, Any]]:
        """Each memory in the control plane's terms; byte budgets become tokens."""
        return [memory.spec(bytes_per_token) for memory in self.memories]

    def __or__(self, other: object) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        left, right = self.memories, other.memories
        if len(left) > 1 and len(right) > 1:
            raise PolicyError(f"cannot join two chains, {self} and {other}; join the memories first, then chain with >>")
        joined = _join(left[-1], right[0])
        return _chain((*left[:-1], joined, *right[1:]))

    def __rshift__(self, other: object) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        return _chain((*self.memories, *other.memories))


@dataclass(frozen=True, repr=False)
class Memory(Policy):
    """One choice for each role; None leaves a role unclaimed, and open to ``|``.

    Unclaimed roles default to: everything stays, as rotated, everything is read, plain.

    Raises:
        PolicyError: for a part in the wrong role.
    """

    retain: Retain | None = None
    place: Place | None = None
    select: Select | None = None
    pack: Pack | None = None
    text: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("retain", Retain), ("place", Place), ("select", Select), ("pack", Pack)):
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise PolicyError(f"{name} must be a {kind.__name__}, got {part!r}")
        _check_per_head(self)
        _check_search(self)
        if self.place_or_default.moves and not self.pack_or_default.keeps_pairs:
            raise PolicyError(
                f"{self.place!r} shows tokens at other distances, which rotates their keys again, and keys whose channels were "
                "dropped one by one cannot be rotated; drop whole rotary pairs: channels='pairs'"
            )

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (self,)

    @property
    def retain_or_default(self) -> Retain:
        """The retain role, or :class:`All`."""
        return self.retain or All()

    @property
    def place_or_default(self) -> Place:
        """The place role, or :class:`AsRotated`."""
        return self.place or AsRotated()

    @property
    def pack_or_default(self) -> Pack:
        """The pack role, or :class:`Plain`."""
        return self.pack or Plain()

    @property
    def frame(self) -> Frame:
        return self.place_or_default.frame(self.retain_or_default)

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        """This memory in the control plane's terms."""
        select = self.select or Everything()
        return {**self.retain_or_default.spec(bytes_per_token), **self.place_or_default.spec(), **select.spec()}

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        parts = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[:4] if getattr(self, f.name) is not None)
        return f"Memory({parts})"


@dataclass(frozen=True, repr=False)
class Chain(Policy):
    """Two or more memories; what one lets go flows into the next."""

    parts: tuple[Memory, ...]
    text: str | None = field(default=None, compare=False)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.parts

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        return " >> ".join(f"({m!r})" if " | " in repr(m) else repr(m) for m in self.parts)


def _chain(memories: tuple[Memory, ...]) -> Policy:
    if len(memories) == 1:
        return memories[0]
    for memory in memories:
        if isinstance(memory.retain, PerHead):
            raise PolicyError(
                f"{memory!r} keeps other tokens for each head, so what it lets go has no one position; it cannot be part of a chain"
            )
    for memory in memories:
        if isinstance(memory.select, Search):
            raise PolicyError(f"{memory!r} searches all that a query may read, so it cannot be one part of a chain")
    for memory in memories[:-1]:
        if isinstance(memory.retain_or_default, All):
            raise PolicyError(f"{memory!r} lets nothing go, so nothing can flow into what follows it; put it last")
    for memory in memories:
        if not isinstance(memory.pack_or_default, Plain):
            raise PolicyError(
                f"{memory!r} packs its tokens; in a chain they would have to be unpacked to flow on, so it stands alone"
            )
    for memory in memories[1:]:
        if isinstance(memory.place_or_default, Ceiling):
            raise PolicyError(f"{memory!r}: a ceiling is relative to a window's edge and belongs to the first memory; use Fixed")
    return Chain(memories)


def _join(left: Memory, right: Memory) -> Memory:
    roles: dict[str, Any] = {}
    for name in ("retain", "place", "select", "pack"):
        mine, theirs = getattr(left, name), getattr(right, name)
        both = mine.joined(theirs) if isinstance(mine, Pack) and isinstance(theirs, Pack) else None
        if mine is not None and theirs is not None and both is None:
            raise PolicyError(
                f"both {left!r} and {right!r} decide {name}; a memory has one {name} role: chain them with >> instead"
            )
        roles[name] = both or (mine if mine is not None else theirs)
    return Memory(**roles, text=f"{left!r} | {right!r}")


def _check_per_head(memory: Memory) -> None:
    """Refuse what one table of positions for all heads would be needed for."""
    if not isinstance(memory.retain, PerHead):
        return
    for part, allowed, why in (
        (memory.place, AsRotated, "so their positions differ per head"),
        (memory.select, Everything, "so there is no one token to read for all of them"),
    ):
        if part is not None and not isinstance(part, allowed):
            raise PolicyError(
                f"{memory.retain!r} keeps other tokens for each head, {why}; it goes with {allowed.__name__}, not with {part!r}"
            )


def _check_search(memory: Memory) -> None:
    """Refuse what a search cannot go with."""
    if isinstance(memory.place, Consecutive) and not isinstance(memory.select, Search):
        raise PolicyError(f"{memory.place!r} numbers what a search found; it goes with HiP, InfiniteHiP or Quest")
    if not isinstance(memory.select, Search):
        return
    if isinstance(memory.retain, Window):
        raise PolicyError(
            f"{memory.retain!r} lets the text between its sinks and its window go, which is what {memory.select!r} would search; "
            "keep everything, or what is most surprising (SirLLM)"
        )
    if isinstance(memory.place, (Ceiling, Fixed)):
        raise PolicyError(f"{memory.select!r} reads tokens at their own distances; it does not go with {memory.place!r}")
    if memory.select.bounded and not isinstance(memory.retain_or_default, All):
        raise PolicyError(f"Quest judges whole blocks of the text, of which {memory.retain!r} lets tokens go; HiP goes with it")
    if memory.select.bounded and not isinstance(memory.pack_or_default, Plain):
        raise PolicyError(f"Quest keeps bounds of keys as they came, and {memory.pack!r} stores them otherwise; HiP goes with it")


def _check_count(name: str, value: object, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{name} must be an int of at least {least}, got {value!r}")
