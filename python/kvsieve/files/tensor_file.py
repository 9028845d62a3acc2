"""Tensors and a JSON header in one file whose every byte is checked when it is read.

The file is a safetensors file, which any reader of that format can open:

    8 bytes        length of the header, little-endian
    header         {"__metadata__":{"sha256":"<64 hexadecimal digits>","<kind>":"<text>"},
                    "<tensor>":{"dtype":..,"shape":[..],"data_offsets":[..]},..}
    tensors        one after the other, without a gap, little-endian

``sha256`` is the digest of the whole file with zeros in its own place: there is no byte that can change unnoticed. ``<kind>`` says
what the file is, and holds the JSON that its owner wrote, whose ``"version"`` is the number of the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import Any, BinaryIO

import torch

from kvsieve.checks import check_path
from kvsieve.errors import SaveError, SessionError, SessionNotFoundError, UnsupportedError
from kvsieve.files.replace import replacing

__all__ = ["Kind", "Later", "TensorFile", "opened", "write"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_START = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + 64)
_MOST_HEADER = 100_000_000
"""Bytes; other readers of safetensors files refuse more."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Attributes:
        key: of its JSON among the metadata; what: for messages; version: of its format.
    """

    key: str
    what: str
    version: int


@dataclass(frozen=True, eq=False)
class Later:
    """A tensor that is made when its turn comes to be written, so that not all are in memory at once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------- writing


