"""What the model thread does with jobs: prompts are read between the tokens of others, answers are told, conversations remembered.

Between two joint forwards, in which every answer gets a token, one piece of one prompt is read, of a fixed number of tokens, so
that what an answer is does not depend on who else is there. What goes wrong with a job is that job's alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.batching import Batch
from kvsieve.errors import KvsieveError, PromptTooLongError, ServiceFullError
from kvsieve.model.generation import Settings
from kvsieve.runtime.chunks import chunk_of
from kvsieve.serve.conversations import PUBLIC, Conversations, NoRoomError
from kvsieve.serve.detokenize import Pieces, Stops
from kvsieve.serve.store import owner_key
from kvsieve.serve.texts import Texts, segments
from kvsieve.serve.work import Choice, Work

if TYPE_CHECKING:
    from kvsieve.serve.conversations import State
    from kvsieve.serve.jobs import Reason
    from kvsieve.serve.meters import Meters

__all__ = ["Limits", "Worker"]

READING = 4
"""Prompts that are being read at a time; the one with the fewest tokens left comes next, and now and then the oldest."""

OLDEST = 4
"""Every so many pieces one is of the oldest prompt."""

SLOTS = 64
"""Tokens that a stream may have to copy before it goes on from what others share: a block."""

GROWTH = 8
"""Tokens for which a block that is not full gets memory at a time."""

BESIDE = 1.25
"""Bytes of a token that comes, with what a selection knows of it, by those of its keys and values."""

log = logging.getLogger("kvsieve.serve")


@dataclass(frozen=True)
class Limits:
    """What a worker keeps to.

    Attributes:
        most: answers at a time.
        chunk: tokens of a prompt between two tokens of the others; never more than the policy's own.
        longest: tokens of a conversation with its answer; None: as many as fit.
        durable: whether an answer's end is told once the conversation is on the disk.
    """

    most: int
    chunk: int
    longest: int | None
    durable: bool


class Worker:
    """The jobs at work. One thread uses it.

    Args:
        states: what is remembered, and the streams.
        texts: the tokenizer.
        meters: what is counted.

    Attributes:
        works: jobs that were taken, in the order in which they came.
    """

    def __init__(self, states: Conversations, texts: Texts, meters: Meters, limits: Limits) -> None:
        self._states, self._holdings, self._texts, self._meters, self._limits = states, states.holdings, texts, meters, limits
        root = self._holdings.root
        self._model, self._batch = root.model, Batch(root.model, most=limits.most)
        self._chunk = min(limits.chunk, chunk_of(root._engine))
        self.works: list[Work] = []
        self._pieces = 0

    def has_place(self, answers: int) -> bool:
        """Whether a job of so many answers can be taken now."""
        reading = sum(not work.choices for work in self.works)
        return reading < READING and sum(work.job.n for work in self.works) + answers <= self._limits.most

    def take(self, work: Work) -> None:
        """A job begins."""
        self.works.append(work)
        state = self._states.match(owner_key(work.job.owner), work.job.text)
        work.estimate -= 0 if state is None else state.length

    def turn(self) -> None:
        """A piece of a prompt, and a token for every answer."""
        for work in self._in_order():
            if self._read(work):
                break
        if self._batch.answers:
            self._step()

    def publish(self) -> None:
        """Say what is held now."""
        answers = sum(choice.ended is None for work in self.works for choice in work.choices)
        self._meters.now(sum(not work.choices for work in self.works), answers, self._states)

    def _in_order(self) -> list[Work]:
        """Whose piece is read next: the fewest tokens left come first, and nobody waits for ever."""
        reading = [work for work in self.works if not work.choices]
        self._pieces += bool(reading)
        oldest = reading[:1] if self._pieces % OLDEST == 0 else []
        return [*oldest, *sorted(reading[len(oldest) :], key=lambda work: work.left)]

    # -------------------------------------------------------------------------------------------------------------------- reading

    def _read(self, work: Work) -> bool:
        """One piece of a prompt, or the first tokens of its answers; False if it waits for room. What goes wrong is its own."""
        try:
            if work.stream is None and not self._open(work):
                return False
            assert work.stream is not None
            if work.left:
                ids = work.piece(self._chunk)
                if not self._room(work, ids.shape[1] + SLOTS):
                    return False
                work.stream.feed(ids.to(self._model.device), chunk=self._chunk)
                self._meters.tokens_read += ids.shape[1]
                self._kept(work, work.was_read(ids.shape[1]))
            if not work.left:
                if not self._room(work, work.job.n * SLOTS):
                    return False
                self._answer(work)
        except Exception as error:
            self.fail(work, error)
        return True

    def _open(self, work: Work) -> bool:
        """Whether the job's stream has read what is remembered; it may have to wait for room."""
        job = work.job
        try:
            # Others may have written states of a conversation that has had answers; of a text without messages nobody knows.
            stream, state = self._states.open(owner_key(job.owner), job.text, job.answered if job.boundaries else len(job.text))
        except NoRoomError:
            # Those that have begun go on, or fail, and give their memory back.
            if any(other.choices or other.stream is not None for other in self.works):
                return False
            raise ServiceFullError("the memory has no room for this conversation") from None
        work.state = state
        try:
            # What was said and not read is read with what is new.
            unread = stream._engine.transcript.rows[0].unread.tolist() if stream.seen else []
            start = 0 if state is None else state.length
            parts = segments(self._texts, job.text, start, unread, job.boundaries)
            count = stream.seen + sum(len(part.ids) for part in parts)
            most = self._limits.longest
            if most is not None and job.shorter:
                work.longest = max(min(work.longest, most - count), 1)
            if most is not None and count + work.longest > most:
                raise PromptTooLongError(f"the conversation has {count} tokens, and with an answer more than {most}")
            if unread:
                stream._engine.transcript.say([torch.zeros(0, dtype=torch.int64, device=self._model.device)])
        except BaseException:
            self._holdings.close(stream)
            self._states.done(state)
            work.state = None
            raise
        work.opened(stream, state, parts)
        return True

    def _room(self, work: Work, tokens: int) -> bool:
        """Whether so many tokens fit in. While others are being answered a prompt waits.

        Raises:
            ServiceFullError: if nobody else will make room.
        """
        if self._states.room(self._bytes(tokens)):
            return True
        if any(other.choices for other in self.works):
            return False
        raise ServiceFullError(
            f"this conversation needs more than the {self._states.memory:,} bytes that all conversations may hold; it has seen "
            f"{0 if work.stream is None else work.stream.seen:,} tokens"
        )

    def _bytes(self, tokens: int) -> int:
        return int(tokens * self._holdings.bytes_per_token * BESIDE)

    def _kept(self, work: Work, end: Any) -> None:
        """A segment was read; the moment is remembered if it is to be."""
        if end is None or end[1] is None:
            return
        assert work.stream is not None
        stream = self._holdings.fork(work.stream)
        job = work.job
        work.parent = self._states.keep(owner_key(job.owner), job.text[: end[0]], end[1], stream, work.parent)

    def read_public(self, text: str) -> None:
        """Read a text for everybody."""
        stream = self._holdings.fork()
        try:
            (part,) = segments(self._texts, text, 0, (), ())
            for lo in range(0, len(part.ids), self._chunk):
                ids = part.ids[lo : lo + self._chunk]
                if not self._states.room(self._bytes(len(ids) + SLOTS)):
                    raise ServiceFullError("the memory has no room for the public texts")
                stream.feed(torch.tensor([ids], device=self._model.device), chunk=self._chunk)
        except BaseException:
            self._holdings.close(stream)
            raise
        self._states.keep(PUBLIC, text, "first", stream, None)

    # ------------------------------------------------------------------------------------------------------------------ answering

    def _answer(self, work: Work) -> None:
        """The prompt was read but for its last token, which all answers read on their own."""
        job, stream = work.job, work.stream
        assert stream is not None
        options = {**job.options, **({"max_new_tokens": work.longest} if job.shorter else {})}
        seed = options.pop("seed", None)
        choices: list[Choice] = []
        streams = [stream, *(self._holdings.fork(stream) for _ in range(job.n - 1))]
        last = torch.tensor([[work.last]], device=self._model.device)
        try:
            for number, one in enumerate(streams):
                mine = None if seed is None else seed + number
                answer = self._batch.add(one, last, seed=mine, logprobs=job.logprobs, **options)
                pieces = Pieces(self._texts.tokenizer, work.tail) if job.stop else None
                choices.append(Choice(number, one, answer, pieces, Stops(job.stop)))
        except BaseException:
            for choice in choices:
                self._batch.cancel(choice.answer)
            for one in streams[1:]:
                self._holdings.close(one)
            raise
        self._meters.tokens_read += 1
        work.answered_by(choices)
        self._meters.tokens_cached += work.remembered
        self._meters.waits.add(time.monotonic() - work.began)
        usage = work.usage(choices[0])
        self._meters.rereads += usage.read_again
        self._tell(work, lambda: work.sink.begin(usage))

    def _step(self) -> None:
        """Every answer gets a token."""
        while self._batch.answers and not self._states.room(self._bytes(len(self._batch.answers) * GROWTH)):
            answering = [work for work in self.works if work.choices]
            largest = max(answering, key=lambda work: sum(choice.stream._engine.blocks.resident for choice in work.choices))
            self.fail(largest, ServiceFullError(f"all conversations together need more than {self._states.memory:,} bytes"))
        if not self._batch.answers:
            return
        began = time.monotonic()
        self._batch.step()
        self._meters.steps.add(time.monotonic() - began)
        for work in [work for work in self.works if work.choices]:
            try:
                self._deliver(work)
            except Exception as error:
                self.fail(work, error)

    def _deliver(self, work: Work) -> None:
        """The new tokens of a job's answers, and the ends of those that are over."""
        for choice in work.choices:
            if choice.ended is not None or work.over:
                continue
            for token in choice.new():
                self._meters.tokens_said += 1
                self._tell(work, lambda token=token, choice=choice: work.sink.token(choice.number, token))  # type: ignore[misc]
            if choice.stops.hit is not None:
                self._batch.cancel(choice.answer)
                self._finish(work, choice, "stop")
            elif choice.answer.done:
                choice.answer.result()
                ends = Settings(self._model, dict(work.job.options)).ends
                self._finish(work, choice, "stop" if choice.ids[-1] in ends else "length")

    def _finish(self, work: Work, choice: Choice, reason: Reason) -> None:
        """An answer is over: its conversation is remembered, and then its end is told."""
        usage = work.usage(choice)
        choice.ended = reason
        state = self._remember(work, choice)
        if state is not None and self._limits.durable:
            self._states.write(state, must=True)
        self._meters.ends[reason] = self._meters.ends.get(reason, 0) + 1
        self.publish()
        self._tell(work, lambda: work.sink.end(choice.number, reason, usage))
        if all(one.ended is not None for one in work.choices):
            self._leave(work)

    def _remember(self, work: Work, choice: Choice) -> State | None:
        """The state at the end of an answer: behind its text, and before the token that ended it."""
        stream, ids = choice.stream, choice.ids
        if ids and ids[-1] in Settings(self._model, dict(work.job.options)).ends:
            stream._engine.transcript.say([torch.zeros(0, dtype=torch.int64, device=self._model.device)])
            ids = ids[:-1]
        try:
            text = self._texts.said(work.tail, ids)
        except BaseException:
            self._holdings.close(stream)
            raise
        # A stop string is not what the client sends back, and half of a character is nothing that it could.
        if choice.stops.hit is not None or text is None or text.endswith("\ufffd") or not choice.ids:
            self._holdings.close(stream)
            return None
        return self._states.keep(owner_key(work.job.owner), work.job.text + text, "leaf", stream, work.parent)

    # ------------------------------------------------------------------------------------------------------------------ how it ends

    def cut(self, work: Work, reason: Reason, *, tell: bool = True) -> None:
        """A job is over before its time. What its answers have said is remembered."""
        try:
            open_choices = [choice for choice in work.choices if choice.ended is None]
            for choice in open_choices:
                self._batch.cancel(choice.answer)
                if tell:
                    self._finish(work, choice, reason)
                else:
                    choice.ended = reason
                    self._remember(work, choice)
            if tell and not work.choices:
                for number in range(work.job.n):
                    usage = work.usage()
                    self._meters.ends[reason] = self._meters.ends.get(reason, 0) + 1
                    self._tell(work, lambda number=number, usage=usage: work.sink.end(number, reason, usage))  # type: ignore[misc]
        except Exception as error:
            self.fail(work, error)
        if tell:
            self._leave(work)

    def fail(self, work: Work, error: Exception) -> None:
        """A job is over by an error; its streams go, and no other's."""
        if work.over:
            return
        if not isinstance(error, KvsieveError):
            log.error("a request failed", exc_info=error)
        self._leave(work)
        self._meters.failed += 1
        self.publish()
        self._tell(work, lambda: work.sink.fail(error))

    def _leave(self, work: Work) -> None:
        """A job's streams that are no states are closed."""
        if work.over:
            return
        work.over = True
        if work in self.works:
            self.works.remove(work)
        for choice in work.choices:
            if choice.ended is None:
                choice.ended = "cancelled"
                self._batch.cancel(choice.answer)
                self._holdings.close(choice.stream)
        if work.stream is not None:
            self._holdings.close(work.stream)
        self._states.done(work.state)

    def _tell(self, work: Work, call: Callable[[], None]) -> None:
        """A sink that raises has no reader any more: the job is cut at the next turn."""
        try:
            call()
        except Exception:
            log.exception("the reader of an answer failed; the request is cancelled")
            work.deserted = True
