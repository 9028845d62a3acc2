"""What a stream and its forks share where some of their blocks may lie in a file."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvsieve.backends.base import TierFile

__all__ = ["SharedTiers"]


class SharedTiers:
    """One file, and the blocks that must stay in memory.

    Attributes:
        file: of the blocks that are not in memory.
        windows: the blocks of the newest tokens, of the stream and of each of its forks, by the part that knows them.
    """

    def __init__(self, file: TierFile) -> None:
        self.file = file
        self.windows: weakref.WeakKeyDictionary[object, frozenset[int]] = weakref.WeakKeyDictionary()

    @property
    def kept(self) -> list[int]:
        """All blocks that must stay."""
        return sorted(set().union(*self.windows.values()))
