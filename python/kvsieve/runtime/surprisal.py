"""Surprisal: how much each token surprised the model, from the logits it computes anyway wherever possible.

The score of token ``t`` is ``-ln p(x_t | x_<t)``, which needs the logits at ``t - 1``. So the last row of logits is carried from
one forward to the next: a generated token costs one read of a row that exists. A prompt's rows are not computed by `generate`,
so they are made here from the final hidden states, in blocks, and dropped: ``[tokens, vocabulary]`` is never whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.errors import StateError, UnsupportedModelError
from kvsieve.runtime.part import Apply, Crop, Forward, Saved, Setting, StreamPart, unchanged

if TYPE_CHECKING:
    from kvsieve.backends.base import Backend
    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.blocks import Blocks

__all__ = ["SurprisalScores", "published_scores", "true_scores"]

ROWS = 256
"""Rows of logits made at a time."""


class SurprisalScores(StreamPart):
    """Scores the tokens of each forward, and carries the last logits to the next.

    Attributes:
        published: whether scores are those of SirLLM's published code.
        tail: logits ``[B, r, V]`` of the last columns seen; the last row is the carry.
        first: scores of the next tokens, where they were known before and no logits are carried.
    """

    name = "surprisal"
    stores_all = True

    def __init__(self, policy: Policy, facts: ModelFacts, backend: Backend, blocks: Blocks) -> None:
        if facts.logits_of is None:
            raise UnsupportedModelError(
                f"{policy!r} needs the model's logits for every token, but this model computes them in a way that is not known: "
                "its output differs from its head applied to its last hidden state"
            )
        self._logits_of, self._backend, self._policy, self._blocks = facts.logits_of, backend, policy, blocks
        rule = next(m.roles.evict for m in policy.memories if m.roles.evict.needs_surprisal)
        self.published = getattr(rule, "score", "surprisal") == "published"
        self.tail: torch.Tensor | None = None
        self.first: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, setting: Setting) -> SurprisalScores | None:
        """None if the policy does not rank tokens by how surprising they are."""
        if not setting.policy.needs_surprisal:
            return None
        return cls(setting.policy, setting.facts, setting.backend, setting.blocks)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def check_input(self, causal_lm: bool, ids: torch.Tensor | None) -> None:
        if not causal_lm:
            raise StateError(f"{self._policy!r} scores tokens by the model's logits: call the causal LM, not its base model")
        if ids is None:
            raise StateError(f"{self._policy!r} scores tokens by their ids: pass input_ids, not inputs_embeds")

    def commit(self, forward: Forward) -> Apply:
        if forward.ids is None or forward.hidden is None or forward.logits is None:
            return unchanged
        scores, tail = self.score(forward.ids, forward.hidden, forward.logits, forward.lens, keep_rows=forward.verifying)

        def apply() -> None:
            for row, values in enumerate(scores):
                if len(values):
                    self._blocks.planner.set_scores(row, values)
            self.tail, self.first = tail, None

        return apply

    def score(
        self, ids: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor, lens: list[int], keep_rows: bool
    ) -> tuple[list[npt.NDArray[np.float32]], torch.Tensor]:
        """Scores of each row's new tokens, and the tail to carry.

        Args:
            ids: int64 ``[B, q]``; hidden: ``[B, q, hidden]`` after the final norm; logits: ``[B, r, V]`` of the last ``r`` columns.
            lens: real new tokens of each row (its last columns).
            keep_rows: keep all ``r`` rows, because a later crop may go back to any of them.
        """
        with torch.no_grad():
            width = ids.shape[1]
            own = ids if self.published else torch.cat([ids[:, 1:], ids[:, :1]], 1)
            table = self._table(own.to(hidden.device), hidden, logits, width if self.published else width - 1)
            first = self._first(ids, lens)
            scores = []
            for row, count in enumerate(lens):
                values = table[row, width - count :]
                if self.published:
                    scores.append(published_scores(values))
                else:
                    known = None if first is None else float(first[row])
                    scores.append(true_scores(values[: max(count - 1, 0)], known, count))
            if not logits.shape[1]:
                logits = torch.stack([self._logits_of(row[-1:]) for row in hidden])
            tail = logits.detach() if keep_rows else logits[:, -1:].detach().clone()
            silent = [row for row, count in enumerate(lens) if count == 0]
            if silent:
                # A row that was given pads only goes on from where it was; what a pad makes the model expect means nothing.
                tail = tail.clone()
                tail[silent] = torch.nan if self.tail is None else self.tail[silent, -1:]
            return scores, tail

    def _first(self, ids: torch.Tensor, lens: list[int]) -> npt.NDArray[np.float32] | None:
        """The scores of the rows' first new tokens, from the logits that were carried; nan where none were."""
        if self.published:
            return None
        if self.tail is None:
            return self.first
        at = torch.tensor([min(ids.shape[1] - count, ids.shape[1] - 1) for count in lens], device=ids.device)
        tokens = ids.gather(1, at[:, None])[:, 0].to(self.tail.device)
        found: npt.NDArray[np.float32] = self._backend.surprisal(self.tail[:, -1], tokens).cpu().numpy()
        return found

    def _table(self, targets: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor, width: int) -> npt.NDArray[np.float32]:
        """Surprisal of ``targets[:, c]`` under the logits of column ``c``, for columns below ``width``: ``[B, width]``."""
        batch, given = targets.shape[0], logits.shape[1]
        made = min(hidden.shape[1] - given, width)
        table = torch.zeros(batch, width, dtype=torch.float32)
        for row in range(batch):
            for lo in range(0, made, ROWS):
                hi = min(lo + ROWS, made)
                table[row, lo:hi] = self._backend.surprisal(self._logits_of(hidden[row, lo:hi]), targets[row, lo:hi]).cpu()
            if width > made:
                rows = logits[row, : width - made]
                table[row, made:] = self._backend.surprisal(rows, targets[row, made:width].to(rows.device)).cpu()
        result: npt.NDArray[np.float32] = table.numpy()
        return result

    # -------------------------------------------------------------------------------------------------------------- going back

    def covers(self, columns: int) -> bool:
        """Whether the logits of what is left after the newest ``columns`` are forgotten are carried."""
        return not columns or self.published or (self.tail is not None and columns < self.tail.shape[1])

    def must_read_again(self, columns: int) -> int:
        """The score of the next token needs the logits of the last one that stays, which is read again where they are gone."""
        return 0 if self.covers(columns) else 1

    def crop(self, crop: Crop) -> Apply:
        """The logits of forgotten columns go. Where the columns stay, those of rows that forget tokens mean nothing."""

        def apply() -> None:
            if self.tail is None:
                return
            if crop.columns is not None:
                self.tail = self.tail[:, : -crop.columns] if crop.columns < self.tail.shape[1] else None
            else:
                self.tail = self.tail.clone()
                self.tail[[row for row, count in enumerate(crop.counts) if count]] = torch.nan

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            if self.tail is not None:
                self.tail = self.tail[list(rows)]

        return apply

    def state(self) -> tuple[torch.Tensor | None, npt.NDArray[np.float32] | None]:
        return self.tail, self.first

    def return_to(self, state: tuple[torch.Tensor | None, npt.NDArray[np.float32] | None]) -> None:
        self.tail, self.first = state

    def save(self) -> Saved:
        return Saved({}, {} if self.tail is None else {"tail": self.tail.contiguous()})

    def restore(self, saved: Saved) -> None:
        self.tail = saved.tensor("tail", None, len(saved.seen), None, None) if "tail" in saved.tensors else None

    def reset(self) -> None:
        self.tail = self.first = None


def true_scores(following: npt.NDArray[Any], first: float | None, count: int) -> npt.NDArray[np.float32]:
    """Scores of a chunk of ``count`` tokens: ``first`` (from the carry), then ``following``.

    A session's very first token has no carry (None, or nan); it takes the largest of the others, so that it is not the first to go.
    """
    if count == 0:
        return np.zeros(0, np.float32)
    if first is None or np.isnan(first):
        finite = following[np.isfinite(following)]
        first = float(finite.max()) if finite.size else 0.0
    return np.concatenate([np.array([first]), following]).astype(np.float32)


def published_scores(repeats: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The score of the published SirLLM code, from ``repeats[i] = -ln p_i(x_i)``: shifted by one, the first takes the largest."""
    if repeats.size == 0:
        return np.zeros(0, np.float32)
    return np.concatenate([repeats.max(keepdims=True), repeats[:-1]]).astype(np.float32)
