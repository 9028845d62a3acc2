"""Summaries of blocks: one vector for each KV head and block, made once, when a block is complete.

A row's summaries are a value (:class:`Summed`): a table that only grows, which forks and marks share, and what the blocks to come
need. A kind of summary says how that value goes on after some queries, and what it must be told for it.

    representatives     the mean of the tokens that were attended to most (InfLLM); of keys before RoPE
    chunk_attention     what the chunk attends to in itself (LongHeads); of keys rotated to their places in it
    mean                the mean of all keys before RoPE
    bounds              the maximum and the minimum of every channel (Quest)

All of them are float32, and turned so that queries are compared with them as they come, before RoPE: where a rule compares queries
at a distance, summaries, or the keys that they are made of, are rotated by as much backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from kvsieve.backends.attention import attend
from kvsieve.locks import shared_lock

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.policy.select import FetchedSelection

__all__ = ["KINDS", "Bounds", "ChunkAttention", "MeanKey", "News", "Representatives", "Summary", "Summed", "Table", "summary_of"]


SLAB = 1024
"""Blocks whose summaries lie side by side. Slabs never move, so a text that grows leaves no holes in the heap."""

PIECE = 1 << 20
"""Bytes of summaries that are compared at once: what a product writes is still in the cache when it is summed up."""


class _Slab:
    """Memory of at most :data:`SLAB` summaries, ``[capacity, Hkv, D]``, of which ``used`` are written. Tables share it."""

    def __init__(self, like: torch.Tensor, capacity: int) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.data = torch.empty(capacity, *like.shape[1:], dtype=like.dtype, device=like.device)
        self.used = 0
        self.lock = shared_lock()

    def then(self, count: int, more: torch.Tensor) -> _Slab:
        """One whose first ``count`` summaries are this one's, and then ``more`` ``[m, Hkv, D]``: itself, where there is room, and
        nothing else has gone on from there."""
        end = count + more.shape[0]
        with self.lock:
            if self.used == count and end <= self.data.shape[0]:
                self.data[count:end] = more
                self.used = end
                return self
        grown = _Slab(more, min(max(2 * end, 16), SLAB))
        grown.data[:count], grown.data[count:end] = self.data[:count], more
        grown.used = end
        return grown


class Table:
    """Summaries of the first blocks of a row, float32 ``[Hkv, n, R]``, mostly of a key's size. A value: growing makes another one.

    It grows in slabs that it shares with what it has grown from, so a block costs no copy of the others; where two forks grow from
    one table the second one copies the last slab.
    """

    def __init__(self, full: tuple[_Slab, ...], last: _Slab, count: int) -> None:
        self._full, self._last, self._count = full, last, count

    @classmethod
    def of(cls, data: torch.Tensor) -> Table:
        """The summaries ``data`` ``[Hkv, n, D]``."""
        like = data.transpose(0, 1)
        return cls((), _Slab(like, 0), 0).then(data)

    def __len__(self) -> int:
        return len(self._full) * SLAB + self._count

    def pieces(self, lo: int, hi: int) -> Iterator[torch.Tensor]:
        """Summaries ``lo..hi`` in order, some ``[m, Hkv, D]`` at a time; not to be written to."""
        row = self._last.data.shape[1:].numel() * self._last.data.itemsize
        size = max(1, PIECE // max(row, 1))
        for at, slab in enumerate((*self._full, self._last)):
            first = at * SLAB
            for begin in range(max(lo, first), min(hi, first + SLAB), size):
                end = min(begin + size, hi, first + SLAB)
                yield slab.data[begin - first : end - first]

    @property
    def data(self) -> torch.Tensor:
        """``[Hkv, n, D]``, copied."""
        parts = [*(slab.data for slab in self._full), self._last.data[: self._count]]
        return torch.cat(parts).transpose(0, 1)

    @property
    def memory(self) -> dict[int, int]:
        """Bytes of each piece of memory that it shares with others, by a number for that piece."""
        return {id(slab): slab.data.nbytes for slab in (*self._full, self._last)}

    def first(self, count: int) -> Table:
        """The first ``count`` of them."""
        if count >= len(self):
            return self
        slabs = (*self._full, self._last)
        whole, rest = divmod(max(count - 1, 0), SLAB)
        return Table(slabs[:whole], slabs[whole], rest + min(count, 1))

    def then(self, more: torch.Tensor) -> Table:
        """These, and ``more`` ``[Hkv, m, D]``."""
        new = more.detach().transpose(0, 1)
        full, last, count, at = self._full, self._last, self._count, 0
        while at < new.shape[0]:
            if count == SLAB:
                full, last, count = (*full, last), _Slab(new, SLAB), 0
            take = min(new.shape[0] - at, SLAB - count)
            last = last.then(count, new[at : at + take])
            count, at = count + take, at + take
        return Table(full, last, count)


@dataclass(frozen=True, eq=False)
class Summed:
    """What one layer of a row knows of its blocks.

    Attributes:
        table: their summaries.
        scores: float32 ``[Hkv, n]``, attention that the tokens behind the last block got from the queries that see them in their
            window; empty for kinds that do not need it.
        queries: those of the block that is not complete, ``[H, m, D]`` each, not rotated; empty for kinds that do not need them.
    """

    table: Table
    scores: torch.Tensor
    queries: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes beside the table's."""
        return self.scores.nbytes + sum(piece.nbytes for piece in self.queries)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies for a session file."""
        found = {"table": self.table.data.contiguous(), "scores": self.scores.clone()}
        return {**found, "queries": torch.cat(self.queries, 1)} if self.queries else found

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> Summed:
        """The inverse of :attr:`tensors`."""
        queries = (tensors["queries"].to(device),) if "queries" in tensors else ()
        return cls(Table.of(tensors["table"].to(device)), tensors["scores"].to(device), queries)


@dataclass(frozen=True, eq=False)
class News:
    """What a block of queries has done.

    Attributes:
        seen: tokens that the row has seen with them.
        q: they themselves, ``[H, m, D]``, not rotated; k: keys like the row's, ``[B, Hkv, q, D]``.
        read: keys ``[Hkv, n, D]`` and values of the tokens ``lo..hi``, pre-RoPE.
        call: the numbers that the layer's attention adds.
        scores: float32 ``[Hkv, n]``, attention that the tokens from ``scores_from`` on got from them; None where it is not needed.
    """

    seen: int
    q: torch.Tensor
    k: torch.Tensor
    read: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    call: AttendCall
    scores: torch.Tensor | None = None
    scores_from: int = 0


class Summary:
    """A kind of summary."""

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False
    """Whether it must be told how much attention tokens get inside the window."""
    rows: ClassVar[int] = 1
    """Vectors of a key's size of which a summary is made, one after the other."""

    def __init__(self, rule: FetchedSelection) -> None:
        self.rule = rule

    def begin(self, k: torch.Tensor) -> Summed:
        """Before the first token, for keys like ``k`` ``[B, Hkv, q, D]``."""
        table = Table.of(torch.zeros(k.shape[1], 0, self.rows * k.shape[3], device=k.device))
        return Summed(table, torch.zeros(k.shape[1], 0, device=k.device))

    def after(self, state: Summed | None, news: News) -> Summed:
        """What is known once some queries have read."""
        raise NotImplementedError

    def asked(self, q: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """What summaries are multiplied by to judge them for queries ``q`` ``[H, m, D]``: float32 ``[Hkv, R]``, ``R`` numbers as a
        summary has. It is the sum over the query heads of a group, and over queries."""
        q = q.detach().float()
        return (q.sum(1) if q.shape[1] > 1 else q).reshape(kv_heads, -1, q.shape[2]).sum(1)

    def can_forget(self, state: Summed, left: int) -> bool:
        """Whether what is known of the first ``left`` tokens alone can still be told."""
        raise NotImplementedError

    def cropped(self, state: Summed, left: int) -> Summed:
        """What is known of a row of which ``left`` tokens are left, as well as that can be told."""
        return replace(state, table=state.table.first(max((left - self.rule.start) // self.rule.block, 0)))

    def due(self, state: Summed, seen: int) -> tuple[int, int]:
        """The first token that no block has, and how many blocks more are complete."""
        done = len(state.table)
        return self.rule.start + done * self.rule.block, max(self.rule.num_blocks(seen) - done, 0)

    def split(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """``x`` ``[Hkv, count * block, ...]`` as ``[Hkv, count, block, ...]``."""
        return x.reshape(x.shape[0], count, self.rule.block, *x.shape[2:])

    def turned(self, keys: torch.Tensor, call: AttendCall) -> torch.Tensor:
        """``[Hkv, n, D]`` as queries are compared with them: :attr:`FetchedSelection.compared_at` tokens before these."""
        if call.rope is None or not self.rule.compared_at:
            return keys
        cos, sin = call.rope.span(self.rule.compared_at, 1, keys, factor=False)
        return call.rope.turn(keys, (cos, -sin))


class Representatives(Summary):
    """The mean of the tokens that got the most attention from the queries that see them in their window; of equal ones the earlier.

    Xiao et al., NeurIPS 2024, arXiv 2402.04617.
    """

    name = "representatives"
    needs_scores = True

    def after(self, state: Summed | None, news: News) -> Summed:
        state = state or self.begin(news.k)
        assert news.scores is not None
        base, count = self.due(state, news.seen)
        # A copy: what is known of a row is shared, and never changed.
        scores = torch.nn.functional.pad(state.scores, (0, max(news.seen - base, 0) - state.scores.shape[1]))
        lo = max(base, news.scores_from)
        scores[:, lo - base :].add_(news.scores[:, lo - news.scores_from :])
        if not count:
            return replace(state, scores=scores)
        end = count * self.rule.block
        keys = self.split(news.read(base, base + end)[0].float(), count)
        best = (
            self.split(scores[:, :end], count).sort(dim=2, descending=True, stable=True).indices[..., : self.rule.representatives]
        )
        more = keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[3])).mean(2)
        return replace(state, table=state.table.then(self.turned(more, news.call)), scores=scores[:, end:].clone())

    def can_forget(self, state: Summed, left: int) -> bool:
        """Attention that forgotten tokens gave is part of sums."""
        return False

    def cropped(self, state: Summed, left: int) -> Summed:
        """The attention that forgotten tokens gave stays counted."""
        found = super().cropped(state, left)
        lost = (len(state.table) - len(found.table)) * self.rule.block
        base = self.due(found, left)[0]
        scores = torch.nn.functional.pad(state.scores, (lost, 0))[:, : max(left - base, 0)]
        return replace(found, scores=scores)


class ChunkAttention(Summary):
    """Two attentions inside a chunk: the mean answer ``u`` of its queries to its keys, and what ``u`` as a query gives of the keys.

    Queries and keys are rotated to their places in the chunk, and see all of it. ``u`` is the mean over the query heads of a group.
    Lu et al., Findings of EMNLP 2024, arXiv 2402.10685.
    """

    name = "chunk_attention"

    def after(self, state: Summed | None, news: News) -> Summed:
        state = state or self.begin(news.k)
        held = (*state.queries, news.q.detach().clone())
        base, count = self.due(state, news.seen)
        if not count:
            return replace(state, queries=held)
        assert count == 1, "query blocks do not reach beyond a chunk"
        keys, values = (x.float() for x in news.read(base, base + self.rule.block))
        more = self.of_chunk(torch.cat(held, 1).float(), keys, values, news.call)
        return replace(state, table=state.table.then(more[:, None]), queries=())

    def of_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttendCall) -> torch.Tensor:
        """The summary ``[Hkv, D]`` of a chunk: its last queries ``[H, m, D]``, mostly all; keys and values ``[Hkv, w, D]``."""
        size = k.shape[1]
        if call.rope is not None:
            q, k = call.rope.rotate_to(q, [range(size - q.shape[1], size)]), call.rope.rotate_to(k, [range(size)])
        seen = torch.ones(q.shape[1], size, dtype=torch.bool, device=k.device)
        answers = attend(q, k, v, seen, call.scale, call.softcap)[0]
        mean = answers.mean(1).view(k.shape[0], -1, v.shape[2]).mean(1)
        return attend(mean[:, None], k, k, seen[:1], call.scale, call.softcap)[0][:, 0]

    def can_forget(self, state: Summed, left: int) -> bool:
        return left >= len(state.table) * self.rule.block

    def cropped(self, state: Summed, left: int) -> Summed:
        """Queries of a chunk that was complete are gone: what comes then is all that its summary is made of."""
        found = super().cropped(state, left)
        known = left - len(state.table) * self.rule.block
        queries = (torch.cat(state.queries, 1)[:, :known],) if state.queries and known > 0 else ()
        return replace(found, queries=queries)


class OfAllKeys(Summary):
    """A kind that needs a block's keys, and nothing else."""

    def after(self, state: Summed | None, news: News) -> Summed:
        state = state or self.begin(news.k)
        base, count = self.due(state, news.seen)
        if not count:
            return state
        keys = news.read(base, base + count * self.rule.block)[0].float()
        return replace(state, table=state.table.then(self.of_keys(keys, count, news.call)))

    def of_keys(self, keys: torch.Tensor, count: int, call: AttendCall) -> torch.Tensor:
        """Summaries ``[Hkv, count, R]`` of so many blocks of ``keys`` ``[Hkv, count * block, D]``."""
        raise NotImplementedError

    def can_forget(self, state: Summed, left: int) -> bool:
        return True


class MeanKey(OfAllKeys):
    """The mean of all keys of a block."""

    name = "mean"

    def of_keys(self, keys: torch.Tensor, count: int, call: AttendCall) -> torch.Tensor:
        return self.turned(self.split(keys, count).mean(2), call)


class Bounds(OfAllKeys):
    """The greatest and the least of every channel of a block's keys: no key of it suits a query better than they say.

    ``sum over channels of max(q * greatest, q * least)``, which is the positive part of a query times the one and the negative part
    times the other, so that it adds up over queries and heads before any block is looked at. A NaN in a key is found in both.
    Tang et al., ICML 2024, arXiv 2406.10774.
    """

    name = "bounds"
    rows = 2

    def of_keys(self, keys: torch.Tensor, count: int, call: AttendCall) -> torch.Tensor:
        keys = self.split(self.turned(keys, call), count)
        return torch.cat([keys.amax(2), keys.amin(2)], -1)

    def asked(self, q: torch.Tensor, kv_heads: int) -> torch.Tensor:
        q = q.detach().float()
        parts = (super(Bounds, self).asked(part, kv_heads) for part in (q.clamp(min=0), q.clamp(max=0)))
        return torch.cat([*parts], -1)


KINDS: tuple[type[Summary], ...] = (Representatives, ChunkAttention, MeanKey, Bounds)


def summary_of(rule: FetchedSelection) -> Summary:
    """The kind that ``rule`` names."""
    return next(kind for kind in KINDS if kind.name == rule.summary)(rule)
