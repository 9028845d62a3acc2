"""States of conversations in a folder of this process alone.

    DIR/<owner>/<state>.safetensors     the stream, as `Stream.save` writes it
    DIR/<owner>/<state>.json            what it is: written last, so that a state without it, or that does not fit it, is none

Folders are 0700 and files 0600. Neither a text nor an owner's name is in any of them: a state is found by the digest of its text,
an owner by that of the name. Nothing is pickled. One process at a time uses a folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve import streams
from kvsieve.errors import SaveError, ServiceError
from kvsieve.files.replace import replacing, sync_folder
from kvsieve.serve.store import VERSION, Store, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy

__all__ = ["Sessions"]

_OWNER, _STATE = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{40}")
_MOST_TOLD = 65536
"""Bytes of a JSON file that is one of these."""

log = logging.getLogger("kvsieve.serve")


class Sessions(Store):
    """The folder of states that one service writes and reads.

    Args:
        folder: made where it is missing.
        backend: of streams that are loaded.

    Attributes:
        found: states of this model, tokenizer and policy that were there; unusable: files that are none.

    Raises:
        SaveError: if the folder cannot be made or written. ServiceError: if another process uses it.
        UnsupportedError: for a policy that cannot be written as text.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, tokenizer: Any, policy: Policy, backend: str | None) -> None:
        super().__init__(model, tokenizer, policy, backend)
        self.folder = folder
        self._lock: int | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(folder)
            self.found = list(self._scan())
        except BaseException as err:
            self.close()
            if isinstance(err, OSError):
                raise SaveError(f"cannot keep conversations in {folder}: {err.strerror or err}") from err
            raise

    def close(self) -> None:
        """Another process may use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ----------------------------------------------------------------------------------------------------------------- one state

    def save(self, owner: str, length: int, digest: str, stream: streams.Stream) -> Stored:
        """Write a state; both files are on the disk when this returns.

        Raises:
            SaveError: if they cannot be written; there is then no such state.
        """
        name = self.named(length, digest)
        place, data, told = self._paths(owner, name)
        try:
            if not place.is_dir():
                place.mkdir(mode=0o700, exist_ok=True)
                sync_folder(str(self.folder))
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            os.close(os.open(data, flags, 0o600))  # what replaces it has its permissions
            stream.save(data)  # the description knows the tokenizer, whose fingerprint takes half a second
            size, unread = data.stat().st_size, len(stream.ids[0]) - stream.seen
            stored = Stored(owner, name, length, digest, stream.seen, unread, size, time.time())
            with replacing(told, "state of a conversation", 0o600) as file:
                file.write(json.dumps({"version": VERSION, "identity": self.identity, **asdict(stored)}).encode())
        except BaseException as err:
            self._unlink(data, told)
            if isinstance(err, OSError) and not isinstance(err, SaveError):
                raise SaveError(f"cannot keep a conversation in {place}: {err.strerror or err}") from err
            raise
        return stored

    def load(self, stored: Stored) -> streams.Stream:
        """The stream of a state; see :meth:`Store.load`."""
        _, data, told = self._paths(stored.owner, stored.name)
        stream = self._opened(data, stored)
        with contextlib.suppress(OSError):
            os.utime(told)
        return stream

    def holds(self, stored: Stored) -> bool:
        """Whether both files are there."""
        _, data, told = self._paths(stored.owner, stored.name)
        return data.is_file() and told.is_file()

    def remove(self, stored: Stored) -> None:
        """Remove the files of a state; what describes it first."""
        _, data, told = self._paths(stored.owner, stored.name)
        self._unlink(told, data)

    def _paths(self, owner: str, name: str) -> tuple[Path, Path, Path]:
        place = self.folder / owner
        return place, place / f"{name}.safetensors", place / f"{name}.json"

    def _unlink(self, *paths: Path) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as err:
                log.warning("cannot remove %s: %s", path, err.strerror or err)

    # ------------------------------------------------------------------------------------------------------------- what is there

    def _scan(self) -> Iterator[Stored]:
        """The states that are there. What a process that was killed left half-written goes."""
        others = 0
        for place in sorted(self.folder.iterdir()):
            if not _OWNER.fullmatch(place.name) or not place.is_dir() or place.is_symlink():
                continue
            for path in sorted(place.iterdir()):
                if path.suffix == ".partial" or (path.suffix == ".safetensors" and not path.with_suffix(".json").exists()):
                    if path.suffix == ".partial" or _STATE.fullmatch(path.stem):
                        self._unlink(path)
                elif path.suffix == ".json":
                    stored = self._described(path)
                    if isinstance(stored, Stored):
                        yield stored
                    else:
                        others += stored == "another"
                        self.unusable += stored != "another"
        if self.unusable:
            log.warning("%s files under %s are damaged or half-written, and not used", self.unusable, self.folder)
        if others:
            log.warning("%s conversations under %s are of another model, tokenizer or policy, and stay there", others, self.folder)

    def _described(self, path: Path) -> Stored | str:
        """What a JSON file describes; ``"another"`` model's state, or ``"nothing"`` usable."""
        try:
            if path.is_symlink() or path.stat().st_size > _MOST_TOLD:
                return "nothing"
            told = json.loads(path.read_text(encoding="utf-8"))
            if told.pop("version") != VERSION or told.pop("identity") != self.identity:
                return "another"
            stored = Stored(**told)
            data = path.with_suffix(".safetensors")
            counts = (stored.length, stored.tokens, stored.unread, stored.size)
            fits = all(type(one) is int and one >= 0 for one in counts) and stored.unread <= 1
            fits = fits and (stored.owner, stored.name) == (path.parent.name, path.stem) and len(bytes.fromhex(stored.digest)) == 32
            if not fits or data.is_symlink() or data.stat().st_size != stored.size:
                return "nothing"
            return Stored(**{**told, "used": path.stat().st_mtime})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "nothing"


def _locked(folder: Path) -> int | None:
    """The folder's lock, held until it is closed or the process ends.

    Raises:
        ServiceError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise ServiceError(f"another process keeps its conversations in {folder}; give each a folder of its own") from None
    return held
