"""A bank on disk: one safetensors file, plain tensors and a JSON header. Nothing is pickled, nothing is executed on load.

A file is written beside the old one, to the disk itself, and then takes its place: whoever reads sees one or the other, whole. The
header has a checksum of every tensor. One process at a time may write a bank: it holds a lock on ``<path>.lock`` while it does.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvsieve.bank.entries import BankLayer, Entries, Piece, Segment, Shape
from kvsieve.errors import BankError, UnsupportedError

__all__ = ["Content", "lock", "read", "unlock", "write"]

VERSION = 1
NAME = "kvsieve_bank"

Content = tuple[Shape, dict[str, Any], dict[str, Entries]]
"""A bank's shape, what it says of the model that wrote it, and the entries of its namespaces."""


# ------------------------------------------------------------------------------------------------------------------------- lock


def lock(path: Path) -> int:
    """A file descriptor that holds the lock of the bank at ``path``; the file itself need not be there yet.

    Raises:
        BankError: if another bank, of this process or another one, holds it, or the folder cannot be written.
        UnsupportedError: on systems without POSIX locks.
    """
    try:
        import fcntl
    except ImportError:
        raise UnsupportedError(
            "this system has no POSIX locks, so no bank can be written to a file; open it with read_only=True"
        ) from None
    try:
        held = os.open(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as err:
        raise BankError(f"cannot write a bank at {path}: {err.strerror}") from err
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise BankError(
            f"the bank at {path} is being written by another process, or another MemoryBank of this one; a bank has one writer: "
            "close it there, or open it here with read_only=True"
        ) from None
    return held


def unlock(held: int) -> None:
    """Give the lock back."""
    os.close(held)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


# ---------------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, content: Content) -> None:
    """Write ``content`` to ``path``; what is there is replaced once the new file is complete and on the disk.

    Raises:
        BankError: if it cannot be written; the old file is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shape, identity, namespaces = content
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for at, (name, entries) in enumerate(namespaces.items()):
        told = ("tail", "written", "dropped", "chunks_dropped", "ragged")
        rows.append({"name": name, **{key: getattr(entries, key) for key in told}})
        tensors.update({f"{at}/{key}": tensor for key, tensor in _tensors(entries).items()})
    header = {
        "version": VERSION,
        "identity": identity,
        "chunk": shape.chunk,
        "capacity": shape.capacity,
        "layers": [[x.index, x.num_kv_heads, x.key_dim, x.value_dim, str(x.dtype).removeprefix("torch.")] for x in shape.layers],
        "namespaces": rows,
        "checksums": {key: _checksum(tensor) for key, tensor in tensors.items()},
    }
    partial = _beside(path, ".partial")
    try:
        save_file(tensors, partial, metadata={NAME: json.dumps(header)})
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as err:
        raise BankError(f"cannot write the bank to {path}: {err}; what was saved there before is as it was") from err
    finally:
        partial.unlink(missing_ok=True)


def _tensors(entries: Entries) -> dict[str, torch.Tensor]:
    """All whole chunks and the one that is being filled, side by side."""
    last = len(entries.pieces) - 1
    ends = [piece.hi + (at == last and entries.tail > 0) for at, piece in enumerate(entries.pieces)]
    found = {"lengths": _joined([p.segment.lengths[p.lo : p.hi] for p in entries.pieces], 0)}
    for layer in entries.shape.layers if entries.pieces else ():
        index = layer.index
        for name in ("keys", "values"):
            held = [getattr(p.segment, name)[index][:, p.lo : end] for p, end in zip(entries.pieces, ends)]
            found[f"{name}.{index}"] = _joined(held, 1)
            if entries.tail:
                found[f"{name}.{index}"][:, -1, entries.tail :] = 0
        found[f"means.{index}"] = _joined([p.segment.means[index][:, p.lo : p.hi] for p in entries.pieces], 1)
    return found


def _joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(tensors, dim).contiguous() if tensors else torch.zeros(0, dtype=torch.int64)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def _sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


# ---------------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Content:
    """What :func:`write` wrote to ``path``.

    Raises:
        BankError: if there is none, or it is damaged, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(NAME)
            if text is None:
                raise BankError(f"{path} is not a bank: it has no header of one")
            header = json.loads(text)
            if header["version"] != VERSION:
                raise BankError(f"{path} was written in format {header['version']}; this kvsieve reads format {VERSION}")
            tensors = {key: file.get_tensor(key) for key in header["checksums"]}
        return _content(header, tensors)
    except BankError:
        raise
    except FileNotFoundError:
        raise BankError(f"there is no bank at {path}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, IndexError) as err:
        raise BankError(f"{path} is damaged, or not a bank ({type(err).__name__}: {err})") from err


def _content(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Content:
    wrong = [key for key, tensor in tensors.items() if _checksum(tensor) != header["checksums"][key]]
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])} are not what was written")
    layers = tuple(BankLayer(index, heads, k, v, getattr(torch, dtype)) for index, heads, k, v, dtype in header["layers"])
    shape = Shape(layers, header["chunk"], header["capacity"])
    namespaces = {}
    for at, row in enumerate(header["namespaces"]):
        mine = {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{at}/")}
        name = row.pop("name")
        namespaces[name] = _entries(shape, row, mine)
    return shape, header["identity"], namespaces


def _entries(shape: Shape, row: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Entries:
    lengths, pieces = tensors["lengths"], []
    count = len(lengths)
    for lo in range(0, count + (row["tail"] > 0), shape.most_chunks):
        whole = max(min(lo + shape.most_chunks, count) - lo, 0)
        size = min(shape.most_chunks, count + (row["tail"] > 0) - lo)
        segment = Segment(shape, size)
        segment.used = whole * shape.chunk
        segment.lengths[:whole] = lengths[lo : lo + whole]
        for index in segment.keys:
            segment.keys[index][:] = tensors[f"keys.{index}"][:, lo : lo + size]
            segment.values[index][:] = tensors[f"values.{index}"][:, lo : lo + size]
            segment.means[index][:, :whole] = tensors[f"means.{index}"][:, lo : lo + whole]
        pieces.append(Piece(segment, 0, whole))
    if pieces:
        pieces[-1].segment.used += row["tail"]
    return Entries(shape, tuple(pieces), **row)
