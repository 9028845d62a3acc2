"""Several streams of one row each in one forward: weights are read once for all of them, and attention is each stream's own.

To a model this is one engine with a row for each stream. What concerns a row goes to the engine of its stream, alone and as it
would in a forward of its own, so that streams may be of any length and hold whatever their policies keep. Between two forwards
nothing is shared, and a stream may leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import StateError

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["Together"]


class _Nobody:
    """In the place of what reads pieces and candidates: every forward stays whole."""

    inner = False
    verifying = False

    def whole(self, output: Any) -> None:
        """Nothing was read in pieces."""


class _Underway:
    """In the place of a transcript: all streams are in a turn of their own."""

    turn = object()


class Together:
    """Engines whose streams read equally many tokens.

    Attributes:
        failed: what engines raised in the last forward, of those that did; all the others can go on.
        logits: what the model returned in it, float ``[B, r, V]``, also where some engine failed after that.
    """

    replaying = False

    def __init__(self, engines: Sequence[Engine]) -> None:
        first = engines[0]
        if any(one.facts is not first.facts or one.stored_keys != first.stored_keys for one in engines):
            raise StateError("streams that read together are of one model, and store keys in one way")
        self.engines = list(engines)
        self.facts, self.stored_keys = first.facts, first.stored_keys
        self.candidates, self.transcript, self.positions = _Nobody(), _Underway(), first.positions
        self.failed: list[tuple[Engine, Exception]] = []
        self.logits: torch.Tensor | None = None

    @property
    def columns(self) -> int:
        """Columns of the longest row: what masks are made for. Positions are given."""
        return max(engine.columns for engine in self.engines)

    @property
    def num_rows(self) -> int:
        """One for each stream."""
        return len(self.engines)

    def cut(self, width: int, kept_logits: Any) -> None:
        """Every forward stays whole."""

    def check_mask(self, mask: torch.Tensor, width: int) -> None:
        """No mask is given."""

    def expect(self, ids: torch.Tensor | None, *, foreign: bool = False) -> None:
        """The causal LM begins a forward over ``ids``, int64 ``[B, n]``."""
        self.failed, self.logits = [], None
        for at, engine in enumerate(self.engines):
            self._do(engine, engine.expect, None if ids is None else ids[at : at + 1])

    def prepare(self) -> None:
        """Its decoder begins."""
        for engine in self.engines:
            self._do(engine, engine.prepare)

    def attend(
        self,
        index: int,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **call: Any,
    ) -> torch.Tensor:
        """Attention of one layer, row by row: ``q`` ``[B, H, n, D]``, ``k``, ``v`` ``[B, Hkv, n, D]`` to ``[B, n, H, Dv]``."""
        out = []
        for at, engine in enumerate(self.engines):
            row = slice(at, at + 1)
            told = position_ids if position_ids is None or position_ids.shape[0] == 1 else position_ids[row]
            out.append(self._do(engine, engine.attend, index, module, q[row], k[row], v[row], mask=None, position_ids=told, **call))
        return out[0] if len(out) == 1 else torch.cat(out)

    def decoded(self, hidden: torch.Tensor) -> None:
        """The decoder returned ``hidden`` ``[B, n, hidden]``."""
        for at, engine in enumerate(self.engines):
            self._do(engine, engine.decoded, hidden[at : at + 1])

    def complete(self, logits: torch.Tensor) -> None:
        """The causal LM returned ``logits`` ``[B, r, V]``. Where one stream cannot take its token, the others have theirs."""
        self.logits = logits
        for at, engine in enumerate(self.engines):
            with contextlib.suppress(Exception):
                self._do(engine, engine.complete, logits[at : at + 1])
        if self.failed:
            raise self.failed[0][1]

    def rollback(self) -> None:
        """Undo what is unfinished, in every stream."""
        for engine in self.engines:
            engine.rollback()

    def _do(self, engine: Engine, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.failed.append((engine, error))
            raise
