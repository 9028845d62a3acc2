"""A bank's file, its lock and its book, without a model: what is written is read; a bank has one writer, and one model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import torch
from bank_cases import content, held, shape_of, tokens
from kvsieve.backends import recall
from kvsieve.bank import file
from kvsieve.bank.book import Book, Terms
from kvsieve.errors import BankError, CacheMismatchError, PolicyError, StateError

# -------------------------------------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path, saved = tmp_path / "a.bank", content(dtype)
    file.write(path, saved)
    shape, identity, namespaces = file.read(path)
    assert (shape, identity, list(namespaces)) == (saved[0], saved[1], ["a", "b", "c"])
    for name, got in namespaces.items():
        want = saved[2][name]
        for key in ("tail", "written", "dropped", "chunks_dropped", "ragged", "num_chunks", "num_tokens"):
            assert getattr(got, key) == getattr(want, key)
        if want.num_chunks:
            every = torch.arange(want.num_chunks).expand(1, 1, -1)
            for layer in (0, 3):
                for a, b in zip(recall.gather(got, layer, every), recall.gather(want, layer, every)):
                    assert a is not None
                    assert b is not None
                    assert torch.equal(a.nan_to_num(), b.nan_to_num())
        more = [e.append(*tokens(saved[0], want.written, 9)) for e in (got, want)]
        if dtype == torch.float32:
            assert held(more[0]) == held(more[1])
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "kvsieve.files.tensor_file._write_tensor"])
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "a.bank"
    file.write(path, content())
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(BankError, match="No space left") as caught:
            file.write(path, content())
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.bank"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    file.write(path, content())
    whole = path.read_bytes()
    for cut in (0, 4, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BankError):
            file.read(path)
    for at in (len(whole) - 3, len(whole) - 900):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        with pytest.raises(BankError, match="damaged"):
            file.read(path)
    path.write_bytes(whole)
    assert file.read(path)[1] == {"weights": "abc"}
    with pytest.raises(BankError, match="there is no bank"):
        file.read(tmp_path / "other.bank")
    with pytest.raises(BankError):
        file.read(tmp_path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.bank"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(BankError, match="no kvsieve_bank header"):
        file.read(path)
    save_file({"x": torch.zeros(2)}, path, metadata={file.KIND.key: json.dumps({"version": 99})})
    with pytest.raises(BankError, match="format 99"):
        file.read(path)
    save_file({"x": torch.zeros(2)}, path, metadata={file.KIND.key: json.dumps({"version": file.KIND.version})})
    with pytest.raises(BankError, match="damaged"):
        file.read(path)


# ------------------------------------------------------------------------------------------------------------------ one writer


def test_a_bank_has_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    file.write(path, content())
    with kvsieve.MemoryBank.load(path) as bank:
        assert bank.book.names == ["a", "b"]
        with pytest.raises(BankError, match="one writer"):
            kvsieve.MemoryBank.load(path)
        readers = [kvsieve.MemoryBank.load(path, read_only=True) for _ in range(2)]
        assert all(reader.stats() == bank.stats() for reader in readers)
    with kvsieve.MemoryBank.load(path), pytest.raises(StateError, match="closed"):
        bank.stats()


def test_another_process_that_writes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    file.write(path, content())
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", program, f"{path}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BankError, match="one writer"):
            kvsieve.MemoryBank.load(path)
        assert kvsieve.MemoryBank.load(path, read_only=True).stats().tokens > 0
        other.communicate("")
    with kvsieve.MemoryBank.load(path):
        told = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert "BlockingIOError" in told.stderr


def test_a_reader_sees_the_old_bank_until_the_writer_in_another_process_has_written(tmp_path: Path) -> None:
    """A second writer is refused in either process; who reads meanwhile gets the old file, whole."""
    path = tmp_path / "a.bank"
    file.write(path, content())
    program = (
        "import sys, kvsieve\n"
        "bank = kvsieve.MemoryBank.load(sys.argv[1])\n"
        "bank.forget('a')\n"
        "print('changed', flush=True)\n"
        "sys.stdin.readline()\n"
        "bank.save()\n"
        "print('saved', flush=True)\n"
        "sys.stdin.read()\n"
        "bank.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "changed\n"
        with pytest.raises(BankError, match="one writer"):
            kvsieve.MemoryBank.load(path)
        old = kvsieve.MemoryBank.load(path, read_only=True)
        assert old.book.names == ["a", "b"]
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "saved\n"
        assert old.book.names == ["a", "b"], "what was read is a value"
        assert kvsieve.MemoryBank.load(path, read_only=True).book.names == ["b"]
        other.communicate("")
    assert other.returncode == 0
    with kvsieve.MemoryBank.load(path) as mine:
        assert mine.book.names == ["b"]


def test_a_bank_that_is_dropped_gives_its_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    kvsieve.MemoryBank(path).open()
    with kvsieve.MemoryBank(path) as bank:
        bank.save()
    assert not path.exists(), "a bank without a model has nothing to write"


def test_a_failed_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (shape, _, namespaces) = tmp_path / "a.bank", content()
    bank = kvsieve.MemoryBank(path, chunk=4, capacity=64)
    bank.book.bind(shape.layers, {"weights": "abc"})
    bank.book.put("a", namespaces["a"])
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(BankError, match="No space"):
            bank.close()
    assert not path.exists()
    bank.close()
    bank.close()
    loaded = kvsieve.MemoryBank.load(path, read_only=True)
    assert loaded.stats().namespaces["a"].written == 97
    with pytest.raises(StateError, match="read-only"):
        loaded.save()
    with pytest.raises(StateError, match="read-only"):
        loaded.forget("a")


# -------------------------------------------------------------------------------------------------------------------------- book


def book(**changes: Any) -> Book:
    return Book(Terms(**{"path": None, "capacity": 64, "chunk": 4, "layers": None, "read_only": False, **changes}))


def test_a_bank_belongs_to_one_model() -> None:
    layers = shape_of().layers
    held = book()
    held.bind(layers, {"weights": "abc", "model class": "X"})
    held.bind(layers, {"weights": "abc"})
    held.know({"tokenizer": "t"})
    for wrong in ({"weights": "other"}, {"tokenizer": "u"}):
        with pytest.raises(CacheMismatchError, match=f"other {next(iter(wrong))}"):
            held.bind(layers, wrong)
    with pytest.raises(CacheMismatchError, match="the bank holds"):
        held.bind(layers[:1], {})
    with pytest.raises(CacheMismatchError, match="the bank holds"):
        held.bind(shape_of(dtype=torch.bfloat16).layers, {})
    with pytest.raises(PolicyError, match=r"layers \[7\] are no full-attention layers"):
        book(layers=(0, 7)).bind(layers, {})
    assert book(layers=(3,)).bind(layers, {}).layers == layers[1:]


def test_a_file_says_what_its_bank_is(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    file.write(path, content())
    for wrong, said in (({"chunk": 8}, "chunk=4"), ({"chunk": 4, "layers": [1]}, r"layers=\(0, 3\)")):
        with pytest.raises(PolicyError, match=said):
            kvsieve.MemoryBank(path, read_only=True, **wrong).open()
    smaller = kvsieve.MemoryBank.load(path, read_only=True, capacity=32)
    assert 28 <= smaller.stats().namespaces["a"].tokens <= 32
    assert held(smaller.book.entries("a")) == held(content()[2]["a"])[-len(held(smaller.book.entries("a"))) :]


def test_a_namespace_has_one_writer() -> None:
    class Writer:
        pass

    held, one, other = book(), Writer(), Writer()
    held.lead(["a", "b"], one)
    held.lead(["a"], one)
    with pytest.raises(StateError, match="namespace 'b'"):
        held.lead(["c", "b"], other)
    held.lead(["c"], other)
    held.leave(one)
    held.lead(["b"], other)
    del other
    held.lead(["b", "c"], one)
