"""Which blocks of a layer are in memory, written to be read: the definition that ``Arena`` of the Rust core follows.

Copies of the others are tensors on the CPU. What a backend does so that a block comes and goes is its own.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from kvsieve._core import PACKED
from kvsieve.backends.tiers import TierCounts
from kvsieve.budget import BLOCK
from kvsieve.errors import StateError, UnsupportedError

if TYPE_CHECKING:
    from kvsieve.backends.base import Runs

__all__ = ["BlockTier", "HasTier", "HostCopies"]

Tensors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Keys ``[Hkv, 64, D]`` and values ``[Hkv, 64, Dv]`` of a block."""


class HostCopies:
    """In the place of a file: it knows the layers that hold the blocks that left memory."""

    def __init__(self) -> None:
        self.layers: weakref.WeakSet[BlockTier] = weakref.WeakSet()

    def bytes(self) -> tuple[int, int]:
        held = sum(layer.counts().bytes_in_file for layer in self.layers)
        return held, held


class BlockTier:
    """The blocks of one layer.

    Of the blocks that nobody needs, those leave memory first that were fetched longest ago, or those of the lowest score.

    Args:
        get: keys and values of a block in memory; put: the other way round, None for nothing to be read any more; save: a copy of
            such tensors on the CPU, or one that is being made before anything that is asked for later.
    """

    def __init__(
        self,
        file: HostCopies,
        capacity: int,
        decay: float | None,
        get: Callable[[int], Tensors],
        put: Callable[[int, Tensors | None], None],
        save: Callable[[Tensors], Tensors],
    ) -> None:
        file.layers.add(self)
        self._capacity, self._decay = capacity, decay
        self._get, self._put, self._save = get, put, save
        self._copies: dict[int, Tensors] = {}
        self._away: set[int] = set()
        self._ends: dict[int, int] = {}
        self._full: set[int] = set()
        self._used: dict[int, int] = {}
        self._scores: dict[int, float] = {}
        self._protected: set[int] = set()
        self._leases: dict[int, set[int]] = {}
        self._clock = self._copies_due = 0
        self._hits = self._loads = self._spills = self._read = self._written = 0

    def away(self, blocks: Iterable[int]) -> set[int]:
        """Those of ``blocks`` that are not in memory."""
        return self._away.intersection(blocks)

    def check(self, blocks: Iterable[int]) -> None:
        """Refuse to read blocks that are not in memory.

        Raises:
            StateError: naming one.
        """
        gone = self.away(blocks)
        if gone:
            raise StateError(f"block {min(gone)} is not in memory; fetch it before it is read")

    def peek(self, block: int) -> Tensors:
        """Keys and values of a block, which stays where it is."""
        if block not in self._away:
            return self._get(block)
        k, v = self._copies[block]
        self._read += k.nbytes + v.nbytes
        return k, v

    def change(self, ends: Iterable[tuple[int, int]]) -> None:
        """Blocks are about to be written, up to these slots."""
        for block, end in ends:
            self.load([block])
            self._ends[block] = max(end, self._ends.get(block, 0))
            if self._ends[block] == BLOCK:
                self._full.add(block)
            self._copies.pop(block, None)
            self._use(block)

    def free(self, in_use: Callable[[int], bool]) -> None:
        """Blocks that nobody holds are forgotten."""
        for block in [block for block in self._used if not in_use(block)]:
            self._copies.pop(block, None)
            self._away.discard(block)
            self._full.discard(block)
            del self._used[block], self._ends[block]
            self._scores.pop(block, None)

    def load(self, blocks: Iterable[int]) -> None:
        """Blocks that left memory are there again."""
        for block in self._away.intersection(blocks):
            k, v = self._copies[block]
            self._put(block, (k, v))
            self._away.discard(block)
            self._use(block)
            self._loads += 1
            self._read += k.nbytes + v.nbytes

    def fetch(self, blocks: Iterable[int]) -> None:
        wanted = set(blocks)
        missing = self._away & wanted
        self._leases[threading.get_ident()] = wanted
        if missing:
            self._make_room(len(missing))
        for block in sorted(wanted):
            if block in missing:
                self.load([block])
            else:
                self._hits += 1
                self._use(block)

    def _make_room(self, more: int) -> None:
        """Blocks that have a copy leave memory, so that ``more`` have place within the capacity.

        Nothing is written while a step reads. Where a block without a copy was the one to leave, another one leaves in its place,
        and the end of the step makes a copy of the first.
        """
        held = self._in_memory()
        over = len(held) + more - self._capacity
        first, leaving = self._leaving(held, over), self._leaving(held & set(self._copies), over)
        self._copies_due += len(set(leaving) - set(first))
        for block in leaving:
            self._leave(block)

    def hold(self, blocks: Iterable[int]) -> None:
        held = set(blocks)
        self._protected |= held
        self.load(held)

    def trim(self, keep: Iterable[int]) -> None:
        self._leases.pop(threading.get_ident(), None)
        self._protected = set(keep)
        self.spill(self._leaving(self._in_memory(), len(self._in_memory()) - self._capacity))
        for block in self._leaving(self._in_memory() - set(self._copies), self._copies_due):
            self._copy(block)
        self._copies_due = 0

    def spill(self, blocks: Iterable[int]) -> None:
        for block in self._in_memory().intersection(blocks):
            self._copy(block)
            self._leave(block)

    def _copy(self, block: int) -> None:
        if block not in self._copies:
            k, v = self._copies[block] = self._save(self._get(block))
            self._spills += 1
            self._written += k.nbytes + v.nbytes

    def score(self, blocks: Sequence[int], mass: Sequence[float]) -> None:
        decay = 1.0 if self._decay is None else self._decay
        self._scores = {block: score * decay for block, score in self._scores.items()}
        for block, more in zip(blocks, mass, strict=True):
            self._scores[block] = self._scores.get(block, 0.0) + more

    def counts(self) -> TierCounts:
        in_file = sum(k.nbytes + v.nbytes for k, v in list(self._copies.values()))
        return TierCounts(self._hits, self._loads, self._spills, self._read, self._written, in_file)

    def _in_memory(self) -> set[int]:
        """Full blocks that are in memory."""
        return self._full - self._away

    def _leaving(self, blocks: set[int], most: int) -> list[int]:
        """The first ``most`` of those that may leave memory, the first to go first."""
        if most <= 0:
            return []
        free = blocks - self._protected - set().union(*self._leases.values())
        scores = self._scores if self._decay is not None else {}
        return heapq.nsmallest(most, free, key=lambda block: (scores.get(block, 0.0), self._used[block], block))

    def _leave(self, block: int) -> None:
        self._away.add(block)
        self._put(block, None)

    def _use(self, block: int) -> None:
        self._clock += 1
        self._used[block] = self._clock


