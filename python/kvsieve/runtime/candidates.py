"""Forwards that are read in pieces: a long prompt, and candidates that must be verified one by one.

Assisted decoding gives the model several candidates at once and takes back those that it rejects, by a crop. Where what a candidate
sees depends on how many came before it, each is read in a forward of its own, and its moment is kept: the crop then returns to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.runtime.part import State, StreamPart

if TYPE_CHECKING:
    from kvsieve.runtime.turn import Turn

__all__ = ["Candidates", "Pieces"]


@dataclass(frozen=True)
class Pieces:
    """How a forward is cut.

    Attributes:
        bounds: columns ``lo..hi`` of each piece.
        verifying: whether every piece ends with a candidate whose logits are wanted, and can be returned to.
        copies: rows that were made of each prompt; all pieces but the last read one of them, then the memory is copied.
    """

    bounds: tuple[tuple[int, int], ...]
    verifying: bool = False
    copies: int = 1


class Candidates:
    """How the forward under way is read, and the candidates that a crop may take back.

    Attributes:
        verifying: whether forwards may hold candidates.
        stepping: whether they are read one by one now.
        inner: whether a piece of a forward is being read.
        marks: the moment before each candidate of the last forward but its first, if they were read one by one.
    """

    def __init__(self, parts: Sequence[StreamPart]) -> None:
        self._parts = parts
        self.verifying = self.stepping = self.inner = False
        self.marks: list[State] = []
        self._outputs: list[Any] | None = None

    def cut(self, turn: Turn | None, width: int, kept_logits: Any) -> Pieces | None:
        """How a forward over ``width`` columns is cut, whose last ``kept_logits`` logits are wanted; None if it stays whole."""
        if self.inner:
            return None
        self.end()
        if self.steps_through(width, kept_logits):
            ends = list(range(width - kept_logits + 1, width + 1))
            return Pieces(tuple(zip([0, *ends[:-1]], ends)), verifying=True)
        if turn is None:
            return None
        cuts = turn.cuts(width, kept_logits if isinstance(kept_logits, int) else 1)
        return None if cuts is None else Pieces(tuple(pairwise(cuts)), copies=turn.copies)

    def steps_through(self, width: int, kept_logits: Any) -> bool:
        """Whether a forward over ``width`` tokens, of which the last ``kept_logits - 1`` are candidates, must go one by one."""
        if not self.verifying or self.stepping or not isinstance(kept_logits, int) or not 1 <= kept_logits <= width:
            return False
        return any(part.must_step(width, width > kept_logits) for part in self._parts)

    def begin(self, verifying: bool) -> None:
        """The forward under way is read in pieces; their outputs are kept."""
        self.inner, self.stepping, self._outputs = True, verifying, []

    def piece_read(self, output: Any, state: Callable[[], State]) -> None:
        """A piece was read; ``state`` tells what it takes to return to this moment."""
        assert self._outputs is not None
        self._outputs.append((output.logits[:, -1:] if self.stepping else None, output.hidden_states))
        if self.stepping:
            self.marks.append(state())

    def end(self) -> None:
        """Nothing is read in pieces any more."""
        self.inner, self.stepping, self._outputs = False, False, None

    def whole(self, output: Any) -> None:
        """The last piece's ``output`` becomes that of the whole forward."""
        if self.inner or self._outputs is None:
            return
        pieces = self._outputs
        if self.stepping:
            output.logits = torch.cat([*(logits for logits, _ in pieces), output.logits], 1)
        if output.hidden_states is not None and all(states is not None for _, states in pieces):
            every = [*(states for _, states in pieces), output.hidden_states]
            copies = output.hidden_states[0].shape[0]
            output.hidden_states = tuple(
                torch.cat([x.repeat_interleave(copies // x.shape[0], 0) for x in layer], 1) for layer in zip(*every)
            )
        self.stepping, self._outputs = False, None

    def reset(self) -> None:
        """No candidates, and no pieces."""
        self.verifying = False
        self.marks.clear()
        self.end()
