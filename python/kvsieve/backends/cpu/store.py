"""One layer's blocks, in Rust: decode attention in place, prefill by the core's kernel or torch's.

Two paths, one decision:

* *decode* (a few queries, or a handful of candidates): the new tokens are stored first, then one Rust pass reads keys and values
  where they lie, rotating on read;
* *prefill*: residents are gathered once, rotated to where the policy shows them, and torch's flash kernel does the matrix work in
  float32. Partial results merge by log-sum-exp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import Store, Tier, TierFile, attend_heaviest, attend_highest, attend_sets, decode
from kvsieve.backends.attention import Partial, attend, merge, total, visibility
from kvsieve.backends.attention_scores import highest_of_prefill, of_items, of_prefill
from kvsieve.backends.base import HeldBytes, Runs
from kvsieve.backends.cpu.pieces import attend_many, attend_one, best_summaries
from kvsieve.backends.cpu.prefill import attend_part
from kvsieve.backends.cpu.tensors import DTYPES, LENT, floats, view
from kvsieve.backends.heaviest_values import of_rows
from kvsieve.backends.piece_matrices import in_order
from kvsieve.backends.prefill_plan import PrefillPlan
from kvsieve.backends.runs import columns
from kvsieve.backends.tiers import TierCounts
from kvsieve.errors import UnsupportedError
from kvsieve.policy.storage import Channels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvsieve._core import Moves, Residents, Step
    from kvsieve.backends.base import AttendCall, Attended, HeadSets
    from kvsieve.backends.cpu.selection import CpuSelection
    from kvsieve.policy.select import HeaviestValues, Piece
    from kvsieve.policy.storage import Packing

__all__ = ["CpuStore", "Plans"]


class Plans:
    """The parts of a step, prepared once for all layers."""

    def __init__(self) -> None:
        self._last: tuple[Step, list[PrefillPlan]] | None = None

    def of(self, step: Step) -> list[PrefillPlan]:
        """Those of ``step``."""
        if self._last is None or self._last[0] is not step:
            self._last = (step, [PrefillPlan.of(p, step.new_lens[p.row]) for p in step.parts()])
        return self._last[1]


class CpuStore:
    """One layer's blocks, in Rust."""

    def __init__(self, plans: Plans, k: torch.Tensor, v: torch.Tensor) -> None:
        self._plans = plans
        self._dtype = k.dtype
        self._core = Store(k.shape[1], k.shape[3], v.shape[3], DTYPES[k.dtype])
        self._shape = (k.shape[1], k.shape[3], v.shape[3])
        self._tier: Tier | None = None

    @property
    def bytes_held(self) -> int:
        return int(self._core.bytes)

    def held(self) -> HeldBytes:
        return HeldBytes(*self._core.bytes_by_part())

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        if step.has_spans:
            return self._decode(q, k, v, step, call)
        out = self._prefill(q, k, v, step, call)
        self._core.append(view(k), view(v), step)
        return out

    def run_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not step.has_spans:
            lse = torch.full(q.shape[:3], -torch.inf)
            out = self._prefill(q, k, v, step, call, lse)
            self._core.append(view(k), view(v), step)
            return out, lse
        self._core.append(view(k), view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        found = np.empty(tuple(q.shape[:3]), np.float32)
        rope = None if call.rope is None else call.rope.core
        sinks = call.sinks
        numbers = call.scale, call.softcap, floats(sinks)
        threads, factor = torch.get_num_threads(), step.stored_keys == "pre_rope"
        self._core.attend(view(q), step, rope, *numbers, view(out), found, threads=threads, apply_factor=factor)
        lse = torch.from_numpy(found)
        if sinks is not None:  # the kernel tells it without them
            lse = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sinks[None, :, None]))
        return out, lse

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        rows, heads, queries, _ = q.shape
        out = torch.empty(rows, queries, heads, self._shape[2], dtype=q.dtype)
        rope = None if call.rope is None else call.rope.core
        threads, factor = torch.get_num_threads(), step.stored_keys == "pre_rope"
        plans = [p for p in self._plans.of(step) if p.part.top_k] if call.top_k else []
        sink_logits = None if plans or call.sink_logits is None else floats(call.sinks)
        numbers = call.scale, call.softcap, sink_logits
        if LENT and not plans and decode(self._core, q, k, v, step, rope, *numbers, out, threads=threads, apply_factor=factor):
            return out
        self._core.append(view(k), view(v), step)
        lse = np.empty((rows, heads, queries), np.float32) if plans else None
        self._core.attend(view(q), step, rope, *numbers, view(out), lse, threads=threads, apply_factor=factor)
        if lse is not None:
            self._merge_selected(q, k, v, plans, step, call, out, torch.from_numpy(lse))
        return out

    def append(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        self._core.append(view(k), view(v), step)

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
        if q.shape[1] == 1:
            return attend_one(self._core, q, first, residents, pieces, call, scored, told)
        return attend_many(q, first, pieces, lambda spans: self.read(in_order(residents, spans)), call, scored, told)

    best_summaries = staticmethod(best_summaries)

    def run_selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, selection: CpuSelection
    ) -> torch.Tensor:
        self._core.append(view(k), view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        sink_logits = floats(call.sinks)
        selection.work = selection.core.attend(
            self._core,
            view(q),
            step,
            call.scale,
            call.softcap,
            sink_logits,
            view(out),
            threads=torch.get_num_threads(),
            rope=None if call.rope is None else call.rope.core,
            apply_factor=step.stored_keys == "pre_rope",
            relative=call.relative,
            consecutive=call.consecutive,
            chunk=not step.has_spans,
        )
        return out

    def run_with_scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        if not step.has_spans:
            scores = of_prefill(self, q, k, step, call)
            return self.run(q, k, v, step, call), scores
        self._core.append(view(k), view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        sink_logits = floats(call.sinks)
        threads = torch.get_num_threads()
        numbers = call.scale, call.softcap, sink_logits
        items = self._core.attend_mass(view(q), step, None, *numbers, view(out), threads=threads)
        return out, of_items([torch.from_numpy(item) for item in items], step)

    def run_with_sets(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        sets: Sequence[HeadSets | None],
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        whole = [mine is None and count > 0 for mine, count in zip(sets, step.new_lens)]
        scores: list[torch.Tensor | None] = [None] * q.shape[0]
        if not step.has_spans:
            scores = highest_of_prefill(self, q, k, step, call, [not mine for mine in whole])
            out = self.run(q, k, v, step, call)
        else:
            self._core.append(view(k), view(v), step)
            out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        sink_logits = floats(call.sinks)
        numbers, threads = (call.scale, call.softcap, sink_logits), torch.get_num_threads()
        if step.has_spans and (any(whole) or q.shape[2] > 1):
            items = attend_highest(self._core, view(q), step, whole, *numbers, view(out), threads)
            scores = [None if item is None else torch.from_numpy(item) for item in items]
        if all(mine is None for mine in sets):
            return out, scores
        given = [None if s is None else (s.tokens.numpy(), s.order.numpy(), s.gone, s.rest) for s in sets]
        alone = step.has_spans and q.shape[2] == 1 and not any(whole)
        answer = out if alone else torch.empty(q.shape[0], 1, q.shape[1], v.shape[3], dtype=q.dtype)
        attend_sets(self._core, view(q[:, :, -1:]), step, given, *numbers, view(answer), threads)
        if not alone:
            mine = [row for row, one in enumerate(sets) if one is not None]
            out[mine, -1] = answer[mine, 0]
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
        if not step.has_spans:
            # A row's single token beside another row's prompt: rare, and much else is to be done then.
            found = of_rows(self, (q, k, v), step, call, rule, rows)
            return found.put_in(self.run(q, k, v, step, call))
        alone = all(one or not count for one, count in zip(rows, step.new_lens))
        if alone:
            self._core.append(view(k), view(v), step)
            out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        else:
            out = self.run(q, k, v, step, call)
        answer = out if alone else torch.empty_like(out)
        kept = attend_heaviest(
            self._core,
            view(q),
            step,
            list(rows),
            rope=None if call.rope is None else call.rope.core,
            scale=call.scale,
            softcap=call.softcap,
            sinks=floats(call.sinks),
            out=view(answer),
            top=2**62 if rule.top is None else rule.top,
            mass=1.0 if rule.mass is None else rule.mass,
            renormalise=rule.renormalise,
            threads=torch.get_num_threads(),
            apply_factor=step.stored_keys == "pre_rope",
        )
        mine = torch.tensor(rows)
        if not alone:
            out[mine] = answer[mine]
        return out, torch.from_numpy(kept[:, :, -1]).masked_fill(~mine[:, None], torch.nan)

    def _merge_selected(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plans: list[PrefillPlan],
        step: Step,
        call: AttendCall,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        for row in range(q.shape[0]):
            new = slice(q.shape[2] - step.new_lens[row], None)
            parts = [(out[row].float().transpose(0, 1), lse[row])]
            mine = [plan for plan in plans if plan.part.row == row]
            parts += [self._selected(q[row], k[row, :, new], v[row, :, new], plan, step.stored_keys, call) for plan in mine]
            out[row] = merge(parts, call.sink_logits).transpose(0, 1).to(out.dtype)

    def _selected(
        self, q: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, plan: PrefillPlan, frame: str, call: AttendCall
    ) -> Partial:
        """A memory read by top-k, by the last query only: out ``[H, m, Dv]``, lse ``[H, m]``."""
        k, v = (x.float() for x in self._gather(plan, new_k, new_v))
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
        lse = torch.full(q.shape[:2], -torch.inf)
        queries = q[:, -1:].float()
        tables = plan.rotation(call.rope, frame)
        if tables is not None and call.rope is not None:
            (cos, sin), keys = tables
            queries, k = call.rope.turn(queries, (cos[-1:], sin[-1:])), call.rope.turn(k, keys)
        if plan.visible is None:
            plan.visible = visibility(plan.part, q.device)[-1:]
        out[:, -1:], lse[:, -1:] = attend(queries, k, v, plan.visible, call.scale, call.softcap, plan.part.top_k)
        return out, lse

    def _gather(self, plan: PrefillPlan, new_k: torch.Tensor, new_v: torch.Tensor) -> Partial:
        """Keys and values of a part, in their own dtype: its residents, then its new tokens (``[Hkv, m, D]``)."""
        heads, key_dim, value_dim = self._shape
        lo, hi = plan.part.new_range
        if plan.num_old == 0:
            return new_k[:, lo:hi], new_v[:, lo:hi]
        count = plan.num_old + hi - lo
        k = torch.empty(heads, count, key_dim, dtype=self._dtype)
        v = torch.empty(heads, count, value_dim, dtype=self._dtype)
        self._core.gather(*plan.runs, view(k), view(v), 0)
        k[:, plan.num_old :], v[:, plan.num_old :] = new_k[:, lo:hi], new_v[:, lo:hi]
        return k, v

    def _prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``lse`` ``[B, H, q]`` is filled in where it is given, and is then one of float32 products."""
        rows: list[list[Partial]] = [[] for _ in range(q.shape[0])]
        width = q.shape[2]
        for plan in self._plans.of(step):
            part = plan.part
            if part.top_k and not call.top_k:
                continue
            new = slice(width - plan.num_queries, width)
            keys, values = self._gather(plan, k[part.row, :, new], v[part.row, :, new])
            queries = q[part.row, :, new]
            tables = plan.rotation(call.rope, step.stored_keys)
            if tables is not None and call.rope is not None:
                queries, keys = call.rope.turn(queries.float(), tables[0]), call.rope.turn(keys.float(), tables[1])
            rows[part.row].append(attend_part(queries, keys, values, plan, call, exact=lse is not None))
        for row, parts in enumerate(rows if lse is not None else ()):
            if parts and lse is not None:
                lse[row, :, width - step.new_lens[row] :] = total(parts, call.sink_logits)
        if len(rows) == 1 and len(rows[0]) == 1 and call.sink_logits is None and step.new_lens[0] == width:
            # The common case, without a copy: torch's kernel writes queries before heads anyway.
            return rows[0][0][0].transpose(0, 1)[None].to(q.dtype)
        out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        for row, parts in enumerate(rows):
            if parts:
                merged = parts[0][0] if len(parts) == 1 and call.sink_logits is None else merge(parts, call.sink_logits)
                out[row, width - step.new_lens[row] :] = merged.transpose(0, 1).to(out.dtype)
        return out

    def permute(self, source: Runs, keep: torch.Tensor, to: Runs) -> None:
        runs = (np.asarray(r, np.int64).reshape(-1, 3) for r in (source, to))
        self._core.permute(next(runs), keep.contiguous().numpy(), next(runs))

    def apply(self, moves: Moves) -> None:
        self._core.apply(moves)

    def free_unused(self, in_use: npt.NDArray[np.bool_], packed_in_use: npt.NDArray[np.bool_]) -> None:
        self._core.free_unused(in_use, packed_in_use)

    def set_packing(self, packing: Packing) -> None:
        self._core.set_packing(packing.key_kept, packing.key_bits, packing.value_bits, packing.group)

    def pack(self, moves: Moves, channels: Channels | int) -> None:
        if isinstance(channels, int):
            self._core.pack(moves, like=channels)
        else:
            self._core.pack(moves, channels.index.numpy(), list(channels.pairs))

    def channels(self, block: int) -> Channels:
        index, pairs = self._core.channels(block)
        return Channels(torch.from_numpy(index), tuple(pairs))

    def read(self, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
        heads, key_dim, value_dim = self._shape
        table = columns(runs)
        count = int((table[2] - table[1]).sum())
        k = torch.empty(heads, count, key_dim, dtype=self._dtype)
        v = torch.empty(heads, count, value_dim, dtype=self._dtype)
        if count:
            self._core.gather(*table, view(k), view(v), 0, spilled=self._tier is not None)
        return k, v

    def write(self, runs: Runs, k: torch.Tensor, v: torch.Tensor) -> None:
        self._core.write(*columns(runs), view(k.contiguous()), view(v.contiguous()))

    # ------------------------------------------------------------------------------------------------------- blocks in a file

    def fetch(self, runs: Runs) -> None:
        if self._tier is not None:
            self._tier.fetch(_numbers(block for block, _, _ in runs))

    def set_tier(self, file: TierFile, capacity: int, decay: float | None, values_alone: bool = False) -> None:
        self._tier = Tier(self._core, file, capacity, decay, values_alone)

    def hold(self, blocks: Sequence[int]) -> None:
        self._tiered().hold(_numbers(blocks))

    def trim(self, keep: Sequence[int], later: bool = False) -> None:
        self._tiered().trim(_numbers(keep), later)

    def spill(self, blocks: Sequence[int], later: bool = False) -> None:
        self._tiered().spill(_numbers(blocks), later)

    def prefetch(self, runs: Runs) -> None:
        self._tiered().prefetch(_numbers(block for block, _, _ in runs))

    def finish(self) -> None:
        self._tiered().finish()

    def score(self, blocks: Sequence[int], mass: Sequence[float]) -> None:
        self._tiered().score(_numbers(blocks), np.asarray(mass, np.float64))

    def tier_counts(self) -> TierCounts:
        return TierCounts() if self._tier is None else TierCounts(*self._tier.counts())

    def _tiered(self) -> Tier:
        if self._tier is None:
            raise UnsupportedError("this layer's blocks lie in no file; open the stream with kvsieve.policy.Tiered(...)")
        return self._tier


def _numbers(blocks: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(blocks, np.int64)
