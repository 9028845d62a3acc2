"""One layer's blocks in plain tensors. Slow and obvious on purpose; what it computes is :mod:`kvsieve.backends.attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends.attention import Partial, attend, merge, rotate_part, total, visibility
from kvsieve.backends.attention_scores import highest_of_prefill, of_prefill
from kvsieve.backends.base import HeadSets, HeldBytes, Runs
from kvsieve.backends.block_tier import BlockTier, HasTier, HostCopies
from kvsieve.backends.heaviest_values import of_rows
from kvsieve.backends.pieces import attend_pieces
from kvsieve.backends.ranking import best_summaries
from kvsieve.backends.reference.definition import sparse_attend
from kvsieve.backends.reference.selection import Asking, ReferenceSelection
from kvsieve.backends.reference.storage import PackedBlock
from kvsieve.backends.runs import pick
from kvsieve.budget import BLOCK
from kvsieve.errors import ShapeError, StateError
from kvsieve.locks import shared_lock

if TYPE_CHECKING:
    from kvsieve._core import Moves, Part, Residents, Step
    from kvsieve.backends.base import AttendCall, Attended
    from kvsieve.policy.select import HeaviestValues, Piece
    from kvsieve.policy.storage import Channels, Packing

__all__ = ["ReferenceStore"]


F = TypeVar("F", bound=Callable[..., Any])


def _save(tensors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.detach().to("cpu", copy=True) for x in tensors)
    return k, v


def _locked(method: F) -> F:
    """Forks write to one store, each to blocks of its own, but all of them make it grow."""

    @functools.wraps(method)
    def wrapped(self: ReferenceStore, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast("F", wrapped)


class ReferenceStore(HasTier):
    """Blocks ``[block, Hkv, 64, D]`` of keys and values, in plain tensors."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._lock = shared_lock()
        self._k = k.new_zeros(0, k.shape[1], BLOCK, k.shape[3])
        self._v = v.new_zeros(0, v.shape[1], BLOCK, v.shape[3])
        self._packing: Packing | None = None
        self._packed: dict[int, PackedBlock] = {}

    @property
    def bytes_held(self) -> int:
        return self.held().total

    def held(self) -> HeldBytes:
        blocks = list(self._packed.values())
        keys, values, scales = (sum(block.nbytes[part] for block in blocks) for part in range(3))
        channels = {id(block.channels): block.channels.nbytes for block in blocks}
        return HeldBytes(self._k.nbytes, self._v.nbytes, keys, values, scales, sum(channels.values()))

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        return self.run_with_lse(q, k, v, step, call)[0]

    def run_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        rows: list[list[Partial]] = [[] for _ in range(q.shape[0])]
        for part in step.parts():
            if part.top_k and not call.top_k:
                continue
            m = step.new_lens[part.row]
            lo, hi = part.new_range
            new = slice(q.shape[2] - m + lo, q.shape[2] - m + hi)
            old_k, old_v = self._in_memory(part)
            keys = torch.cat([old_k, k[part.row, :, new]], 1).to(wide)
            values = torch.cat([old_v, v[part.row, :, new]], 1).to(wide)
            queries, keys = rotate_part(q[part.row, :, q.shape[2] - m :].to(wide), keys, part, step.stored_keys, call.rope)
            seen = visibility(part, q.device)
            rows[part.row].append(attend(queries, keys, values, seen, call.scale, call.softcap, part.top_k))
        for row, parts in enumerate(rows):
            if parts:
                m = step.new_lens[row]
                out[row, q.shape[2] - m :] = merge(parts, call.sink_logits).transpose(0, 1).to(out.dtype)
                lse[row, :, q.shape[2] - m :] = total(parts, call.sink_logits)
        self._append(k, v, step)
        return out, lse

    def append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        self._check(k, v)
        self._append(k, v, step)

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
        return attend_pieces(q, first, pieces, lambda lo, hi: self.read(residents.runs(lo, hi)), call, scored, told)

    def run_selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, selection: ReferenceSelection
    ) -> torch.Tensor:
        self._check(k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        selection.begin(q.shape[0])
        for part in step.parts():
            m = step.new_lens[part.row]
            if not m:
                continue
            new = slice(q.shape[2] - m, None)
            old_k, old_v = self._in_memory(part)
            keys = torch.cat([old_k, k[part.row, :, new]], 1).to(wide)
            values = torch.cat([old_v, v[part.row, :, new]], 1).to(wide)
            queries = q[part.row, :, new].to(wide)
            placed = rotate_part(queries, keys, part, step.stored_keys, call.rope)
            content = placed
            if step.stored_keys == "pre_rope" and call.rope is not None and (call.relative or selection.rule.page_bounds):
                window, none = (torch.full((n,), at, device=q.device) for n, at in ((m, selection.rule.window), (keys.shape[1], 0)))
                content = call.rope.rotate(queries, window), call.rope.rotate(keys, none)
            compared = content if call.relative else placed
            if call.consecutive:
                placed = queries, keys
            piece = selection.attend(part.row, Asking(compared, content, placed, k.dtype), values, call)
            out[part.row, q.shape[2] - m :] = merge([piece], call.sink_logits).transpose(0, 1).to(out.dtype)
        self._append(k, v, step)
        return out

    def run_with_scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        self._check(k, v)
        scores = of_prefill(self, q, k, step, call)
        return self.run(q, k, v, step, call), scores

    def run_with_sets(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        sets: Sequence[HeadSets | None],
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        self._check(k, v)
        scores = highest_of_prefill(self, q, k, step, call, [mine is not None for mine in sets])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        read = {}
        for part in step.parts():
            mine = sets[part.row]
            if mine is None or not step.new_lens[part.row]:
                continue
            old_k, old_v = self._in_memory(part)
            keys, values = (torch.cat([old, new[part.row, :, -1:]], 1).to(wide) for old, new in ((old_k, k), (old_v, v)))
            visible = torch.zeros(keys.shape[0], 1, keys.shape[1], dtype=torch.bool)
            for head in range(keys.shape[0]):
                visible[head, 0, mine.read(head, keys.shape[1])] = True
            found = sparse_attend(q[part.row, :, -1:].to(wide), keys, values, visible.to(q.device), call.scale, call.softcap)
            read[part.row] = merge([found], call.sink_logits)[:, 0]
        out = self.run(q, k, v, step, call)
        for row, answer in read.items():
            out[row, -1] = answer.to(out.dtype)
        return out, scores

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
        self._check(k, v)
        found = of_rows(self, (q, k, v), step, call, rule, rows)
        out = self.run(q, k, v, step, call)
        return found.put_in(out)

    @_locked
    def permute(self, source: Runs, keep: torch.Tensor, to: Runs) -> None:
        chosen = [pick(x, keep) for x in self.read(source)]
        packed = [block for block, _, _ in source if block >= PACKED]
        for block, _, _ in to:
            if block >= PACKED:
                self._make(block, self._packed[packed[0]].channels)
        self.write(to, *chosen)

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        for name, new, old in (("keys", k, self._k), ("values", v, self._v)):
            if (new.shape[1], new.shape[3], new.dtype, new.device) != (
                old.shape[1],
                old.shape[3],
                old.dtype,
                old.device,
            ):
                raise ShapeError(
                    f"this layer holds {name} of {old.shape[1]} heads of size {old.shape[3]} in {old.dtype} on {old.device}, "
                    f"got {new.shape[1]} heads of size {new.shape[3]} in {new.dtype} on {new.device}"
                )

    @_locked
    def _append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        self._ensure(step.num_blocks)
        self._change((block, slot + count) for _, _, block, slot, count in step.appends())
        for move in step.copies():
            self._move(*move)
        for row, new, block, slot, count in step.appends():
            start = k.shape[2] - step.new_lens[row] + new
            self._k[block, :, slot : slot + count] = k[row, :, start : start + count]
            self._v[block, :, slot : slot + count] = v[row, :, start : start + count]

    def _ensure(self, num_blocks: int) -> None:
        missing = num_blocks - self._k.shape[0]
        if missing > 0:
            self._k = torch.cat([self._k, self._k.new_zeros(missing, *self._k.shape[1:])])
            self._v = torch.cat([self._v, self._v.new_zeros(missing, *self._v.shape[1:])])

    def _move(self, source: int, source_slot: int, to: int, to_slot: int, count: int) -> None:
        self._ensure(to + 1)
        if self._tier is not None:
            self._tier.load([source])
        self._change([(to, to_slot + count)])
        for blocks in (self._k, self._v):
            blocks[to, :, to_slot : to_slot + count] = blocks[source, :, source_slot : source_slot + count].clone()

    @_locked
    def apply(self, moves: Moves) -> None:
        packed = [move for move in moves.tuples() if move[0] >= PACKED]
        for move in moves.tuples():
            if move[0] < PACKED:
                self._move(*move)
        # All is read before anything is written: numbers that share a scale change together.
        held = [self._packed[block].read(slot, slot + count, self._k.shape[3]) for block, slot, _, _, count in packed]
        for source, _, to, _, _ in packed:
            self._make(to, self._packed[source].channels)
        self._put(packed, held)

    def _put(self, moves: list[tuple[int, int, int, int, int]], held: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Store what moves. Neighbours in one packed block come together, so that numbers that share a scale are seen together."""
        at = 0
        while at < len(moves):
            _, _, to, slot, count = moves[at]
            pieces = [held[at]]
            while at + 1 < len(moves) and moves[at + 1][2:4] == (to, slot + count):
                at += 1
                count += moves[at][4]
                pieces.append(held[at])
            k, v = (torch.cat(x, 1) for x in zip(*pieces))
            self._packed[to].write(slot, k, v)
            at += 1

    def _make(self, block: int, channels: Channels) -> None:
        if self._packing is None:
            raise StateError("this layer was not told how to pack")
        if block not in self._packed or self._packed[block].channels is not channels:
            self._packed[block] = PackedBlock.empty(self._packing, channels, self._k, self._v)

    def set_packing(self, packing: Packing) -> None:
        self._packing = packing

    @_locked
    def pack(self, moves: Moves, channels: Channels | int) -> None:
        if self._tier is not None:
            self._tier.load(move[0] for move in moves.tuples())
        chosen = self._packed[channels].channels if isinstance(channels, int) else channels
        table = moves.tuples()
        for _, _, to, _, _ in table:
            self._make(to, chosen)
        self._put(
            table, [(self._k[block, :, slot : slot + n], self._v[block, :, slot : slot + n]) for block, slot, _, _, n in table]
        )

    def channels(self, block: int) -> Channels:
        return self._packed[block].channels

    @_locked
    def free_unused(self, in_use: npt.NDArray[np.bool_], packed_in_use: npt.NDArray[np.bool_]) -> None:
        if self._tier is not None:
            self._tier.free(lambda block: block < len(in_use) and bool(in_use[block]))
        used = np.flatnonzero(in_use)
        keep = int(used[-1]) + 1 if used.size else 0
        if keep < self._k.shape[0]:
            self._k, self._v = self._k[:keep].clone(), self._v[:keep].clone()
        packed = {PACKED + int(i) for i in np.flatnonzero(packed_in_use)}
        self._packed = {block: held for block, held in self._packed.items() if block in packed}

    def read(self, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
        heads, key_dim, value_dim = self._k.shape[1], self._k.shape[3], self._v.shape[3]
        if not runs:
            return self._k.new_zeros(heads, 0, key_dim), self._v.new_zeros(heads, 0, value_dim)
        keys, values = [], []
        for block, lo, hi in runs:
            if block >= PACKED:
                k, v = self._packed[block].read(lo, hi, key_dim)
            elif self._tier is None:
                k, v = self._k[block, :, lo:hi], self._v[block, :, lo:hi]
            else:
                k, v = (x[:, lo:hi].to(self._k.device) for x in self._tier.peek(block))
            keys.append(k)
            values.append(v)
        # Codes read as float32, and stay that precise beside tokens of fewer bits.
        k, v = torch.cat(keys, 1), torch.cat(values, 1)
        return k.to(torch.promote_types(k.dtype, self._k.dtype)), v.to(torch.promote_types(v.dtype, self._v.dtype))

    @_locked
    def write(self, runs: Runs, k: torch.Tensor, v: torch.Tensor) -> None:
        at = 0
        for block, lo, hi in runs:
            new = slice(at, at + hi - lo)
            if block >= PACKED:
                self._packed[block].write(lo, k[:, new], v[:, new])
            else:
                self._ensure(block + 1)
                self._change([(block, hi)])
                self._k[block, :, lo:hi] = k[:, new]
                self._v[block, :, lo:hi] = v[:, new]
            at += hi - lo

    # ------------------------------------------------------------------------------------------------------- blocks in a file

    def _in_memory(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a part's residents, all of which must be in memory."""
        runs = list(zip(*(a.tolist() for a in part.runs())))
        if self._tier is not None:
            self._tier.check(block for block, _, _ in runs)
        return self.read(runs)

    def _change(self, ends: Iterable[tuple[int, int]]) -> None:
        if self._tier is not None:
            self._tier.change(ends)

    def _get_block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._k[block], self._v[block]

    def _put_block(self, block: int, tensors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """A block that left memory is NaN, so what would read it all the same shows."""
        k, v = (torch.nan, torch.nan) if tensors is None else tensors
        self._k[block], self._v[block] = k, v

    @_locked
    def set_tier(self, file: HostCopies, capacity: int, decay: float | None, values_alone: bool = False) -> None:
        self._tier = BlockTier(file, capacity, decay, self._get_block, self._put_block, _save)
        self._tier.change((block, BLOCK) for block in range(len(self._k)))
