"""The tokens of one stream: the planner, which knows what is resident where, and the stores, which must agree with it.

A change of the planner comes with moves that every layer's store must make. It is made in all of them or in none: Ctrl-C waits, and
if one of the stores fails in the midst the stream is broken, which every later use says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvsieve.errors import StateError
from kvsieve.locks import shared_lock
from kvsieve.runtime.process import defer_sigint

if TYPE_CHECKING:
    from kvsieve._core import Moves, Planner
    from kvsieve.backends.base import Store
    from kvsieve.runtime.shared_tiers import SharedTiers

__all__ = ["Blocks"]


class Blocks:
    """A planner and one store per layer.

    Attributes:
        planner: what is resident where; replaced when a stream returns to a moment.
        stores: by layer index. Forks share them: which blocks are whose the planners know.
        lock: of a stream and its forks, under which both change: what planners decide and what stores do is not interleaved.
        tiers: where blocks of the stores lie that are not in memory, if any may; forks share it.
        broken: what went wrong in the midst of a change that all layers must make; the stream is then of no use.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.stores: dict[int, Store] = {}
        self.lock = shared_lock()
        self.tiers: SharedTiers | None = None
        self.broken: str | None = None

    def fork(self) -> Blocks:
        """The same tokens, in blocks that are copied when one of the two writes to them."""
        child = Blocks(self.planner.fork())
        child.stores, child.lock, child.tiers = self.stores, self.lock, self.tiers
        return child

    @property
    def num_rows(self) -> int:
        """Sequences in the batch; 0 before the first forward."""
        return self.planner.num_rows

    @property
    def seen(self) -> list[int]:
        """Tokens that each row has seen."""
        return [self.planner.seen(row) for row in range(self.planner.num_rows)]

    @property
    def resident(self) -> int:
        """Tokens held by the fullest row, over all memories of a chain."""
        planner = self.planner
        memories = range(planner.num_memories)
        return max((sum(planner.resident(m, row) for m in memories) for row in range(planner.num_rows)), default=0)

    @property
    def bytes_held(self) -> int:
        """Bytes that the stores' allocators hold."""
        return sum(store.bytes_held for store in self.stores.values())

    def check_whole(self) -> None:
        """Refuse a stream whose layers no longer agree.

        Raises:
            StateError: with what went wrong.
        """
        if self.broken is not None:
            raise StateError(f"{self.broken}, so they no longer hold the same tokens; reset this stream, or open another")

    @contextmanager
    def all_layers(self, what: str) -> Iterator[None]:
        """A change that all layers must make. Ctrl-C waits until it is made; after any other error the stream is of no use."""
        with defer_sigint():
            try:
                yield
            except BaseException as error:
                self.broken = f"{what} failed in the midst of the layers ({type(error).__name__}: {error})"
                raise

    def apply(self, moves: Moves) -> None:
        """Make the moves of an eviction in every store."""
        if len(moves):
            with self.all_layers("evicting"):
                for store in self.stores.values():
                    store.apply(moves)

    def free_unused(self) -> None:
        """Give memory that no block uses back to the allocator."""
        self._free()
        moves = self.planner.tidy()
        if len(moves):
            self.apply(moves)
            self._free()

    def _free(self) -> None:
        in_use, packed = self.planner.blocks_in_use(), self.planner.packed_in_use()
        for store in self.stores.values():
            store.free_unused(in_use, packed)

    def reset(self) -> None:
        """Forget all tokens; stores that no fork needs go as well."""
        self.planner.reset()
        self.broken = None
        self.free_unused()
        if not self.planner.used_blocks:
            self.stores.clear()

    def release(self) -> None:
        """The same, without a thought for what comes after."""
        self.planner.reset()
        if self.planner.used_blocks:
            self.free_unused()
        else:
            self.stores.clear()