def write(path: str | os.PathLike[str], kind: Kind, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | Later]) -> None:
    """Write a file, which replaces what is at ``path`` once it is complete and on the disk (:func:`.replace.replacing`).

    Args:
        header: plain data for JSON; numbers must be finite.
        tensors: by name, on any device.

    Raises:
        SaveError: if it cannot be written; what was there before is as it was.
        UnsupportedError: for a dtype that such a file cannot hold, or on a big-endian machine.
    """
    _check_byte_order()
    entries, at = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UnsupportedError(f"a {kind.what} cannot hold {tensor.dtype}, the dtype of {name}")
        size = _numel(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({**header, "version": kind.version}, allow_nan=False)
    metadata = {"__metadata__": {"sha256": "0" * 64, kind.key: text}}
    raw = json.dumps({**metadata, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MOST_HEADER:
        raise SaveError(f"cannot write the {kind.what} {path}: its header would have {len(raw)} bytes, more than {_MOST_HEADER}")
    digest = hashlib.sha256()
    with replacing(path, kind.what) as file:
        for piece in (len(raw).to_bytes(8, "little"), raw):
            digest.update(piece)
            file.write(piece)
        for name, tensor in tensors.items():
            _write_tensor(file, digest, name, tensor)
        file.seek(_DIGEST.start)
        file.write(digest.hexdigest().encode())


def _write_tensor(file: BinaryIO, digest: Any, name: str, tensor: torch.Tensor | Later) -> None:
    made = tensor if isinstance(tensor, torch.Tensor) else tensor.make()
    if (made.dtype, tuple(made.shape)) != (tensor.dtype, tuple(tensor.shape)):
        raise RuntimeError(f"{name} was to be {tensor.dtype} {tuple(tensor.shape)}, and is {made.dtype} {tuple(made.shape)}")
    if made.numel():
        flat = made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for lo in range(0, len(flat), _CHUNK):
            digest.update(flat[lo : lo + _CHUNK])
            file.write(flat[lo : lo + _CHUNK].data)


# ---------------------------------------------------------------------------------------------------------------------- reading


class TensorFile:
    """A file that :func:`write` wrote, open for reading; its digest and its tensors' places have been checked.

    Attributes:
        path: where it is.
        header: what its owner wrote.
    """

    def __init__(self, path: str | bytes, kind: Kind, file: FileIO) -> None:
        self.path, self._kind, self._file = os.fsdecode(path), kind, file
        self._state = _state(file)
        self.header, self._entries, self._body = self._read_header()

    def error(self, why: str) -> SessionError:
        """The error that refuses this file."""
        return SessionError(f"{self.path} is no {self._kind.what}, or a damaged one: {why}")

    def unreadable(self, err: OSError) -> SessionError:
        """The error when the disk does not give the bytes."""
        return SessionError(f"cannot read the {self._kind.what} {self.path}: {err.strerror or err}")

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU.

        Raises:
            KeyError: if the file has none of this name.
            SessionError: if it cannot be read.
        """
        dtype, shape, begin, end = self._entries[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._read_into(memoryview(data.numpy().data), self._body + begin)
        return data.view(dtype).reshape(shape)

    def num_bytes(self, name: str) -> int:
        """The size of a tensor."""
        _, _, begin, end = self._entries[name]
        return end - begin

    def _read_into(self, view: memoryview, at: int) -> None:
        """Fill ``view`` with the bytes from ``at`` on."""
        try:
            self._file.seek(at)
            while view:
                count = self._file.readinto(view[:_CHUNK])
                if not count:
                    raise self.error("it was cut while it was read")
                view = view[count:]
        except OSError as err:
            raise self.unreadable(err) from err

    def check_unchanged(self) -> None:
        """Refuse a file that was written to, or cut, while it was read.

        Raises:
            SessionError: then.
        """
        if _state(self._file) != self._state:
            raise self.error("it was changed while it was read")

    def _read_header(self) -> tuple[dict[str, Any], dict[str, tuple[torch.dtype, list[int], int, int]], int]:
        size, start = self._state[0], bytearray(8)
        if size < 8:
            raise self.error(f"it has {size} bytes")
        self._read_into(memoryview(start), 0)
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _MOST_HEADER):
            raise self.error(f"its header does not fit into its {size} bytes")
        header = bytearray(length)
        self._read_into(memoryview(header), 8)
        raw = bytes(header)
        signed = raw.startswith(_START)
        if signed:
            self._check_digest(raw)
        found = self._json(raw)
        metadata = found.pop("__metadata__", None)
        text = metadata.get(self._kind.key) if isinstance(metadata, dict) else None
        if not isinstance(text, str):
            raise self.error(f"it has no {self._kind.key} header")
        told = self._json(text.encode())
        version = told.pop("version", None)
        if version != self._kind.version or isinstance(version, bool):
            raise SessionError(
                f"{self.path} was written in format {str(version)[:20]}; this kvsieve reads format {self._kind.version} of a "
                f"{self._kind.what}"
            )
        if not signed:
            raise self.error("it has no digest")
        return told, self._places(found, size - 8 - length), 8 + length

    def _check_digest(self, raw: bytes) -> None:
        digest, at = hashlib.sha256(), len(_START)
        told = raw[at : at + 64]
        digest.update(len(raw).to_bytes(8, "little") + raw[:at] + b"0" * 64 + raw[at + 64 :])
        left = self._state[0] - 8 - len(raw)
        buffer = memoryview(bytearray(min(left, _CHUNK)))
        while left:
            piece = buffer[: min(left, _CHUNK)]
            self._read_into(piece, self._state[0] - left)
            digest.update(piece)
            left -= len(piece)
        if digest.hexdigest().encode() != told:
            raise self.error("its bytes are not those that were written (its digest differs)")

    def _json(self, raw: bytes) -> dict[str, Any]:
        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) != len(pairs):
                raise ValueError("a key comes twice")
            return found

        def no_number(text: str) -> Any:
            raise ValueError(f"{text} is no number")

        try:
            found = json.loads(raw.decode(), object_pairs_hook=once, parse_constant=no_number)
        except (ValueError, RecursionError) as err:
            raise self.error(f"its header cannot be read ({str(err)[:100]})") from None
        if not isinstance(found, dict):
            raise self.error("its header is no JSON object")
        return found

    def _places(self, found: dict[str, Any], size: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
        places, at = {}, 0
        for name, entry in found.items():
            match entry:
                case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if len(entry) == 3:
                    pass
                case _:
                    raise self.error(f"it does not say where {name[:100]!r} is")
            if dtype not in _DTYPES or len(shape) > 8 or not all(type(x) is int and 0 <= x < 1 << 40 for x in shape):
                raise self.error(f"it holds {name[:100]!r} as {dtype[:10]} {str(shape)[:100]}, which no such file does")
            if (begin, end) != (at, at + _numel(shape) * _DTYPES[dtype].itemsize) or end > size:
                raise self.error(f"{name[:100]!r} is not where it must be")
            places[name], at = (_DTYPES[dtype], shape, begin, end), end
        if at != size:
            raise self.error(f"it has {size - at} bytes that belong to no tensor")
        return places


@contextmanager
def opened(path: str | os.PathLike[str], kind: Kind) -> Iterator[TensorFile]:
    """The file at ``path``, checked whole: its digest, its format, and where its tensors are.

    Raises:
        SessionNotFoundError: if there is none.
        SessionError: if it cannot be read, is damaged, or is something else.
        UnsupportedError: on a big-endian machine.
    """
    _check_byte_order()
    path = check_path("path", path, SessionError)
    try:
        # A pipe without a writer would be waited for.
        held = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise SessionNotFoundError(f"there is no {kind.what} at {path}") from None
    except (OSError, ValueError, TypeError) as err:
        raise SessionError(f"cannot read the {kind.what} {path!r}: {getattr(err, 'strerror', None) or err}") from err
    if not stat.S_ISREG(os.fstat(held).st_mode):
        os.close(held)
        raise SessionError(f"{path} is no {kind.what}: it is a folder, a device or a pipe")
    with open(held, "rb", buffering=0) as file:
        yield TensorFile(os.fspath(path), kind, file)


def _state(file: FileIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _numel(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise UnsupportedError("session and bank files are read and written on little-endian machines only")
