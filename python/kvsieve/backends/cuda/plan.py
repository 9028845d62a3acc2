"""One step on one device: planned and uploaded once, for all layers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.attention import Partial
from kvsieve.backends.cuda.buffers import DeviceRuns, StepBuffer, round_up, upload
from kvsieve.backends.cuda.ops.attend import heads_of, resident
from kvsieve.backends.cuda.ops.launch import launcher_of
from kvsieve.backends.cuda.step_residents import Shared, StepResidents, find_residents
from kvsieve.backends.prefill_plan import PrefillPlan

if TYPE_CHECKING:
    from kvsieve._core import Step

__all__ = ["DevicePart", "Plan", "filling", "splits"]


class Plan:
    """One step on one device."""

    def __init__(self, step: Step, device: torch.device, buffers: dict[tuple[Any, ...], StepBuffer]) -> None:
        self.step, self.device = step, device
        table, appends = step.span_table(), step.append_table()
        decode = table is not None
        starts, spans, shifts = (
            table if table is not None else (np.zeros(1, np.int32), np.zeros((0, 4), np.int32), np.zeros(0, np.int64))
        )
        self.most_spans = int(np.diff(starts).max()) if len(starts) > 1 else 0
        """Spans of the longest item."""
        self.splits: dict[tuple[Any, ...], int] = {}
        """See :func:`splits`."""
        self._shifts = shifts
        self.spans = (starts, spans) if decode else None
        """Spans of each item on the host; None of a prefill."""
        self._residents: StepResidents | None = None
        self._uploads: dict[tuple[Any, ...], torch.Tensor] = {}
        self.key_starts: npt.NDArray[np.int64] | None = None
        """Where each item's keys begin among the keys of all items, and their number; None without a fast path."""
        if decode:
            lengths = (spans[:, 1] >> 8 & 255) - (spans[:, 1] & 255)
            self.key_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts]
        # Decode: one buffer for each shape of input, so that a captured graph finds it again. It is replaced to grow.
        tokens = step.num_rows * step.num_queries if decode else round_up(len(appends))
        key = (device, step.num_rows, step.num_queries) if decode else (device,)
        buffer = buffers.get(key)
        if buffer is None or buffer.tokens < tokens or buffer.capacity < len(spans):
            buffer = buffers[key] = StepBuffer(device, len(starts) - 1, tokens, round_up(len(spans)) if decode else 0)
        buffer.fill(appends, starts, spans, shifts)
        self.buffer = buffer
        copies = step.copy_table()
        self.copies = upload(copies, device) if len(copies) else None
        copied = [(to, (slots >> 16) + count) for _, to, slots, count in copies.tolist()]
        self.copied = copies[:, 0].tolist()
        """Shared blocks that are copied before they are written."""
        self.ends = copied + [(block, slot + count) for _, _, block, slot, count in step.appends()]
        """Blocks that the step writes to, up to which slot."""
        self.written = sorted({block for block, _ in self.ends})
        self._parts: list[DevicePart] | None = None

    @property
    def parts(self) -> list[DevicePart]:
        """The parts of the step."""
        if self._parts is None:
            step = self.step
            self._parts = [DevicePart(self.device, PrefillPlan.of(p, step.new_lens[p.row])) for p in step.parts()]
        return self._parts

    @cached_property
    def reads(self) -> frozenset[int]:
        """Blocks that it reads, if all that is held is read."""
        if self.spans is not None:
            return frozenset(np.unique(self.spans[1][:, 0]).tolist())
        return frozenset(block for p in self.parts for block in p.plan.runs[0].tolist())

    def residents(self) -> StepResidents:
        """All residents of each row, for a selection. Where a layer's blocks lie is for the layer to say.

        Raises:
            BackendError: for compressed keys.
            UnsupportedError: for post-RoPE keys that are shown elsewhere than the model put them.
        """
        if self._residents is None:
            shared = Shared(self.device, self.buffer.starts, self.buffer.spans, self.upload)
            self._residents = find_residents(self.step, self.spans, shared, self._shifts)
        return self._residents

    def upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """A copy on the device; one for equal values."""
        key = (values.shape, values.dtype, values.tobytes())
        if key not in self._uploads:
            self._uploads[key] = upload(values, self.device)
        return self._uploads[key]


class DevicePart:
    """A part of a step, its integers on the device."""

    def __init__(self, device: torch.device, plan: PrefillPlan) -> None:
        self.plan, self.part = plan, plan.part
        self.num_old, self.num_queries = plan.num_old, plan.num_queries
        self.runs = DeviceRuns(plan.runs, device)
        self.query_true, self.key_true = self.part.query_true(), self.part.key_true()
        self._device = device
        self._true: Partial | None = None
        self._at: dict[str, Partial | None] = {}

    def true(self) -> Partial:
        """True positions of queries and keys, on the device."""
        if self._true is None:
            self._true = upload(self.query_true, self._device), upload(self.key_true, self._device)
        return self._true

    def positions(self, frame: str) -> Partial | None:
        """Where to rotate queries and keys to, on the device; None if nothing rotates."""
        if frame not in self._at:
            at = self.plan.positions(frame)
            self._at[frame] = None if at is None else (upload(at[0].numpy(), self._device), upload(at[1].numpy(), self._device))
        return self._at[frame]

    def visible(self, queries: slice, keys: slice) -> torch.Tensor:
        """Which of these keys each of these queries sees: bool, on the device."""
        q_at, k_at = self.true()
        distance = q_at[queries, None] - k_at[None, keys]
        seen = (distance >= 0) & (distance >= self.part.far)
        return seen if self.part.near is None else seen & (distance < self.part.near)


def splits(plan: Plan, kv_heads: int, group: int, key_dim: int, raw: bool = False, bits: tuple[int, int] | None = None) -> int:
    """Thread blocks per query and head: as many as fill the GPU once, at most one per span."""
    found = plan.splits.get((kv_heads, group, key_dim, raw, bits))
    if found is not None:
        return found
    # Beyond the smallest capacity by powers of two, so that a growing memory changes the shape of a launch seldom.
    most = plan.most_spans if plan.most_spans <= 256 else round_up(plan.most_spans)
    found = max(1, min(filling(plan.device, max(plan.buffer.items, 1) * kv_heads, group, key_dim, raw, bits), most))
    plan.splits[kv_heads, group, key_dim, raw, bits] = found
    return found


def filling(
    device: torch.device, heads: int, group: int, key_dim: int, raw: bool = False, bits: tuple[int, int] | None = None
) -> int:
    """Thread blocks of `attend` for each of ``heads`` KV heads of all queries that fill the GPU once; 0 where these fill it."""
    together, subsets = heads_of(group, key_dim)
    others = heads * -(-group // (together * subsets))
    return launcher_of(device).processors(device) * resident(group, key_dim, raw, bits) // others
