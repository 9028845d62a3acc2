"""Which positions the model was told that tokens have: a caller may have begun elsewhere than at 0, but not jump.

Streams that are joined have read their documents side by side, from one position on: the next token comes after the longest of
them, and the model's positions are then *behind* the tokens seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvsieve.errors import CacheMismatchError, SessionError, UnsupportedError
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.part import Apply, Crop, Forward, Join, Saved, Setting, StreamPart
from kvsieve.runtime.saved import MOST, in_range, of_kind

if TYPE_CHECKING:
    from kvsieve.policy.compose import Policy

__all__ = ["ToldPositions"]


class ToldPositions(StreamPart):
    """How far the model's positions are ahead of the tokens that each row has seen.

    Attributes:
        ahead: by how much, of each row; negative where documents were read side by side. None of a row that nothing is known of.
            None before the first forward.
        joined_at: tokens that each row had seen when streams were joined to it; empty if none ever were.
        several_axes: whether an image was read whose positions have several axes: where text goes on then, only the model knows.
    """

    name = "positions"

    def __init__(self, policy: Policy, stored_keys: str) -> None:
        self._policy, self._pre_rope = policy, stored_keys == "pre_rope"
        self._moves = policy.moves or self._pre_rope
        self.ahead: list[int | None] | None = None
        self._told: list[int | None] | None = None
        """`ahead`, once the forward under way counts."""
        self.joined_at: list[int] = []
        self.several_axes = False
        self._image = False
        """Whether the forward under way reads an image with positions of several axes."""

    @classmethod
    def of(cls, setting: Setting) -> ToldPositions:
        """Every stream has it."""
        return cls(setting.policy, setting.stored_keys)

    def of_rows(self, batch: int) -> list[int]:
        """How far each of ``batch`` rows is ahead; 0 unless a caller began elsewhere."""
        known = self.ahead or []
        return [ahead or 0 for ahead in known] if len(known) == batch else [0] * batch

    def start(self, batch: int, anew: bool) -> None:
        """One of the stream's own calls feeds the model, which starts at 0."""
        self._told = [0] * batch if self.ahead is None or anew else self.ahead

    def check(self, position_ids: torch.Tensor | None, forward: Forward, first: bool) -> None:
        """The model must be told positions that go on where the stream stands, or keys rotated by them would lie.

        Args:
            position_ids: what it is told, int64 ``[B or 1, q]``.
            first: whether the stream has seen no column yet.

        Raises:
            CacheMismatchError: naming the row.
        """
        self._told = self.ahead
        if position_ids is None or position_ids.dim() != 2:
            return
        if position_ids.device.type != "cpu" and not self.joined_at:
            return
        lens, seen = forward.lens, forward.seen
        last = position_ids[:, -1].tolist()
        last = last * len(lens) if len(last) == 1 else last
        told = [at - (s + n - 1) if s + n else None for at, s, n in zip(last, seen, lens)]
        known = self.ahead if self.ahead is not None and not first else [None] * len(lens)
        self._told = [now if before is None else before for now, before in zip(told, known)]
        if self._pre_rope:
            self._check_each(position_ids, forward)
        for row, (now, before) in enumerate(zip(told, self._told)):
            if now != before:
                raise CacheMismatchError(
                    f"row {row}: the model was told that these tokens end at position {last[row]}, "
                    f"but the stream has seen {seen[row]} and got {lens[row]}; "
                    "use stream.generate(), or an attention mask over everything seen"
                )

    def _check_each(self, position_ids: torch.Tensor, forward: Forward) -> None:
        """Where keys are rotated when they are read, positions with gaps or in another order cannot be followed."""
        told, width = position_ids.expand(len(forward.lens), -1), position_ids.shape[1]
        for row, count in enumerate(forward.lens):
            mine = told[row, width - count :]
            if count > 1 and not torch.equal(mine, torch.arange(int(mine[-1]) - count + 1, int(mine[-1]) + 1)):
                raise CacheMismatchError(
                    f"row {row}: the model was told positions {mine[:3].tolist()}... to {int(mine[-1])} for {count} tokens from "
                    f"number {forward.seen[row]} on: {self._policy!r} counts tokens itself; leave position_ids out"
                )

    def check_axes(self, position_ids: torch.Tensor) -> None:
        """Positions ``[axes, B, q]``: those of text agree, those of an image do not, and then a key has no one place to move to.

        Raises:
            UnsupportedError: for an image under a policy that moves tokens.
        """
        axes = position_ids[-3:]
        if not bool((axes != axes[:1]).any()):
            return
        if self._moves:
            raise UnsupportedError(
                f"the positions of an image have three axes, and {self._policy!r} moves tokens along one; "
                "use a policy that leaves tokens where they are, such as kvsieve.Full() or kvsieve.SnapKV(...), or pass text only"
            )
        self._image = True

    def commit(self, forward: Forward) -> Apply:
        (told, image), (self._told, self._image) = (self._told, self._image), (None, False)

        def apply() -> None:
            self.ahead = self.ahead if told is None else told
            self.several_axes = self.several_axes or image

        return apply

    def rollback(self) -> None:
        self._told, self._image = None, False

    def check_crop(self, crop: Crop) -> None:
        """Refuse to forget a part of what was joined: documents that were read side by side have no one end to go back to."""
        for row, (seen, gone, joined) in enumerate(zip(crop.seen, crop.counts, self.joined_at)):
            if gone and seen - gone < joined:
                raise CacheMismatchError(
                    f"row {row}: cannot forget {gone} tokens of {seen}: the first {joined} were joined from several streams; "
                    f"at most {max(seen - joined, 0)} can be forgotten; {GO_BACK}"
                )

    def join(self, forks: Sequence[ToldPositions], join: Join) -> Apply:
        """The next token comes after the longest of the documents."""
        if any(fork.several_axes for fork in (self, *forks)):
            raise UnsupportedError(
                "streams that hold an image whose positions have three axes cannot be joined: only the model knows where text goes "
                "on; join streams of text only"
            )
        ends = [past + ahead for past, ahead in zip(join.past, self.of_rows(len(join.past)))]
        for fork, seen in zip(forks, join.seen):
            ends = [max(end, at + ahead) for end, at, ahead in zip(ends, seen, fork.of_rows(len(seen)))]
        totals = join.totals

        def apply() -> None:
            self.ahead = [end - total for end, total in zip(ends, totals)]
            self.joined_at = totals

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            if self.ahead is not None:
                self.ahead = [self.ahead[row] for row in rows]
            self.joined_at = [self.joined_at[row] for row in rows] if self.joined_at else []

        return apply

    def state(self) -> tuple[list[int | None] | None, list[int], bool]:
        return None if self.ahead is None else list(self.ahead), list(self.joined_at), self.several_axes

    def return_to(self, state: tuple[list[int | None] | None, list[int], bool]) -> None:
        ahead, joined_at, self.several_axes = state
        self.ahead, self.joined_at = None if ahead is None else list(ahead), list(joined_at)

    def save(self) -> Saved:
        return Saved({"ahead": self.ahead, "joined_at": self.joined_at, "several_axes": self.several_axes})

    def restore(self, saved: Saved) -> None:
        ahead = saved.get("ahead", (list, type(None)))
        if ahead is not None and len(saved.rows("ahead")) != len(saved.seen):
            raise SessionError(f"it says how far {len(ahead)} rows are ahead, of {len(saved.seen)}")
        for value in ahead or ():
            if value is not None:
                in_range(of_kind(value, int, "ahead"), -MOST, MOST, "ahead")
        self.ahead, self.several_axes = ahead, saved.get("several_axes", bool)
        self.joined_at = saved.by_row("joined_at")

    def reset(self) -> None:
        self.ahead, self.joined_at, self.several_axes = None, [], False
