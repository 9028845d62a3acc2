"""What a backend's stores offer where some of their blocks may lie in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from kvsieve.backends.base import Store

__all__ = ["HoldsTiers", "TierCounts"]


class TierCounts(NamedTuple):
    """What the blocks of a layer did that may lie in a file.

    Attributes:
        hits, loads: blocks that were fetched, and were in memory, or were read from the file to stay there.
        spills: blocks that were written to the file.
        bytes_read, bytes_written: what was moved, whole reads of blocks that stay in the file among it.
        bytes_in_file: of the copies that the file holds; copies of blocks that are in memory as well count.
    """

    hits: int = 0
    loads: int = 0
    spills: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_in_file: int = 0


class HoldsTiers(Store, Protocol):
    """A store of which some blocks may lie in a file. Blocks that are not full never do.

    To read a block that is not in memory is a StateError. :meth:`Store.read` reads it from the file, and what writes or moves a
    block loads it first.
    """

    def set_tier(self, file: Any, capacity: int, decay: float | None, values_alone: bool = False) -> None:
        """Blocks may lie in ``file``, which this store's backend made, and about ``capacity`` full ones are in memory.

        Args:
            decay: of the blocks' scores, by which they leave memory; None for the order in which they were fetched.
            values_alone: keys stay in memory, and what is said of blocks is said of their values.
        """

    def hold(self, blocks: Sequence[int]) -> None:
        """These blocks stay in memory, whatever is fetched, until the next :meth:`trim`."""

    def trim(self, keep: Sequence[int], later: bool = False) -> None:
        """A step is over: full blocks leave memory, as many as are more than the capacity, but none of ``keep``.

        Args:
            later: a thread of the file writes them, and their memory is given back once that is done.

        Raises:
            TierFullError, TierError: if one cannot be written, or could not be written meanwhile; it stays in memory.
        """

    def spill(self, blocks: Sequence[int], later: bool = False) -> None:
        """Full ones of these blocks leave memory; ``later`` and errors are as of :meth:`trim`."""

    def prefetch(self, runs: Any) -> None:
        """Have the system begin to read the blocks of these runs that are not in memory, and wait for nothing.

        It is a hint: what it reads lies in the system's cache of the file, so no block comes or goes, nothing counts as a hit or a
        load, and what goes wrong is said by the fetch that needs a block. Where copies are in the host's memory it does nothing.
        """

    def finish(self) -> None:
        """Wait until nothing is being read or written any more; raises as :meth:`trim`."""

    def score(self, blocks: Sequence[int], mass: Sequence[float]) -> None:
        """A step is over in which ``blocks`` got so much attention, over all heads and queries."""

    def tier_counts(self) -> TierCounts:
        """What its blocks did since the store was made."""
