"""The same operations, once per backend: ``reference`` (the specification, any device), ``cpu`` (Rust), ``cuda`` (CUDA, CuPy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvsieve.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kvsieve._core import Moves, Step
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.storage import Channels, Packing

__all__ = [
    "BACKENDS",
    "AttendCall",
    "Backend",
    "Choosy",
    "HeadChoice",
    "HeldBytes",
    "Search",
    "Store",
    "choose",
    "get",
]

BACKENDS = ("reference", "cpu", "cuda")
"""Every backend by name."""


@dataclass(frozen=True)
class AttendCall:
    """What one layer's attention adds to the step: the numbers that differ per layer, never per token.

    Attributes:
        scale: factor on the logits.
        softcap: cap of the logits, ``cap * tanh(logit / cap)``; None for none.
        sinks: learned logits ``[H]`` that join every softmax without a value (gpt-oss); None for none.
        rope: the layer's rotation; None where the layer has none, or nothing is re-placed.
        top_k: whether this layer reads memories that are selected by top-k.
        by_content: a search compares all keys at one distance, that of the window's edge, and not where they are placed. Raw frame.
        side_by_side: what a query reads by a search is numbered consecutively, for each key-value head, and ends at the query. Raw
            frame.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    rope: LayerRope | None = None
    top_k: bool = True
    by_content: bool = False
    side_by_side: bool = False


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a layer's allocator holds, by what they hold.

    Attributes:
        plain_keys, plain_values: tokens as they came.
        keys, values: packed tokens, as numbers or codes.
        scales: steps and least values of codes.
        channels: which channels of keys were kept.
        bounds: the greatest and the least number of every key channel of a block.
    """

    plain_keys: int
    plain_values: int
    keys: int = 0
    values: int = 0
    scales: int = 0
    channels: int = 0
    bounds: int = 0


@dataclass(frozen=True)
class HeadChoice:
    """What one key-value head of a row reads between sinks and window.

    Attributes:
        stretches: int64 ``[n, 2]``, residents ``lo..hi`` in text order.
        end: what was searched ends here; the window begins here, or earlier.
        reads: representative keys that were scored for it.
        rounds: levels of the tree, or stages.
    """

    stretches: npt.NDArray[np.int64]
    end: int
    reads: int
    rounds: int


class Search(Protocol):
    """What the rows of a stream have chosen to read in one layer."""

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

    def run_mass(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """As :meth:`run`, for a lone memory whose tokens are seen as they were rotated, and how much attention each key got.

        Returns:
            The output, and for each row float32 ``[Hkv, n]`` over its residents, the new ones included, in text order:
            probabilities summed over the row's new queries and over the query heads of a group. None for a row without new tokens.
        """

    def run_sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, search: Any
    ) -> torch.Tensor:
        """As :meth:`run`, reading only sinks, window and what ``search``, which this store's backend made, finds between them."""

    def permute(self, source: list[tuple[int, int, int]], keep: torch.Tensor, to: list[tuple[int, int, int]]) -> None:
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

    def read(self, runs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of (block, lo, hi) runs, copied; channels that were dropped are zero."""

    def write(self, runs: list[tuple[int, int, int]], k: torch.Tensor, v: torch.Tensor) -> None:
        """The inverse of :meth:`read`. Packed blocks keep the channels that they have."""


class Backend(Protocol):
    """Makes stores, and computes what is not attention."""

    name: str

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> Store:
        """An empty store for keys and values like these (``[B, Hkv, q, D]``)."""

    def make_search(self, rule: SparseSelection) -> Search:
        """The choices of one layer under ``rule``, for stores of this backend.

        Raises:
            BackendError: if it cannot search so.
        """

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``logsumexp(logits) - logits[ids]``: float32 ``[n]`` in nats, from ``[n, V]`` and int64 ``[n]``."""


@runtime_checkable
class Choosy(Protocol):
    """A backend that cannot hold every layer: asked when a stream opens, not when its first token arrives."""

    def check_layer(self, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
        """Raise BackendError if a layer like this cannot be held."""

    def check_search(self, rule: SparseSelection, frame: str, packs: bool) -> None:
        """Raise BackendError if ``rule`` cannot be followed over keys in this frame, or over packed ones."""


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        BackendError: for an unknown name, or one that cannot run here.
    """
    if name == "reference":
        from kvsieve.backends.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from kvsieve.backends.cpu import CpuBackend

        return CpuBackend()
    if name == "cuda":
        from kvsieve.backends.cuda import CudaBackend

        return CudaBackend()
    raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend for tensors on ``device`` in ``dtype``.

    On a CUDA device that is ``cuda``, whether or not what it needs is installed: a slower one is taken by name, never in silence.
    """
    import torch

    if dtype in (torch.float32, torch.bfloat16, torch.float16) and device.type in ("cpu", "cuda"):
        return device.type
    return "reference"