class HasTier:
    """What a store offers whose blocks a :class:`BlockTier` knows: :class:`kvsieve.backends.tiers.HoldsTiers`, but for setting one.
    What is said to happen later is done at once, or begins at once.
    """

    _tier: BlockTier | None = None
    _lock: threading.RLock

    def fetch(self, runs: Runs) -> None:
        if self._tier is not None:
            with self._lock:
                self._tier.fetch(block for block, _, _ in runs if block < PACKED)

    def hold(self, blocks: Sequence[int]) -> None:
        with self._lock:
            self._tiered().hold(blocks)

    def trim(self, keep: Sequence[int], later: bool = False) -> None:
        with self._lock:
            self._tiered().trim(keep)

    def spill(self, blocks: Sequence[int], later: bool = False) -> None:
        with self._lock:
            self._tiered().spill(blocks)

    def prefetch(self, runs: Runs) -> None:
        """Copies are in memory: there is nothing to be read ahead."""
        self._tiered()

    def finish(self) -> None:
        self._tiered()

    def score(self, blocks: Sequence[int], mass: Sequence[float]) -> None:
        with self._lock:
            self._tiered().score(blocks, mass)

    def tier_counts(self) -> TierCounts:
        return TierCounts() if self._tier is None else self._tier.counts()

    def _tiered(self) -> BlockTier:
        if self._tier is None:
            raise UnsupportedError("this layer's blocks lie in no file; open the stream with kvsieve.policy.Tiered(...)")
        return self._tier
