"""One layer's keys and values on a GPU: decode attention in place, prefill through torch's fused attention.

A prefill gathers the residents once and rotates them to where the policy shows them. Nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends.attention import Partial, merge, total
from kvsieve.backends.base import HeldBytes, Runs
from kvsieve.backends.cuda.buffers import DeviceRuns, upload
from kvsieve.backends.cuda.ops.angles import Angles
from kvsieve.backends.cuda.ops.append import Append
from kvsieve.backends.cuda.ops.attend import SUMMED, Attend
from kvsieve.backends.cuda.ops.gather import copy_runs
from kvsieve.backends.cuda.ops.launch import LAYOUTS, aligned
from kvsieve.backends.cuda.ops.move import Move, move
from kvsieve.backends.cuda.ops.rotate import rotate
from kvsieve.backends.cuda.ops.scatter import scatter
from kvsieve.backends.cuda.ops.top_k import top_k
from kvsieve.backends.cuda.ops.unpack import unpack
from kvsieve.backends.cuda.pieces import Held, attend_pieces
from kvsieve.backends.cuda.plan import splits
from kvsieve.backends.cuda.prefill import attend_part
from kvsieve.backends.cuda.storage import PackedChannels, PackedStore, PlainStore, dense_blocks
from kvsieve.backends.cuda.tier import KeepsOnHost
from kvsieve.backends.ranking import best_summaries
from kvsieve.backends.runs import columns, pick
from kvsieve.errors import ShapeError, StateError, UnsupportedError
from kvsieve.locks import shared_lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsieve._core import Moves, Residents, Step
    from kvsieve.backends.base import AttendCall, Attended
    from kvsieve.backends.cuda.context import Context
    from kvsieve.backends.cuda.plan import DevicePart, Plan
    from kvsieve.backends.cuda.selection import CudaSelection, Turns
    from kvsieve.facts import LayerRope
    from kvsieve.policy.select import Piece
    from kvsieve.policy.storage import Channels, Packing

__all__ = ["CudaStore", "Keys"]

SpansResult = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Out ``[B, q, H, Dv]``; lse float32 ``[B, q, H]``; attention scores float32 ``[Hkv, keys]``."""


class Keys(NamedTuple):
    """Where each item's keys begin among all of them, int64 ``[items + 1]``, how many there are, and what is told of each."""

    starts: torch.Tensor
    total: int
    told: int = SUMMED


