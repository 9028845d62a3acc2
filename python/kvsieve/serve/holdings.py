"""The bytes of many streams: those of blocks that forks share count once, as their allocator counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsieve.streams import Stream, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.blocks import Blocks

__all__ = ["Holdings"]


class Holdings:
    """The streams of a service: forks of one that has read nothing, and those that were loaded.

    Forks of one stream share an allocator, whose bytes are those of all of them together. What lies beside it (the windows of a
    model's sliding layers, summaries of blocks) is counted for each stream that holds it.

    Args:
        model, policy, backend: as for :func:`kvsieve.stream`.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, backend: str | None) -> None:
        self.root = stream(model, policy, backend)
        self._allocators: dict[int, tuple[Blocks, int]] = {}
        """By the identity of what forks share, and of how many open streams it is."""
        self._frozen: dict[Stream, int] = {}
        """Streams that nobody changes, and the bytes beside their blocks."""
        self._changing: set[Stream] = set()
        self.add(self.root)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values of all layers, before any compression."""
        return self.root._engine.facts.bytes_per_token

    @property
    def bytes_held(self) -> int:
        """Of all streams."""
        beside = sum(self._frozen.values()) + sum(_beside(one) for one in self._changing)
        return beside + sum(blocks.bytes_held for blocks, _ in self._allocators.values())

    @property
    def streams(self) -> list[Stream]:
        """All that are open, the first one among them."""
        return [*self._changing, *self._frozen]

    def add(self, found: Stream) -> Stream:
        """A stream that was opened elsewhere."""
        blocks = found._engine.blocks
        kept, count = self._allocators.get(id(blocks.stores), (blocks, 0))
        self._allocators[id(blocks.stores)] = kept, count + 1
        self._changing.add(found)
        return found

    def fork(self, of: Stream | None = None) -> Stream:
        """A stream that goes on from another one; without one, from nothing."""
        return self.add((self.root if of is None else of).fork())

    def freeze(self, one: Stream) -> None:
        """Nobody changes a stream from now on; it is forked only."""
        self._changing.discard(one)
        self._frozen[one] = _beside(one)

    def close(self, one: Stream) -> None:
        """Give back what no other stream shares. One that is closed already stays so."""
        if one not in self._changing and one not in self._frozen:
            return
        self._changing.discard(one)
        self._frozen.pop(one, None)
        key = id(one._engine.blocks.stores)
        blocks, count = self._allocators.pop(key)
        if count > 1:
            self._allocators[key] = blocks, count - 1
        one.close()

    def close_all(self) -> None:
        """The model is as it was."""
        for one in self.streams:
            self.close(one)


def _beside(one: Stream) -> int:
    engine = one._engine
    return engine.bytes_of_parts + engine.bytes_of_summaries
