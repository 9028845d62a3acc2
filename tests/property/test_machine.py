"""Whatever is done to a stream in whatever order, it is what a plain model says, and goes on as one that was told the same plainly.

A state machine draws a policy and a model, and then what a user may do: read, generate, forget, go back, pin, evict, fork, write to
a file, be interrupted. `tests/conversation_machine.py` has the streams and what must hold of them.

    KVSIEVE_STEPS=50000 pytest tests/property/test_machine.py        # or `make soak`: other draws each time
"""

from __future__ import annotations

import functools
import os
from typing import Any

import conversation_model as plainly
import pytest
import tiny
import torch
from conversation_machine import ENDS, Live, Streams, tensors
from conversation_model import cut, interrupts
from drive import pad_left
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from kvsieve.errors import BackendError, BankError, BudgetError, CacheMismatchError, RangeError, StateError, UnsupportedError
from kvsieve.runtime.chunks import chunk_of

STEPS = int(os.environ.get("KVSIEVE_STEPS", "0"))
"""Steps of a longer run; other ones each time."""

IN_THE_GATE, A_RUN = {"cpu": 1600, "reference": 400}, 20
"""Steps on each backend, of which the specification is the slow one, and of each conversation."""

LENGTH = st.one_of(st.integers(1, 20), st.sampled_from([1, 16, 17, 40, 63, 64, 65, 90]))
CHUNK = st.sampled_from([None, None, 1, 7, 16, 17, 40])
WHICH = st.integers(0, 5)


