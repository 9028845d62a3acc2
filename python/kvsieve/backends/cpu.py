"""The Rust backend: a block store per layer, decode attention in place, chunks through torch's fused matrix kernels.

Two paths, one decision:

* *few queries* (decoding, verifying a handful of candidates): the new tokens are stored first, then one Rust pass reads keys and
  values where they lie, rotating on read;
* *a chunk*: residents are gathered once, rotated to where the policy shows them, and torch's flash kernel does the matrix work in
  float32, in bands where the policy has a window, so that cost is linear in the chunk. Partial results merge by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve import _core
from kvsieve.backends import HeadChoice, HeldBytes
from kvsieve.backends.masses import of_chunk, of_items
from kvsieve.backends.parts import BAND, PartPlan, columns
from kvsieve.backends.reference import attend as naive_attend
from kvsieve.backends.reference import join, merge, visibility
from kvsieve.errors import BackendError
from kvsieve.policy.storage import Channels

if TYPE_CHECKING:
    from kvsieve._core import Moves, Step
    from kvsieve.backends import AttendCall
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.storage import Packing

__all__ = ["CpuBackend", "CpuSearch", "CpuStore"]

QUERIES = 256
"""A long prompt is cut at multiples of so many queries."""

WORK = 10 << 30
"""Floating-point operations of one call into torch, about: less than a fifth of a second of one core."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

Partial = tuple[torch.Tensor, torch.Tensor]


