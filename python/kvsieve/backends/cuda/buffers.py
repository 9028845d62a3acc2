"""Integers on the device: uploads, the buffer of a step, runs of slots, tables of blocks."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends.cuda.ops.rotations import Rotations

if TYPE_CHECKING:
    from kvsieve.backends.runs import Columns
    from kvsieve.facts import LayerRope

__all__ = ["DeviceRuns", "StepBuffer", "Table", "round_up", "upload"]


def upload(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``; the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def round_up(count: int) -> int:
    """A capacity for ``count``: the next power of two, at least 256."""
    return max(256, 1 << max(count - 1, 0).bit_length())


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
        self._rotated: set[int] = set()

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
        self._rotated.clear()

    def forget_rotations(self) -> None:
        """Let the next layer that asks make the rotations again: a graph that is being captured must hold their launch."""
        self._rotated.clear()

    def rotations(self, rope: LayerRope, frequencies: torch.Tensor) -> torch.Tensor:
        """Rotations of the step's shifts, made by the first layer that asks."""
        table = self._tables.get(rope)
        if table is None:
            table = torch.empty(self.capacity, rope.rotary_dim, dtype=torch.float32, device=self.device)
            self._tables[rope] = table
        if id(rope) not in self._rotated:
            Rotations(self.shifts, self.counts[1:2], frequencies, table).launch()
            self._rotated.add(id(rope))
        return table


class DeviceRuns:
    """Runs of slots on the device, plain and packed ones apart: int32 ``[n, 4]`` (block, lo, hi, tokens before), or None."""

    def __init__(self, runs: Columns, device: torch.device) -> None:
        blocks, lo, hi = runs
        ends = np.cumsum(hi - lo)
        self.tokens = int(ends[-1]) if len(ends) else 0
        at, packed = ends - (hi - lo), blocks >= PACKED
        table = np.stack([np.where(packed, blocks - PACKED, blocks), lo, hi, at], 1).astype(np.int32)
        self.plain = upload(table[~packed], device) if not packed.all() else None
        self.packed = upload(table[packed], device) if packed.any() else None


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
            self._tensor.copy_(upload(self.host, self.device), non_blocking=True)
            self._stale = False
        return self._tensor

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Rows to be changed."""
        while len(self.host) < first + count:
            self.host = np.concatenate([self.host, np.zeros_like(self.host)])
        self._stale = True
        return self.host[first : first + count]
