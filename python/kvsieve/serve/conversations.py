"""What is remembered of conversations: a tree of states that never change.

A *state* is a stream that read a text and is left alone since, or the file that holds it. A request continues the state of its
owner with the longest text that its prompt begins with: it forks that stream, reads the rest, answers, and leaves a state where it
is done. Whatever becomes of the fork, the state is what it was.

Under a byte budget moments inside of conversations go first, then those that were used longest ago leave memory for a file. They
come back by themselves.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvsieve.errors import CacheMismatchError, KvsieveError, SaveError, ServiceError, SessionNotFoundError
from kvsieve.serve.texts import Kind, digests

if TYPE_CHECKING:
    from kvsieve.serve.holdings import Holdings
    from kvsieve.serve.store import Store, Stored
    from kvsieve.streams import Stream

__all__ = ["PUBLIC", "Conversations", "NoRoomError", "State"]

PUBLIC = "public"
"""The owner of what everybody may continue. No other owner has this name: theirs are digests."""

INNER = 2
"""Moments inside of a conversation that are remembered beside its newest end: where its last message begins, and ends."""

FILES = 2
"""Files of one conversation."""

log = logging.getLogger("kvsieve.serve")


class NoRoomError(ServiceError, MemoryError):
    """A state cannot come back while others hold the memory. Nothing has changed."""


@dataclass(eq=False)
class State:
    """One moment of one conversation.

    Attributes:
        owner: see :func:`~kvsieve.serve.store.owner_key`.
        length: characters of its text; digest: SHA-256 of it.
        kind: what it is remembered for.
        seen: tokens that its stream has read; unread: that it said and has not.
        stream: None where it is in a file only.
        parent: the state that it went on from, as far as that is remembered.
        stored: its file.
        written: whether it was written once, or cannot be; it is not written again.
        used: when it was used last, a count.
        busy: streams at work that go on from it, and share its blocks.
    """

    owner: str
    length: int
    digest: bytes
    kind: Kind
    seen: int
    unread: int
    stream: Stream | None = None
    parent: State | None = None
    stored: Stored | None = None
    written: bool = False
    used: int = 0
    busy: int = 0


@dataclass
class Counts:
    """What happened so far; see :class:`~kvsieve.serve.jobs.Snapshot`."""

    evictions: int = 0
    dropped: int = 0
    saves: int = 0
    loads: int = 0
    unusable: int = 0


@dataclass
class Conversations:
    """All states of a service. One thread uses it.

    Args:
        holdings: the streams.
        memory: most bytes of all streams together.
        sessions: where states go that leave memory; None: they are forgotten.
        disk: most bytes of files; None: any number, or the store keeps to its own limit.

    Attributes:
        changed: whether :meth:`sizes` may be others than before; who asks for them takes it back.
    """

    holdings: Holdings
    memory: int
    sessions: Store | None = None
    disk: int | None = None
    counts: Counts = field(default_factory=Counts)
    changed: bool = True
    _known: dict[str, dict[int, dict[bytes, State]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clock = itertools.count(1)
        if self.sessions is not None:
            self.counts.unusable = self.sessions.unusable
            for stored in sorted(self.sessions.found, key=lambda one: one.used):
                state = State(stored.owner, stored.length, bytes.fromhex(stored.digest), "leaf", stored.tokens, stored.unread)
                state.stored, state.written, state.used = stored, True, next(self._clock)
                self._index(state)
            self._trim_files()

    # ------------------------------------------------------------------------------------------------------------------- finding

    def match(self, owner: str, text: str) -> State | None:
        """The state that a prompt continues: the longest that ``text`` begins with, of this owner or of everybody's."""
        return next(self._matches(owner, text), None)

    def _matches(self, owner: str, text: str) -> Iterator[State]:
        """All of them, the longest first."""
        mine = [self._known.get(one, {}) for one in (owner, PUBLIC)]
        lengths = {length for known in mine for length in known}
        found = [
            known[length][digest]
            for length, digest in digests(text, lengths)
            for known in mine
            if length in known and digest in known[length]
        ]
        # A state of the whole text can be continued only where a token of it is still to be read.
        return (state for state in reversed(found) if state.length < len(text) or state.unread)

    def open(self, owner: str, text: str, reach: int = 0) -> tuple[Stream, State | None]:
        """A stream that has read the beginning of ``text``, and the state that it goes on from; None: it has read nothing. The
        state is busy until :meth:`done`.

        Args:
            reach: where what others may have read and written ends. A store that they share is asked where nothing longer is known.

        Raises:
            NoRoomError: if the state is in a file, and there is no room for it now.
        """
        found = list(self._matches(owner, text))
        if reach and self.sessions is not None and self.sessions.shared and (not found or found[0].length <= reach):
            self._look(owner, text, self.sessions)
            found = list(self._matches(owner, text))
        for state, before in itertools.pairwise(found):
            if state.parent is None and state.owner == before.owner:  # as after a restart
                state.parent = before
        for state in found:
            if state.stream is None and not self._load(state):
                continue
            state.used, state.busy = next(self._clock), state.busy + 1
            return self.holdings.fork(state.stream), state
        return self.holdings.fork(), None

    def _look(self, owner: str, text: str, sessions: Store) -> None:
        """States that another process has written are states here as well, in files."""
        for stored in sessions.find(owner, text):
            digest = bytes.fromhex(stored.digest)
            if digest not in self._known.get(owner, {}).get(stored.length, {}):
                state = State(owner, stored.length, digest, "leaf", stored.tokens, stored.unread)
                state.stored, state.written, state.used = stored, True, next(self._clock)
                self._index(state)

    def done(self, state: State | None) -> None:
        """A stream that :meth:`open` returned is a state of its own now, or closed."""
        if state is not None:
            state.busy -= 1

    def _load(self, state: State) -> bool:
        """Whether a state came back from its file. One that cannot is no state, and its file is not used again."""
        stored, state.used = state.stored, next(self._clock)
        if self.sessions is None or stored is None:  # it left memory while a longer one was looked for
            return False
        if not self.room(stored.size):
            raise NoRoomError(f"a conversation of {stored.size:,} bytes waits until there is room for it")
        if state.stored is not stored:  # its file made room for those that left memory
            return False
        try:
            stream = self.sessions.load(stored)
        except SessionNotFoundError as error:
            log.warning("a conversation is read again: %s", error)
            self.counts.unusable += not self.sessions.shared  # whoever shares it went on from it, or made room
            self._forget(state)
            return False
        except (CacheMismatchError, ServiceError) as error:
            log.warning("a conversation is read again: %s", error)
            self.counts.unusable += 1
            self.sessions.spoiled(stored)
            self._forget(state)
            return False
        except (KvsieveError, OSError) as error:
            log.warning("a conversation is read again, its file stays: %s", error)
            return False
        self.counts.loads += 1
        self.changed = True
        state.stream = self.holdings.add(stream)
        self.holdings.freeze(stream)
        return True

    # ------------------------------------------------------------------------------------------------------------------- keeping

    def keep(self, owner: str, text: str, kind: Kind, stream: Stream, parent: State | None) -> State:
        """``stream`` has read ``text`` and is a state from now on; where there is one of this text already, that one stays."""
        ((length, digest),) = digests(text, [len(text)])
        state = self._known.get(owner, {}).get(length, {}).get(digest)
        if state is None:
            unread = len(stream.ids[0]) - stream.seen
            state = State(owner, length, digest, kind, stream.seen, unread)
            self._index(state)
        if state.parent is None and parent is not state:
            state.parent = parent
        if state.stream is None:
            self.changed = True
            self.holdings.freeze(stream)
            state.stream = stream
        else:
            self.holdings.close(stream)
        state.used = next(self._clock)
        if kind == "leaf":
            state.kind = "leaf"
            self._supersede(state)
        return state

    def _supersede(self, leaf: State) -> None:
        """A conversation has a new end. What was one before it is a moment inside, of which the newest few are remembered."""
        inside, at = 0, leaf
        while at.parent is not None:
            state = at.parent
            if state is leaf:  # the same text was said again
                at.parent = None
                return
            if state.owner != PUBLIC and state.kind != "first":
                state.kind = "inner"
                inside += 1
            if inside > INNER and state.kind == "inner":
                before, forgotten = state.parent, state.stored is None
                self._release(state)
                if forgotten:
                    at.parent = before
                    continue
            at = state

    def _index(self, state: State) -> None:
        self.changed = True
        self._known.setdefault(state.owner, {}).setdefault(state.length, {})[state.digest] = state

    def _forget(self, state: State) -> None:
        """There is no such state any more."""
        self.changed = True
        known = self._known.get(state.owner, {})
        of_length = known.get(state.length, {})
        if of_length.get(state.digest) is state:
            del of_length[state.digest]
            if not of_length:
                del known[state.length]
            if not known:
                del self._known[state.owner]
        if state.stream is not None:
            self.holdings.close(state.stream)
        state.stream = state.stored = state.parent = None

    def _release(self, state: State) -> None:
        """A state leaves memory; without a file it is forgotten."""
        if state.stream is None:
            return
        if state.stored is None:
            self.counts.dropped += 1
            self._forget(state)
            return
        self.counts.evictions += 1
        self.changed = True
        self.holdings.close(state.stream)
        state.stream = None

    # -------------------------------------------------------------------------------------------------------------------- budget

    def room(self, more: int = 0) -> bool:
        """Whether ``more`` bytes fit beside all streams. States leave memory until they do."""
        while self.holdings.bytes_held + more > self.memory:
            if not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        """Whether a state left memory: a moment inside of a conversation, or else what was used longest ago. Those whose blocks a
        stream at work shares come last, as they give little back."""
        held = [state for state in self._states() if state.stream is not None and state.owner != PUBLIC]
        if not held:
            return False
        state = min(held, key=lambda one: (one.busy > 0, one.kind != "inner", one.used))
        if state.kind == "leaf":
            self.write(state)
        self._release(state)
        if state.stored is not None and state.kind == "leaf" and self.sessions is not None and self.sessions.shared:
            self._leave(state)
        return True

    def _leave(self, leaf: State) -> None:
        """A conversation that is in a shared store alone is looked for when it comes back; it may go on elsewhere meanwhile."""
        at: State | None = leaf
        while at is not None:
            before = at.parent
            if at.stream is None:
                self._forget(at)
            at = before

    def _states(self) -> Iterator[State]:
        return (state for known in self._known.values() for same in known.values() for state in same.values())

    def sizes(self) -> tuple[int, int, int]:
        """States in memory, states in files, and the bytes of these."""
        held = stored = size = 0
        for state in self._states():
            held += state.stream is not None
            stored += state.stored is not None
            size += 0 if state.stored is None else state.stored.size
        return held, stored, size

    # --------------------------------------------------------------------------------------------------------------------- files

    def unwritten(self) -> State | None:
        """The end of a conversation that no file holds, the one used longest ago."""
        if self.sessions is None:
            return None
        found = [state for state in self._states() if state.kind == "leaf" and state.stream is not None and not state.written]
        return min(found, key=lambda one: one.used, default=None)

    def write(self, state: State, *, must: bool = False) -> bool:
        """Whether a file holds a state now. One that cannot be written is told of, and kept in memory as long as there is room.

        Raises:
            KvsieveError: with ``must``, if it cannot be written.
        """
        if state.stored is not None and must and self.sessions is not None and not self.sessions.holds(state.stored):
            state.stored = None
        if state.stored is not None or self.sessions is None or state.stream is None or (state.written and not must):
            return state.stored is not None
        state.written = True
        try:
            state.stored = self.sessions.save(state.owner, state.length, state.digest.hex(), state.stream)
        except (KvsieveError, OSError) as error:
            if must:
                raise
            log.warning("a conversation is in memory only: %s", error)
            return False
        self.counts.saves += 1
        self.changed = True
        if self.disk is not None and state.stored.size > self.disk:
            size = state.stored.size
            self.sessions.remove(state.stored)
            state.stored = None
            if must:
                raise SaveError(f"cannot keep a conversation of {size:,} bytes: the files' limit is {self.disk:,}")
            log.warning("a conversation of %s bytes is in memory only: the files' limit is %s", size, self.disk)
            return False
        self._remove_older(state)
        self._trim_files(state)
        return state.stored is not None

    def _remove_older(self, state: State) -> None:
        """A conversation is in two files at most: those of its newest end and of the one before it. A client that was never told of
        the newest one goes on from that."""
        assert self.sessions is not None
        files, at = 1, state
        while at.parent is not None:
            older = at.parent
            files += older.stored is not None
            if files > FILES and older.kind == "inner" and older.stored is not None:
                self.sessions.remove(older.stored)
                older.stored, self.changed = None, True
                if older.stream is None:
                    at.parent = older.parent
                    self._forget(older)
                    continue
            at = older

    def _trim_files(self, newest: State | None = None) -> None:
        """The files used longest ago go until the rest is within its bytes."""
        if self.disk is None or self.sessions is None:
            return
        stored = sorted((one for one in self._states() if one.stored is not None), key=lambda one: (one is newest, one.used))
        sizes = sum(state.stored.size for state in stored if state.stored is not None)
        for state in stored:
            if sizes <= self.disk:
                return
            assert state.stored is not None
            sizes -= state.stored.size
            self.sessions.remove(state.stored)
            state.stored, self.changed = None, True
            if state.stream is None:
                self.counts.dropped += 1
                self._forget(state)

    def close(self) -> None:
        """Write what no file holds, as far as that can be, and close all streams."""
        try:
            while (state := self.unwritten()) is not None:
                self.write(state)
            for state in list(self._states()):
                self._forget(state)
        finally:
            if self.sessions is not None:
                self.sessions.close()
