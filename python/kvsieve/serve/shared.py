"""States of conversations in a store that several processes share: a directory, or object storage, through fsspec.

    URL/<identity>/<owner>/<length>-<tokens>-<unread>-<state>-<number>.state

One object is one state: the stream as `Stream.save` writes it, and behind it what it is, so that neither is ever found with another
one's other half. Each is written once under a name that nobody else uses, is visible when it is complete, and is never changed. A
state is found by its text: the names in an owner's folder tell which lengths to compare. Neither a text nor an owner's name is in
any name or description. Nothing is pickled.

fsspec is asked for names anew each time; what it remembers of a listing may be older than what another process wrote.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve import streams
from kvsieve.errors import ArgumentError, BackendError, SaveError, ServiceError, SessionNotFoundError
from kvsieve.files.replace import sync_folder
from kvsieve.serve.store import VERSION, Store, Stored, is_url
from kvsieve.serve.texts import digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy

__all__ = ["Shared", "file_system", "store_url"]

MAGIC = b"kvsieve\n"
"""The last bytes of an object; before them the length of the description in four bytes, and the description."""

_MOST_TOLD = 65536
"""Bytes of a description."""

_NAME = re.compile(r"(\d{1,12})-(\d{1,12})-([01])-([0-9a-f]{40})-([0-9a-f]{16})")
_ENDING = ".state"

ATOMIC = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2"))
"""Object storage, where what is put is there whole or not at all. Elsewhere it is written under another name and moved."""

ABANDONED = 24 * 3600.0
"""Seconds after which a file that is still being written is one whose process was killed."""

PARTS = 16
"""The store's bytes are counted whenever so large a part of their limit was written here."""

