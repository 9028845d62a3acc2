"""The CUDA backend, and the only file that knows CuPy.

The store of a layer is slabs of torch tensors, head-major like the CPU's, and a table on the device that says where each block
lies. Kernels are compiled at first use and loaded with CuPy, run on torch's current stream, and get their scratch from torch's
allocator.

A step with few queries is planned once and uploaded once: one pinned buffer to one device buffer of stable address, for all layers.
Kernels read their counts from it, so a captured graph can be replayed with the next step's plan. Nothing waits for the device.

A chunk gathers the residents once, rotates them to where the policy shows them, and lets torch's fused attention do the matrix
work: whole where everything is seen, and for windows the middle that all queries of a band see, with the two ragged edges done
plainly.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends import HeldBytes, kernels, nvrtc
from kvsieve.backends.cuda_search import CudaSearch, StepRows
from kvsieve.backends.masses import of_chunk, of_items
from kvsieve.backends.parts import Columns, PartPlan, columns
from kvsieve.backends.reference import attend as naive_attend
from kvsieve.backends.reference import join, merge, pick
from kvsieve.budget import BLOCK
from kvsieve.errors import BackendError, ShapeError, StateError, UnsupportedError

if TYPE_CHECKING:
    from kvsieve._core import Moves, Step
    from kvsieve.backends import AttendCall
    from kvsieve.backends.nvrtc import Module
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.storage import Channels, Packing

__all__ = ["CudaBackend", "CudaStore", "CupyLauncher", "require"]

BAND = 256
"""Queries of a chunk that share one band of keys."""

FEW = 64
"""Queries of a step, at most, whose chosen keys are shared out among thread blocks."""

TIERS = ((32, 1), (128, 4), (1024, 16), (1 << 26, 64))
"""Blocks per slab below each block number: small budgets cost what they hold, long ones need few slabs."""

Partial = tuple[torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------------------------------------------------------------ launching


class _Stream:
    """A torch stream, as CuPy asks for it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class CupyLauncher:
    """Loads kernels with CuPy and starts them on torch's current stream."""

    def __init__(self) -> None:
        wheel = f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
        if not torch.cuda.is_available():
            raise BackendError(
                "backend 'cuda' needs an NVIDIA card, its driver, and a CUDA build of torch; torch finds no CUDA device here. "
                "Use backend='reference' on other devices, or a model on the CPU"
            )
        try:
            import cupy
        except ImportError as err:
            raise BackendError(
                f"backend 'cuda' needs CuPy: pip install {wheel} (for CUDA 13: pip install 'kvsieve[cuda]'), "
                f"or use backend='reference' ({err})"
            ) from err
        nvrtc.version()
        self._cupy = cupy
        self._functions: dict[tuple[Module, int], Any] = {}
        self._streams: dict[int, Any] = {}
        self._processors: dict[int, int] = {}

    def processors(self, device: torch.device) -> int:
        index = device.index or 0
        if index not in self._processors:
            self._processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
        return self._processors[index]

    def launch(
        self, module: Module, grid: kernels.Size, block: int, args: Sequence[kernels.Argument], device: torch.device
    ) -> None:
        function = self._functions.get((module, device.index)) or self._load(module, device)
        address = torch.cuda.current_stream(device).cuda_stream
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = self._cupy.cuda.Stream.from_external(_Stream(address))
        values = tuple([0 if a is None else a for a in args])
        if device.index == torch.cuda.current_device():
            function(grid, (block, 1, 1), values, stream=stream)
        else:
            with torch.cuda.device(device):
                function(grid, (block, 1, 1), values, stream=stream)

    def _load(self, module: Module, device: torch.device) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        made = nvrtc.compiled(module, 10 * major + minor)
        with torch.cuda.device(device):
            loaded = self._cupy.cuda.function.Module()
            loaded.load(made.cubin)
            function = loaded.get_function(made.symbols[module.expressions[0]])
        self._functions[module, device.index] = function
        return function


_lock = threading.Lock()


def require() -> None:
    """Make sure that kernels can be launched on this machine's card.

    Raises:
        BackendError: if there is no card, CuPy or NVRTC; the message says what to install.
    """
    with _lock:
        if "cuda" not in kernels._launchers:
            kernels.register("cuda", CupyLauncher())


