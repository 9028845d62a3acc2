"""What every backend offers, as protocols, and the data that goes in and out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvsieve._core import Moves, Residents, Step
    from kvsieve.backends.capabilities import Capabilities
    from kvsieve.facts import AttentionLayer, LayerRope
    from kvsieve.policy.select import HeaviestValues, Piece, SparseSelection
    from kvsieve.policy.storage import Channels, Packing

__all__ = [
    "AttendCall",
    "Attended",
    "Backend",
    "HeadChoice",
    "HeadSets",
    "HeldBytes",
    "SelectionState",
    "Store",
    "TierFile",
    "check_stream",
]

Runs = list[tuple[int, int, int]]
"""Runs of slots (block, lo, hi)."""

# ------------------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class AttendCall:
    """What one layer's attention adds to the step: the numbers that differ per layer, never per token.

    Attributes:
        scale: factor on the logits.
        softcap: cap of the logits, ``cap * tanh(logit / cap)``; None for none.
        sink_logits: learned logits ``[H]`` that join every softmax without a value (gpt-oss); None for none.
        rope: the layer's rotation; None where the layer has none, or nothing is re-placed.
        top_k: whether this layer reads memories that are selected by top-k.
        relative: a selection compares all keys at one distance, the window's edge, and not where they are placed (pre-RoPE).
        consecutive: what a query selects is numbered consecutively, for each key-value head, and ends at the query (pre-RoPE).
    """

    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    rope: LayerRope | None = None
    top_k: bool = True
    relative: bool = False
    consecutive: bool = False

    @property
    def sinks(self) -> torch.Tensor | None:
        """:attr:`sink_logits` as kernels take them: float32, contiguous, without a gradient."""
        return None if self.sink_logits is None else self.sink_logits.detach().float().contiguous()


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a layer's allocator holds, by what they hold.

    Attributes:
        plain_keys, plain_values: tokens as they came.
        keys, values: packed tokens, as numbers or codes.
        scales: scales and zero points of codes.
        channels: which channels of keys were kept.
        bounds: the maximum and the minimum of every key channel of a block.
    """

    plain_keys: int
    plain_values: int
    keys: int = 0
    values: int = 0
    scales: int = 0
    channels: int = 0
    bounds: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class HeadChoice:
    """What one key-value head of a row reads between sinks and window.

    Attributes:
        ranges: int64 ``[n, 2]``, residents ``lo..hi`` in text order.
        end: the region selected from ends here; the window begins here, or earlier.
        reads: representative keys that were scored for it.
        rounds: levels of the tree, or stages.
    """

    ranges: npt.NDArray[np.int64]
    end: int
    reads: int
    rounds: int


@dataclass(frozen=True, eq=False)
class HeadSets:
    """What the only new query of a row reads where each KV head chose tokens before. Residents are counted in text order.

    Attributes:
        tokens: int64 ``[Hkv, k]`` on the layer's device, residents before ``rest``, ascending.
        order: int64 ``[Hkv, k]``, those of less than ``gone`` are not read.
        rest: every resident from this one on is read.
    """

    tokens: torch.Tensor
    order: torch.Tensor
    gone: int
    rest: int

    def read(self, head: int, count: int) -> torch.Tensor:
        """Which of ``count`` residents a head reads: int64 ``[m]``, ascending, on the CPU."""
        chosen = self.tokens[head][self.order[head] >= self.gone].cpu()
        return torch.cat([chosen, torch.arange(self.rest, count)])


@dataclass(frozen=True, eq=False)
class Attended:
    """Attention of some queries to pieces of their row's text.

    Attributes:
        out: ``[H, m, Dv]``, learned sink logits taken into account; lse: ``[H, m]``, without them, -inf where nothing is read.
        scores: float32 ``[Hkv, hi - lo]`` of the first piece, if it was asked for: probabilities summed over the queries and over
            the query heads of a group.
        mass: float32 ``[n]``, if it was asked for: of each piece but the first in turn, of each of its tokens ``lo..hi``, the
            probabilities summed over queries and over all query heads that read it.
    """

    out: torch.Tensor
    lse: torch.Tensor
    scores: torch.Tensor | None = None
    mass: torch.Tensor | None = None


