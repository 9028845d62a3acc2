"""How tokens are stored: the base of such rules, the format and the channels that they decide on, and two of them as one.

torch is imported where tensors are made, so that naming a policy does not load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from kvsieve.budget import check_choice, check_count, parse_bytes
from kvsieve.checks import LARGEST, check_flag, check_path, integer, plain_fields, real, told
from kvsieve.errors import BudgetError, PolicyError

if TYPE_CHECKING:
    import torch

__all__ = [
    "WHEN",
    "Channels",
    "LayerShape",
    "Packing",
    "Plain",
    "PrunedAndQuantized",
    "RotaryPairs",
    "StorageObservation",
    "StorageRule",
    "Tiered",
    "join",
    "on_disk",
]

WHEN = ("decode", "prefill")


class RotaryPairs(Protocol):
    """Which channels of a head rotate together."""

    @property
    def rotary_dim(self) -> int:
        """The first so many channels rotate, the rest pass through."""
        ...

    @property
    def layout(self) -> Literal["half", "interleaved"]:
        """``"half"`` pairs channel ``i`` with ``i + rotary_dim / 2``; ``"interleaved"`` pairs ``2i`` with ``2i + 1``."""
        ...


@dataclass(frozen=True)
class LayerShape:
    """A layer as a storage rule sees it: its index, KV heads, and channels of a key and of a value."""

    index: int
    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Packing:
    """The format of a layer's compressed tokens.

    Attributes:
        key_kept: channels of a key that are kept, the same number in each head.
        key_bits, value_bits: bits of a code, 2, 4 or 8; 0 for numbers as they came.
        group: numbers that share a scale and a zero point, float16 each: tokens of one key channel, channels of one value.
    """

    key_kept: int
    key_bits: int = 0
    value_bits: int = 0
    group: int = 32

    def bits_per_token(self, value_dim: int, dtype: torch.dtype) -> tuple[float, float, float]:
        """Bits of one token of one head: its key, its value, and its share of scales. Rows are whole bytes."""
        wide = dtype.itemsize * 8
        key = -(-self.key_kept * self.key_bits // 8) * 8 if self.key_bits else self.key_kept * wide
        value = -(-value_dim * self.value_bits // 8) * 8 if self.value_bits else value_dim * wide
        scales = (self.key_kept if self.key_bits else 0) + (value_dim if self.value_bits else 0)
        return key, value, scales * 32 / self.group


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of its keys that a sequence keeps in one layer.

    Attributes:
        index: int64 ``[Hkv, kept]``: the first channels of the kept rotary pairs, then their second ones, then the others.
            ``-1 - c`` stands for channel ``c`` stored as zero.
        pairs: how many rotary pairs each head keeps; 0 where channels were chosen one by one.
    """

    index: torch.Tensor
    pairs: tuple[int, ...]

    @classmethod
    def all(cls, keys: torch.Tensor, rope: RotaryPairs | None) -> Channels:
        """Every channel of ``keys`` ``[Hkv, n, D]``."""
        import torch

        heads, dim = keys.shape[0], keys.shape[2]
        return in_order(torch.ones(heads, dim, dtype=torch.bool), rope, whole_pairs=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of the channels, 16 bits each."""
        return 2 * self.index.numel()

    def with_zeros(self, keys: torch.Tensor, rope: RotaryPairs | None) -> Channels:
        """Every channel of ``keys`` ``[Hkv, n, D]``, those not kept here stored as zero."""
        import torch

        every = Channels.all(keys, rope)
        kept = [set(row) for row in self.index.tolist()]
        index = [[c if c in mine else -1 - c for c in row] for mine, row in zip(kept, every.index.tolist())]
        return Channels(torch.tensor(index), every.pairs)


@dataclass(frozen=True, eq=False)
class StorageObservation:
    """What a storage rule sees of one sequence in one layer.

    Attributes:
        layer: the layer.
        queries: float32 ``[H, m, D]``, the newest queries; keys: ``[Hkv, n, D]``, all residents.
        count: how many of the first keys are about to be compressed.
        rope: the layer's rotation; None where it has none.
        pre_rope: whether queries and keys are as they were before rotation.
    """

    layer: LayerShape
    queries: torch.Tensor
    keys: torch.Tensor
    count: int
    rope: RotaryPairs | None
    pre_rope: bool


def pairs_of(rope: RotaryPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that rotate together."""
    import torch

    half = rope.rotary_dim // 2
    if rope.layout == "half":
        return torch.arange(half), torch.arange(half, 2 * half)
    return torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2)