def _upload(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``; the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------------- plans


class StepBuffer:
    """The integers of one step on one device, where every layer and every captured graph finds them.

    Sections: ``counts`` int32 ``[4]`` (new tokens, distinct shifts), ``starts`` int32 ``[items + 1]``, ``appends`` int32
    ``[tokens, 4]``, ``spans`` int32 ``[capacity, 4]``, ``shifts`` int64 ``[capacity]``. One upload fills them all.
    """

    def __init__(self, device: torch.device, items: int, tokens: int, spans: int) -> None:
        self.device, self.items, self.tokens, self.capacity = device, items, tokens, spans
        sizes = [2, (items + 2) // 2, 2 * tokens, 2 * spans, spans]  # in 8-byte words
        sizes = [size + size % 2 for size in sizes]
        self._starts = np.cumsum([0, *sizes])
        self._memory = torch.zeros(int(self._starts[-1]), dtype=torch.int64, device=device)
        pieces = [self._memory[a:b] for a, b in zip(self._starts[:-1], self._starts[1:])]
        self.counts = pieces[0].view(torch.int32)
        self.starts = pieces[1].view(torch.int32)[: items + 1]
        self.appends = pieces[2].view(torch.int32).view(-1, 4)[:tokens]
        self.spans = pieces[3].view(torch.int32).view(-1, 4)[:spans]
        self.shifts = pieces[4][:spans]
        self._tables: weakref.WeakKeyDictionary[LayerRope, torch.Tensor] = weakref.WeakKeyDictionary()
        self._turned: set[int] = set()

    def fill(
        self,
        appends: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        spans: npt.NDArray[np.int32],
        shifts: npt.NDArray[np.int64],
    ) -> None:
        """Upload a step."""
        used = int(self._starts[4]) + len(shifts) if len(spans) else int(self._starts[3])
        pinned = self.device.type == "cuda"
        staged = torch.empty(used, dtype=torch.int64, pin_memory=pinned)
        words = staged.numpy()
        halves = words.view(np.int32)
        at = [2 * int(s) for s in self._starts]
        halves[:4] = len(appends), len(shifts), 0, 0
        halves[at[1] : at[1] + len(starts)] = starts
        halves[at[2] : at[2] + appends.size] = appends.ravel()
        if len(spans):
            halves[at[3] : at[3] + spans.size] = spans.ravel()
            words[int(self._starts[4]) :] = shifts
        self._memory[:used].copy_(staged, non_blocking=True)
        self._turned.clear()

    def forget_turns(self) -> None:
        """Let the next layer that asks make the rotations again: a graph that is being captured must hold their launch."""
        self._turned.clear()

    def turns(self, rope: LayerRope, frequencies: torch.Tensor) -> torch.Tensor:
        """Rotations of the step's shifts, made by the first layer that asks."""
        table = self._tables.get(rope)
        if table is None:
            table = torch.empty(self.capacity, rope.rotary_dim, dtype=torch.float32, device=self.device)
            self._tables[rope] = table
        if id(rope) not in self._turned:
            kernels.turns(self.shifts, self.counts[1:2], frequencies, table)
            self._turned.add(id(rope))
        return table


class Plan:
    """One step on one device."""

    def __init__(self, step: Step, device: torch.device, buffers: dict[tuple[Any, ...], StepBuffer]) -> None:
        self.step, self.device = step, device
        table, appends = step.span_table(), step.append_table()
        few = table is not None
        starts, spans, shifts = (
            table if table is not None else (np.zeros(1, np.int32), np.zeros((0, 4), np.int32), np.zeros(0, np.int64))
        )
        self.most_spans = int(np.diff(starts).max()) if len(starts) > 1 else 0
        """Spans of the longest item."""
        self.splits: dict[tuple[Any, ...], int] = {}
        """See :meth:`CudaBackend.splits`."""
        self._spans = (starts, spans) if few else None
        self._rows: StepRows | None = None
        self._uploads: dict[tuple[Any, ...], torch.Tensor] = {}
        self.key_starts: npt.NDArray[np.int64] | None = None
        """Where each item's keys begin among the keys of all items, and their number; None without a fast path."""
        if few:
            lengths = (spans[:, 1] >> 8 & 255) - (spans[:, 1] & 255)
            self.key_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts]
        # Few queries: one buffer for each shape of input, so that a captured graph finds it again. It is replaced to grow.
        tokens = step.num_rows * step.num_queries if few else _round_up(len(appends))
        key = (device, step.num_rows, step.num_queries) if few else (device,)
        buffer = buffers.get(key)
        if buffer is None or buffer.tokens < tokens or buffer.capacity < len(spans):
            buffer = buffers[key] = StepBuffer(device, len(starts) - 1, tokens, _round_up(len(spans)) if few else 0)
        buffer.fill(appends, starts, spans, shifts)
        self.buffer = buffer
        copies = step.copy_table()
        self.copies = _upload(copies, device) if len(copies) else None
        self.written = sorted({*copies[:, 1].tolist(), *(block for _, _, block, _, _ in step.appends())})
        """Blocks that the step writes to."""
        self._parts: list[CudaPart] | None = None

    @property
    def parts(self) -> list[CudaPart]:
        """The parts of the step."""
        if self._parts is None:
            step = self.step
            self._parts = [CudaPart(self.device, PartPlan.of(p, step.new_lens[p.row])) for p in step.parts()]
        return self._parts

    def rows(self) -> StepRows:
        """All residents of each row, for a search. Where a layer's blocks lie is for the layer to say.

        Raises:
            BackendError: for keys that are stored unrotated, or packed.
            UnsupportedError: for a memory that does not keep every token where the model put it.
        """
        if self._rows is None:
            self._rows = self._find_rows()
        return self._rows

    def _find_rows(self) -> StepRows:
        step, first = self.step, [int(at) for at in self.step.first_new]
        if step.frame == "raw":
            raise BackendError(
                "backend 'cuda' searches keys as the model rotated them, and this policy stores them unrotated; "
                "search with a policy that moves no token, or use backend='reference'"
            )
        runs = self._rows_of_spans() if self._spans is not None else self._rows_of_parts()
        for row, mine in enumerate(runs):
            if step.new_lens[row] and (mine[:, 0] >= PACKED).any():
                raise BackendError(
                    "backend 'cuda' searches keys as they came, and some of these are packed; leave the packing out, "
                    "or use backend='reference'"
                )
            if step.new_lens[row] and int((mine[:, 2] - mine[:, 1]).sum()) != first[row] + step.new_lens[row]:
                raise UnsupportedError("a search needs a memory that keeps every token where the model put it")
        if self._spans is not None:
            starts, spans, items = self.buffer.starts, self.buffer.spans, step.num_queries
        else:
            ends = np.cumsum([0, *map(len, runs)]).astype(np.int32)
            spans = _upload(np.concatenate([_as_spans(mine) for mine in runs]).reshape(-1, 4), self.device)
            starts, items = _upload(ends, self.device), 1
        processors = kernels.launcher_of(self.device).processors(self.device)
        few = step.num_rows * step.num_queries <= FEW
        blocks = starts.new_empty((0, 4), dtype=torch.int64)
        return StepRows(kernels.Rows(blocks, starts, spans, items), first, step.new_lens, few, {}, self.upload, processors)

    def _rows_of_spans(self) -> list[npt.NDArray[np.int64]]:
        """Runs ``[n, 3]`` of each row, from what its last query reads."""
        assert self._spans is not None
        starts, spans = self._spans
        if (spans[:, 3] != 0).any() or (spans[:, 1] >> 16 & 1).any():
            raise UnsupportedError("a search needs a memory that keeps every token where the model put it")
        columns, found = self.step.num_queries, []
        for row in range(self.step.num_rows):
            mine = spans[starts[(row + 1) * columns - 1] : starts[(row + 1) * columns]].astype(np.int64)
            found.append(np.stack([mine[:, 0], mine[:, 1] & 255, mine[:, 1] >> 8 & 255], 1))
        return found

    def _rows_of_parts(self) -> list[npt.NDArray[np.int64]]:
        """Runs ``[n, 3]`` of each row: its residents, then its new tokens."""
        appends, found = self.step.append_table().astype(np.int64), []
        parts = self.step.parts()
        for row, count in enumerate(self.step.new_lens):
            mine = [part for part in parts if part.row == row]
            if count and len(mine) != 1:
                raise UnsupportedError("a search needs a memory that keeps every token where the model put it")
            held = np.zeros((0, 3), np.int64)
            for part in mine:
                if not (
                    np.array_equal(part.key_true(), part.key_positions())
                    and np.array_equal(part.query_true(), part.query_positions())
                ):
                    raise UnsupportedError("a search needs a memory that keeps every token where the model put it")
                held = np.stack(part.runs(), 1).astype(np.int64)
            block, slot = appends[appends[:, 0] == row][:, 2:].T
            begins = np.flatnonzero(np.diff(block, prepend=-1))
            new = np.stack([block[begins], slot[begins], slot[begins] + np.diff(begins, append=len(block))], 1)
            if len(held) and len(new) and held[-1, 0] == new[0, 0] and held[-1, 2] == new[0, 1]:
                new[0, 1] = held[-1, 1]
                held = held[:-1]
            found.append(np.concatenate([held, new]))
        return found

    def upload(self, values: npt.NDArray[np.int32]) -> torch.Tensor:
        """A copy on the device; one for equal values."""
        key = (values.shape, values.tobytes())
        if key not in self._uploads:
            self._uploads[key] = _upload(values, self.device)
        return self._uploads[key]


def _as_spans(runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Runs ``[n, 3]`` of a row as its spans."""
    block, lo, hi = runs.T
    return np.stack([block, lo | hi << 8, np.cumsum(hi - lo) - (hi - lo), np.zeros_like(lo)], 1).astype(np.int32)


def _round_up(count: int) -> int:
    """A capacity for ``count``: the next power of two, at least 256."""
    return max(256, 1 << max(count - 1, 0).bit_length())


class Runs:
    """Runs of slots on the device, plain and packed ones apart: int32 ``[n, 4]`` (block, lo, hi, tokens before), or None."""

    def __init__(self, runs: Columns, device: torch.device) -> None:
        blocks, lo, hi = runs
        ends = np.cumsum(hi - lo)
        self.tokens = int(ends[-1]) if len(ends) else 0
        at, packed = ends - (hi - lo), blocks >= PACKED
        table = np.stack([np.where(packed, blocks - PACKED, blocks), lo, hi, at], 1).astype(np.int32)
        self.plain = _upload(table[~packed], device) if not packed.all() else None
        self.packed = _upload(table[packed], device) if packed.any() else None


class CudaPart:
    """A part of a step, its integers on the device."""

    def __init__(self, device: torch.device, plan: PartPlan) -> None:
        self.plan, self.part = plan, plan.part
        self.num_old, self.num_queries = plan.num_old, plan.num_queries
        self.runs = Runs(plan.runs, device)
        self.query_true, self.key_true = self.part.query_true(), self.part.key_true()
        self._device = device
        self._true: Partial | None = None
        self._at: dict[str, Partial | None] = {}

    def true(self) -> Partial:
        """True positions of queries and keys, on the device."""
        if self._true is None:
            self._true = _upload(self.query_true, self._device), _upload(self.key_true, self._device)
        return self._true

    def positions(self, frame: str) -> Partial | None:
        """Where to rotate queries and keys to, on the device; None if nothing turns."""
        if frame not in self._at:
            at = self.plan.positions(frame)
            self._at[frame] = None if at is None else (_upload(at[0].numpy(), self._device), _upload(at[1].numpy(), self._device))
        return self._at[frame]

    def visible(self, queries: slice, keys: slice) -> torch.Tensor:
        """Which of these keys each of these queries sees: bool, on the device."""
        q_at, k_at = self.true()
        distance = q_at[queries, None] - k_at[None, keys]
        seen = (distance >= 0) & (distance >= self.part.far)
        return seen if self.part.near is None else seen & (distance < self.part.near)


# ---------------------------------------------------------------------------------------------------------------------------- store


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


class Table:
    """Integers about each block, on the host and, as far as they are known there, on the device."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.device, self.host = device, np.zeros((64, width), np.int64)
        self._tensor: torch.Tensor | None = None
        self._stale = True

    @property
    def tensor(self) -> torch.Tensor:
        """On the device. Its address changes only when it must grow."""
        if self._stale or self._tensor is None:
            if self._tensor is None or self._tensor.shape[0] < len(self.host):
                self._tensor = torch.zeros(self.host.shape, dtype=torch.int64, device=self.device)
            self._tensor.copy_(_upload(self.host, self.device), non_blocking=True)
            self._stale = False
        return self._tensor

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Rows to be changed."""
        while len(self.host) < first + count:
            self.host = np.concatenate([self.host, np.zeros_like(self.host)])
        self._stale = True
        return self.host[first : first + count]


class PackedStore:
    """One layer's packed blocks: slabs of rows and scales that come and go, which channels each block keeps, and the table of both.

    Blocks are counted from 0 here.
    """

    def __init__(self, packing: Packing, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.packing, self.shape, self.dtype, self.device = packing, shape, dtype, device
        self.format = kernels.Format(packing.key_kept, packing.key_bits, packing.value_bits, packing.group)
        self.format.check(shape[1], shape[2])
        self.table = Table(kernels.PACKED_COLUMNS, device)
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
            first, size = _extent(slab)
            if not in_use[first : first + size].any():
                del self._slabs[slab]
                self.table.rows(first, size)[:] = 0

    def keeps_pairs_of(self, rope: LayerRope) -> bool:
        """Whether keys can be rotated after they were packed."""
        return all(channels.keeps_pairs_of(rope) for channels in set(self._channels.values()))

    def pack(self, source: torch.Tensor, moves: npt.NDArray[np.int32], thin: bool = False) -> None:
        """Store tokens of ``source``, a table of plain blocks, in blocks with memory. Moves into one block keep their order."""
        order = np.argsort(moves[:, 1], kind="stable")
        moves = moves[order]
        starts = np.flatnonzero(np.diff(moves[:, 1], prepend=-1, append=-1)).astype(np.int32)
        if len(moves):
            up = _upload(moves, self.device), _upload(starts, self.device)
            kernels.pack(source, self.table.tensor, *up, *self.shape, self.dtype, self.format, thin)

    def apply(self, moves: npt.NDArray[np.int32]) -> None:
        """Move tokens between blocks. Bits are carried over; keys that are codes are read, all of them, and packed again."""
        for source, to in dict.fromkeys(map(tuple, moves[:, :2].tolist())):
            self.reserve(to, self.channels_of(source))
        table = self.table.tensor
        up = _upload(moves, self.device)
        if not self.format.key_bits:
            kernels.carry(table, up, self.shape[0], self.shape[2], self.dtype, self.format)
            return
        lens = moves[:, 3].astype(np.int64)
        at, slots = np.cumsum(lens) - lens, moves[:, 2] & 0xFFFF
        runs = np.stack([moves[:, 0], slots, slots + lens, at], 1).astype(np.int32)
        wide, tokens = self.format.wide(self.dtype), int(lens.sum())
        held = torch.empty(self.shape[0], tokens, wide, dtype=torch.float32, device=self.device)
        kernels.unpack(table, _upload(runs, self.device), held, None, *self.shape[1:], self.dtype, self.format)
        kernels.carry(table, up, self.shape[0], self.shape[2], self.dtype, self.format)
        again = np.stack([np.arange(len(moves)), moves[:, 1], moves[:, 2] >> 16 << 16, lens], 1).astype(np.int32)
        self.pack(_dense_blocks(held, None, at, self.device), again, thin=True)


class PackedChannels:
    """Kept channels of each head, on the device as packed.cuh has them: int16 ``[heads, 1 + wide]``."""

    def __init__(self, channels: Channels, wide: int, device: torch.device) -> None:
        self.channels, index = channels, channels.index.cpu()
        held = torch.zeros(index.shape[0], 1 + wide, dtype=torch.int16)
        held[:, 0] = torch.tensor(channels.pairs, dtype=torch.int16)
        held[:, 1 : 1 + index.shape[1]] = index.to(torch.int16)
        self.tensor = _upload(held.numpy(), device)
        self._legal: dict[LayerRope, bool] = {}

    def keeps_pairs_of(self, rope: LayerRope) -> bool:
        """Whether the first channels are whole pairs of ``rope``, and the others do not turn."""
        if rope not in self._legal:
            half, index = rope.rotary_dim // 2, self.channels.index.cpu()
            index = torch.where(index < 0, -1 - index, index)
            self._legal[rope] = all(
                bool((mine[2 * pairs :] >= rope.rotary_dim).all() and (mine[: 2 * pairs] < rope.rotary_dim).all())
                and torch.equal(mine[pairs : 2 * pairs], mine[:pairs] + (half if rope.layout == "half" else 1))
                for mine, pairs in zip(index, self.channels.pairs)
            )
        return self._legal[rope]


def _dense_blocks(k: torch.Tensor, v: torch.Tensor | None, at: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A table whose plain block ``i`` are the tokens from ``at[i]`` on of contiguous ``k``, ``v`` ``[heads, tokens, channels]``."""
    rows = np.zeros((len(at), 4), np.int64)
    rows[:, 0] = k.data_ptr() + at * k.shape[2] * k.element_size()
    rows[:, 1] = 0 if v is None else v.data_ptr() + at * v.shape[2] * v.element_size()
    rows[:, 2] = k.shape[1]
    return _upload(rows, device)


def _extent(slab: int) -> tuple[int, int]:
    """The first block of a slab, and how many it has."""
    first_block = first_slab = 0
    for end, size in TIERS:
        slabs = (end - first_block) // size
        if slab < first_slab + slabs:
            return first_block + (slab - first_slab) * size, size
        first_slab += slabs
        first_block = end
    raise BackendError(f"slab {slab} does not exist")


class CudaStore:
    """One layer's blocks: slabs ``[heads][tokens][dim]`` that come and go, and the table of where each block lies."""

    def __init__(self, backend: CudaBackend, k: torch.Tensor, v: torch.Tensor) -> None:
        self._backend = backend
        self.dtype, self.device = k.dtype, k.device
        self._shape = (k.shape[1], k.shape[3], v.shape[3])
        self._slabs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._table = Table(4, k.device)
        self._packed: PackedStore | None = None
        self._prepared: Plan | None = None

    @property
    def bytes_held(self) -> int:
        held = self.held()
        return held.plain_keys + held.plain_values + held.keys + held.values + held.scales + held.channels

    def held(self) -> HeldBytes:
        packed = (0, 0, 0, 0) if self._packed is None else self._packed.held()
        slabs = self._slabs.values()
        return HeldBytes(sum(k.nbytes for k, _ in slabs), sum(v.nbytes for _, v in slabs), *packed)

    @property
    def table(self) -> torch.Tensor:
        """Where each plain block lies, on the device."""
        return self._table.tensor

    def reserve(self, blocks: Iterable[int]) -> None:
        """Give these plain blocks memory."""
        heads, key_dim, value_dim = self._shape
        for block in blocks:
            slab, first, size = locate(block)
            if slab in self._slabs:
                continue
            tokens = size * BLOCK
            k = torch.empty(heads, tokens, key_dim, dtype=self.dtype, device=self.device)
            v = torch.empty(heads, tokens, value_dim, dtype=self.dtype, device=self.device)
            at = np.arange(size) * BLOCK * self.dtype.itemsize
            rows = self._table.rows(first, size)
            rows[:, 0], rows[:, 1] = k.data_ptr() + at * key_dim, v.data_ptr() + at * value_dim
            rows[:, 2], rows[:, 3] = tokens, 0
            self._slabs[slab] = (k, v)

    def free_unused(self, in_use: npt.NDArray[np.bool_], packed_in_use: npt.NDArray[np.bool_]) -> None:
        for slab in list(self._slabs):
            first, size = _extent(slab)
            if not in_use[first : first + size].any():
                del self._slabs[slab]
                self._table.rows(first, size)[:] = 0
        if self._packed is not None:
            self._packed.free_unused(packed_in_use)

    # ------------------------------------------------------------------------------------------------------------------- one step

    def prepare(self, step: Step) -> None:
        """What `run` does before it launches what a graph can hold: the plan is uploaded, blocks that will be written have memory,
        shared ones are copied.

        A captured graph of :meth:`run` can then be replayed, if no buffer had to grow meanwhile (see :meth:`addresses`).
        """
        plan = self._backend.plan(step, self.device)
        if self._prepared is plan:
            return
        self.reserve(plan.written)
        table = self.table
        if self._packed is not None:
            _ = self._packed.table.tensor
        if plan.copies is not None:
            kernels.move(table, plan.copies, *self._shape, self.dtype)
        self._prepared = plan

    def addresses(self, step: Step) -> tuple[int, ...]:
        """What a captured graph of this step has built in: it may be replayed while these stay the same."""
        buffer = self._backend.plan(step, self.device).buffer
        packed = 0 if self._packed is None else self._packed.table.tensor.data_ptr()
        return self.table.data_ptr(), packed, buffer.counts.data_ptr(), buffer.capacity

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        self._check(q, k, v)
        plan = self._backend.plan(step, self.device)
        if step.has_spans:
            self._append(k, v, plan)
            return self._few(q, k, v, plan, call)
        out = self._chunk(q, k, v, plan, call)
        self._append(k, v, plan)
        return out

    def run_sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, search: CudaSearch
    ) -> torch.Tensor:
        """As :meth:`run`, reading only sinks, window, and what ``search`` chooses between them.

        Keys are stored first, a chunk's as well, and read where they lie. After an error the choices are as before.

        Raises:
            BackendError: for keys that are stored unrotated, or packed.
            UnsupportedError: for a memory that does not keep every token where the model put it.
        """
        search.begin()
        self._check(q, k, v)
        plan = self._backend.plan(step, self.device)
        asked = plan.rows()
        self._append(k, v, plan)
        asked.rows = asked.rows._replace(blocks=self.table)
        return search.run(q, (self._shape[0], self._shape[2]), asked, call)

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        heads, key_dim, value_dim = self._shape
        for name, x, want in (("keys", k, (heads, key_dim)), ("values", v, (heads, value_dim))):
            if (x.shape[1], x.shape[3], x.dtype, x.device) != (*want, self.dtype, self.device):
                raise ShapeError(
                    f"this layer holds {name} of {want[0]} heads of size {want[1]} in {self.dtype} on {self.device}, "
                    f"got {x.shape[1]} heads of size {x.shape[3]} in {x.dtype} on {x.device}"
                )
        if q.dtype != self.dtype or q.device != self.device or q.shape[3] != key_dim or q.shape[1] % heads:
            raise ShapeError(
                f"queries must be [rows, a multiple of {heads}, queries, {key_dim}] in {self.dtype} on {self.device}, "
                f"got {tuple(q.shape)} in {q.dtype} on {q.device}"
            )

    def _append(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        self.prepare(plan.step)
        buffer = plan.buffer
        kernels.run_append(k, v, self.table, buffer.appends, buffer.counts, buffer.tokens)

    def _few(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, call: AttendCall) -> torch.Tensor:
        chosen = [p for p in plan.parts if p.part.top_k] if call.top_k and self._backend.selects else []
        sinks = None if call.sinks is None or chosen else call.sinks.detach().float().contiguous()
        out, lse, _ = self._attend_spans(q, plan, call, sinks, with_lse=bool(chosen))
        if lse is None:
            return out
        for row in range(q.shape[0]):
            new = slice(q.shape[2] - plan.step.new_lens[row], None)
            parts = [(out[row].float().transpose(0, 1), lse[row].transpose(0, 1))]
            mine = [p for p in chosen if p.part.row == row]
            parts += [self._selected(q[row], k[row, :, new], v[row, :, new], p, plan.step.frame, call) for p in mine]
            out[row] = merge(parts, call.sinks).transpose(0, 1).to(out.dtype)
        return out

    def _attend_spans(
        self,
        q: torch.Tensor,
        plan: Plan,
        call: AttendCall,
        sinks: torch.Tensor | None,
        key_starts: torch.Tensor | None = None,
        total_keys: int = 0,
        with_lse: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        heads, _, value_dim = self._shape
        raw, rope, buffer = plan.step.frame == "raw", call.rope, plan.buffer
        turns = in_block = None
        if rope is not None:
            frequencies, in_block = self._backend.rope(rope, self.device)
            turns = buffer.turns(self._backend.same(rope), frequencies)
        packed = self._packed
        if packed is not None and raw and rope is not None and not packed.keeps_pairs_of(rope):
            raise UnsupportedError(
                "keys that lost single channels of a rotary pair cannot be rotated; keep pairs, or the rotated frame"
            )
        bits = None if packed is None else (packed.format.key_bits, packed.format.value_bits)
        return kernels.run_attend(
            q if q.stride(-1) == 1 else q.contiguous(),
            self.table,
            buffer.starts,
            buffer.spans,
            turns,
            in_block,
            heads,
            value_dim,
            self._backend.splits(plan, heads, q.shape[1] // heads, q.shape[3], raw and rope is not None, bits),
            call.scale,
            call.softcap or 0.0,
            0 if rope is None else kernels.LAYOUTS[rope.layout],
            rope.factor**2 if rope is not None and raw else 1.0,
            raw and rope is not None,
            sinks,
            key_starts,
            total_keys,
            with_lse,
            None if packed is None else packed.table.tensor,
            None if packed is None else packed.format,
        )

    def attend_mass(self, q: torch.Tensor, step: Step, call: AttendCall) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Attention of a step whose tokens are stored, and the probability of every key.

        Returns:
            out ``[B, q, H, Dv]``; lse float32 ``[B, q, H]``; for each item (``row * q + query``) float32 ``[Hkv, keys in the order
            of the spans]``, summed over the query heads of a group.
        """
        plan = self._backend.plan(step, self.device)
        if plan.key_starts is None:
            raise ShapeError("this step is for the chunk path: it has no spans")
        sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
        starts = _upload(plan.key_starts, self.device)
        out, lse, mass = self._attend_spans(q, plan, call, sinks, starts, int(plan.key_starts[-1]))
        assert lse is not None
        assert mass is not None
        return out, lse, list(torch.split(mass, np.diff(plan.key_starts).tolist(), 1))

    def run_mass(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        self._check(q, k, v)
        if not step.has_spans:
            masses = of_chunk(self, q, k, step, call)
            return self.run(q, k, v, step, call), masses
        self._append(k, v, self._backend.plan(step, self.device))
        out, _, items = self.attend_mass(q, step, call)
        return out, of_items(items, step)

    # -------------------------------------------------------------------------------------------------------------------- a chunk

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, call: AttendCall) -> torch.Tensor:
        step, width = plan.step, q.shape[2]
        out = torch.zeros(q.shape[0], width, q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        rows: list[list[Partial]] = [[] for _ in range(q.shape[0])]
        for p in plan.parts:
            if p.part.top_k and not call.top_k:
                continue
            new, row = slice(width - p.num_queries, width), p.part.row
            if p.part.top_k:
                rows[row].append(self._selected(q[row, :, new], k[row, :, new], v[row, :, new], p, step.frame, call))
                continue
            keys, values = self._gather(p, k[row, :, new], v[row, :, new])
            queries, keys = self._turn(q[row, :, new], keys, p, step.frame, call.rope, slice(None), self.dtype)
            rows[row].append(_attend_part(queries, keys, values, p, call))
        for row, parts in enumerate(rows):
            if parts:
                merged = parts[0][0] if len(parts) == 1 and call.sinks is None else merge(parts, call.sinks)
                out[row, width - step.new_lens[row] :] = merged.transpose(0, 1).to(out.dtype)
        return out

    def _gather(self, p: CudaPart, new_k: torch.Tensor, new_v: torch.Tensor) -> Partial:
        """Keys ``[Hkv, n, D]`` and values of a part: its residents, then its new tokens (``[Hkv, m, D]``)."""
        lo, hi = p.part.new_range
        if p.num_old == 0:
            return new_k[:, lo:hi], new_v[:, lo:hi]
        k, v = self._read(p.runs)
        return torch.cat([k, new_k[:, lo:hi]], 1), torch.cat([v, new_v[:, lo:hi]], 1)

    def _turn(
        self, q: torch.Tensor, k: torch.Tensor, p: CudaPart, frame: str, rope: LayerRope | None, queries: slice, dtype: torch.dtype
    ) -> Partial:
        """Queries (those of the slice) and keys, rotated to where the policy shows them, in ``dtype``."""
        at = None if rope is None else p.positions(frame)
        if rope is None or at is None:
            return q.to(dtype), k.to(dtype)
        frequencies, _ = self._backend.rope(rope, self.device)
        layout, factor = kernels.LAYOUTS[rope.layout], rope.factor if frame == "raw" else 1.0
        q = kernels.rotate(_dense(q), at[0][queries].contiguous(), frequencies, layout, factor, dtype)
        return q, kernels.rotate(_dense(k), at[1], frequencies, layout, factor, dtype)

    def _selected(
        self, q: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, p: CudaPart, frame: str, call: AttendCall
    ) -> Partial:
        """A memory read by top-k, by the last query only: out ``[H, m, Dv]``, lse ``[H, m]``."""
        k, v = self._gather(p, new_k, new_v)
        # In float32, so that rounding does not choose.
        last, k = self._turn(q[:, -1:], k, p, frame, call.rope, slice(-1, None), torch.float32)
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        group = q.shape[0] // k.shape[0]
        logits = (last.view(k.shape[0], group, -1) @ k.transpose(1, 2)).flatten(0, 1) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~p.visible(slice(-1, None), slice(None)), -torch.inf)
        if p.part.top_k < logits.shape[1]:
            _, kth = kernels.top_k(logits, p.part.top_k)
            logits = logits.masked_fill(logits < kth[:, None], -torch.inf)
        total = torch.logsumexp(logits, -1)
        weights = torch.exp(logits - torch.where(total.isneginf(), 0.0, total)[:, None])
        out[:, -1] = (weights.view(k.shape[0], group, -1) @ v.float()).flatten(0, 1)
        lse[:, -1] = total
        return out, lse

    # ----------------------------------------------------------------------------------------------------------------- moving data

    def apply(self, moves: Moves) -> None:
        table = moves.table()
        packed = table[:, 0] >= PACKED
        if not packed.any():
            self.reserve(sorted(set(table[:, 1].tolist())))
            kernels.move(self.table, self._backend.moves(moves, table, self.device), *self._shape, self.dtype)
            return
        plain = table[~packed]
        self.reserve(sorted(set(plain[:, 1].tolist())))
        kernels.move(self.table, _upload(plain, self.device), *self._shape, self.dtype)
        self._packs().apply(_from_zero(table[packed], [0, 1]))

    def set_packing(self, packing: Packing) -> None:
        if self._packed is None:
            self._packed = PackedStore(packing, self._shape, self.dtype, self.device)
        elif self._packed.packing != packing:
            raise StateError("a layer's packing cannot change; open a new stream")

    def pack(self, moves: Moves, channels: Channels | int) -> None:
        packed = self._packs()
        if isinstance(channels, int):
            mine = packed.channels_of(channels - PACKED)
        else:
            heads, kept = self._shape[0], packed.format.kept
            if channels.index.shape != (heads, kept) or len(channels.pairs) != heads:
                raise ShapeError(f"channels must be [{heads}, {kept}], got {tuple(channels.index.shape)}, pairs {channels.pairs}")
            mine = PackedChannels(channels, packed.format.wide(self.dtype), self.device)
        table = _from_zero(moves.table(), [1])
        for block in sorted(set(table[:, 1].tolist())):
            packed.reserve(block, mine)
        packed.pack(self.table, table)

    def channels(self, block: int) -> Channels:
        return self._packs().channels_of(block - PACKED).channels

    def _packs(self) -> PackedStore:
        if self._packed is None:
            raise StateError("this layer was not told how to pack")
        return self._packed

    def permute(self, source: list[tuple[int, int, int]], keep: torch.Tensor, to: list[tuple[int, int, int]]) -> None:
        if not to:
            return
        chosen = [pick(x, keep) for x in self.read(source)]
        blocks, mine = (
            [block - PACKED for block, _, _ in to if block >= PACKED],
            [block for block, _, _ in source if block >= PACKED],
        )
        for block in blocks:
            self._packs().reserve(block, self._packs().channels_of(mine[0] - PACKED))
        self.write(to, *chosen)

    def read(self, runs: list[tuple[int, int, int]]) -> Partial:
        return self._read(Runs(columns(runs), self.device))

    def _read(self, runs: Runs) -> Partial:
        """Keys and values of ``runs`` at full width, in the layer's dtype."""
        heads, key_dim, value_dim = self._shape
        k = torch.empty(heads, runs.tokens, key_dim, dtype=self.dtype, device=self.device)
        v = torch.empty(heads, runs.tokens, value_dim, dtype=self.dtype, device=self.device)
        if runs.plain is not None:
            kernels.gather_into(k, v, self.table, runs.plain)
        if runs.packed is not None:
            packed = self._packs()
            kernels.unpack(packed.table.tensor, runs.packed, k, v, key_dim, value_dim, self.dtype, packed.format)
        return k, v

    def write(self, runs: list[tuple[int, int, int]], k: torch.Tensor, v: torch.Tensor) -> None:
        k, v = kernels.aligned(k.contiguous()), kernels.aligned(v.contiguous())
        blocks, lo, hi = columns(runs)
        at = np.cumsum(hi - lo) - (hi - lo)
        is_packed = blocks >= PACKED
        if not is_packed.all():
            self.reserve(sorted(set(blocks[~is_packed].tolist())))
            table = np.stack([blocks, lo, hi, at], 1)[~is_packed].astype(np.int32)
            kernels.scatter(k, v, self.table, _upload(table, self.device))
        if is_packed.any():
            numbers = np.arange(int(is_packed.sum()))
            moves = np.stack([numbers, blocks[is_packed] - PACKED, lo[is_packed] << 16, (hi - lo)[is_packed]], 1)
            for block in set(moves[:, 1].tolist()):
                self._packs().channels_of(block)
            self._packs().pack(_dense_blocks(k, v, at[is_packed], self.device), moves.astype(np.int32))


def _from_zero(moves: npt.NDArray[np.int32], fields: list[int]) -> npt.NDArray[np.int32]:
    """A copy of ``moves`` with packed blocks in ``fields`` counted from 0."""
    moves = moves.copy()
    moves[:, fields] -= PACKED
    return moves


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# --------------------------------------------------------------------------------------------------- torch's attention, for chunks


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> Partial:
    """Out ``[H, m, Dv]`` and lse ``[H, m]`` of ``q`` ``[H, m, D]`` over all keys, or, causal, over as many keys as queries."""
    heads, m, dim = q.shape
    group = heads // k.shape[0]
    if causal:
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    else:
        # Without a mask the queries of a group are just more queries: keys need not be repeated.
        q = q.reshape(k.shape[0], group * m, dim)
    out: torch.Tensor
    lse: torch.Tensor
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q[None].float(), k[None].float(), v[None].float(), 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q[None], k[None], v[None], None, True, 0.0, causal, scale=scale)[:2]
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q[None], k[None], v[None], 0.0, causal, scale=scale)[:2]
    return out[0].reshape(heads, m, -1).float(), lse[0, :, : q.shape[1]].reshape(heads, m)


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: CudaPart, call: AttendCall, queries: slice, keys: slice
) -> Partial:
    return naive_attend(
        q[:, queries].float(), k[:, keys].float(), v[:, keys].float(), p.visible(queries, keys), call.scale, call.softcap
    )


def _attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: CudaPart, call: AttendCall) -> Partial:
    """Attention of a chunk to one part: float32 out ``[H, m, Dv]``, lse ``[H, m]``."""
    bands = [slice(lo, min(lo + BAND, q.shape[1])) for lo in range(0, q.shape[1], BAND)]
    if p.part.far or call.softcap is not None or k.shape[-1] != v.shape[-1]:
        return _stack([_plain(q, k, v, p, call, band, slice(None)) for band in bands])
    if p.part.near is None:
        old = p.num_old
        pieces = [_fused(q, k[:, :old], v[:, :old], call.scale)] if old else []
        if k.shape[1] > old:
            pieces.append(_fused(q, k[:, old:], v[:, old:], call.scale, causal=True))
        return join(pieces)
    return _stack([_attend_band(q, k, v, p, call, band) for band in bands])


