"""The tokens of one namespace of a bank: keys before RoPE, values, and the mean key of every chunk, for each layer and KV head.

``Entries`` is a value: nothing that happens later changes it, so streams, forks and marks share it. Tokens lie in segments, which
are only ever written behind what any value of them shows:

    segment   | chunk 0 | chunk 1 | ... | chunk being filled | unwritten |
                lo ^ of a piece      hi ^

A value that goes on from a place from which another has already gone on copies a little and goes on in a segment of its own.
Chunks are dropped from the front by moving ``lo``; a segment of which nothing is shown any more is freed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kvsieve.locks import shared_lock

__all__ = ["BankLayer", "Entries", "Piece", "Segment", "Shape"]

FIRST = 8
"""Chunks of the first segment, and the most that are copied where two values go on from one place."""

LARGEST = 8192
"""Most tokens of a segment."""

Tensors = Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class BankLayer:
    """One layer that has a bank: its index, KV heads, the sizes of a key and a value, and their dtype."""

    index: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"layer {self.index} with {self.num_kv_heads} KV heads of {self.key_dim} and {self.value_dim} in {self.dtype}"


@dataclass(frozen=True)
class Shape:
    """What all namespaces of a bank have in common: its layers, tokens of a chunk, and most tokens of a namespace."""

    layers: tuple[BankLayer, ...]
    chunk: int
    capacity: int

    @property
    def most_chunks(self) -> int:
        """Chunks of the largest segment: small beside the capacity, since segments are freed as a whole."""
        return max(1, min(LARGEST, self.capacity // 8) // self.chunk)


class Segment:
    """Chunks that lie side by side, in every layer.

    Attributes:
        keys, values: by layer ``[Hkv, size, chunk, D]``, on the CPU; slots that no token was written to are zero.
        means: by layer float32 ``[Hkv, size, D]``, of the keys of each whole chunk.
        lengths: int64 ``[size]``, tokens of each whole chunk: fewer than ``chunk`` where it was flushed.
        used: slots that some value has written to.
    """

    def __init__(self, shape: Shape, size: int) -> None:
        self.size, self.chunk, self.used = size, shape.chunk, 0
        self.keys = {x.index: torch.zeros(x.num_kv_heads, size, shape.chunk, x.key_dim, dtype=x.dtype) for x in shape.layers}
        self.values = {x.index: torch.zeros(x.num_kv_heads, size, shape.chunk, x.value_dim, dtype=x.dtype) for x in shape.layers}
        self.means = {x.index: torch.zeros(x.num_kv_heads, size, x.key_dim) for x in shape.layers}
        self.lengths = torch.zeros(size, dtype=torch.int64)
        self._lock = shared_lock()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        every = (*self.keys.values(), *self.values.values(), *self.means.values(), self.lengths)
        return sum(tensor.nbytes for tensor in every)

    def claim(self, begin: int, end: int) -> bool:
        """Whether the slots ``begin`` to ``end - 1`` may be written by whoever asks: nobody else has gone on from ``begin``."""
        with self._lock:
            free = self.used == begin
            if free:
                self.used = end
            return free

    def write(self, begin: int, keys: Tensors, values: Tensors, new: slice) -> None:
        """Write the tokens ``new`` of ``keys``, ``values`` ``[Hkv, n, D]`` to claimed slots; whole chunks get their means."""
        count = new.stop - new.start
        lo, hi = begin // self.chunk, (begin + count) // self.chunk
        for index in self.keys:
            for held, given in ((self.keys, keys), (self.values, values)):
                held[index].flatten(1, 2)[:, begin : begin + count] = given[index][:, new]
            if lo < hi:
                self.means[index][:, lo:hi] = self.keys[index][:, lo:hi].float().mean(2)
        self.lengths[lo:hi] = self.chunk

    def end_chunk(self, at: int, count: int) -> None:
        """Chunk ``at`` is whole with its first ``count`` tokens."""
        for index in self.keys:
            self.means[index][:, at] = self.keys[index][:, at, :count].float().mean(1)
        self.lengths[at] = count

    def copy(self, shape: Shape, lo: int, hi: int, tail: int, size: int) -> Segment:
        """A segment that begins with the chunks ``lo`` to ``hi - 1`` of this one and ``tail`` tokens of the next."""
        made, end = Segment(shape, size), hi + (tail > 0)
        for mine, theirs in ((made.keys, self.keys), (made.values, self.values)):
            for index in mine:
                mine[index][:, : end - lo] = theirs[index][:, lo:end]
                if tail:  # the rest of that chunk may be another's
                    mine[index][:, hi - lo, tail:] = 0
        for index in made.means:
            made.means[index][:, : hi - lo] = self.means[index][:, lo:hi]
        made.lengths[: hi - lo] = self.lengths[lo:hi]
        made.used = (hi - lo) * self.chunk + tail
        return made


class Piece(NamedTuple):
    """The whole chunks ``lo`` to ``hi - 1`` of a segment."""

    segment: Segment
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class Entries:
    """The tokens of one namespace at one moment.

    Attributes:
        pieces: whole chunks, the oldest first.
        tail: tokens of the chunk that is being filled, after the last piece; it cannot be found yet.
        written: tokens ever written; the number of the next one. Token ``i`` is always the ``i``-th that was written.
        dropped: tokens that are gone, the first ones; the number of the oldest one held.
        chunks_dropped: chunks that are gone; the number of the oldest one held.
        ragged: whether some chunk was flushed before it was full.
    """

    shape: Shape
    pieces: tuple[Piece, ...] = ()
    tail: int = 0
    written: int = 0
    dropped: int = 0
    chunks_dropped: int = 0
    ragged: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens held, those of the unfinished chunk among them."""
        return self.written - self.dropped

    @property
    def num_chunks(self) -> int:
        """Whole chunks: those that can be found."""
        return sum(piece.hi - piece.lo for piece in self.pieces)

    def segments(self) -> list[Segment]:
        """The segments that they lie in."""
        return [piece.segment for piece in self.pieces]

    # ----------------------------------------------------------------------------------------------------------------- writing

    def append(self, keys: Tensors, values: Tensors) -> Entries:
        """These and then ``n`` new tokens; the oldest chunks go where there would be more tokens than the capacity.

        Args:
            keys, values: by layer ``[Hkv, n, D]``, keys before RoPE.
        """
        count = next(iter(keys.values())).shape[1]
        found, at = self, 0
        while at < count:
            found, at = found._write(keys, values, at, count)
        return found

    def _write(self, keys: Tensors, values: Tensors, at: int, count: int) -> tuple[Entries, int]:
        wanted = -(-(self.tail + count - at) // self.shape.chunk)
        if not self.pieces or self._end == self.pieces[-1].segment.size * self.shape.chunk:
            return self._with_room(wanted), at
        last, begin = self.pieces[-1], self._end
        # No more at once than may stay.
        taken = min(count - at, last.segment.size * self.shape.chunk - begin, self.shape.capacity)
        if not last.segment.claim(begin, begin + taken):
            return self._apart(wanted), at
        last.segment.write(begin, keys, values, slice(at, at + taken))
        hi, tail = divmod(begin + taken, self.shape.chunk)
        pieces = (*self.pieces[:-1], Piece(last.segment, last.lo, hi))
        return replace(self, pieces=pieces, tail=tail, written=self.written + taken)._within(), at + taken

    def flush(self) -> Entries:
        """The chunk that is being filled is whole as it is: it can be found, and the next token begins another."""
        if not self.tail:
            return self
        last, begin = self.pieces[-1], self._end
        if not last.segment.claim(begin, (last.hi + 1) * self.shape.chunk):
            return self._apart(1).flush()
        last.segment.end_chunk(last.hi, self.tail)
        return replace(self, pieces=(*self.pieces[:-1], last._replace(hi=last.hi + 1)), tail=0, ragged=True)

    @property
    def _end(self) -> int:
        """The slot of the last segment that the next token goes to."""
        return self.pieces[-1].hi * self.shape.chunk + self.tail

    def _with_room(self, wanted: int) -> Entries:
        """The same, where the last segment has room for a token: it has grown, or there is another one."""
        most = self.shape.most_chunks
        if self.pieces and self.pieces[-1].segment.size < most:
            return self._moved(wanted)
        fresh = Segment(self.shape, min(most, max(FIRST, wanted)))
        return replace(self, pieces=(*self.pieces, Piece(fresh, 0, 0)))

    def _moved(self, wanted: int) -> Entries:
        """The same, where the last piece lies in a larger segment of its own."""
        segment, lo, hi = self.pieces[-1]
        held = hi - lo
        size = max(held + 1, min(self.shape.most_chunks, max(2 * held, held + wanted, FIRST)))
        made = segment.copy(self.shape, lo, hi, self.tail, size)
        return replace(self, pieces=(*self.pieces[:-1], Piece(made, 0, held)))

    def _apart(self, wanted: int) -> Entries:
        """The same, where nobody else has gone on from the last segment."""
        segment, lo, hi = self.pieces[-1]
        if hi - lo <= FIRST:
            return self._moved(wanted)
        size = min(self.shape.most_chunks, max(FIRST, wanted))
        return replace(self, pieces=(*self.pieces, Piece(segment.copy(self.shape, hi, hi, self.tail, size), 0, 0)))

    def _within(self) -> Entries:
        """Without the oldest chunks, as far as there are more tokens than the capacity."""
        over, chunks, tokens, pieces = self.num_tokens - self.shape.capacity, 0, 0, list(self.pieces)
        while over > tokens:
            segment, lo, hi = pieces[0]
            if lo == hi:
                pieces.pop(0)
                continue
            gone = segment.lengths[lo:hi].cumsum(0)
            count = min(int(torch.searchsorted(gone, over - tokens)) + 1, hi - lo)
            tokens, chunks = tokens + int(gone[count - 1]), chunks + count
            pieces[0] = Piece(segment, lo + count, hi)
            if lo + count == hi and len(pieces) > 1:
                pieces.pop(0)
        if not chunks:
            return self
        dropped, chunks = self.dropped + tokens, self.chunks_dropped + chunks
        return replace(self, pieces=tuple(pieces), dropped=dropped, chunks_dropped=chunks)

    def with_capacity(self, shape: Shape) -> Entries:
        """The same under a shape with another capacity."""
        return replace(self, shape=shape)._within()
