"""What each backend can hold and follow, as data that is asked when a stream opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvsieve.errors import BackendError

if TYPE_CHECKING:
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.storage import Packing

__all__ = ["FLOATS", "Capabilities", "SelectionCapabilities"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the fast backends hold."""

DEVICES = {"cpu": "the CPU", "cuda": "a CUDA device"}
"""Types of devices in words."""


@dataclass(frozen=True)
class SelectionCapabilities:
    """Which selections a backend can follow.

    Attributes:
        rules: kinds of rules that it implements.
        definitions: whether it also follows a rule by the definition that the rule brings along.
        stored_keys: ``"post_rope"`` (as the model rotated them) and ``"pre_rope"`` where it can select.
        compressed: whether some of the keys may be compressed.
        page_bounds: whether it keeps bounds of blocks, and can judge blocks by them.
        split_pages: whether it can where tokens were taken out of a text, or texts were joined: their blocks are not whole.
        recycled: whether heads can read tokens that they chose before, by scores that it tells (:meth:`Store.run_with_sets`).
        heaviest_values: whether a query can add up the heaviest values alone (:meth:`Store.run_heaviest`).
        fetched: whether queries can read pieces of the text at distances that they are told (:meth:`Store.attend_pieces`).
    """

    rules: frozenset[str]
    definitions: bool = False
    stored_keys: frozenset[str] = frozenset({"post_rope", "pre_rope"})
    compressed: bool = True
    page_bounds: bool = True
    split_pages: bool = True
    recycled: bool = True
    heaviest_values: bool = True
    fetched: bool = True


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
        residents_suffice: whether a step that tells where residents lie, and no more, is enough for :meth:`Store.attend_pieces`.
        tells_lse: whether attention can tell its log-sum-exp (:meth:`Store.run_with_lse`), which a bank's answer is joined by.
        tiers: whether blocks may lie in a file (:class:`kvsieve.backends.tiers.HoldsTiers`).
        value_tiers: whether their values alone may.
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
    residents_suffice: bool = False
    tells_lse: bool = True
    tiers: bool = True
    value_tiers: bool = False

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

    def check_split_pages(self, what: str) -> None:
        """Raise BackendError if page bounds must be of an unbroken text, which ``what`` says this one is not."""
        if not self.selection.split_pages:
            raise BackendError(
                f"backend {self.name!r} keeps page bounds of whole blocks of an unbroken text, and {what}; use HiP, which reads "
                "keys, or backend='reference'"
            )

    def check_recycling(self, compressed: bool = False) -> None:
        """Raise BackendError if heads cannot read tokens that they chose at an earlier step, or not where some are compressed."""
        if not self.selection.recycled:
            raise BackendError(
                f"backend {self.name!r} lets no head read tokens that it chose at an earlier step; use HiP, or backend='reference'"
            )
        if compressed and not self.selection.compressed:
            raise BackendError(
                f"backend {self.name!r} lets heads read again what they chose of tokens as they came, and this policy compresses "
                "some; leave the storage rule out, or use backend='reference'"
            )

    def check_heaviest_values(self) -> None:
        """Raise BackendError if a query cannot add up the heaviest values alone."""
        if not self.selection.heaviest_values:
            raise BackendError(f"backend {self.name!r} adds up all values; use HiP to read fewer tokens, or backend='reference'")

    def check_fetching(self, compressed: bool = False) -> None:
        """Raise BackendError if queries cannot read pieces of the text, or compressed ones, at distances that they are told."""
        if not self.selection.fetched:
            raise BackendError(
                f"backend {self.name!r} reads no blocks at other distances than their own; use HiP, or backend='reference'"
            )
        if compressed and not self.selection.compressed:
            raise BackendError(
                f"backend {self.name!r} fetches tokens as they came, and this policy compresses some; leave the storage rule out, "
                "or use backend='reference'"
            )

    def check_lse(self) -> None:
        """Raise BackendError if attention cannot tell its log-sum-exp."""
        if not self.tells_lse:
            raise BackendError(
                f"backend {self.name!r} does not tell the log-sum-exp of its attention, and a bank's is joined to it by that; "
                "leave the MemoryBank out, or use backend='reference'"
            )

    def check_tiers(self, values_alone: bool = False) -> None:
        """Raise BackendError if all blocks must be in memory, or with ``values_alone`` if keys leave it with their values."""
        if values_alone and not self.value_tiers:
            raise BackendError(
                f"backend {self.name!r} moves keys and values together; leave values_alone out, or use backend='cpu'"
            )
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
