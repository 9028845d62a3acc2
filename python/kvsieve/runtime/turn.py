"""A turn under way: which columns of a forward are real tokens, and how a long prompt is cut."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvsieve.runtime.part import State

__all__ = ["Turn"]


@dataclass
class Turn:
    """A turn under way.

    Attributes:
        width: columns of its prompt.
        counts: real tokens of the prompt in each row, the last ones.
        chunk: most columns of a forward over the prompt.
        answers: whether what is read is answered; of `feed` it is not.
        copies: rows that `generate` makes of each prompt; they are made once the prompt but its last column has been read.
        left: columns of the prompt that are still to be read.
        fed: columns of sampled tokens that were fed to the model since.
        stops: for each row, after how many sampled tokens it ended; None while it goes on.
        said: the newest ids that `generate` showed, int64 ``[B, n]``.
        hidden: columns of ``said`` before the first sampled token.
        delivered: tokens that a streamer was given.
        prompt_state: with copies, the stream's state before the last column of the prompt.
        owner: the thread that began it.
        verified: with candidates, how many tokens the row held when the last ones were verified.
    """

    width: int
    counts: list[int]
    chunk: int
    copies: int = 1
    answers: bool = True
    left: int = 0
    fed: int = 0
    stops: list[int | None] = field(default_factory=list)
    said: torch.Tensor | None = None
    hidden: int = 0
    delivered: list[torch.Tensor] = field(default_factory=list)
    prompt_state: State | None = None
    verified: int | None = None
    owner: threading.Thread = field(default_factory=threading.current_thread)
    started: bool = False

    def __post_init__(self) -> None:
        self.left = self.width
        self.stops = [None] * (len(self.counts) * self.copies)

    def cuts(self, width: int, kept_logits: int) -> list[int] | None:
        """Where a forward over the whole prompt is cut, whose last ``kept_logits`` are wanted; None if it stays whole."""
        if self.left != self.width:
            return None
        last = width - 1 if self.copies > 1 else width - max(kept_logits, 1)
        cuts = sorted({*range(0, last, self.chunk), last, width} if self.copies > 1 else {*range(0, last + 1, self.chunk), width})
        return None if self.copies == 1 and len(cuts) == 2 else cuts

    def lens(self, batch: int, width: int) -> list[int]:
        """Real tokens among the next ``width`` columns of each of ``batch`` rows; they are the last ones."""
        counts, stops = self.counts, self.stops
        if batch != len(counts):
            counts = [count for count in counts for _ in range(batch // len(counts))]
        if batch != len(stops):
            stops = [None] * batch
        prompt = min(width, self.left)
        lo = self.width - self.left
        more = width - prompt
        lens = []
        for count, stop in zip(counts, stops):
            real = min(max(lo + prompt - (self.width - count), 0), prompt)
            lens.append(real + (more if stop is None else min(max(stop - self.fed, 0), more)))
        return lens

    def longer(self, batch: int) -> list[bool]:
        """For each of ``batch`` rows, whether what comes next is of a prompt of several tokens, all of it or a piece."""
        copies = batch // len(self.counts)
        return [self.left > 0 and count > 1 for count in self.counts for _ in range(copies)]

    @property
    def place(self) -> tuple[int, int, bool]:
        """How far the turn has come."""
        return self.left, self.fed, self.started

    @place.setter
    def place(self, at: tuple[int, int, bool]) -> None:
        self.left, self.fed, self.started = at

    def committed(self, width: int) -> None:
        """A forward over ``width`` columns counts."""
        self.started = True
        prompt = min(width, self.left)
        self.left -= prompt
        self.fed += width - prompt

    def cropped(self, columns: int, seen: int) -> None:
        """The newest columns were taken back; ``seen`` tokens are left."""
        self.fed = max(self.fed - columns, 0)
        self.verified = seen

    def heard(self, ids: torch.Tensor, ended: torch.Tensor | None) -> None:
        """`generate` shows all ids ``[B, n]`` after each sampled token, and which rows are at their end."""
        self.said = ids
        if ended is not None and ended.shape[0] == len(self.stops):
            count = ids.shape[1] - self.hidden
            for row in ended.nonzero().flatten().tolist():
                if self.stops[row] is None:
                    self.stops[row] = count