class CudaStore(KeepsOnHost):
    """One layer's plain and packed blocks."""

    def __init__(self, context: Context, k: torch.Tensor, v: torch.Tensor) -> None:
        self._context = context
        self.dtype, self.device = k.dtype, k.device
        self._shape = (k.shape[1], k.shape[3], v.shape[3])
        self.plain = PlainStore(self._shape, k.dtype, k.device)
        self._packed: PackedStore | None = None
        self._prepared: Plan | None = None
        self._lock = shared_lock()

    @property
    def bytes_held(self) -> int:
        return self.held().total

    def held(self) -> HeldBytes:
        packed = (0, 0, 0, 0) if self._packed is None else self._packed.held()
        return HeldBytes(*self.plain.held(), *packed, bounds=sum(x.nbytes for x in self.plain.bounds.values()))

    @property
    def table(self) -> torch.Tensor:
        """Where each plain block lies, on the device."""
        if self._tier is not None:
            self._tier.side.join()
        return self.plain.table.tensor

    def free_unused(self, in_use: npt.NDArray[np.bool_], packed_in_use: npt.NDArray[np.bool_]) -> None:
        with self._lock:
            if self._tier is not None:
                self._tier.free(lambda block: block < len(in_use) and bool(in_use[block]))
            self.plain.free_unused(in_use)
        if self._packed is not None:
            self._packed.free_unused(packed_in_use)

    # ------------------------------------------------------------------------------------------------------------------- one step

    def prepare(self, step: Step) -> None:
        """What `run` does before it launches what a graph can hold: the plan is uploaded, blocks that will be written have memory,
        shared ones are copied.

        A captured graph of :meth:`run` can then be replayed, if no buffer had to grow meanwhile (see :meth:`addresses`).
        """
        self._prepare(self._context.plan(step, self.device))

    def _prepare(self, plan: Plan) -> None:
        if self._prepared is plan:
            return
        self._change(plan.copied, plan.ends)
        self.plain.reserve(plan.written)
        table = self.table
        if self._packed is not None:
            _ = self._packed.table.tensor
        if plan.copies is not None:
            Move(table, plan.copies, *self._shape, self.dtype).launch()
        self._prepared = plan

    def addresses(self, step: Step) -> tuple[int, ...]:
        """What a captured graph of this step has built in: it may be replayed while these stay the same."""
        buffer = self._context.plan(step, self.device).buffer
        packed = 0 if self._packed is None else self._packed.table.tensor.data_ptr()
        return self.table.data_ptr(), packed, buffer.counts.data_ptr(), buffer.capacity

    def forget_rotations(self, step: Step) -> None:
        """Let the next layer that asks make the step's rotations again: a graph that is being captured must hold their launch."""
        self._context.plan(step, self.device).buffer.forget_rotations()

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        self._check(q, k, v)
        plan = self._readable(step)
        if step.has_spans:
            self._append(k, v, plan)
            return self._decode(q, k, v, plan, call)
        out = self._prefill(q, k, v, plan, call)
        self._append(k, v, plan)
        return out

    def run_selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, selection: CudaSelection
    ) -> torch.Tensor:
        """As :meth:`run`, reading only sinks, window, and what ``selection`` chooses between them.

        Keys are stored first, a chunk's as well, and read where they lie. After an error the choices are as before.

        Raises:
            BackendError: for compressed keys.
            UnsupportedError: for post-RoPE keys of a memory that does not keep every token where the model put it; for pre-RoPE
                ones that are not shown at their numbers among the residents.
        """
        selection.begin()
        self._check(q, k, v)
        plan = self._readable(step)
        asked = plan.residents()
        raw = step.stored_keys == "pre_rope"
        if not raw:
            asked.unbroken()
        elif not call.consecutive:
            asked.check_numbered()
        self._append(k, v, plan)
        if selection.rule.page_bounds:
            self.plain.bound(asked.whole_blocks())
        asked.residents = asked.residents._replace(blocks=self.table)
        return selection.run(q, (self._shape[0], self._shape[2]), asked, call, self._turns(call.rope) if raw else None)

    def _turns(self, rope: LayerRope | None) -> Turns | None:
        """Turns of as many positions as are asked for."""
        if rope is None:
            return None
        return lambda count: Angles(self._context.angles(rope, self.device, count), LAYOUTS[rope.layout], rope.factor**2)

    def _readable(self, step: Step) -> Plan:
        """The plan of a step, all that it can read being on the device.

        Raises:
            StateError: if it is not.
        """
        plan = self._context.plan(step, self.device)
        self._check_there(plan)
        return plan

    def _check_stored(self, k: torch.Tensor, v: torch.Tensor) -> None:
        (heads, key_dim, value_dim), dtype, device = self._shape, self.dtype, self.device
        for name, x, dim in (("keys", k, key_dim), ("values", v, value_dim)):
            _, its_heads, _, its_dim = x.shape
            if its_heads != heads or its_dim != dim or x.dtype is not dtype or x.device != device:
                raise ShapeError(
                    f"this layer holds {name} of {heads} heads of size {dim} in {dtype} on {device}, "
                    f"got {its_heads} heads of size {its_dim} in {x.dtype} on {x.device}"
                )

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._check_stored(k, v)
        (heads, key_dim, _), dtype, device = self._shape, self.dtype, self.device
        _, query_heads, _, its_dim = q.shape
        if q.dtype is not dtype or q.device != device or its_dim != key_dim or query_heads % heads:
            raise ShapeError(
                f"queries must be [rows, a multiple of {heads}, queries, {key_dim}] in {dtype} on {device}, "
                f"got {tuple(q.shape)} in {q.dtype} on {q.device}"
            )

    def _append(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        self._prepare(plan)
        buffer = plan.buffer
        Append(k, v, self.table, buffer.appends, buffer.counts, buffer.tokens).launch()

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, call: AttendCall) -> torch.Tensor:
        chosen = [p for p in plan.parts if p.part.top_k] if call.top_k else []
        sink_logits = None if chosen else call.sinks
        out, lse, _ = self.attend_spans(q, plan, call, sink_logits, with_lse=bool(chosen))
        if lse is None:
            return out
        for row in range(q.shape[0]):
            new = slice(q.shape[2] - plan.step.new_lens[row], None)
            parts = [(out[row].float().transpose(0, 1), lse[row].transpose(0, 1))]
            mine = [p for p in chosen if p.part.row == row]
            parts += [self._selected(q[row], k[row, :, new], v[row, :, new], p, plan.step.stored_keys, call) for p in mine]
            out[row] = merge(parts, call.sink_logits).transpose(0, 1).to(out.dtype)
        return out

    def attend_spans(
        self,
        q: torch.Tensor,
        plan: Plan,
        call: AttendCall,
        sink_logits: torch.Tensor | None = None,
        keys: Keys | None = None,
        with_lse: bool = False,
    ) -> SpansResult:
        """Attention of a step whose tokens are stored: out, and lse and what is told of each key where they are wanted."""
        heads, _, value_dim = self._shape
        raw, rope, buffer, packed = plan.step.stored_keys == "pre_rope", call.rope, plan.buffer, self._packed
        rotations = in_block = None
        if rope is not None:
            frequencies, in_block = self._context.rope(rope, self.device)
            rotations = buffer.rotations(self._context.same(rope), frequencies)
        if packed is not None and raw and rope is not None and not packed.keeps_pairs_of(rope):
            raise UnsupportedError(
                "keys that lost single channels of a rotary pair cannot be rotated; keep pairs, or post-RoPE keys"
            )
        bits = None if packed is None else (packed.format.key_bits, packed.format.value_bits)
        rotates = raw and rope is not None
        return Attend(
            q if q.stride(-1) == 1 else q.contiguous(),
            self.table,
            buffer.starts,
            buffer.spans,
            rotations,
            in_block,
            kv_heads=heads,
            value_dim=value_dim,
            splits=splits(plan, heads, q.shape[1] // heads, q.shape[3], rotates, bits),
            scale=call.scale,
            softcap=call.softcap or 0.0,
            layout=0 if rope is None else LAYOUTS[rope.layout],
            factor=rope.factor**2 if rope is not None and raw else 1.0,
            raw=rotates,
            sink_logits=sink_logits,
            key_starts=None if keys is None else keys.starts,
            total_keys=0 if keys is None else keys.total,
            packed=None if packed is None else packed.table.tensor,
            format=None if packed is None else packed.format,
            told=SUMMED if keys is None else keys.told,
        ).run(with_lse=with_lse)

    def append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        self._check_stored(k, v)
        self._append(k, v, self._context.plan(step, self.device))

    best_summaries = staticmethod(best_summaries)

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
        there = None if self._tier is None else self._tier.check
        held = Held(self._context, self.table, self._shape, residents, self.read, there)
        return attend_pieces(held, q, first, pieces, call, scored, told)

    # -------------------------------------------------------------------------------------------------------------------- prefill

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, call: AttendCall, lse: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``lse`` ``[B, H, q]`` is filled in where it is given."""
        step, width = plan.step, q.shape[2]
        out = torch.zeros(q.shape[0], width, q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        rows: list[list[Partial]] = [[] for _ in range(q.shape[0])]
        for p in plan.parts:
            if p.part.top_k and not call.top_k:
                continue
            new, row = slice(width - p.num_queries, width), p.part.row
            if p.part.top_k:
                rows[row].append(self._selected(q[row, :, new], k[row, :, new], v[row, :, new], p, step.stored_keys, call))
                continue
            keys, values = self._gather(p, k[row, :, new], v[row, :, new])
            queries, keys = self._rotate(q[row, :, new], keys, p, step.stored_keys, call.rope, slice(None), self.dtype)
            rows[row].append(attend_part(queries, keys, values, p, call))
        for row, parts in enumerate(rows):
            if parts:
                merged = parts[0][0] if len(parts) == 1 and call.sink_logits is None else merge(parts, call.sink_logits)
                out[row, width - step.new_lens[row] :] = merged.transpose(0, 1).to(out.dtype)
                if lse is not None:
                    lse[row, :, width - step.new_lens[row] :] = total(parts, call.sink_logits)
        return out

    def _gather(self, p: DevicePart, new_k: torch.Tensor, new_v: torch.Tensor) -> Partial:
        """Keys ``[Hkv, n, D]`` and values of a part: its residents, then its new tokens (``[Hkv, m, D]``)."""
        lo, hi = p.part.new_range
        if p.num_old == 0:
            return new_k[:, lo:hi], new_v[:, lo:hi]
        k, v = self._read(p.runs)
        return torch.cat([k, new_k[:, lo:hi]], 1), torch.cat([v, new_v[:, lo:hi]], 1)

    def _rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        p: DevicePart,
        frame: str,
        rope: LayerRope | None,
        queries: slice,
        dtype: torch.dtype,
    ) -> Partial:
        """Queries (those of the slice) and keys, rotated to where the policy shows them, in ``dtype``."""
        at = None if rope is None else p.positions(frame)
        if rope is None or at is None:
            return q.to(dtype), k.to(dtype)
        frequencies, _ = self._context.rope(rope, self.device)
        layout, factor = LAYOUTS[rope.layout], rope.factor if frame == "pre_rope" else 1.0
        q = rotate(_dense(q), at[0][queries].contiguous(), frequencies, layout, factor, dtype)
        return q, rotate(_dense(k), at[1], frequencies, layout, factor, dtype)

    def _selected(
        self, q: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, p: DevicePart, frame: str, call: AttendCall
    ) -> Partial:
        """A memory read by top-k, by the last query only: out ``[H, m, Dv]``, lse ``[H, m]``."""
        k, v = self._gather(p, new_k, new_v)
        # In float32, so that rounding does not choose.
        last, k = self._rotate(q[:, -1:], k, p, frame, call.rope, slice(-1, None), torch.float32)
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        group = q.shape[0] // k.shape[0]
        logits = (last.view(k.shape[0], group, -1) @ k.transpose(1, 2)).flatten(0, 1) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~p.visible(slice(-1, None), slice(None)), -torch.inf)
        if p.part.top_k < logits.shape[1]:
            _, kth = top_k(logits, p.part.top_k)
            logits = logits.masked_fill(logits < kth[:, None], -torch.inf)
        lse[:, -1] = torch.logsumexp(logits, -1)
        weights = torch.exp(logits - torch.where(lse[:, -1].isneginf(), 0.0, lse[:, -1])[:, None])
        out[:, -1] = (weights.view(k.shape[0], group, -1) @ v.float()).flatten(0, 1)
        return out, lse

    # ----------------------------------------------------------------------------------------------------------------- moving data

    def apply(self, moves: Moves) -> None:
        table = moves.table()
        packed = table[:, 0] >= PACKED
        self._change(table[:, 0].tolist(), [(to, (slots >> 16) + count) for _, to, slots, count in table.tolist()])
        if not packed.any():
            self.plain.reserve(sorted(set(table[:, 1].tolist())))
            move(self.table, self._context.moves(moves, table, self.device), *self._shape, self.dtype)
            return
        plain = table[~packed]
        self.plain.reserve(sorted(set(plain[:, 1].tolist())))
        move(self.table, upload(plain, self.device), *self._shape, self.dtype)
        self._packs().apply(_from_zero(table[packed], [0, 1]))

    def set_packing(self, packing: Packing) -> None:
        if self._packed is None:
            self._packed = PackedStore(packing, self._shape, self.dtype, self.device)
        elif self._packed.packing != packing:
            raise StateError("a layer's storage format cannot change; open a new stream")

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

    def permute(self, source: Runs, keep: torch.Tensor, to: Runs) -> None:
        if not to:
            return
        chosen = [pick(x, keep) for x in self.read(source)]
        packed = [block for block, _, _ in source if block >= PACKED]
        for block in [block for block, _, _ in to if block >= PACKED]:
            self._packs().reserve(block - PACKED, self._packs().channels_of(packed[0] - PACKED))
        self.write(to, *chosen)

    def read(self, runs: Runs) -> Partial:
        with self._lock:
            if self._tier is None or not self._tier.away(block for block, _, _ in runs):
                return self._read(DeviceRuns(columns(runs), self.device))
            return self._tier.read(runs, lambda mine: self._read(DeviceRuns(columns(mine), self.device)))

    def _read(self, runs: DeviceRuns) -> Partial:
        """Keys and values of ``runs`` at full width, in the layer's dtype."""
        heads, key_dim, value_dim = self._shape
        k = torch.empty(heads, runs.tokens, key_dim, dtype=self.dtype, device=self.device)
        v = torch.empty(heads, runs.tokens, value_dim, dtype=self.dtype, device=self.device)
        if runs.plain is not None:
            copy_runs(self.table, runs.plain, k, v)
        if runs.packed is not None:
            packed = self._packs()
            unpack(packed.table.tensor, runs.packed, k, v, key_dim, value_dim, self.dtype, packed.format)
        return k, v

    def write(self, runs: Runs, k: torch.Tensor, v: torch.Tensor) -> None:
        k, v = aligned(k.contiguous()), aligned(v.contiguous())
        blocks, lo, hi = columns(runs)
        at = np.cumsum(hi - lo) - (hi - lo)
        is_packed = blocks >= PACKED
        if not is_packed.all():
            self._change([], [(block, end) for block, _, end in runs])
            self.plain.reserve(sorted(set(blocks[~is_packed].tolist())))
            table = np.stack([blocks, lo, hi, at], 1)[~is_packed].astype(np.int32)
            scatter(k, v, self.table, upload(table, self.device))
        if is_packed.any():
            numbers = np.arange(int(is_packed.sum()))
            moves = np.stack([numbers, blocks[is_packed] - PACKED, lo[is_packed] << 16, (hi - lo)[is_packed]], 1)
            for block in set(moves[:, 1].tolist()):
                self._packs().channels_of(block)
            self._packs().pack(dense_blocks(k, v, at[is_packed], self.device), moves.astype(np.int32))


def _from_zero(moves: npt.NDArray[np.int32], fields: list[int]) -> npt.NDArray[np.int32]:
    """A copy of ``moves`` with packed blocks in ``fields`` counted from 0."""
    moves = moves.copy()
    moves[:, fields] -= PACKED
    return moves


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
