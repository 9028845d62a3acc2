"""What a stream holds between two forwards, and how it changes there: crops, reordered rows, marks, forks, evictions.

Every change is a loop over the parts (:mod:`.part`); which ones there are is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from kvsieve.backends.heap import trim_heap
from kvsieve.errors import StateError
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.blocks import Blocks
from kvsieve.runtime.candidates import Candidates
from kvsieve.runtime.exclusive import exclusive
from kvsieve.runtime.part import Crop, Forward, Setting, State, Watcher
from kvsieve.runtime.parts import Parts, check_backend
from kvsieve.runtime.pinning import Pinning
from kvsieve.runtime.process import defer_sigint
from kvsieve.runtime.tiers import Tiers
from kvsieve.runtime.told_positions import ToldPositions
from kvsieve.runtime.transcript import Transcript

if TYPE_CHECKING:
    from kvsieve._core import Planner
    from kvsieve.backends.base import Backend, Store
    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.stats import TierStats

__all__ = ["Held"]

H = TypeVar("H", bound="Held")


class Held:
    """The tokens of one stream, and its parts.

    Attributes:
        blocks: the tokens.
        parts: what else has a state. Three that every stream has are named: transcript, positions, pinning.
        candidates: how the forward under way is read.
        forward: the forward under way, once its first layer has been reached.
        watchers: who is told of every step; a fork has none.
        claim: the thread that is in :meth:`claimed`.
    """

    def __init__(self, policy: Policy, facts: ModelFacts, backend: Backend, stored_keys: str, blocks: Blocks | None) -> None:
        self.policy, self.facts, self.backend, self.stored_keys = policy, facts, backend, stored_keys
        self.blocks = blocks or Blocks(make_planner(policy.specs(facts.bytes_per_token), stored_keys))
        setting = Setting(policy, facts, backend, stored_keys, self.blocks)
        self.parts = Parts.of(setting)
        if blocks is None:
            check_backend(setting, self.parts)
        self.transcript, self.positions = self.parts.the(Transcript), self.parts.the(ToldPositions)
        self.pinning = self.parts.the(Pinning)
        self.candidates = Candidates(self.parts)
        self.forward: Forward | None = None
        self.watchers: list[Watcher] = []
        self.claim: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------------ what is held

    @property
    def planner(self) -> Planner:
        """What is resident where."""
        return self.blocks.planner

    @property
    def stores(self) -> dict[int, Store]:
        """Keys and values, by layer index."""
        return self.blocks.stores

    @property
    def lock(self) -> threading.RLock:
        """Of this stream and its forks."""
        return self.blocks.lock

    @property
    def columns(self) -> int:
        """Columns seen, pads included: what `generate` must be told."""
        return self.transcript.columns

    @property
    def num_rows(self) -> int:
        """Sequences in the batch; 0 before the first forward."""
        return self.blocks.num_rows

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that the allocator holds."""
        return self.blocks.bytes_held + self.bytes_of_parts + self.bytes_of_summaries

    @property
    def bytes_of_parts(self) -> int:
        """The share of those that lie beside the stores: the sliding layers', and a bank's."""
        return sum(part.bytes_held for part in self.parts)

    @property
    def bytes_of_summaries(self) -> int:
        """The share of those that sums up blocks of the text."""
        return sum(part.bytes_of_summaries for part in self.parts)

    @property
    def tier_stats(self) -> TierStats | None:
        """Blocks in memory and in a file; None where all are in memory."""
        tiers = self.parts.find(Tiers)
        return None if tiers is None else tiers.stats()

    @exclusive
    def rollback(self) -> None:
        """Undo an unfinished forward, in every layer; without one, do nothing."""
        if self.forward is not None:
            self.forward = None
            self.planner.rollback()
        for part in self.parts:
            part.rollback()

    def idle(self) -> None:
        """No forward is under way: one that died is undone.

        Raises:
            StateError: if a change of all layers failed in their midst, or another thread is at work.
        """
        self.blocks.check_whole()
        self.check_owner()
        if self.forward is not None:
            self.rollback()

    def check_owner(self) -> None:
        """Refuse another thread while a forward or a turn is under way.

        Raises:
            StateError: if the thread that began it lives.
        """
        turn, me = self.transcript.turn, threading.current_thread()
        owner = self.forward.owner if self.forward is not None else None if turn is None else turn.owner
        for one in (owner, self.claim):
            if one is not None and one is not me and one.is_alive():
                raise StateError(f"this stream is in use by thread {one.name!r}; wait for it, or give each thread a stream.fork()")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside, other threads are refused, between two forwards and before the first one too.

        Raises:
            StateError: if another thread is at work.
        """
        me, before = threading.current_thread(), None
        try:
            with self.lock:
                self.check_owner()
                before, self.claim = self.claim, me
            yield
        finally:
            if self.claim is me:
                self.claim = before

    # ---------------------------------------------------------------------------------------------------------------- evicting

    @exclusive
    def evict(self, force: bool, turn_ended: bool = False) -> None:
        """Let the policy evict. Without ``force`` a rule that ranks tokens waits until it is a whole block over budget."""
        with defer_sigint():
            try:
                for part in self.parts:
                    part.evict(force, turn_ended)
                for part in self.parts:
                    part.evicted()
            except BaseException:
                # What a part holds from the one to the other, blocks among it, nobody would give back.
                for part in self.parts:
                    part.rollback()
                raise
        if force:
            self.blocks.free_unused()

    def settled(self, turn_ended: bool = False) -> None:
        """Evictions are over, and no resident is a candidate."""
        for part in self.parts:
            part.settled(turn_ended)
        for watcher in self.watchers:
            watcher.settled()

    @exclusive
    def make_room(self) -> None:
        """Something else than a forward changed what must stay: evict what that leaves over."""
        if self.num_rows and not self.candidates.verifying:
            self.evict(force=False)

    @exclusive
    def end_turn(self) -> None:
        """Scores decay, the budget holds exactly, memory is given back."""
        self.idle()
        self.evict(force=True, turn_ended=True)
        self.settled(turn_ended=True)

    # ------------------------------------------------------------------------------------------------------------- what callers do

    def check_crop(self, columns: int, *, to_read_again: bool = False) -> None:
        """Refuse, before anything changes, to forget ``columns`` if that cannot be exact.

        ``to_read_again`` says that they are read again at once.

        Raises:
            CacheMismatchError, StateError: if there are not so many, or what came before them is gone.
        """
        self.blocks.check_whole()
        if not 0 < columns <= len(self.candidates.marks):
            self._check_crop(self._crop_of(columns, to_read_again))

    @exclusive
    def crop(self, columns: int, *, to_read_again: bool = False) -> None:
        """Forget the newest ``columns``, and what was said after them."""
        self.idle()
        self.check_crop(columns, to_read_again=to_read_again)
        marks = self.candidates.marks
        if 0 < columns <= len(marks):
            self.return_to(marks[-columns])
        elif columns:
            self._crop(self._crop_of(columns, to_read_again))
        marks.clear()
        self.transcript.cropped(columns)
        if self.candidates.verifying and self.num_rows:
            self.evict(force=False)

    @exclusive
    def crop_rows(self, counts: list[int]) -> None:
        """Forget the newest ``counts[row]`` tokens of each row, which it did not say."""
        self.idle()
        crop = Crop(self.blocks.seen, counts, None, keeps_pins=True)
        self._check_crop(crop)
        self._crop(crop)

    def _crop_of(self, columns: int, to_read_again: bool) -> Crop:
        counts = self.transcript.tokens_in_last(columns)
        again = 0 if to_read_again else max((part.must_read_again(columns) for part in self.parts), default=0)
        return Crop(self.blocks.seen, counts, columns, self.candidates.verifying or to_read_again, again)

    def _check_crop(self, crop: Crop) -> None:
        for part in self.parts:
            part.check_crop(crop)

    def _crop(self, crop: Crop) -> None:
        changes = [part.crop(crop) for part in self.parts]
        if crop.columns is None:
            for part in self.parts:
                part.force_crop(crop.counts)
        self.planner.crop_rows(list(crop.counts))
        for change in changes:
            change()

    @exclusive
    def stop_verifying(self) -> None:
        """No candidates are verified any more: what had to stay because of them may be evicted."""
        if self.candidates.verifying:
            self.candidates.verifying = False
            self.candidates.marks.clear()
            if self.num_rows and self.forward is None:
                self.evict(force=False)

    @exclusive
    def select_rows(self, rows: list[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        if not self.num_rows:
            return
        self.idle()
        changes = [part.select_rows(rows) for part in self.parts]
        self.planner.select_rows(rows)
        for change in changes:
            change()

    @exclusive
    def state(self) -> State:
        """What it takes to return to this moment."""
        return State(self.planner.fork(), tuple(part.state() for part in self.parts))

    @exclusive
    def return_to(self, state: State) -> None:
        """Make ``state``, of this stream or of a fork of it, the present; it can be returned to again.

        A forward that died since then is undone: its step is none of the planner that comes.
        """
        if self.forward is not None:
            self.rollback()
        self.blocks.planner = state.planner.fork()
        for part, then in zip(self.parts, state.parts):
            part.return_to(then)

    @exclusive
    def rewind(self, state: State) -> None:
        """Go back to ``state``; what was held only since then is given back."""
        self.idle()
        self.stop_verifying()
        self.transcript.turn = None
        self.candidates.marks.clear()
        self.return_to(state)
        self.blocks.free_unused()

    def fork(self: H) -> H:
        """The same once more, over the same blocks, which are copied when one of the two writes."""
        with self.lock:
            self.idle()
            child = type(self)(self.policy, self.facts, self.backend, self.stored_keys, self.blocks.fork())
            child.return_to(self.state())
        return child

    @exclusive
    def begin_at(self, columns: int, rows: Sequence[tuple[int, list[tuple[Any, Any]]]]) -> None:
        """Make places for tokens that the model does not read here; the caller writes keys and values to :meth:`Planner.runs`.

        Args:
            columns: columns seen.
            rows: for each row the tokens seen, and for each memory positions (int64) and scores (float32), each an array or a list.
        """
        self.planner.restore(columns, list(rows))
        for part in self.parts:
            part.begin_at(columns, [seen for seen, _ in rows])

    @exclusive
    def reset(self) -> None:
        """Forget everything and give all memory back."""
        self.forward = None
        self.blocks.reset()
        self.candidates.reset()
        for part in self.parts:
            part.reset()

    @exclusive
    def release(self) -> None:
        """Give all memory back: the stream is closed. Forks and marks keep what they share."""
        self.rollback()
        self.candidates.marks.clear()
        self.blocks.release()
        for part in self.parts:
            part.release()
        trim_heap()