def in_order(mask: torch.Tensor, rope: RotaryPairs | None, whole_pairs: bool) -> Channels:
    """The channels of ``mask`` (bool ``[Hkv, D]``) in the order of :class:`Channels`."""
    import torch

    if rope is None or not whole_pairs:
        return Channels(torch.stack([row.nonzero()[:, 0] for row in mask]), (0,) * len(mask))
    first, second = pairs_of(rope)
    rows, pairs = [], []
    for row in mask:
        own = row[first]
        others = row.clone()
        others[: rope.rotary_dim] = False
        rows.append(torch.cat([first[own], second[own], others.nonzero()[:, 0]]))
        pairs.append(int(own.sum()))
    return Channels(torch.stack(rows), tuple(pairs))


class StorageRule:
    """How tokens are stored once they are compressed: when the prompt, or a piece of it, has been read, and then every
    ``flush_every`` tokens.

    Subclass and write :meth:`packing` and :meth:`choose_channels` for a rule of one's own.
    """

    recent: int = 0
    """Newest tokens, stored as they came."""
    observe: int = 0
    """How many of a prompt's last queries :meth:`choose_channels` looks at."""
    flush_every: int | None = None
    """Generated tokens that gather behind the recent ones before they are compressed; None to leave them until the next prompt."""
    align: int = 1
    """Tokens are compressed in multiples of this, a divisor of 64."""
    when: Literal["decode", "prefill"] = "decode"
    """Whether a prompt is compressed once the first token is decoded after it, or its turn ends; or after each of its pieces."""
    keeps_pairs: bool = True
    """Whether what is kept of a key can still be rotated."""
    plain: ClassVar[bool] = False
    """Whether tokens stay as they came."""
    tiered: ClassVar[bool] = False
    """Whether some of them may lie in a file."""
    by_scores: bool = False
    """Whether blocks leave memory by the attention that they got, so that the selection has to tell it."""
    prunes: ClassVar[bool] = False
    """Whether it keeps some channels of the keys, so that a rule that makes codes of them can be joined to it by ``|``."""
    quantizes: ClassVar[bool] = False
    """Whether it stores codes of a few bits, so that it can be joined to a rule that keeps some channels."""

    def packing(self, layer: LayerShape) -> Packing:
        """The format of a layer's compressed tokens.

        Raises:
            PolicyError: if such a layer cannot be stored so.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define packing()")

    def idle(self, layer: LayerShape) -> bool:
        """Whether compression would leave such a layer's tokens as they are."""
        packing = self.packing(layer)
        return packing.key_kept == layer.key_dim and not packing.key_bits and not packing.value_bits

    def choose_channels(self, seen: StorageObservation) -> Channels:
        """The channels of one sequence's keys that are kept; asked once per sequence and layer."""
        return Channels.all(seen.keys, seen.rope)


@dataclass(frozen=True)
class Plain(StorageRule):
    """As it came, in the model's dtype."""

    plain: ClassVar[bool] = True


