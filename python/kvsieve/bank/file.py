"""A bank on disk: tensors and a JSON header (:mod:`kvsieve.files.tensor_file`). Nothing is pickled, nothing is executed on load.

A file is written beside the old one, to the disk itself, and then takes its place: whoever reads sees one or the other, whole, and
every byte is compared with its digest. One process at a time may write a bank: it holds a lock on ``<path>.lock`` while it does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvsieve.bank.entries import BankLayer, Entries, Piece, Segment, Shape
from kvsieve.errors import BankError, SaveError, SessionError, SessionNotFoundError, UnsupportedError
from kvsieve.files.tensor_file import Kind, TensorFile, opened
from kvsieve.files.tensor_file import write as write_file

__all__ = ["Content", "lock", "read", "unlock", "write"]

KIND = Kind("kvsieve_bank", "bank", 2)

Content = tuple[Shape, dict[str, Any], dict[str, Entries]]
"""A bank's shape, what it says of the model that wrote it, and the entries of its namespaces."""


# ------------------------------------------------------------------------------------------------------------------------- lock


def lock(path: Path) -> int:
    """A file descriptor that holds the lock of the bank at ``path``; the file itself need not be there yet.

    Raises:
        BankError: if another bank, of this process or another one, holds it, there is a folder, or where it lies cannot be written.
        UnsupportedError: on systems without POSIX locks.
    """
    try:
        import fcntl
    except ImportError:
        raise UnsupportedError(
            "this system has no POSIX locks, so no bank can be written to a file; open it with read_only=True"
        ) from None
    if os.path.isdir(path):
        raise BankError(f"cannot write a bank at {path}: that is a folder")
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
    shape, identity, namespaces = content
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for at, (name, entries) in enumerate(namespaces.items()):
        told = ("tail", "written", "dropped", "chunks_dropped", "ragged")
        rows.append({"name": name, **{key: getattr(entries, key) for key in told}})
        tensors.update({f"{at}/{key}": tensor for key, tensor in _tensors(entries).items()})
    header = {
        "identity": identity,
        "chunk": shape.chunk,
        "capacity": shape.capacity,
        "layers": [[x.index, x.num_kv_heads, x.key_dim, x.value_dim, str(x.dtype).removeprefix("torch.")] for x in shape.layers],
        "namespaces": rows,
    }
    try:
        write_file(path, KIND, header, tensors)
    except SaveError as err:
        raise BankError(str(err)) from err


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


# ---------------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Content:
    """What :func:`write` wrote to ``path``.

    Raises:
        BankError: if there is none, or it is damaged, or of another format.
    """
    try:
        with opened(path, KIND) as file:
            try:
                content = _content(file)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as err:
                raise file.error(f"{type(err).__name__}: {err}") from err
            file.check_unchanged()
            return content
    except SessionNotFoundError:
        raise BankError(f"there is no bank at {path}") from None
    except SessionError as err:
        raise BankError(str(err)) from err


def _content(file: TensorFile) -> Content:
    header = file.header
    layers = tuple(BankLayer(index, heads, k, v, _dtype(dtype)) for index, heads, k, v, dtype in header["layers"])
    for layer in layers:
        _check_counts((layer.index, 0), (layer.num_kv_heads, 1), (layer.key_dim, 1), (layer.value_dim, 1))
    _check_counts((header["chunk"], 1), (header["capacity"], 1))
    shape = Shape(layers, header["chunk"], header["capacity"])
    if len({layer.index for layer in layers}) != len(layers) or not isinstance(header["identity"], dict):
        raise ValueError("layers or identity")
    namespaces: dict[str, Entries] = {}
    left = set(file.names)
    for at, told in enumerate(header["namespaces"]):
        row = dict(told)
        mine = {name.partition("/")[2]: file.tensor(name) for name in file.names if name.startswith(f"{at}/")}
        name = row.pop("name")
        if not isinstance(name, str) or name in namespaces:
            raise ValueError(f"namespace {name!r}")
        namespaces[name] = _entries(shape, row, mine)
        left -= {f"{at}/{key}" for key in mine}
    if left:
        raise ValueError(f"tensors that belong to nothing: {sorted(left)[:3]}")
    return shape, header["identity"], namespaces


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {name}")
    return found


def _check_counts(*counts: tuple[Any, int]) -> None:
    for value, least in counts:
        if type(value) is not int or not least <= value < 1 << 40:
            raise ValueError(f"{value!r} is no count of at least {least}")


def _entries(shape: Shape, row: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Entries:
    lengths, pieces = tensors["lengths"], []
    count, tail = len(lengths), row["tail"]
    _check_counts(*((row[key], 0) for key in ("tail", "written", "dropped", "chunks_dropped")))
    if type(row["ragged"]) is not bool or len(row) != 5 or tail >= shape.chunk:
        raise ValueError("what a namespace says of itself")
    inside = lengths.dtype == torch.int64 and lengths.dim() == 1 and bool(((lengths > 0) & (lengths <= shape.chunk)).all())
    if not inside or int(lengths.sum()) + tail + row["dropped"] != row["written"]:
        raise ValueError(f"{row['written']} tokens written")
    size = count + (tail > 0)
    expected = {"lengths"}
    for layer in shape.layers if size else ():
        heads, index = layer.num_kv_heads, layer.index
        wanted = {
            f"keys.{index}": (layer.dtype, (heads, size, shape.chunk, layer.key_dim)),
            f"values.{index}": (layer.dtype, (heads, size, shape.chunk, layer.value_dim)),
            f"means.{index}": (torch.float32, (heads, count, layer.key_dim)),
        }
        wrong = [key for key, like in wanted.items() if (tensors[key].dtype, tuple(tensors[key].shape)) != like]
        if wrong:
            raise ValueError(f"{wrong[0]} does not fit")
        if tail and any(tensors[f"{name}.{index}"][:, -1, tail:].any() for name in ("keys", "values")):
            raise ValueError("tokens behind the last one")
        expected |= set(wanted)
    if set(tensors) != expected:
        raise ValueError("tensors of a namespace")
    for lo in range(0, size, shape.most_chunks):
        pieces.append(_piece(shape, lo, min(lo + shape.most_chunks, size), tensors))
    if pieces:
        pieces[-1].segment.used += tail
    return Entries(shape, tuple(pieces), **row)


def _piece(shape: Shape, lo: int, hi: int, tensors: Mapping[str, torch.Tensor]) -> Piece:
    """The chunks ``lo`` to ``hi - 1``, of which the last one may not be whole."""
    segment, lengths = Segment(shape, hi - lo), tensors["lengths"][lo:hi]
    whole = len(lengths)
    segment.used = whole * shape.chunk
    segment.lengths[:whole] = lengths
    for index in segment.keys:
        segment.keys[index][:] = tensors[f"keys.{index}"][:, lo:hi]
        segment.values[index][:] = tensors[f"values.{index}"][:, lo:hi]
        segment.means[index][:, :whole] = tensors[f"means.{index}"][:, lo : lo + whole]
    return Piece(segment, 0, whole)
