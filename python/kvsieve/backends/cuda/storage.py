"""Where a layer's blocks lie: slabs of torch tensors that come and go, and on the device a table of their addresses.

Slabs are head-major like the CPU's: ``[heads][tokens][dim]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends.cuda.buffers import Table, upload
from kvsieve.backends.cuda.ops.carry import carry
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.pack import pack
from kvsieve.backends.cuda.ops.page_bounds import PageBounds
from kvsieve.backends.cuda.ops.unpack import unpack
from kvsieve.budget import BLOCK
from kvsieve.errors import BackendError, StateError

if TYPE_CHECKING:
    from kvsieve.facts import LayerRope
    from kvsieve.policy.storage import Channels, Packing

__all__ = ["PackedChannels", "PackedStore", "PlainStore", "Shape", "dense_blocks", "extent", "locate"]

Shape = tuple[int, int, int]
"""Heads, channels of a key, channels of a value."""

TIERS = ((32, 1), (128, 4), (1024, 16), (1 << 26, 64))
"""Blocks per slab below each block number: small budgets cost what they hold, long ones need few slabs."""


def locate(block: int) -> tuple[int, int, int]:
    """The slab of a block, the first block of that slab, and how many blocks the slab has."""
    first_block = first_slab = 0
    for end, size in TIERS:
        if block < end:
            at = (block - first_block) // size
            return first_slab + at, first_block + at * size, size
        first_slab += (end - first_block) // size
        first_block = end
    raise BackendError(f"block {block} is beyond {TIERS[-1][0]}, the most that a store can have")


def extent(slab: int) -> tuple[int, int]:
    """The first block of a slab, and how many it has."""
    first_block = first_slab = 0
    for end, size in TIERS:
        slabs = (end - first_block) // size
        if slab < first_slab + slabs:
            return first_block + (slab - first_slab) * size, size
        first_slab += slabs
        first_block = end
    raise BackendError(f"slab {slab} does not exist")


class PlainStore:
    """One layer's plain blocks: slabs, and the table of where each block lies.

    Attributes:
        apart: whether every block has a slab of its own, so that it can go alone; said before there are any.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.apart = False
        self.slabs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.table = Table(4, device)
        self.bounds: dict[int, torch.Tensor] = {}
        """Of each slab whose blocks were judged by them: ``[blocks, heads, 2, channels of a key]``."""
        self._bounded = np.zeros(0, np.bool_)

    def held(self) -> tuple[int, int]:
        """Bytes of keys and of values."""
        return sum(k.nbytes for k, _ in self.slabs.values()), sum(v.nbytes for _, v in self.slabs.values())

    def reserve(self, blocks: Sequence[int]) -> None:
        """Give these blocks memory. They are about to be written, so that bounds of their keys are void."""
        heads, key_dim, value_dim = self.shape
        if len(self._bounded) and len(blocks):
            known = np.asarray(blocks)
            self._bounded[known[known < len(self._bounded)]] = False
        for block in blocks:
            slab, first, size = self._locate(block)
            if slab in self.slabs:
                continue
            tokens = size * BLOCK
            k = torch.empty(heads, tokens, key_dim, dtype=self.dtype, device=self.device)
            v = torch.empty(heads, tokens, value_dim, dtype=self.dtype, device=self.device)
            at = np.arange(size) * BLOCK * self.dtype.itemsize
            rows = self.table.rows(first, size)
            rows[:, 0], rows[:, 1] = k.data_ptr() + at * key_dim, v.data_ptr() + at * value_dim
            rows[:, 2], rows[:, 3] = tokens, 0
            self.slabs[slab] = (k, v)

    def free_unused(self, in_use: npt.NDArray[np.bool_]) -> None:
        """Give back slabs none of whose blocks is in use."""
        for slab in list(self.slabs):
            first, size = self._extent(slab)
            if not in_use[first : first + size].any():
                del self.slabs[slab]
                self.bounds.pop(slab, None)
                self._bounded[first : first + size] = False
                self.table.rows(first, size)[:] = 0

    def _locate(self, block: int) -> tuple[int, int, int]:
        """The slab of a block, and its first block and size."""
        return (block, block, 1) if self.apart else locate(block)

    def _extent(self, slab: int) -> tuple[int, int]:
        return (slab, 1) if self.apart else extent(slab)

    def block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block that has memory of its own."""
        return self.slabs[block]

    def drop(self, block: int) -> None:
        """Give back a block's own memory. Its bounds are made again when it is back."""
        del self.slabs[block]
        self.bounds.pop(block, None)
        self._bounded[block : block + 1] = False
        self.table.rows(block, 1)[:] = 0

    def bound(self, blocks: npt.NDArray[np.int64]) -> None:
        """Have the bounds of these blocks, which are full: of those that have none yet."""
        size = len(self.table.host)
        if len(self._bounded) < size:
            self._bounded = np.concatenate([self._bounded, np.zeros(size - len(self._bounded), np.bool_)])
        missing = np.unique(blocks[~self._bounded[blocks]])
        if not len(missing):
            return
        for slab in dict.fromkeys(self._locate(block)[0] for block in missing.tolist()):
            self._keep_bounds(slab)
        which = upload(missing.astype(np.int32), self.device)
        PageBounds(self.table.tensor, which, self.shape[0], self.shape[1], self.dtype).launch()
        self._bounded[missing] = True

    def _keep_bounds(self, slab: int) -> None:
        """Give the bounds of a slab's blocks memory."""
        if slab in self.bounds:
            return
        (first, size), (heads, key_dim, _) = self._extent(slab), self.shape
        made = self.bounds[slab] = torch.empty(size, heads, 2, key_dim, dtype=self.dtype, device=self.device)
        self.table.rows(first, size)[:, 3] = made.data_ptr() + np.arange(size) * made[0].nbytes