def _view(x: torch.Tensor) -> npt.NDArray[Any]:
    """A numpy view of ``x``; 16-bit floats as their bits."""
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy()


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Out ``[H, m, Dv]`` and lse ``[H, m]`` of float32 ``q`` ``[H, m, D]`` over ``k``, ``v`` ``[Hkv, n, D]``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, attn_mask=bias, scale=scale
    )
    return out[0], lse[0]


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_old: int, scale: float) -> Partial:
    """Causal attention of ``q`` ``[H, m, D]`` over ``num_old`` keys that all see, and then their own; as :func:`_flash`.

    In pieces of about :data:`WORK` where that is needed, because nothing can interrupt torch inside one: first by key-value head,
    which costs nothing, then by queries and keys.
    """
    (heads, count, dim), num_new = q.shape, k.shape[1] - num_old
    if 4 * heads * count * dim * (num_old + num_new // 2) <= WORK:
        return _causal(q, k, v, num_old, num_new, scale)
    group = heads // k.shape[0]
    size = max(QUERIES, WORK // (4 * group * dim * k.shape[1]) // QUERIES * QUERIES)
    if 4 * group * count * dim * (num_old + num_new // 2) <= WORK:
        size = count
    columns = []
    for head in range(k.shape[0]):
        mine, keys, values = q[head * group : (head + 1) * group], k[head : head + 1], v[head : head + 1]
        rows = []
        for lo in range(0, count, size):
            hi = min(lo + size, count)
            seen, own = (num_old + lo, hi - lo) if num_new else (num_old, 0)
            rows.append(_causal(mine[:, lo:hi], keys[:, : seen + own], values[:, : seen + own], seen, own, scale))
        columns.append((torch.cat([out for out, _ in rows], 1), torch.cat([lse for _, lse in rows], 1)))
    return torch.cat([out for out, _ in columns]), torch.cat([lse for _, lse in columns])


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_old: int, num_new: int, scale: float) -> Partial:
    """:func:`_dense`, with at most :data:`WORK` in a call over old keys."""
    most = max(QUERIES, WORK // (4 * q.shape[0] * q.shape[1] * q.shape[2]))
    cuts = [slice(at, min(at + most, num_old)) for at in range(0, num_old, most)]
    pieces = [_flash(q, k[:, cut], v[:, cut], scale) for cut in cuts]
    if num_new:
        pieces.append(_flash(q, k[:, num_old:], v[:, num_old:], scale, causal=True))
    return join(pieces)


class CpuStore:
    """One layer's blocks, in Rust."""

    def __init__(self, backend: CpuBackend, k: torch.Tensor, v: torch.Tensor) -> None:
        self._backend = backend
        self._dtype = k.dtype
        self._core = _core.Store(k.shape[1], k.shape[3], v.shape[3], _DTYPES[k.dtype])
        self._shape = (k.shape[1], k.shape[3], v.shape[3])

    @property
    def bytes_held(self) -> int:
        return int(self._core.bytes)

    def held(self) -> HeldBytes:
        return HeldBytes(*self._core.bytes_by_part())

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        if step.has_spans:
            return self._few(q, k, v, step, call)
        out = self._chunk(q, k, v, step, call)
        self._core.append(_view(k), _view(v), step)
        return out

    def _few(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        self._core.append(_view(k), _view(v), step)
        plans = [p for p in self._backend.plans(step) if p.part.top_k] if call.top_k and self._backend.selects else []
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        lse = np.empty((q.shape[0], q.shape[1], q.shape[2]), np.float32) if plans else None
        rope = None if call.rope is None else call.rope.core
        sinks = None if call.sinks is None or plans else call.sinks.detach().float().numpy()
        threads = torch.get_num_threads()
        self._core.attend(_view(q), step, rope, call.scale, call.softcap, sinks, _view(out), lse, threads, step.frame == "raw")
        if lse is not None:
            self._merge_selected(q, k, v, plans, step, call, out, torch.from_numpy(lse))
        return out

    def run_sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall, search: CpuSearch
    ) -> torch.Tensor:
        self._core.append(_view(k), _view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        sinks = None if call.sinks is None else call.sinks.detach().float().numpy()
        search.work = search.core.attend(
            self._core,
            _view(q),
            step,
            call.scale,
            call.softcap,
            sinks,
            _view(out),
            threads=torch.get_num_threads(),
            rope=None if call.rope is None else call.rope.core,
            apply_factor=step.frame == "raw",
            relative=call.by_content,
            consecutive=call.side_by_side,
            chunk=not step.has_spans,
        )
        return out

    def run_mass(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        if not step.has_spans:
            masses = of_chunk(self, q, k, step, call)
            return self.run(q, k, v, step, call), masses
        self._core.append(_view(k), _view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        sinks = None if call.sinks is None else call.sinks.detach().float().numpy()
        threads = torch.get_num_threads()
        items = self._core.attend_mass(_view(q), step, None, call.scale, call.softcap, sinks, _view(out), None, threads)
        return out, of_items([torch.from_numpy(item) for item in items], step)

    def _merge_selected(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plans: list[PartPlan],
        step: Step,
        call: AttendCall,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        for row in range(q.shape[0]):
            new = slice(q.shape[2] - step.new_lens[row], None)
            parts = [(out[row].float().transpose(0, 1), lse[row])]
            mine = [plan for plan in plans if plan.part.row == row]
            parts += [self._selected(q[row], k[row, :, new], v[row, :, new], plan, step.frame, call) for plan in mine]
            out[row] = merge(parts, call.sinks).transpose(0, 1).to(out.dtype)

    def _selected(
        self, q: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, plan: PartPlan, frame: str, call: AttendCall
    ) -> Partial:
        """A memory read by top-k, by the last query only: out ``[H, m, Dv]``, lse ``[H, m]``."""
        k, v = self._gather(plan, new_k, new_v)
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
        lse = torch.full(q.shape[:2], -torch.inf)
        queries = q[:, -1:].float()
        tables = plan.rotation(call.rope, frame)
        if tables is not None and call.rope is not None:
            (cos, sin), keys = tables
            queries, k = call.rope.turn(queries, (cos[-1:], sin[-1:])), call.rope.turn(k, keys)
        if plan.visible is None:
            plan.visible = visibility(plan.part, q.device)[-1:]
        out[:, -1:], lse[:, -1:] = naive_attend(queries, k, v, plan.visible, call.scale, call.softcap, plan.part.top_k)
        return out, lse

    def _gather(self, plan: PartPlan, new_k: torch.Tensor, new_v: torch.Tensor) -> Partial:
        """float32 keys and values of a part: its residents, then its new tokens (``[Hkv, m, D]``)."""
        heads, key_dim, value_dim = self._shape
        lo, hi = plan.part.new_range
        if plan.num_old == 0:
            return new_k[:, lo:hi].float(), new_v[:, lo:hi].float()
        count = plan.num_old + hi - lo
        k = torch.empty(heads, count, key_dim, dtype=self._dtype)
        v = torch.empty(heads, count, value_dim, dtype=self._dtype)
        self._core.gather(*plan.runs, _view(k), _view(v), 0)
        k[:, plan.num_old :], v[:, plan.num_old :] = new_k[:, lo:hi], new_v[:, lo:hi]
        return k.float(), v.float()

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall) -> torch.Tensor:
        rows: list[list[Partial]] = [[] for _ in range(q.shape[0])]
        width = q.shape[2]
        for plan in self._backend.plans(step):
            part = plan.part
            if part.top_k and not call.top_k:
                continue
            new = slice(width - plan.num_queries, width)
            keys, values = self._gather(plan, k[part.row, :, new], v[part.row, :, new])
            queries = q[part.row, :, new].float()
            tables = plan.rotation(call.rope, step.frame)
            if tables is not None and call.rope is not None:
                queries, keys = call.rope.turn(queries, tables[0]), call.rope.turn(keys, tables[1])
            rows[part.row].append(self._attend(queries, keys, values, plan, call))
        if len(rows) == 1 and len(rows[0]) == 1 and call.sinks is None and step.new_lens[0] == width:
            # The common case, without a copy: torch's kernel writes queries before heads anyway.
            return rows[0][0][0].transpose(0, 1)[None].to(q.dtype)
        out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        for row, parts in enumerate(rows):
            if parts:
                merged = parts[0][0] if len(parts) == 1 and call.sinks is None else merge(parts, call.sinks)
                out[row, width - step.new_lens[row] :] = merged.transpose(0, 1).to(out.dtype)
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PartPlan, call: AttendCall) -> Partial:
        part = plan.part
        if part.far or part.top_k or call.softcap is not None or k.shape[-1] != v.shape[-1]:
            if plan.visible is None:
                plan.visible = visibility(part, q.device)
            # Many tokens may be pinned: so many queries at a time, or the logits of all of them would be held at once.
            done = [
                naive_attend(q[:, lo : lo + BAND], k, v, plan.visible[lo : lo + BAND], call.scale, call.softcap, part.top_k)
                for lo in range(0, q.shape[1], BAND)
            ]
            return done[0] if len(done) == 1 else (torch.cat([o for o, _ in done], 1), torch.cat([lse for _, lse in done], 1))
        if part.near is None:
            return _dense(q, k, v, plan.num_old, call.scale)
        outs = [_flash(q[:, queries], k[:, keys], v[:, keys], call.scale, bias=bias) for queries, keys, bias in plan.band_list()]
        return torch.cat([o for o, _ in outs], 1), torch.cat([lse for _, lse in outs], 1)

    def permute(self, source: list[tuple[int, int, int]], keep: torch.Tensor, to: list[tuple[int, int, int]]) -> None:
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

    def read(self, runs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        heads, key_dim, value_dim = self._shape
        table = columns(runs)
        count = int((table[2] - table[1]).sum())
        k = torch.empty(heads, count, key_dim, dtype=self._dtype)
        v = torch.empty(heads, count, value_dim, dtype=self._dtype)
        if count:
            self._core.gather(*table, _view(k), _view(v), 0)
        return k, v

    def write(self, runs: list[tuple[int, int, int]], k: torch.Tensor, v: torch.Tensor) -> None:
        self._core.write(*columns(runs), _view(k.contiguous()), _view(v.contiguous()))


class CpuSearch:
    """One layer's choices, in Rust."""

    def __init__(self, rule: SparseSelection) -> None:
        same: Any = rule
        shared = same.representative, same.sinks, same.window
        queries = same.query_block, same.query_stride
        if rule.kind == "hip":
            self.core = _core.Sparse.hip(same.budget, same.block, *shared, same.refresh, *queries)
        else:
            self.core = _core.Sparse.infinite(list(same.stages), *shared, list(same.refresh), *queries, same.bounded)
        self.work = (0, 0)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.core.select_rows(list(rows))

    def undo(self) -> None:
        self.core.undo()

    def reset(self) -> None:
        self.core.reset()

    def state(self) -> Any:
        return self.core.state()

    def return_to(self, state: Any) -> None:
        self.core.return_to(state)

    def choice(self, row: int) -> list[HeadChoice]:
        return [HeadChoice(*head) for head in self.core.choice(row)]


class CpuBackend:
    """Rust kernels for tensors on the CPU in float32, bfloat16 and float16."""

    name = "cpu"
    wants_parts = False

    def __init__(self) -> None:
        self._plans: tuple[Step, list[PartPlan]] | None = None
        self.selects = True

    def plans(self, step: Step) -> list[PartPlan]:
        """The parts of ``step``, prepared once for all layers."""
        if self._plans is None or self._plans[0] is not step:
            self._plans = (step, [PartPlan.of(p, step.new_lens[p.row]) for p in step.parts()])
        return self._plans[1]

    def make_store(self, k: torch.Tensor, v: torch.Tensor) -> CpuStore:
        if k.device.type != "cpu" or k.dtype not in _DTYPES:
            raise BackendError(
                f"backend 'cpu' holds float32, bfloat16 and float16 on the CPU, not {k.dtype} on {k.device}; use 'reference'"
            )
        return CpuStore(self, k, v)

    def make_search(self, rule: SparseSelection) -> CpuSearch:
        return CpuSearch(rule)

    def surprisal(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        targets = ids.detach().contiguous().numpy()
        return torch.from_numpy(_core.surprisal(_view(logits), targets, _DTYPES[logits.dtype], torch.get_num_threads()))
