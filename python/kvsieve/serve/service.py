"""The service behind a server: jobs come in on any thread, and one thread answers them.

That thread owns the model, all streams and all states. When nobody waits it writes conversations to files.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.checks import check_flag, integer
from kvsieve.errors import (
    ArgumentError,
    PromptTooLongError,
    ServiceBusyError,
    ServiceClosedError,
    ServiceError,
    StateError,
    UnsupportedError,
)
from kvsieve.locks import shared_lock
from kvsieve.serve.conversations import Conversations
from kvsieve.serve.holdings import Holdings
from kvsieve.serve.jobs import Job, Sink, Snapshot, Ticket
from kvsieve.serve.meters import Meters
from kvsieve.serve.sessions import Sessions
from kvsieve.serve.shared import Shared
from kvsieve.serve.store import Store, is_url
from kvsieve.serve.texts import Texts
from kvsieve.serve.work import Work, check_job
from kvsieve.serve.worker import Limits, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy

__all__ = ["CHUNK", "Service"]

CHUNK = 128
"""Most tokens of a prompt between two tokens of the others. On a CPU a prompt in such pieces takes a sixth longer than in pieces of
512, and others wait a quarter as long; pieces of 64 would take half as long again (SmolLM2-135M, one core: 0.5 s a piece)."""

PAUSE = 0.05
"""Seconds without a job before a conversation is written: the next turn of one that goes on at once need not wait for its file."""

log = logging.getLogger("kvsieve.serve")


def _store(
    where: str | Path, model: PreTrainedModel, tokenizer: Any, policy: Policy, backend: str | None, disk: int | None
) -> Store:
    if is_url(where):
        return Shared(str(where), model, tokenizer, policy, backend, disk)
    return Sessions(Path(where), model, tokenizer, policy, backend)


class Service:
    """Conversations of many owners on one model.

    Args:
        model, tokenizer: of transformers; the service's thread alone uses the model from :meth:`start` to :meth:`close`.
        policy, backend: of every conversation; see :func:`kvsieve.stream`.
        memory: most bytes of keys and values, of all conversations that are remembered or running.
        sessions: folder of conversations that are not in memory, for this service alone, or a URL of fsspec (``s3://``, ``file://``)
            for all services that share it; without one they are read again.
        most: most answers that are said at a time.
        queue: most jobs that wait.
        chunk: most tokens of a prompt between two tokens of the others; never more than the policy's own.
        longest: most tokens of a prompt and its answer; None: as many as fit.
        durable: an answer's end is told once the conversation is on the disk.
        public: texts that every owner's prompts may begin with, read when the service starts.
        disk: most bytes of session files; None: any number.

    Raises:
        ArgumentError: for arguments that are none. KvsieveError: what :func:`kvsieve.stream` refuses.
        SaveError, ServiceError: for a folder that cannot be used, or that another process uses.
        UnsupportedError: for a policy with a bank, in which one conversation would find what another one said.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        policy: Policy,
        *,
        backend: str | None = None,
        memory: int,
        sessions: str | Path | None = None,
        most: int = 32,
        queue: int = 256,
        chunk: int = CHUNK,
        longest: int | None = None,
        durable: bool = False,
        public: Sequence[str] = (),
        disk: int | None = None,
    ) -> None:
        self._most, self._queue_size = integer("most", most, 1), integer("queue", queue, 1)
        self._longest = None if longest is None else integer("longest", longest, 2)
        memory, chunk = integer("memory", memory, 1), integer("chunk", chunk, 1)
        durable, self._public = check_flag("durable", durable), tuple(public)
        if durable and sessions is None:
            raise ArgumentError("durable needs a folder of sessions")
        if getattr(policy, "bank", None) is not None:
            raise UnsupportedError(f"{policy!r} has a bank, in which one conversation would find what another one said")
        disk = None if disk is None else integer("disk", disk, 1)
        holdings, found = Holdings(model, policy, backend), None
        try:
            self._model, self._texts, self._meters = holdings.root.model, Texts(tokenizer), Meters()
            if sessions is not None:
                found = _store(sessions, self._model, tokenizer, policy, backend, disk)
            self._states = Conversations(holdings, memory, found, None if found is not None and found.shared else disk)
            limits = Limits(self._most, chunk, self._longest, durable)
            self._worker = Worker(self._states, self._texts, self._meters, limits)
        except BaseException:
            if found is not None:
                found.close()
            holdings.close_all()
            raise
        self._changed = threading.Condition(shared_lock())
        self._queue: deque[Work] = deque()
        self._cancelled: set[int] = set()
        self._closing: float | None = None
        """Until when running jobs may go on, of the monotonic clock; None while the service is open."""
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------------------------------------------- any thread

    def start(self) -> None:
        """Read the public texts, and answer jobs from now on.

        Raises:
            StateError: if it was started before. ServiceFullError: if the memory cannot hold the public texts; the service is then
                closed.
        """
        if self._thread is not None or self._closing is not None:
            raise StateError("a service is started once")
        try:
            for text in self._public:
                self._worker.read_public(text)
        except BaseException:
            self.close(0)
            raise
        self._thread = threading.Thread(target=self._run, name="kvsieve service", daemon=True)
        self._thread.start()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, job: Job, sink: Sink) -> Ticket:
        """Take a job. Its answers go to ``sink``, from the model thread.

        Raises:
            ServiceBusyError: if as many jobs wait as may. ServiceClosedError: if the service is closing, or not started.
            PromptTooLongError: if prompt and answer have more than ``longest`` tokens.
            ArgumentError, UnsupportedError: for a job that cannot be.
        """
        longest = check_job(job, self._model, self._most)
        least = 1 if job.shorter else longest
        if self._longest is not None and not self._texts.at_most(job.text, self._longest - least):
            raise PromptTooLongError(f"the prompt and an answer of {least} tokens have more than {self._longest} tokens together")
        with self._changed:
            if self._thread is None or self._closing is not None:
                raise ServiceClosedError("this service is closed, or was not started")
            if len(self._queue) >= self._queue_size:
                self._meters.refused += 1
                raise ServiceBusyError(f"{len(self._queue)} requests wait already; try again later")
            work = Work(next(self._numbers), job, sink, longest)
            self._queue.append(work)
            self._meters.jobs += 1
            self._changed.notify()
        return Ticket(work.number)

    def cancel(self, ticket: Ticket) -> None:
        """End all answers of a job, soon; what was said is remembered. One that is over stays as it is."""
        with self._changed:
            self._cancelled.add(ticket.number)
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken, and the model thread is there to answer them."""
        with self._changed:
            return self._closing is None and self._thread is not None and self._thread.is_alive()

    def snapshot(self) -> Snapshot:
        """What the service holds and has done."""
        with self._changed:
            return self._meters.snapshot(len(self._queue), self._states)

    def close(self, grace: float = 10.0) -> None:
        """Take no more jobs. Those that wait fail with `ServiceClosedError`, and so do those that are not over after ``grace``
        seconds. Then conversations are written to files, and the model is as it was. Closing twice is fine; the shorter
        grace holds.
        """
        with self._changed:
            until = time.monotonic() + max(grace, 0.0)
            self._closing = until if self._closing is None else min(self._closing, until)
            self._changed.notify()
            thread = self._thread
        if thread is None:
            self._end()
        else:
            thread.join()

    # ---------------------------------------------------------------------------------------------------------- the model thread

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._wait()
                if goes_on:
                    self._turn()
            except Exception as error:
                log.exception("the model thread goes on after an error")
                self._meters.errors += 1
                self._fail_all(error)
        self._end()

    def _fail_all(self, error: Exception) -> None:
        """Every job at work fails; those that wait come next."""
        for work in list(self._worker.works):
            failed = ServiceError(f"the model thread failed: {type(error).__name__}")
            failed.__cause__ = error
            try:
                self._worker.fail(work, failed)
            except Exception:
                log.exception("a request could not be ended")

    def _end(self) -> None:
        try:
            self._states.close()
        finally:
            self._states.holdings.close_all()

    def _wait(self) -> bool:
        """Until there is something to do, conversations are written to files. False once the service is closed."""
        paused = False
        while True:
            with self._changed:
                if self._queue or self._worker.works:
                    return True
                self._cancelled.clear()
                if self._closing is not None:
                    return False
                state = self._states.unwritten()
                if state is None:
                    self._worker.publish()
                if not paused or state is None:
                    paused = not self._changed.wait(None if state is None else PAUSE)
                    continue
            self._states.write(state)

    def _turn(self) -> None:
        self._end_asked()
        self._admit()
        self._worker.turn()
        self._worker.publish()

    def _end_asked(self) -> None:
        """Jobs that were cancelled, or whose time is over, and those that a service that closes does not wait for."""
        with self._changed:
            cancelled, closing = self._cancelled, self._closing
            self._cancelled = set()
            waiting = list(self._queue)
        now = time.monotonic()
        for work in [*self._worker.works, *waiting]:
            if work.number in cancelled or work.deserted:
                self._worker.cut(work, "cancelled")
            elif work.until is not None and now >= work.until:
                self._worker.cut(work, "timeout")
            elif closing is not None and (now >= closing or work in waiting):
                self._worker.cut(work, "cancelled", tell=False)
                self._worker.fail(work, ServiceClosedError("the service was closed before this request was answered"))
        with self._changed:
            self._queue = deque(work for work in self._queue if not work.over)

    def _admit(self) -> None:
        """Jobs leave the queue while there are places for all their answers."""
        while True:
            with self._changed:
                if not self._queue or not self._worker.has_place(self._queue[0].job.n):
                    return
                work = self._queue.popleft()
            self._worker.take(work)