class PackedStore:
    """One layer's packed blocks: slabs of rows and scales that come and go, which channels each block keeps, and the table of both.

    Blocks are counted from 0 here.
    """

    def __init__(self, packing: Packing, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.packing, self.shape, self.dtype, self.device = packing, shape, dtype, device
        self.format = Format(packing.key_kept, packing.key_bits, packing.value_bits, packing.group)
        self.format.check(shape[1], shape[2])
        self.table = Table(PACKED_COLUMNS, device)
        self._slabs: dict[int, tuple[torch.Tensor, ...]] = {}
        self._channels: dict[int, PackedChannels] = {}

    def held(self) -> tuple[int, int, int, int]:
        """Bytes of keys, values, scales and channels. Rows of keys are counted with what fills them up to whole vectors."""
        keys, key_scales, values, value_scales = (sum(slab[i].nbytes for slab in self._slabs.values()) for i in range(4))
        sets = {id(c): c.tensor.nbytes for c in self._channels.values()}
        return keys, values, key_scales + value_scales, sum(sets.values())

    def reserve(self, block: int, channels: PackedChannels) -> None:
        """Give a block memory and channels."""
        slab, first, size = locate(block)
        if slab not in self._slabs:
            heads, group = self.shape[0], self.format.group
            key, key_scale, value, value_scale = self.format.rows(self.dtype, self.shape[2])
            of_block = (key * BLOCK, key_scale * BLOCK // group, value * BLOCK, value_scale * BLOCK)
            made = tuple(torch.empty(heads * size * n, dtype=torch.uint8, device=self.device) for n in of_block)
            rows = self.table.rows(first, size)
            for column, (x, n) in enumerate(zip(made, of_block)):
                rows[:, column] = x.data_ptr() + np.arange(size) * n if n else 0
            rows[:, 4:] = 0
            rows[:, 5] = size * BLOCK
            self._slabs[slab] = made
        if self._channels.get(block) is not channels:
            self._channels[block] = channels
            self.table.rows(block, 1)[0, 4] = channels.tensor.data_ptr()

    def channels_of(self, block: int) -> PackedChannels:
        """The channels of a block that was packed."""
        found = self._channels.get(block)
        if found is None:
            raise StateError(f"block {block + PACKED} was never packed")
        return found

    def free_unused(self, in_use: npt.NDArray[np.bool_]) -> None:
        used = set(np.flatnonzero(in_use).tolist())
        self._channels = {block: channels for block, channels in self._channels.items() if block in used}
        for slab in list(self._slabs):
            first, size = extent(slab)
            if not in_use[first : first + size].any():
                del self._slabs[slab]
                self.table.rows(first, size)[:] = 0

    def keeps_pairs_of(self, rope: LayerRope) -> bool:
        """Whether keys can be rotated after they were packed."""
        return all(channels.keeps_pairs_of(rope) for channels in set(self._channels.values()))

    def pack(self, source: torch.Tensor, moves: npt.NDArray[np.int32], pruned: bool = False) -> None:
        """Store tokens of ``source``, a table of plain blocks, in blocks with memory. Moves into one block keep their order."""
        order = np.argsort(moves[:, 1], kind="stable")
        moves = moves[order]
        starts = np.flatnonzero(np.diff(moves[:, 1], prepend=-1, append=-1)).astype(np.int32)
        if len(moves):
            up = upload(moves, self.device), upload(starts, self.device)
            pack(source, self.table.tensor, *up, *self.shape, self.dtype, self.format, pruned)

    def apply(self, moves: npt.NDArray[np.int32]) -> None:
        """Move tokens between blocks. Bits are carried over; keys that are codes are read, all of them, and packed again."""
        for source, to in dict.fromkeys(map(tuple, moves[:, :2].tolist())):
            self.reserve(to, self.channels_of(source))
        table = self.table.tensor
        up = upload(moves, self.device)
        if not self.format.key_bits:
            carry(table, up, self.shape[0], self.shape[2], self.dtype, self.format)
            return
        lens = moves[:, 3].astype(np.int64)
        at, slots = np.cumsum(lens) - lens, moves[:, 2] & 0xFFFF
        runs = np.stack([moves[:, 0], slots, slots + lens, at], 1).astype(np.int32)
        wide, tokens = self.format.wide(self.dtype), int(lens.sum())
        held = torch.empty(self.shape[0], tokens, wide, dtype=torch.float32, device=self.device)
        unpack(table, upload(runs, self.device), held, None, *self.shape[1:], self.dtype, self.format)
        carry(table, up, self.shape[0], self.shape[2], self.dtype, self.format)
        again = np.stack([np.arange(len(moves)), moves[:, 1], moves[:, 2] >> 16 << 16, lens], 1).astype(np.int32)
        self.pack(dense_blocks(held, None, at, self.device), again, pruned=True)


class PackedChannels:
    """Kept channels of each head, on the device as packed.cuh has them: int16 ``[heads, 1 + wide]``."""

    def __init__(self, channels: Channels, wide: int, device: torch.device) -> None:
        self.channels, index = channels, channels.index.cpu()
        held = torch.zeros(index.shape[0], 1 + wide, dtype=torch.int16)
        held[:, 0] = torch.tensor(channels.pairs, dtype=torch.int16)
        held[:, 1 : 1 + index.shape[1]] = index.to(torch.int16)
        self.tensor = upload(held.numpy(), device)
        self._legal: dict[LayerRope, bool] = {}

    def keeps_pairs_of(self, rope: LayerRope) -> bool:
        """Whether the first channels are whole pairs of ``rope``, and the others do not rotate."""
        if rope not in self._legal:
            half, index = rope.rotary_dim // 2, self.channels.index.cpu()
            index = torch.where(index < 0, -1 - index, index)
            self._legal[rope] = all(
                bool((mine[2 * pairs :] >= rope.rotary_dim).all() and (mine[: 2 * pairs] < rope.rotary_dim).all())
                and torch.equal(mine[pairs : 2 * pairs], mine[:pairs] + (half if rope.layout == "half" else 1))
                for mine, pairs in zip(index, self.channels.pairs)
            )
        return self._legal[rope]


def dense_blocks(k: torch.Tensor, v: torch.Tensor | None, at: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A table whose plain block ``i`` are the tokens from ``at[i]`` on of contiguous ``k``, ``v`` ``[heads, tokens, channels]``."""
    rows = np.zeros((len(at), 4), np.int64)
    rows[:, 0] = k.data_ptr() + at * k.shape[2] * k.element_size()
    rows[:, 1] = 0 if v is None else v.data_ptr() + at * v.shape[2] * v.element_size()
    rows[:, 2] = k.shape[1]
    return upload(rows, device)
