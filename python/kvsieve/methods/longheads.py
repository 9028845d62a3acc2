"""LongHeads (Lu et al., Findings of EMNLP 2024, arXiv 2402.10685).

Departures from the paper and the published code, and why:

* A token sees itself, in a prompt as in decoding; the published code hides it from itself in a prompt.
* Prompts of any length are summed up; the published code fails on some when they are continued.
* Heads that share keys choose together: summaries are made, and scores are summed, for each KV head. The paper has no such heads.
* Queries of a prompt that lie in one chunk share what they read beside it; the published code searches for every token.
* Of equal scores the earlier chunk is taken.
* Chunks may be summed up otherwise (``summary``): by the mean of their keys, or by bounds, after Quest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsieve.budget import check_count
from kvsieve.checks import as_plain, plain_fields
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import Fetched
from kvsieve.policy.select import FetchedSelection, Piece, check_summary

__all__ = ["LongHeads", "LongHeadsSelection"]


@dataclass(frozen=True)
class LongHeadsSelection(FetchedSelection):
    """The first chunk, the newest two, and for each head those that suit it best, side by side; see :func:`kvsieve.LongHeads`."""

    context: int = 2048
    chunk: int = 256
    summary: str = "chunk_attention"

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("context", "chunk"):
            check_count(name, getattr(self, name), least=1)
        check_summary(self.summary, ("chunk_attention", "mean", "bounds"))
        if self.context % self.chunk or self.context < 3 * self.chunk:
            raise PolicyError(f"context must be at least 3 whole chunks of {self.chunk} tokens, got {self.context}")

    @property
    def start(self) -> int:  # type: ignore[override]
        return 0

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return True

    @property
    def compared_at(self) -> int:  # type: ignore[override]
        return 0

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.chunk

    @property
    def query_block(self) -> int:  # type: ignore[override]
        return self.chunk

    @property
    def longest(self) -> int:  # type: ignore[override]
        return self.context

    @property
    def always_read(self) -> tuple[int, int]:
        # Its own chunk may have begun with it; the one before is whole.
        return self.chunk, self.chunk + 1

    def num_blocks(self, seen: int) -> int:
        return seen // self.chunk

    def candidates(self, first: int) -> range:
        return range(1, max(first // self.chunk - 1, 1))

    def limit(self, first: int) -> int:
        return self.context // self.chunk - 3

    def pieces(self, first: int, count: int, chosen: Sequence[Sequence[int]]) -> list[Piece]:
        current, others = first // self.chunk, max(map(len, chosen))
        if others == len(self.candidates(first)):
            return [Piece(0, first + count, first)]
        # Chunk 0, what was chosen, and the chunk before the current one: so many chunks stand before it, in this order.
        within = first - current * self.chunk
        found = [self._piece(current - 1, within + self.chunk, first + count)]
        found.append(self._piece(0, within + (others + 2) * self.chunk))
        for head, blocks in enumerate(chosen):
            found += [self._piece(block, within + (others + 1 - at) * self.chunk, head=head) for at, block in enumerate(blocks)]
        return found

    def _piece(self, chunk: int, distance: int, end: int = 0, head: int | None = None) -> Piece:
        lo = chunk * self.chunk
        return Piece(lo, end or lo + self.chunk, distance, head=head)


@as_plain
def LongHeads(context: int, chunk: int = 256, summary: str = "chunk_attention") -> Memory:
    """Keep every token; each KV head reads chunks of the text that suit it, side by side, as if there were no others.

    A query reads the first chunk, its own and the one before it, and of the others those whose summaries suit it best. No distance
    is larger than ``context - 1``. A text of which all chunks fit is read whole, exactly. Nothing is freed. Queries of a prompt
    that lie in one chunk, and in one forward, share what they read, so the last token of a prompt may read other chunks than the
    same token would if it were decoded. Combine it by ``|`` with :func:`kvsieve.ThinK` or :func:`kvsieve.Quantized` to store tokens
    in less, which the backend ``cuda`` refuses when the stream opens. Runs on every backend.

    Args:
        context: tokens that are read at most, in whole chunks, at least three. Leave margin below the length that the model was
            trained for, as half of it; more than that length is refused when the stream opens.
        chunk: tokens of a chunk.
        summary: by what a chunk is compared with queries: ``"chunk_attention"``, what it attends to in itself, as published;
            ``"mean"`` and ``"bounds"`` as of :func:`kvsieve.InfLLM`.

    Raises:
        PolicyError: for counts that are none, a context that is not at least three whole chunks, or a summary that is not known.

    >>> LongHeads(2048)
    LongHeads(context=2048)
    """
    select, plain = LongHeadsSelection(context, chunk, summary), LongHeadsSelection()
    told = {"context": context, "chunk": chunk, "summary": summary}
    text = ", ".join(f"{name}={value!r}" for name, value in told.items() if name == "context" or value != getattr(plain, name))
    return Memory(position=Fetched(), select=select, text=f"LongHeads({text})")