def _attend_band(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: CudaPart, call: AttendCall, band: slice) -> Partial:
    """Queries of one band over a window: the keys that all of them see go to the fused kernel, those that some see do not."""
    first, last = int(p.query_true[band.start]), int(p.query_true[band.stop - 1])
    near = p.part.near or 0
    at = p.key_true
    begin, middle = (int(np.searchsorted(at, edge - near, side="right")) for edge in (first, last))
    after, end = (int(np.searchsorted(at, edge, side="right")) for edge in (first, last))
    if middle >= after:
        return _plain(q, k, v, p, call, band, slice(begin, end))
    pieces = [_fused(q[:, band], k[:, middle:after], v[:, middle:after], call.scale)]
    pieces += [_plain(q, k, v, p, call, band, keys) for keys in (slice(begin, middle), slice(after, end)) if keys.stop > keys.start]
    return join(pieces)


def _stack(bands: list[Partial]) -> Partial:
    """Bands of queries, one after another."""
    return torch.cat([out for out, _ in bands], 1), torch.cat([lse for _, lse in bands], 1)


# -------------------------------------------------------------------------------------------------------------------------- backend


class _Local(threading.local):
    """What one thread's forward has planned: a fork on another thread must not overwrite it."""

    def __init__(self) -> None:
        self.plans: dict[torch.device, Plan] = {}
        self.buffers: dict[tuple[Any, ...], StepBuffer] = {}
        self.moves: tuple[Moves, dict[torch.device, torch.Tensor]] | None = None


