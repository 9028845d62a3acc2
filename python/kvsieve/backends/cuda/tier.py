"""Blocks of a layer that are not on the device: copies in pinned memory of the host, which come and go on a stream of their own.

The device is never waited for. A copy to the host begins after all that the current stream was given before, and what the current
stream is given later does not wait for it. Blocks that come back are waited for by the stream that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from kvsieve._core import PACKED
from kvsieve.backends.block_tier import BlockTier, HasTier, HostCopies
from kvsieve.errors import StateError

if TYPE_CHECKING:
    from kvsieve.backends.attention import Partial
    from kvsieve.backends.base import Runs
    from kvsieve.backends.cuda.plan import Plan
    from kvsieve.backends.cuda.storage import PlainStore

__all__ = ["CudaTier", "KeepsOnHost", "SideStream"]


class SideStream:
    """A stream beside the current one on which blocks are copied; where there are no streams, a copy is made at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arrived: torch.cuda.Event | None = None

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` to ``to``, one of which lies on the device, in pinned memory the other one."""
        if self._stream is None:
            to.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            if to.device == self._device:
                self._arrived = self._stream.record_event()
        # Whoever gives the block's memory back does not know this stream.
        (to if to.device == self._device else source).record_stream(self._stream)

    def join(self, whole: bool = False) -> None:
        """What the current stream is given from now on sees what was copied to the device; if ``whole``, also what was copied from
        it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        if whole:
            current.wait_stream(self._stream)
        elif self._arrived is not None:
            current.wait_event(self._arrived)


class CudaTier(BlockTier):
    """The blocks of one layer: as many as there is room for on the device, copies of the others on the host."""

    def __init__(self, file: HostCopies, capacity: int, decay: float | None, plain: PlainStore) -> None:
        self.side, self._plain = SideStream(plain.device), plain
        super().__init__(file, capacity, decay, plain.block, self._come_or_go, self._to_host)

    def _come_or_go(self, block: int, held: Partial | None) -> None:
        if held is None:
            self._plain.drop(block)
            return
        self._plain.reserve([block])
        for to, source in zip(self._plain.block(block), held):
            self.side.copy(to, source)

    def _to_host(self, held: Partial) -> Partial:
        k, v = (torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda") for x in held)
        for to, source in zip((k, v), held):
            self.side.copy(to, source)
        return k, v

    def read(self, runs: Runs, on_device: Callable[[Runs], Partial]) -> Partial:
        """Keys and values of ``runs``, wherever they are, on the device; those that are there already by ``on_device``."""
        away, found = self.away(block for block, _, _ in runs), []
        self.side.join(whole=True)
        for gone, mine in groupby(runs, lambda run: run[0] in away):
            if not gone:
                found.append(on_device(list(mine)))
                continue
            for block, lo, hi in mine:
                # Whole: the host would put slices together by itself, and not wait for a copy that is still being made.
                k, v = (x.to(self._plain.device, non_blocking=True)[:, lo:hi] for x in self.peek(block))
                found.append((k, v))
        k, v = (torch.cat(x, 1) for x in zip(*found))
        return k, v


class KeepsOnHost(HasTier):
    """What a store does so that some of its blocks may lie on the host."""

    plain: PlainStore
    _tier: CudaTier | None = None

    def set_tier(self, file: HostCopies, capacity: int, decay: float | None, values_alone: bool = False) -> None:
        """See :meth:`kvsieve.backends.tiers.HoldsTiers.set_tier`; before there are any blocks.

        Raises:
            StateError: if there are some.
        """
        if self.plain.slabs:
            raise StateError("this layer has blocks already, which share memory; say first that some of them may leave the device")
        self.plain.apart = True
        self._tier = CudaTier(file, capacity, decay, self.plain)

    def _check_there(self, plan: Plan) -> None:
        """Raise StateError unless all that a step can read is on the device."""
        if self._tier is not None:
            self._tier.check(plan.reads)

    def _change(self, sources: Iterable[int], ends: Iterable[tuple[int, int]]) -> None:
        """Blocks are about to be moved from, and written up to these slots. Packed ones stay on the device."""
        if self._tier is not None:
            with self._lock:
                self._tier.load(block for block in sources if block < PACKED)
                self._tier.change((block, end) for block, end in ends if block < PACKED)
