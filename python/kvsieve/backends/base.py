"""What every backend offers, as protocols, and what each of them can hold, as data that is asked when a stream opens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvsieve.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvsieve._core import Moves, Step
    from kvsieve.facts import AttentionLayer, LayerRope
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.storage import Channels, Packing

__all__ = [
    "FLOATS",
    "AttendCall",
    "Backend",
    "Capabilities",
    "HeadChoice",
    "HeadSets",
    "HeldBytes",
    "SelectionCapabilities",
    "SelectionState",
    "Store",
    "TierFile",
    "check_stream",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the fast backends hold."""

Runs = list[tuple[int, int, int]]
"""Runs of slots (block, lo, hi)."""

DEVICES = {"cpu": "the CPU", "cuda": "a CUDA device"}
"""Types of devices in words."""


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
        tokens: int64 ``[Hkv, k]`` on the CPU, residents before ``rest``, ascending.
        order: int64 ``[Hkv, k]``, those of less than ``gone`` are not read.
        rest: every resident from this one on is read.
    """

    tokens: torch.Tensor
    order: torch.Tensor
    gone: int
    rest: int

    def read(self, head: int, count: int) -> torch.Tensor:
        """Which of ``count`` residents a head reads: int64 ``[m]``, ascending."""
        chosen = self.tokens[head][self.order[head] >= self.gone]
        return torch.cat([chosen, torch.arange(self.rest, count)])


# ----------------------------------------------------------------------------------------------------------------- capabilities


@dataclass(frozen=True)
class SelectionCapabilities:
    """Which selections a backend can follow.

    Attributes:
        rules: kinds of rules that it implements.
        definitions: whether it also follows a rule by the definition that the rule brings along.
        stored_keys: ``"post_rope"`` (as the model rotated them) and ``"pre_rope"`` where it can select.
        compressed: whether some of the keys may be compressed.
        page_bounds: whether it keeps bounds of blocks, and can judge blocks by them.
        recycled: whether heads can read tokens that they chose before, by scores that it tells (:meth:`Store.run_with_sets`).
    """

    rules: frozenset[str]
    definitions: bool = False
    stored_keys: frozenset[str] = frozenset({"post_rope", "pre_rope"})
    compressed: bool = True
    page_bounds: bool = True
    recycled: bool = True


@dataclass(frozen=True)
class Capabilities:
    """What a backend can hold.

    Attributes:
        name: of the backend; devices: types of devices, None for every one; dtypes: of keys and values, None for every float.
        max_head_dim: channels of a key or a value, at most; None for any number.
        row_bytes: a key, and a value, is a multiple of so many bytes.
        stored_keys: as of :class:`SelectionCapabilities`, of what it attends to without a selection.
        storage: ways to store compressed tokens: ``"pruned"`` (fewer channels), ``"quantized"`` (codes).
        needs_parts: whether every step must come with its parts, decoding steps included.
        tiers: whether blocks may lie in a file (:class:`kvsieve.backends.tiers.HoldsTiers`).
    """

    name: str
    selection: SelectionCapabilities
    devices: frozenset[str] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_head_dim: int | None = None
    row_bytes: int = 1
    stored_keys: frozenset[str] = frozenset({"post_rope", "pre_rope"})
    storage: frozenset[str] = frozenset({"pruned", "quantized"})
    needs_parts: bool = False
    tiers: bool = True

    def fits(self, dtype: torch.dtype, *dims: int) -> bool:
        """Whether keys and values of ``dims`` channels in ``dtype`` can be held."""
        if self.dtypes is not None and dtype not in self.dtypes:
            return False
        size, most = dtype.itemsize, self.max_head_dim
        return all(d > 0 and (most is None or d <= most) and d * size % self.row_bytes == 0 for d in dims)

    def check_heads(self, dtype: torch.dtype, *dims: int) -> None:
        """Raise BackendError where :meth:`fits` does not hold."""
        if not self.fits(dtype, *dims):
            limit = "" if self.max_head_dim is None else f" heads of at most {self.max_head_dim} channels"
            if self.row_bytes > 1:
                limit += f" in whole {self.row_bytes}-byte pieces (a multiple of {max(1, self.row_bytes // dtype.itemsize)})"
            sizes = f"{' and '.join(map(str, dims))} in {dtype}" if limit else str(dtype)
            raise BackendError(f"backend {self.name!r} holds {self._dtypes()}{limit}, not {sizes}; use backend='reference'")

    def check_layer(self, device: torch.device, dtype: torch.dtype, *dims: int) -> None:
        """Raise BackendError if keys and values of ``dims`` channels in ``dtype`` on ``device`` cannot be held."""
        if self.devices is not None and device.type not in self.devices:
            where = " or ".join(DEVICES.get(name, name) for name in sorted(self.devices))
            other = "'cpu' or 'reference'" if device.type == "cpu" else "'reference'"
            raise BackendError(f"backend {self.name!r} holds tensors on {where}, not on {device}; use {other}")
        self.check_heads(dtype, *dims)

    def check_selection(self, rule: SparseSelection, stored_keys: str, compressed: bool) -> None:
        """Raise BackendError if ``rule`` cannot be followed over keys that are stored so, or where some are compressed."""
        can = self.selection
        if rule.page_bounds and not can.page_bounds:
            raise BackendError(f"backend {self.name!r} keeps no page bounds; use HiP or InfiniteHiP, or backend='reference'")
        if rule.kind not in can.rules and not (can.definitions and rule.defines_itself):
            raise BackendError(
                f"backend {self.name!r} selects by {', '.join(sorted(can.rules))}, not by {rule.kind!r}; use backend='reference'"
            )
        if stored_keys not in can.stored_keys:
            raise BackendError(
                f"backend {self.name!r} selects from post-RoPE keys, and this policy stores pre-RoPE ones; leave out extend= and "
                "policies that move tokens, such as SirLLM, or use backend='reference'"
            )
        if compressed and not can.compressed:
            raise BackendError(
                f"backend {self.name!r} selects from keys as they came, and this policy compresses some; leave the storage rule "
                "out, or use backend='reference'"
            )

    def check_recycling(self) -> None:
        """Raise BackendError if heads cannot read tokens that they chose at an earlier step."""
        if not self.selection.recycled:
            raise BackendError(
                f"backend {self.name!r} lets no head read tokens that it chose at an earlier step; use HiP, or backend='reference'"
            )

    def check_tiers(self) -> None:
        """Raise BackendError if all blocks must be in memory."""
        if not self.tiers:
            raise BackendError(
                f"backend {self.name!r} holds all tokens on the device, and none in a file; leave Tiered (host_budget=) out, or "
                "use backend='reference'"
            )

    def check_storage(self, packing: Packing) -> None:
        """Raise BackendError if tokens cannot be stored so."""
        asked = "quantized" if packing.key_bits or packing.value_bits else "pruned"
        if asked not in self.storage:
            raise BackendError(
                f"backend {self.name!r} stores no {asked} tokens; leave the storage rule out, or use backend='reference'"
            )

    def check_stored_keys(self, stored_keys: str) -> None:
        """Raise BackendError if keys that are stored so cannot be read."""
        if stored_keys not in self.stored_keys:
            name = stored_keys.replace("_rope", "-RoPE")
            raise BackendError(f"backend {self.name!r} reads no {name} keys; use backend='reference'")

    def _dtypes(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes or ()]
        return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


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

    def make_tier(self, folder: str) -> TierFile:
        """A file in ``folder`` for blocks of this backend's stores.

        Raises:
            BackendError: if they are all in memory. TierError: if it cannot be made.
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
    tiered: bool = False,
) -> None:
    """Ask, when a stream opens, whether ``backend`` can do all that will be asked of it.

    Args:
        layers: those that it will hold; stored_keys: how their keys are; packings: formats of compressed tokens, none where
            nothing is compressed.
        rule: by which queries select their keys, if they do.
        recycles: whether heads read tokens that they chose at an earlier step.
        tiered: whether some blocks may lie in a file.

    Raises:
        BackendError: with what it cannot do, and what to use instead.
    """
    can, packings = backend.capabilities, list(packings)
    for layer in layers:
        can.check_layer(layer.device, layer.dtype, layer.key_dim, layer.value_dim)
    can.check_stored_keys(stored_keys)
    for packing in packings:
        can.check_storage(packing)
    if tiered:
        can.check_tiers()
    if recycles:
        can.check_recycling()
    if rule is not None:
        can.check_selection(rule, stored_keys, bool(packings))
        backend.make_selection(rule)