class Conversation(Streams):
    """What a user may do to them."""

    # ------------------------------------------------------------------------------------------------------------- reading

    @rule(which=WHICH, length=LENGTH, ragged=st.sampled_from([0, 0, 1, 5]), chunk=CHUNK)
    def feed(self, which: int, length: int, ragged: int, chunk: int | None) -> None:
        live = self.of(which)
        if self.fits(live):
            self.before_a_turn(live)
            self.feed_(live, self.text(self.lengths(live, length, ragged)), chunk)

    @rule(which=WHICH, length=LENGTH, ragged=st.sampled_from([0, 1]), chunk=CHUNK, at=st.integers(1, 4), layer=st.integers(0, 2))
    def interrupted_feed(self, which: int, length: int, ragged: int, chunk: int | None, at: int, layer: int) -> None:
        live = self.of(which)
        if self.fits(live):
            self.feed_(live, self.text(self.lengths(live, length, ragged)), chunk, (at, layer))

    @rule(
        which=WHICH,
        length=LENGTH,
        ragged=st.sampled_from([0, 0, 3]),
        new=st.integers(1, 6),
        ends=st.booleans(),
        looks_back=st.booleans(),
        end_turn=st.booleans(),
    )
    def generate(self, which: int, length: int, ragged: int, new: int, ends: bool, looks_back: bool, end_turn: bool) -> None:
        live = self.of(which)
        if not self.fits(live):
            return
        self.before_a_turn(live)
        plain, prompt = live.plain, self.text(self.lengths(live, length, ragged))
        how: dict[str, Any] = {"eos_token_id": ENDS} if ends else {}
        if looks_back:
            how["min_length"] = 1
        before, again = self.before(live)
        ids, mask = pad_left(tensors(prompt))
        out = live.stream.generate(
            ids, mask, end_turn=end_turn, max_new_tokens=new, do_sample=False, pad_token_id=0, **how, **self.unread(live)
        )
        assert torch.equal(out[:, : ids.shape[1]], ids)
        answers = out[:, ids.shape[1] :].tolist()
        said = [self.until_the_end(row) if ends else row for row in answers]
        assert max(map(len, said)) == len(answers[0]) <= new
        assert all(not any(row[len(mine) :]) for row, mine in zip(answers, said))
        pieces = cut([a + b for a, b in zip(before, prompt)], chunk_of(live.stream._engine))
        self.has_said(live, pieces, again, said, len(answers[0]) - 1)
        if end_turn:
            plain.ends_turn()

    @rule(which=WHICH, length=LENGTH, new=st.integers(2, 5), at=st.integers(1, 8), layer=st.integers(0, 2))
    def interrupted_generate(self, which: int, length: int, new: int, at: int, layer: int) -> None:
        live = self.of(which)
        if not self.fits(live):
            return
        plain, prompt = live.plain, self.text(self.lengths(live, length, 0))
        before, again = self.before(live)
        pieces = cut([a + b for a, b in zip(before, prompt)], chunk_of(live.stream._engine))
        at = (at - 1) % (len(pieces) + new - 1) + 1
        with interrupts(self.model, at, layer):
            live.stream.generate(torch.tensor(prompt), max_new_tokens=new, do_sample=False, **self.unread(live))
        if at <= len(pieces):
            self.has_read(live, pieces[: at - 1], again)
            self.died(live, pieces, at - 1, again)
            return
        sampled = at - len(pieces)
        told = [row.tolist() for row in live.stream.ids]
        said = [row[len(row) - sampled :] for row in told]
        self.has_said(live, pieces, again, said, sampled - 1)
        plain.died(1)

    @rule(which=WHICH, length=st.integers(3, 30), ragged=st.sampled_from([0, 0, 2]), new=st.integers(1, 4))
    def beams(self, which: int, length: int, ragged: int, new: int) -> None:
        live = self.of(which)
        if not self.fits(live):
            return
        self.before_a_turn(live)
        plain, prompt = live.plain, self.text(self.lengths(live, length, ragged))
        before, again = self.before(live)
        ids, mask = pad_left(tensors(prompt))
        out = live.stream.generate(ids, mask, num_beams=2, max_new_tokens=new, do_sample=False, **self.unread(live))
        said = out[:, ids.shape[1] :].tolist()
        rows, chunk = [a + b for a, b in zip(before, prompt)], chunk_of(live.stream._engine)
        first = cut([row[:-1] for row in rows], chunk)
        self.has_read(live, first, again)
        plain.reads(cut([[row[-1], *mine] for row, mine in zip(rows, said)], chunk))
        plain.unread, plain.pending = [[] for _ in rows], None
        plain.ends_turn()

    @rule(which=WHICH, length=st.integers(1, 40), new=st.integers(1, 4))
    def callers_generate(self, which: int, length: int, new: int) -> None:
        live = self.of(which)
        if self.fits(live):
            (fresh, given), last = self.whole(live, length), self.read_again(live)
            out = self.model.generate(**given, max_new_tokens=new)
            self.has_read(live, [tuple(map(tuple, last))] if last else [], True)
            self.callers_said(live, fresh, out[:, given["input_ids"].shape[1] :].tolist())

    @rule(which=WHICH, length=st.integers(1, 40), new=st.integers(1, 4), at=st.integers(1, 4), layer=st.integers(0, 2))
    def interrupted_callers_generate(self, which: int, length: int, new: int, at: int, layer: int) -> None:
        live, at = self.of(which), min(at, new)
        if not self.fits(live):
            return
        (fresh, given), last = self.whole(live, length), self.read_again(live)
        width = max(map(len, fresh))
        with interrupts(self.model, at, layer):
            self.model.generate(**given, max_new_tokens=new)
        # In a caller's own loop nobody sees that a forward died before the stream is used again.
        live.stream.mark()
        if last and at == 1:
            return  # the forward that was to read them again
        if last:
            self.has_read(live, [tuple(map(tuple, last))], True)
            at -= 1
        if at > 1:
            said = [row.tolist()[len(row) - at + 2 :] for row in live.stream.ids]
            # What was sampled last nobody was told; a caller may go on with anything.
            self.callers_said(live, fresh, [[*row, 9] for row in said])
        live.plain.died(width if at == 1 else 1)

    # ------------------------------------------------------------------------------------------------------------- going back

    @rule(which=WHICH, count=st.one_of(st.integers(1, 8), st.integers(1, 40), st.just(-1)))
    def crop(self, which: int, count: int) -> None:
        live = self.of(which)
        seen = [len(row) for row in live.plain.read]
        if not seen or not max(seen):
            return
        count = max(seen) if count < 0 else count
        if min(seen) <= count < max(seen) or count > max(seen):
            return
        if not self.refused(live, lambda: live.stream.cache.crop(-count), CacheMismatchError, StateError):
            live.plain.cropped(count)

    @rule(which=WHICH)
    def mark(self, which: int) -> None:
        live = self.of(which)
        live.marks = [*live.marks[-2:], (live.stream.mark(), live.plain.copy())]

    @precondition(lambda self: any(live.marks for live in self.live))
    @rule(which=WHICH, mark=WHICH)
    def rewind(self, which: int, mark: int) -> None:
        marked = [live for live in self.live if live.marks]
        live = marked[which % len(marked)]
        back, plain = live.marks[mark % len(live.marks)]
        live.stream.rewind(back)
        live.plain = plain.copy()

    @rule(which=WHICH)
    def reset(self, which: int) -> None:
        live = self.of(which)
        if live.forked and self.kind.banks:
            return
        live.stream.reset()
        live.plain.fresh()
        if len(self.live) == 1 and not live.marks and not self.kind.banks:
            assert live.stream.stats().bytes_held == 0

    # ------------------------------------------------------------------------------------------------------------- by position

    @rule(which=WHICH, start=st.integers(0, 300), length=st.integers(1, 30), one=st.booleans(), back=st.booleans())
    def pin(self, which: int, start: int, length: int, one: bool, back: bool) -> None:
        live = self.of(which)
        seen = max((len(row) for row in live.plain.read), default=0)
        start = max(seen - start % 40, 0) if back else start % (seen + 20)
        rows = (0,) if one and live.plain.rows else None
        stop = start + length
        change = functools.partial(live.stream.pin, start, stop, None if rows is None else list(rows))
        if not self.refused(live, change, BudgetError, StateError):
            live.plain.pinned(start, stop, rows, True)

    @rule(which=WHICH, start=st.integers(0, 300), length=st.integers(1, 60))
    def unpin(self, which: int, start: int, length: int) -> None:
        live = self.of(which)
        pinned = sorted(set().union(*live.plain.pins)) or [start]
        start = pinned[start % len(pinned)]
        live.stream.unpin(start, start + length)
        live.plain.pinned(start, start + length, None, False)

    @rule(which=WHICH, start=st.integers(0, 400), length=st.integers(1, 30), row=st.integers(0, 2))
    def evict(self, which: int, start: int, length: int, row: int) -> None:
        live = self.of(which)
        if not live.plain.rows:
            return
        seen = min(len(read) for read in live.plain.read)
        rows = tuple(range(live.plain.rows)) if row >= live.plain.rows else (row,)
        start = start % (seen + 1)
        stop = start + length
        change = functools.partial(live.stream.evict, start, stop, list(rows))
        past = any(stop > len(live.plain.read[at]) for at in rows)
        if self.refused(live, change, RangeError, UnsupportedError, BackendError):
            return
        assert not past
        live.plain.evicted(start, stop, rows)

    @rule(which=WHICH)
    def end_turn(self, which: int) -> None:
        live = self.of(which)
        live.stream.end_turn()
        if live.plain.rows:
            live.plain.ends_turn()

    # ------------------------------------------------------------------------------------------------------------- copies

    @precondition(lambda self: len(self.live) < 3)
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        live = self.of(which)
        self.live.append(Live(live.stream.fork(), live.plain.copy(), forked=True))

    @precondition(lambda self: len(self.live) > 1)
    @rule(which=WHICH)
    def close(self, which: int) -> None:
        live = self.of(which)
        if self.kind.banks and not live.forked:
            return
        self.live.remove(live)
        live.stream.close()

    @rule(which=WHICH)
    def reload(self, which: int) -> None:
        live = self.of(which)
        if self.kind.banks and live.forked:
            return
        path = self.folder / "session.safetensors"
        if self.refused(live, lambda: live.stream.save(path), UnsupportedError):
            return
        live.marks = []
        live.stream = plainly.reloaded(live.stream, path)
        if self.kind.selects:
            live.plain.history.append(plainly.Reload())

    @rule(which=WHICH, rows=st.sampled_from([(0, 0), (1, 0), (1,), (0,), (0, 1, 0)]))
    def select(self, which: int, rows: tuple[int, ...]) -> None:
        live = self.of(which)
        if max(rows) >= live.plain.rows or (self.kind.banks and live.plain.rows != len(rows)):
            return
        if not self.refused(live, lambda: live.stream.cache.reorder_cache(torch.tensor(rows)), UnsupportedError, BankError):
            live.plain.selected(rows)

    # ------------------------------------------------------------------------------------------------------------- what must hold

    @rule(which=WHICH, width=st.sampled_from([1, 1, 3]))
    def look(self, which: int, width: int) -> None:
        self.check_next(self.of(which), width)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_a_stream_is_what_it_was_told_whatever_was_done_to_it(backend: str) -> None:
    steps = STEPS // 2 if STEPS else IN_THE_GATE[backend]
    how = settings(
        max_examples=max(steps // A_RUN, 1),
        stateful_step_count=A_RUN,
        derandomize=not STEPS,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    machine = type(f"ConversationOn{backend.title()}", (Conversation,), {"backend": backend})
    run_state_machine_as_test(machine, settings=how)