# -------------------------------------------------------------------------------------------------------------------- protocols


class SelectionState(Protocol):
    """What the rows of a stream have selected in one layer."""

    @property
    def work(self) -> tuple[int, int]:
        """Keys scored and keys attended to by the last forward, over all rows, queries and key-value heads."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""

    def undo(self) -> None:
        """Return to the choices before the last forward. Twice is once."""

    def reset(self) -> None:
        """Forget all choices."""

    def state(self) -> Any:
        """What it takes to return here."""

    def return_to(self, state: Any) -> None:
        """Make ``state`` the present."""

    def choice(self, row: int) -> list[HeadChoice]:
        """The choice of each key-value head; empty before the row chose."""


class Store(Protocol):
    """One layer's keys and values."""

    @property
    def bytes_held(self) -> int:
        """Bytes the allocator holds for this layer."""

    def held(self) -> HeldBytes:
        """:attr:`bytes_held` by part."""

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        """Store the step's new keys and values and attend.

        Args:
            q: ``[B, H, q, D]``; k: ``[B, Hkv, q, D]``; v: ``[B, Hkv, q, Dv]``, in the model's dtype.

        Returns:
            ``[B, q, H, Dv]`` in the model's dtype; rows of pad queries are zero.
        """

    def run_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`run`, for memories of which all is read, and what lets the answer be joined with attention to other keys.

        Returns:
            The output, bit for bit that of :meth:`run`, and float32 ``[B, H, q]`` (float64 for queries in float64): the
            log-sum-exp of the logits, learned sinks among them; -inf for pads.
        """

    def run_with_scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """As :meth:`run`, for a lone memory whose tokens are seen as they were rotated, and how much attention each key got.

        Returns:
            The output, and for each row float32 ``[Hkv, n]`` over its residents, the new ones included, in text order:
            probabilities summed over the row's new queries and over the query heads of a group. None for a row without new tokens.
        """

    def run_with_sets(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        sets: Sequence[HeadSets | None],
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """As :meth:`run`, for a lone memory whose tokens are seen as they were rotated; a row with sets, which has one new token,
        reads these alone.

        Returns:
            The output, and for each other row with new tokens float32 ``[Hkv, n]`` over its residents, the new ones included, in
            text order: the highest probability that the row's last query gives to each, among the query heads of a group.
        """

    def run_heaviest(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        rule: HeaviestValues,
        rows: Sequence[bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`run`, for a lone memory; the named rows, which have one new token each, add up the heaviest values alone.

        Returns:
            The output, and float32 ``[B, H]``: the probability mass of what was added up, nan for the other rows.
        """

    def append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Store the step's new keys and values, as :meth:`run` does, without attention."""

    def attend_pieces(
        self,
        q: torch.Tensor,
        first: int,
        residents: Residents,
        pieces: Sequence[Piece],
        call: AttendCall,
        scored: bool = False,
        told: bool = False,
    ) -> Attended:
        """Attention of some of a row's queries to pieces of its text. What they read is stored already, pre-RoPE.

        Args:
            q: ``[H, m, D]``, not rotated: those of the residents from number ``first`` on.
            residents: where the row's tokens lie.
            pieces: at least one; those that a head reads are disjoint.
            scored: whether the scores of the first piece, which all heads read, are wanted.
            told: whether it is wanted how much attention the tokens of the other pieces got.

        Returns:
            ``out`` in the dtype of ``q``.
        """

    def best_summaries(self, summaries: Sequence[torch.Tensor], asked: torch.Tensor, most: int, per_head: bool) -> list[list[int]]:
        """The numbers of the summaries that suit queries best: the inner products with what these ask are compared.

        Args:
            summaries: float32 ``[m, Hkv, R]`` each, in order, at least ``most`` in all.
            asked: float32 ``[Hkv, R]``.
            per_head: whether each KV head chooses for itself; else products are summed over them, and there is one list.

        Returns:
            For each head, or once, at most ``most`` numbers, ascending. Of equal products the first count, and none that is nan or
            minus infinity.
        """

    def run_selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, selection: Any
    ) -> torch.Tensor:
        """As :meth:`run`, reading only sinks, window and what ``selection``, made by this store's backend, selects between them."""

    def permute(self, source: Runs, keep: torch.Tensor, to: Runs) -> None:
        """Give each head residents of its own: resident ``keep[h, j]`` of the runs ``source`` goes to slot ``j`` of ``to``.

        Args:
            keep: int64 ``[Hkv, tokens of to]``. All is read before anything is written.
        """

    def apply(self, moves: Moves) -> None:
        """Move tokens between blocks."""

    def free_unused(self, in_use: npt.NDArray[np.bool_], packed_in_use: npt.NDArray[np.bool_]) -> None:
        """Give back the memory of blocks nobody holds; packed blocks are counted from ``_core.PACKED``."""

    def set_packing(self, packing: Packing) -> None:
        """Say how this layer packs its tokens, before any is packed."""

    def pack(self, moves: Moves, channels: Channels | int) -> None:
        """Move tokens from plain to packed blocks. ``channels`` may be a packed block whose channels these tokens keep as well."""

    def channels(self, block: int) -> Channels:
        """The channels of keys that a packed block keeps."""

    def read(self, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of (block, lo, hi) runs, copied; channels that were dropped are zero."""

    def write(self, runs: Runs, k: torch.Tensor, v: torch.Tensor) -> None:
        """The inverse of :meth:`read`. Packed blocks keep the channels that they have."""

    def fetch(self, runs: Runs) -> None:
        """Make the blocks of these runs stay in memory until this thread fetches again, or the forward ends; before they are read.

        Where no block lies in a file this does nothing.

        Raises:
            TierError, TierDamagedError: if one cannot be read from its file. MemoryError: if there is no memory for it.
        """


class TierFile(Protocol):
    """Where the blocks of all layers of a stream lie that are not in memory. It goes with the last of its users."""

    def bytes(self) -> tuple[int, int]:
        """Bytes of the blocks in it, and of the file."""


class Backend(Protocol):
    """Makes stores, and computes what is not attention."""

    name: str
    capabilities: Capabilities

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> Store:
        """An empty store for keys and values like these (``[B, Hkv, q, D]``)."""

    def make_selection(self, rule: SparseSelection) -> SelectionState:
        """The choices of one layer under ``rule``, for stores of this backend.

        Raises:
            PolicyError: numbers that cannot be right.
            BackendError: if it cannot select so.
        """

    def make_tier(self, folder: str | None) -> TierFile:
        """A file in ``folder`` for blocks of this backend's stores; None for where it has them best.

        Raises:
            BackendError: if they are all in memory, or in no file. TierError: if it cannot be made.
        """

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``logsumexp(logits) - logits[ids]``: float32 ``[n]`` in nats, from ``[n, V]`` and int64 ``[n]``."""


def check_stream(
    backend: Backend,
    layers: Sequence[AttentionLayer],
    stored_keys: str,
    packings: Iterable[Packing],
    rule: SparseSelection | None,
    recycles: bool = False,
) -> None:
    """Ask, when a stream opens, whether ``backend`` can do all that will be asked of it.

    Args:
        layers: those that it will hold; stored_keys: how their keys are; packings: formats of compressed tokens, none where
            nothing is compressed.
        rule: by which queries select their keys, if they do.
        recycles: whether heads read tokens that they chose at an earlier step.

    Raises:
        BackendError: with what it cannot do, and what to use instead.
    """
    can, packings = backend.capabilities, list(packings)
    for layer in layers:
        can.check_layer(layer.device, layer.dtype, layer.key_dim, layer.value_dim)
    can.check_stored_keys(stored_keys)
    for packing in packings:
        can.check_storage(packing)
    if recycles:
        can.check_recycling(bool(packings))
    if rule is not None:
        can.check_selection(rule, stored_keys, bool(packings))
        backend.make_selection(rule)
