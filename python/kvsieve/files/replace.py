"""A file takes the place of an old one only once it is complete and on the disk; until then nobody sees anything of it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from kvsieve.checks import told
from kvsieve.errors import KvsieveError, SaveError

__all__ = ["replacing", "sync_folder", "target_of"]


@contextmanager
def replacing(path: str | os.PathLike[str], what: str, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file, open for writing, that replaces ``path`` when the block is left without an error.

    It has a name that nobody can guess, in the folder of ``path``, until it and then the folder have been flushed to the disk. A
    link is followed: the file that it names is replaced, and the link stays. A file that was there keeps its permissions.

    Args:
        path: the file to write.
        what: what it is, for messages: ``"session file"``.
        mode: its permissions where there was none, less those that the process's mask takes.

    Raises:
        SaveError: if ``path`` is something else than a regular file (a folder, a device, a pipe), if it may not be written, or if
            the disk is full or fails. What was there before is as it was.
    """
    target, kept = target_of(path, what)
    folder, name = os.path.split(target)
    short = name.encode(errors="ignore")[:64].decode(errors="ignore")  # a name has up to 255 bytes, this one too
    partial = os.path.join(folder, f".{short}.{secrets.token_hex(8)}.partial")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        held = os.open(partial, flags, mode)
    except (OSError, ValueError) as err:
        raise SaveError(f"cannot write the {what} {path}: {_reason(err)}") from err
    done = False
    try:
        with open(held, "wb+") as file:
            if kept is not None:
                _keep_mode(file.fileno(), kept)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        done = True
        sync_folder(folder)
    except KvsieveError:
        raise
    except OSError as err:
        left = "the new file is in its place, and may not outlive a power failure" if done else "what was there before is as it was"
        raise SaveError(f"cannot write the {what} {path}: {_reason(err)}; {left}") from err
    finally:
        with suppress(OSError):
            os.unlink(partial)


def target_of(path: str | os.PathLike[str], what: str) -> tuple[str, int | None]:
    """The file that is written when a ``what`` is saved to ``path``, links followed, and its permissions if it exists.

    Raises:
        SaveError: if it cannot be replaced.
    """
    try:
        given = os.fspath(path)
        if not isinstance(given, str):
            raise TypeError("its name must be text")
        if not given:
            raise ValueError("its name is empty")
        target = os.path.realpath(given)
        try:
            found = os.stat(target)
        except FileNotFoundError:
            if given.endswith(("/", os.sep)):
                raise IsADirectoryError("this is the name of a folder") from None
            os.stat(os.path.dirname(target))
            return target, None
    except (OSError, ValueError, TypeError) as err:
        raise SaveError(f"cannot write the {what} {told(path)}: {_reason(err)}") from err
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISFIFO, "a pipe"))
        kind = next((name for test, name in kinds if test(found.st_mode)), "no regular file")
        raise SaveError(f"cannot write the {what} {path}: that is {kind}, which would be lost; name a regular file")
    if not os.access(target, os.W_OK):
        raise SaveError(f"cannot write the {what} {path}: it is there and may not be written (permission denied)")
    return target, stat.S_IMODE(found.st_mode)


def _keep_mode(held: int, mode: int) -> None:
    if hasattr(os, "fchmod"):
        os.fchmod(held, mode)


def sync_folder(folder: str) -> None:
    """What was made, replaced or removed in a folder is on the disk."""
    if os.name == "nt":  # a folder cannot be opened there; the rename is written through
        return
    held = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _reason(err: Exception) -> str:
    return getattr(err, "strerror", None) or str(err) or type(err).__name__