@dataclass(frozen=True)
class Tiered(StorageRule):
    """As it came, for streams that keep every token and hold more than memory has: only so many full blocks are in memory. The
    others are in a file that nobody else sees, and that goes with the stream. On the backend ``cuda`` memory is the device's, and
    the others are in pinned memory of the host.

    A rule that fetches the blocks that it reads (:attr:`SelectionRule.fetches`) moves no others. Under every other rule each layer
    fetches all that it holds, so memory must have one layer at a time. Neither the budget nor the order changes an output.

    Attributes:
        memory_budget: bytes of keys and values in memory, of all layers and rows together (an int, or a text such as ``"64MiB"``).
            What one layer reads at a time may take more, and so may the newest tokens of many rows.
        disk: the folder of the file; None for the system's folder for temporary files. It should not be one that lies in memory.
            Refused on ``cuda``.
        keep: newest tokens of each row that stay in memory.
        order: which blocks leave memory first. ``"recency"``: those that were fetched longest ago. ``"scores"``: those of the
            lowest score, where each lookup of a layer makes it ``score * decay`` and adds the attention that the block got, all
            queries, heads and rows together (InfLLM, Xiao et al., arXiv 2402.04617); of equal ones those fetched longest ago. It
            goes with a rule that fetches blocks, and costs comparing a prompt's queries with what they fetched once more.
        decay: of scores.
        background: whether a thread writes blocks while the model goes on. At most 32 blocks of a layer are then in memory for
            longer; what could not be written is said at the end of the next forward. On ``cuda`` they are always copied so.
        values_alone: whether keys stay in memory, and only values leave it: the budget is that of values. For
            :func:`kvsieve.SelectiveV`, which reads all keys and few values, and then fetches the blocks of those alone. On the
            backend ``cpu``.

    Raises:
        BudgetError: for a budget that is no count of bytes. PolicyError: for the others.
    """

    memory_budget: int | str
    disk: str | PathLike[str] | None = None
    keep: int = 0
    order: Literal["recency", "scores"] = "recency"
    decay: float = 0.1
    background: bool = False
    values_alone: bool = False
    plain: ClassVar[bool] = True
    tiered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        budget = self.memory_budget
        if isinstance(budget, str):
            parse_bytes(budget)
        else:
            integer("memory_budget", budget, 1, LARGEST, BudgetError, "a count of bytes, a text such as '64MiB' or ")
        if self.disk is not None:
            object.__setattr__(self, "disk", check_path("disk", self.disk, PolicyError))
        check_count("keep", self.keep)
        check_choice("order", self.order, ("recency", "scores"))
        check_flag("background", self.background, PolicyError)
        check_flag("values_alone", self.values_alone, PolicyError)
        decay = real(self.decay)
        if decay is None or not 0.0 <= decay <= 1.0:
            raise PolicyError(f"decay must lie between 0 and 1, got {told(self.decay)}")

    @property
    def by_scores(self) -> bool:  # type: ignore[override]
        return self.order == "scores"

    @property
    def budget_bytes(self) -> int:
        """:attr:`memory_budget` as bytes."""
        return parse_bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


def on_disk(budget: int | str | None, disk: str | PathLike[str] | None, what: str, **options: Any) -> Tiered | None:
    """The storage of a policy that is given a budget of memory, and maybe a folder; None without a budget.

    Raises:
        PolicyError: for a folder without a budget. BudgetError: as :class:`Tiered`.
    """
    if budget is not None:
        return Tiered(budget, disk, **options)
    if disk is not None:
        raise PolicyError(f"a folder without a host_budget: say how many bytes of {what} may be in memory")
    return None


@dataclass(frozen=True)
class PrunedAndQuantized(StorageRule):
    """Some channels of the keys by one rule, and codes of a few bits for what is kept by another. Compressed early if either is."""

    pruned: StorageRule
    quantized: StorageRule

    def __post_init__(self) -> None:
        for name, does in (("pruned", "prunes"), ("quantized", "quantizes")):
            rule = getattr(self, name)
            if not isinstance(rule, StorageRule) or not getattr(rule, does):
                raise PolicyError(f"{name} must be a StorageRule that {does}, got {told(rule)}")

    @property
    def recent(self) -> int:  # type: ignore[override]
        return max(self.pruned.recent, self.quantized.recent)

    @property
    def observe(self) -> int:  # type: ignore[override]
        return self.pruned.observe

    @property
    def align(self) -> int:  # type: ignore[override]
        return self.quantized.align

    @property
    def flush_every(self) -> int:  # type: ignore[override]
        return max(self.pruned.flush_every or 0, self.quantized.flush_every or 0)

    @property
    def when(self) -> Literal["decode", "prefill"]:  # type: ignore[override]
        return "prefill" if "prefill" in (self.pruned.when, self.quantized.when) else "decode"

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        return self.pruned.keeps_pairs

    def packing(self, layer: LayerShape) -> Packing:
        codes = self.quantized.packing(layer)
        return Packing(self.pruned.packing(layer).key_kept, codes.key_bits, codes.value_bits, codes.group)

    def choose_channels(self, seen: StorageObservation) -> Channels:
        return self.pruned.choose_channels(seen)


def join(left: StorageRule, right: StorageRule) -> StorageRule | None:
    """Both rules as one; None if they cannot both be."""
    for pruned, quantized in ((left, right), (right, left)):
        if pruned.prunes and quantized.quantizes:
            return PrunedAndQuantized(pruned, quantized)
    return None