log = logging.getLogger("kvsieve.serve")


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ArgumentError: for a URL of nothing that fsspec knows. BackendError: if fsspec, or what it needs for this URL, is missing.
    """
    try:
        import fsspec
    except ImportError:
        raise BackendError(f"{url} needs fsspec; pip install 'kvsieve[serve]'") from None
    if "::" in url:
        raise ArgumentError(f"{url} is a chain of file systems; name the last one alone")
    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise BackendError(f"{url} needs a package that is not here: {error}") from error
    except (ValueError, OSError) as error:
        raise ArgumentError(f"cannot keep conversations at {url}: {error}") from error
    return found, str(path).rstrip("/")


def store_url(sessions: str | None) -> str:
    """Where several processes keep conversations.

    Raises:
        ArgumentError: for nothing, or what each process has on its own.
    """
    if sessions is None:
        raise ArgumentError("--ray needs a store that the replicas share: --sessions DIR, or a URL")
    if sessions.startswith("memory:"):
        raise ArgumentError(f"{sessions} is of one process; --ray needs a store that the replicas share")
    return sessions if is_url(sessions) else f"file://{Path(sessions).expanduser().absolute()}"


class Shared(Store):
    """States at a URL, which other processes read and write as well.

    Args:
        url: of a directory, made where it is missing.
        disk: most bytes of all states there, of every model and policy; None: any number. Those that were written first go first.

    Raises:
        SaveError: if nothing can be written there. ArgumentError, BackendError: as for :func:`file_system`.
        UnsupportedError: for a policy that cannot be written as text.
    """

    shared = True

    def __init__(
        self, url: str, model: PreTrainedModel, tokenizer: Any, policy: Policy, backend: str | None, disk: int | None = None
    ) -> None:
        super().__init__(model, tokenizer, policy, backend)
        self._fs, self._root = file_system(url)
        self._url, self._disk, self._since = url, disk, 0
        self._spoiled: set[str] = set()
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._local, self._atomic = bool(protocols & {"file", "local"}), bool(protocols & ATOMIC)
        self._home = f"{self._root}/{self.identity[:32]}"
        with self._writing(url):
            self._make(self._root)
            self._make(self._home)
            probe = f"{self._home}/.{secrets.token_hex(8)}.probe"
            self._fs.pipe_file(probe, MAGIC)
            self._fs.rm_file(probe)
        self._trim()

    # ----------------------------------------------------------------------------------------------------------------- one state

    def save(self, owner: str, length: int, digest: str, stream: streams.Stream) -> Stored:
        """Write a state; it is there for others, and outlives this process, when this returns.

        Raises:
            SaveError: if it cannot be written; there is then no such state.
        """
        place, unread = f"{self._home}/{owner}", len(stream.ids[0]) - stream.seen
        name = f"{length}-{stream.seen}-{unread}-{self.named(length, digest)}-{secrets.token_hex(8)}"
        target, partial = f"{place}/{name}{_ENDING}", f"{place}/.{name}.partial"
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._writing(place))
            self._make(place)
            spool = Path(partial) if self._local else Path(stack.enter_context(_scratch())) / "state"
            if not self._atomic:
                stack.callback(self._clean, partial)
            os.close(os.open(spool, os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600))  # kept by what replaces it
            stream.save(spool)
            stored = Stored(owner, name, length, digest, stream.seen, unread, spool.stat().st_size, time.time())
            self._describe(spool, stored)
            size = spool.stat().st_size
            if self._disk is not None and size > self._disk:
                raise SaveError(f"cannot keep a conversation of {size:,} bytes: the files' limit is {self._disk:,}")
            self._publish(spool, partial, target)
        self._since += size
        if self._disk is not None and self._since > self._disk // PARTS:
            self._trim()
        return stored

    def _describe(self, spool: Path, stored: Stored) -> None:
        names = ("owner", "name", "length", "digest", "tokens", "unread", "size")
        told = {"version": VERSION, "identity": self.identity, **{name: getattr(stored, name) for name in names}}
        text = json.dumps(told).encode()
        with open(spool, "ab") as file:
            file.write(text + len(text).to_bytes(4, "little") + MAGIC)
            file.flush()
            os.fsync(file.fileno())

    def _publish(self, spool: Path, partial: str, target: str) -> None:
        """Nobody sees anything of a state before all of it is there."""
        if self._local:
            os.replace(spool, target)
            sync_folder(os.path.dirname(target))
        elif self._atomic:
            self._fs.put_file(str(spool), target)
        else:
            self._fs.put_file(str(spool), partial)
            self._fs.mv(partial, target)

    def load(self, stored: Stored) -> streams.Stream:
        """The stream of a state; see :meth:`Store.load`."""
        with _scratch() as scratch:
            here = os.path.join(scratch, "state")
            try:
                if self._local:
                    shutil.copyfile(self._path(stored), here)
                else:
                    self._fs.get_file(self._path(stored), here)
            except FileNotFoundError:
                raise SessionNotFoundError(f"the state {stored.name} is gone") from None
            except Exception as error:
                raise OSError(f"cannot read the state {stored.name}: {_said(error)}") from error
            return self._opened(here, self._described(here, stored))

    def _described(self, path: str, stored: Stored) -> Stored:
        """What the end of a file says of it, which is then cut off.

        Raises:
            ServiceError: if it says nothing, or something else than the file's name.
        """
        wrong = ServiceError(f"the state {stored.name} is damaged, or is another one")
        with open(path, "rb+") as file:
            whole = file.seek(0, os.SEEK_END)
            least = len(MAGIC) + 4
            if whole < least:
                raise wrong
            file.seek(whole - least)
            end = file.read(least)
            count = int.from_bytes(end[:4], "little")
            if end[4:] != MAGIC or count > min(_MOST_TOLD, whole - least):
                raise wrong
            file.seek(whole - least - count)
            try:
                told = json.loads(file.read(count))
                same = (told.pop("version"), told.pop("identity")) == (VERSION, self.identity)
                found = Stored(**told, used=0.0)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise wrong from None
            parts = (found.length, found.tokens, found.unread, self.named(found.length, str(found.digest)))
            named = _NAME.fullmatch(str(found.name))
            same = same and (found.owner, found.name, found.digest) == (stored.owner, stored.name, stored.digest)
            if not same or named is None or parts != (int(named[1]), int(named[2]), int(named[3]), named[4]):
                raise wrong
            if found.size != whole - least - count:
                raise wrong
            file.truncate(found.size)
        return found

    def holds(self, stored: Stored) -> bool:
        """Whether a state is there; one that cannot be asked for is not."""
        try:
            self._fs.invalidate_cache(f"{self._home}/{stored.owner}")
            return stored.name not in self._spoiled and bool(self._fs.exists(self._path(stored)))
        except Exception as error:
            log.warning("cannot ask for a state at %s: %s", self._url, _said(error))
            return False

    def remove(self, stored: Stored) -> None:
        """Remove a state; another process may have done so."""
        self._unlink(self._path(stored))

    def spoiled(self, stored: Stored) -> None:
        """A damaged state stays: it may be this process that reads it wrong. It is not read again here."""
        self._spoiled.add(stored.name)

    # ------------------------------------------------------------------------------------------------------------- what is there

    def find(self, owner: str, text: str) -> list[Stored]:
        """The states of beginnings of ``text`` that are there. A store that does not answer has none; the log says so."""
        known: dict[int, dict[str, Stored]] = {}
        for info in self._listed(f"{self._home}/{owner}"):
            name = str(info["name"]).rsplit("/", 1)[-1].removesuffix(_ENDING)
            parts = _NAME.fullmatch(name)
            if parts is None or name in self._spoiled or int(parts[1]) > len(text):
                continue
            length, size, used = int(parts[1]), int(info.get("size") or 0), _written(info)
            same, stored = known.setdefault(length, {}), Stored(owner, name, length, "", int(parts[2]), int(parts[3]), size, used)
            before = same.get(parts[4])
            if before is None or before.used < used:
                same[parts[4]] = stored
        found = []
        for length, digest in digests(text, known):
            stored = known[length].get(self.named(length, digest.hex()))  # type: ignore[assignment]
            if stored is not None:
                found.append(replace(stored, digest=digest.hex()))
        return found

    def _listed(self, place: str) -> list[Mapping[str, Any]]:
        try:
            self._fs.invalidate_cache(place)
            return [info for info in self._fs.ls(place, detail=True) if str(info["name"]).endswith(_ENDING)]
        except FileNotFoundError:
            return []
        except Exception as error:
            log.warning("cannot look for conversations at %s: %s", self._url, _said(error))
            return []

    def _trim(self) -> None:
        """The states that were written first go until the rest is within the limit, whoever wrote them."""
        self._since = 0
        if self._disk is None:
            return
        try:
            self._fs.invalidate_cache(self._root)
            files = self._fs.find(self._root, detail=True)
        except Exception as error:
            log.warning("cannot count the conversations at %s: %s", self._url, _said(error))
            return
        states, now = list[tuple[float, str, int]](), time.time()
        for path, info in files.items():
            name = path.rsplit("/", 1)[-1]
            if name.startswith(".") and name.endswith(".partial") and _NAME.fullmatch(name[1:-8]):
                if now - _written(info) > ABANDONED:
                    self._unlink(path)
            elif _NAME.fullmatch(name.removesuffix(_ENDING)) and name.endswith(_ENDING):
                states.append((_written(info), path, int(info.get("size") or 0)))
        size = sum(one for _, _, one in states)
        for _, path, one in sorted(states):
            if size <= self._disk:
                return
            size -= one
            self._unlink(path)

    # --------------------------------------------------------------------------------------------------------------------- files

    def _path(self, stored: Stored) -> str:
        return f"{self._home}/{stored.owner}/{stored.name}{_ENDING}"

    def _make(self, place: str) -> None:
        """A folder, where there are folders."""
        if self._atomic:
            return
        if self._local:
            if not os.path.isdir(place):
                os.makedirs(place, mode=0o700, exist_ok=True)
                sync_folder(os.path.dirname(place))
        else:
            self._fs.makedirs(place, exist_ok=True)

    def _clean(self, partial: str) -> None:
        """What was not moved is not left."""
        with contextlib.suppress(Exception):  # what comes before tells why there is something
            if self._fs.exists(partial):
                self._fs.rm_file(partial)

    def _unlink(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            pass
        except Exception as error:
            log.warning("cannot remove %s: %s", path, _said(error))

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Whatever a file system raises is a state that cannot be written."""
        try:
            yield
        except SaveError:
            raise
        except Exception as error:
            raise SaveError(f"cannot keep conversations in {what}: {_said(error)}") from error


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvsieve-")


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _written(info: Mapping[str, Any]) -> float:
    """When an object was written, in seconds since 1970, by whatever name its file system tells that; 0 where it does not."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 0.0