class CudaBackend:
    """CUDA kernels for tensors on a card in float32, bfloat16 and float16.

    Raises:
        BackendError: if there is no card, CuPy or NVRTC; the message says what to install.
    """

    name = "cuda"
    wants_parts = False

    device_type = "cuda"
    """The type of device whose tensors this backend holds."""

    def __init__(self) -> None:
        require()
        self.selects = True
        self._local = _Local()
        self._ropes: dict[LayerRope, dict[torch.device, Partial]] = {}
        self._same: weakref.WeakKeyDictionary[LayerRope, LayerRope] = weakref.WeakKeyDictionary()

    def plan(self, step: Step, device: torch.device) -> Plan:
        """The step's integers on ``device``: made and uploaded once, found by all layers."""
        plan = self._local.plans.get(device)
        if plan is None or plan.step is not step:
            plan = self._local.plans[device] = Plan(step, device, self._local.buffers)
        return plan

    def moves(self, moves: Moves, table: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
        """The moves on ``device``: uploaded once, found by all layers."""
        if self._local.moves is None or self._local.moves[0] is not moves:
            self._local.moves = (moves, {})
        held = self._local.moves[1]
        if device not in held:
            held[device] = _upload(table, device)
        return held[device]

    def rope(self, rope: LayerRope, device: torch.device) -> Partial:
        """A rotation on ``device``: its frequencies float64 ``[pairs]``; float32 ``[64, 2 * pairs]``, those of a block's slots."""
        held = self._ropes.setdefault(self.same(rope), {})
        if device not in held:
            frequencies = rope.inv_freq.to(device=device, dtype=torch.float64).contiguous()
            table = torch.empty(BLOCK, rope.rotary_dim, dtype=torch.float32, device=device)
            kernels.turns(torch.arange(BLOCK, device=device), None, frequencies, table)
            held[device] = frequencies, table
        return held[device]

    def same(self, rope: LayerRope) -> LayerRope:
        """The first rope with these frequencies: layers of a model have equal ones, and need their tables made once."""
        found = self._same.get(rope)
        if found is None:
            by_value = (other for other in self._ropes if torch.equal(other.inv_freq, rope.inv_freq))
            found = self._same[rope] = next(by_value, rope)
        return found

    def splits(
        self, plan: Plan, kv_heads: int, group: int, key_dim: int, raw: bool = False, bits: tuple[int, int] | None = None
    ) -> int:
        """Thread blocks per query and head: as many as fill the card once, at most one per span."""
        found = plan.splits.get((kv_heads, group, key_dim, raw, bits))
        if found is not None:
            return found
        heads, subsets = kernels.heads_of(group, key_dim)
        resident = kernels.resident(group, key_dim, raw, bits)
        others = kv_heads * -(-group // (heads * subsets)) * max(plan.buffer.items, 1)
        fill = kernels.launcher_of(plan.device).processors(plan.device) * resident // others
        # Beyond the smallest capacity by powers of two, so that a growing memory changes the shape of a launch seldom.
        most = plan.most_spans if plan.most_spans <= 256 else _round_up(plan.most_spans)
        found = plan.splits[kv_heads, group, key_dim, raw, bits] = max(1, min(fill, most))
        return found

    def check_layer(self, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
        """Raise BackendError if a layer like this cannot be held."""
        if device.type != self.device_type:
            raise BackendError(f"backend 'cuda' holds tensors on a CUDA device, not on {device}; use 'cpu' or 'reference'")
        kernels.check_dims(dtype, key_dim, value_dim)

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> CudaStore:
        self.check_layer(k.device, k.dtype, k.shape[3], v.shape[3])
        return CudaStore(self, k, v)

    def check_search(self, rule: SparseSelection, frame: str, packs: bool) -> None:
        """Raise BackendError if ``rule`` cannot be followed over keys in this frame, or over packed ones."""
        if rule.bounded:
            raise BackendError("backend 'cuda' keeps no bounds of blocks; use HiP or InfiniteHiP, or backend='reference'")
        CudaSearch(rule)
        if frame == "raw":
            raise BackendError(
                "backend 'cuda' searches keys as the model rotated them, and this policy stores them unrotated; leave out "
                "extend= and policies that move tokens, such as SirLLM, or use backend='reference'"
            )
        if packs:
            raise BackendError(
                "backend 'cuda' searches keys as they came, and this policy packs some; leave the packing out, or use "
                "backend='reference'"
            )

    def make_search(self, rule: SparseSelection) -> CudaSearch:
        """The choices of one layer under ``rule``, for stores of this backend.

        Raises:
            PolicyError: numbers that cannot be right.
            BackendError: more than the kernels can follow.
        """
        return CudaSearch(rule)

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return kernels.surprisal(logits, ids)
