"""A bank without a model: what its values hold, what is found, its file, its lock, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import torch
from drive import Layer
from kvsieve.backends import recall
from kvsieve.backends.attention import attend
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.bank import entries as entries_module
from kvsieve.bank import file
from kvsieve.bank.book import Book, Terms
from kvsieve.bank.entries import BankLayer, Entries, Shape
from kvsieve.errors import BackendError, BankError, CacheMismatchError, PolicyError, StateError
from kvsieve.facts import LayerRope
from kvsieve.methods.parser import parse
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def shape_of(chunk: int = 4, capacity: int = 64, heads: int = 1, dim: int = 2, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape((BankLayer(0, heads, dim, dim, dtype), BankLayer(3, heads, dim, dim + 1, dtype)), chunk, capacity)


def tokens(shape: Shape, first: int, count: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Keys and values of which each says the number of its token, its layer and its head."""
    found: list[dict[int, torch.Tensor]] = []
    for side in (1, -1):
        dims = {x.index: x.key_dim if side == 1 else x.value_dim for x in shape.layers}
        at = torch.arange(first, first + count).float()[None, :, None]
        heads = torch.arange(shape.layers[0].num_kv_heads)[:, None, None] / 8
        found.append({i: (side * (at + heads) + i / 64).expand(-1, -1, d).to(shape.layers[0].dtype) for i, d in dims.items()})
    return found[0], found[1]


def with_keys(keys: list[tuple[float, float]], chunk: int) -> Entries:
    shape = Shape((BankLayer(0, 1, 2, 2, torch.float32),), chunk, 64)
    both = {0: torch.tensor(keys)[None]}
    return Entries(shape).append(both, both)


def held(entries: Entries) -> list[list[int]]:
    """The tokens of every whole chunk, by what their keys say; layers, values and means are compared."""
    count, chunk = entries.num_chunks, entries.shape.chunk
    if not count:
        return []
    found = []
    for layer in entries.shape.layers:
        every = torch.arange(count).expand(layer.num_kv_heads, 1, count)
        k, v, seen = recall.gather(entries, layer.index, every)
        seen = torch.ones(k.shape[:3], dtype=torch.bool) if seen is None else seen
        numbers = (k[0, 0, :, 0] - layer.index / 64).view(count, chunk)
        real = seen[0, 0].view(count, chunk)
        found.append([[round(float(x)) for x, there in zip(*row) if there] for row in zip(numbers, real)])
        assert torch.equal(v[0, 0, :, -1][seen[0, 0]], (layer.index / 64 * 2 - k[0, 0, :, 0])[seen[0, 0]])
        means = torch.cat([p.segment.means[layer.index][:, p.lo : p.hi] for p in entries.pieces], 1)
        want = torch.stack([k[0, 0].view(count, chunk, -1)[at][real[at]].float().mean(0) for at in range(count)])
        torch.testing.assert_close(means[0], want)
    assert found[0] == found[1]
    return found[0]


# ---------------------------------------------------------------------------------------------------------------- worked numbers


def test_the_worked_merge() -> None:
    """Own keys (1, 0), (0, 1) with values the same, found ones (1, 1), (-1, 0) with values (2, 2), (5, -1)."""
    q, scale = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64), 2**-0.5
    own_k, found_k = torch.eye(2).double()[None], torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]).double()
    found_v = torch.tensor([[[2.0, 2.0], [5.0, -1.0]]]).double()
    seen = torch.ones(1, 2, dtype=torch.bool)
    own, found = attend(q, own_k, own_k, seen, scale), attend(q, found_k, found_v, seen, scale)
    assert own[0].flatten().tolist() == pytest.approx([0.5875, 0.4125], abs=1e-4)
    assert found[0].flatten().tolist() == pytest.approx([2.4375, 1.5625], abs=1e-4)
    assert float(torch.sigmoid(found[1] - own[1])) == pytest.approx(0.4948, abs=1e-4)
    got = recall.joined(own[0].transpose(0, 1), own[1], found, 0.0)
    assert got.flatten().tolist() == pytest.approx([1.5029, 0.9816], abs=1e-4)
    both = attend(q, torch.cat([own_k, found_k], 1), torch.cat([own_k, found_v], 1), torch.ones(1, 4, dtype=torch.bool), scale)
    torch.testing.assert_close(got[:, 0], both[0][0])
    assert torch.equal(recall.joined(own[0].transpose(0, 1), own[1], found, -torch.inf)[0], own[0][0])
    # A bias that makes the gate one half is the published mean of two softmaxes.
    half = recall.joined(own[0].transpose(0, 1), own[1], found, float(own[1] - found[1]))
    assert half.flatten().tolist() == pytest.approx([1.5125, 0.9875], abs=1e-4)


def test_the_worked_retrieval() -> None:
    keys = [(1.0, 0.0), (0.0, 1.0), (2.0, 0.0), (2.0, 2.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 3.0), (1.0, 1.0)]
    entries = with_keys(keys, 2)
    segment = entries.pieces[0].segment
    assert segment.means[0][0, :4].tolist() == [[0.5, 0.5], [2.0, 1.0], [-0.5, -0.5], [0.5, 2.0]]
    assert recall.choose(entries, 0, torch.tensor([[[1.0, 0.2]]]), 2).tolist() == [[[1, 3]]]
    k, _, seen = recall.gather(entries, 0, torch.tensor([[[1, 3]]]))
    assert k[0, 0].tolist() == [list(keys[at]) for at in (2, 3, 6, 7)]
    assert seen is None


def test_of_equal_chunks_the_newer_ones_are_found() -> None:
    entries = with_keys([(1.0, 0.0), (5.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)], 1)
    for count, want in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        assert recall.choose(entries, 0, torch.tensor([[[1.0, 0.0]]]), count).tolist() == [[want]]


# ------------------------------------------------------------------------------------------------------------------------ values


def test_an_unfinished_chunk_cannot_be_found_until_it_is_flushed() -> None:
    shape = shape_of()
    entries = Entries(shape).append(*tokens(shape, 0, 6))
    assert (held(entries), entries.tail, entries.num_tokens) == ([[0, 1, 2, 3]], 2, 6)
    flushed = entries.flush()
    assert held(flushed) == [[0, 1, 2, 3], [4, 5]]
    assert held(entries) == [[0, 1, 2, 3]]
    assert held(flushed.append(*tokens(shape, 6, 5))) == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert flushed.flush() is flushed


def test_means_do_not_change_by_what_is_written_later() -> None:
    shape = shape_of(chunk=2)
    entries = Entries(shape).append(*tokens(shape, 0, 3))
    before = entries.pieces[0].segment.means[0][:, :1].clone()
    later = entries.append(*tokens(shape, 3, 40))
    assert torch.equal(later.pieces[0].segment.means[0][:, :1], before)
    assert torch.equal(entries.pieces[0].segment.means[0][:, :1], before)


def test_the_capacity_is_reached_and_never_exceeded() -> None:
    shape, most = shape_of(chunk=4, capacity=32), 0
    entries = Entries(shape)
    for at in range(150):
        entries = entries.append(*tokens(shape, at, 1))
        assert entries.num_tokens <= 32
        most = max(most, entries.num_tokens)
        # Numbers stay: the oldest token held is the one that `dropped` says.
        first = held(entries)[0][0] if entries.num_chunks else 0
        assert first == entries.dropped == 4 * entries.chunks_dropped
        assert sum(segment.size * 4 for segment in entries.segments()) <= 32 + 3 * shape.most_chunks * 4
    assert most == 32
    assert Entries(shape).append(*tokens(shape, 0, 150)).num_tokens == 30
    assert held(Entries(shape).append(*tokens(shape, 0, 150))) == held(entries)


@pytest.mark.parametrize("seed", range(3))
def test_values_go_on_from_anywhere_without_changing_each_other(seed: int) -> None:
    """Against lists of tokens: what is appended to, flushed, or gone on from twice holds what it should, and so do all others."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    chunk, capacity = ((1, 24), (3, 36), (4, 400))[seed % 3]
    shape = shape_of(chunk, capacity, heads=2)
    values: list[tuple[Entries, list[list[int]], list[int]]] = [(Entries(shape), [], [])]
    for _ in range(40):
        entries, chunks, tail = values[-1 if draw(3) else draw(len(values))]
        chunks, tail = [list(c) for c in chunks], list(tail)
        if draw(5):
            count = 1 + draw(3 if draw(2) else 60)
            entries = entries.append(*tokens(shape, entries.written, count))
            for number in range(entries.written - count, entries.written):
                tail.append(number)
                if len(tail) == chunk:
                    chunks.append(tail)
                    tail = []
                while sum(map(len, chunks)) + len(tail) > capacity:
                    chunks.pop(0)
        else:
            entries = entries.flush()
            chunks, tail = ([*chunks, tail], []) if tail else (chunks, tail)
        values.append((entries, chunks, tail))
        for found, want, rest in values[-4:]:
            assert (held(found), found.tail) == (want, len(rest))
            assert found.num_tokens == sum(map(len, want)) + len(rest)
    for found, want, _ in values:
        assert held(found) == want


def test_a_value_that_goes_on_beside_another_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(chunk=2, capacity=4096)
    entries = Entries(shape).append(*tokens(shape, 0, 401))
    made: list[int] = []
    init = entries_module.Segment.__init__
    monkeypatch.setattr(entries_module.Segment, "__init__", lambda self, s, size: (made.append(size), init(self, s, size))[1])
    one, other = (entries.append(*tokens(shape, 401, 1)) for _ in range(2))
    assert made == [entries_module.FIRST]
    assert held(one) == held(other)


# --------------------------------------------------------------------------------------------------------------------- attention


def random_entries(generator: torch.Generator, heads: int, count: int, chunk: int, dim: int = 8) -> Entries:
    shape = Shape((BankLayer(0, heads, dim, dim, torch.float32),), chunk, 4096)
    k, v = (torch.randn(heads, count, dim, generator=generator) for _ in range(2))
    return Entries(shape).append({0: k}, {0: v})


def test_chunks_of_one_token_are_exact_nearest_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = random_entries(generator, 2, 300, 1)
    q = torch.randn(4, 1, 8, generator=generator)
    out, lse = recall.recall(q, entries, 0, 7, 10, AttendCall(0.5))
    k, v = (x[0] for x in (entries.pieces[0].segment.keys, entries.pieces[0].segment.values))
    for head in range(4):
        keys, values = k[head // 2, :300, 0], v[head // 2, :300, 0]
        best = (keys @ q[head // 2 * 2 : head // 2 * 2 + 2, 0].sum(0)).topk(10).indices
        logits = keys[best] @ q[head, 0] * 0.5
        torch.testing.assert_close(out[head, 0], logits.softmax(0) @ values[best])
        torch.testing.assert_close(lse[head, 0], logits.logsumexp(0))


@pytest.mark.parametrize(("first", "m"), [(0, 1), (5, 3), (0, 16), (13, 40), (16, 33)])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_queries_of_a_prompt_share_what_the_mean_of_their_block_finds(first: int, m: int, flush: bool, per_head: bool) -> None:
    generator = torch.Generator().manual_seed(first + m)
    entries = random_entries(generator, 2, 50, 4)
    if flush:
        extra = {0: torch.randn(2, 6, 8, generator=generator)}
        entries = entries.flush().append(extra, extra)
    q = torch.randn(4, m, 8, generator=generator)
    out, lse = recall.recall(q, entries, 0, first, 3, AttendCall(0.4, 5.0), per_head)
    every = torch.arange(entries.num_chunks).expand(2, 1, -1)
    k, v, seen = recall.gather(entries, 0, every)
    seen = torch.ones(k.shape[:3], dtype=torch.bool) if seen is None else seen
    means = torch.cat([p.segment.means[0][:, p.lo : p.hi] for p in entries.pieces], 1)
    for i in range(m):
        mine = [j for j in range(m) if (first + j) // recall.QUERIES == (first + i) // recall.QUERIES] if m > 1 else [0]
        for head in range(4):
            asks = q[:, mine].mean(1).view(2, 2, 8).sum(1)
            scores = (means @ asks[..., None])[..., 0]
            best = (scores[head // 2] if per_head else scores.sum(0)).topk(3).indices
            slots = torch.cat([torch.arange(int(c) * 4, int(c) * 4 + 4) for c in best])
            slots = slots[seen[head // 2, 0, slots]]
            logits = 5.0 * torch.tanh(k[head // 2, 0, slots] @ q[head, i] * 0.4 / 5.0)
            torch.testing.assert_close(lse[head, i], logits.logsumexp(0))
            torch.testing.assert_close(out[head, i], logits.softmax(0) @ v[head // 2, 0, slots])


def test_where_fewer_chunks_are_held_only_these_are_read() -> None:
    """Every value is one, so the output is one: probabilities of tokens that are there add up to it."""
    shape = Shape((BankLayer(0, 1, 4, 2, torch.float32),), 4, 64)
    entries = Entries(shape).append({0: torch.randn(1, 7, 4)}, {0: torch.ones(1, 7, 2)}).flush()
    out, _ = recall.recall(torch.randn(2, 5, 4), entries, 0, 0, 16, AttendCall(1.0))
    torch.testing.assert_close(out, torch.ones(2, 5, 2))


def test_chunks_are_read_alike_one_by_one_and_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = Shape((BankLayer(0, 3, 8, 8, torch.float32),), 4, 512)
    entries = Entries(shape)
    for count in (301, 77, 200):
        both = {0: torch.randn(3, count, 8, generator=generator)}
        entries = entries.append(both, both).flush()
    assert len(entries.pieces) > 4
    chunks = torch.randint(entries.num_chunks, (3, 2, 5), generator=generator)
    found = []
    for few in (64, 0):
        monkeypatch.setattr(recall, "FEW", few)
        found.append(recall.gather(entries, 0, chunks))
    for one, other in zip(*found):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_keys_are_seen_at_one_distance(factor: float) -> None:
    rope = LayerRope(torch.tensor([1.0, 0.1], dtype=torch.float64), "half", factor)
    q, k = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)
    want = rope.rotate(q, torch.tensor([90])) @ rope.rotate(k, torch.tensor([67])).transpose(1, 2)
    torch.testing.assert_close(rope.turn(q, recall.table_of(rope, 23, torch.float64)) @ k.transpose(1, 2), want)


@BACKEND
@pytest.mark.parametrize("policy", ["full()", "streamingllm(48, sinks=2)", "streamingllm(24, sinks=2) >> full()"])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_attention_tells_its_log_sum_exp(width: int, policy: str, backend: str) -> None:
    """The output is that of `run`, bit for bit, and so is what it stores."""
    generator = torch.Generator().manual_seed(width)
    heads, kv_heads, dim, old = 4, 2, 8, 90
    q, k, v = (torch.randn(3, h, old + width, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    sinks = torch.randn(heads, generator=generator) if width != 3 else None
    lens = [width, 0, 1]
    outs = []
    for asks in (False, True):
        layer = Layer(backend, parse(policy), scale=0.4, softcap=None if width == 1 else 4.0, sinks=sinks)
        layer.feed(q[:, :, :old], k[:, :, :old], v[:, :, :old])
        step = layer.planner.begin(lens, width, True, layer.backend.capabilities.needs_parts)
        run = layer.store.run_with_lse if asks else layer.store.run
        outs.append(run(q[:, :, old:], k[:, :, old:], v[:, :, old:], step, layer.call))
        layer.planner.commit()
        outs.append(layer.store.read(layer.planner.runs(0, 0)))
    (want, stored, (out, lse), stored_too) = outs
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(stored, stored_too))
    assert lse.shape == (3, heads, width)
    assert lse[1].isneginf().all()
    assert lse[2, :, : width - 1].isneginf().all()
    if policy == "full()":
        for row in (0, 2):
            for i in range(width - lens[row], width):
                keys = torch.cat([k[row, :, :old], k[row, :, old + width - lens[row] : old + i + 1]], 1).repeat_interleave(2, 0)
                logits = torch.einsum("hd,hnd->hn", q[row, :, old + i], keys) * 0.4
                logits = logits if width == 1 else 4.0 * torch.tanh(logits / 4.0)
                logits = logits if sinks is None else torch.cat([logits, sinks[:, None]], 1)
                torch.testing.assert_close(lse[row, :, i], logits.logsumexp(1), atol=1e-5, rtol=1e-5)


def test_a_backend_that_cannot_says_so() -> None:
    with pytest.raises(BackendError, match="MemoryBank"):
        replace(CUDA, tells_lse=False).check_lse()


# -------------------------------------------------------------------------------------------------------------------------- file


def content(dtype: torch.dtype = torch.float32) -> file.Content:
    shape = shape_of(chunk=4, capacity=64, dtype=dtype)
    ragged = Entries(shape).append(*tokens(shape, 0, 90)).flush().append(*tokens(shape, 90, 7))
    return shape, {"weights": "abc"}, {"a": ragged, "b": Entries(shape).append(*tokens(shape, 0, 3)), "c": Entries(shape)}


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


# ----------------------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": 3}, "path must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"chunk": 3}, "capacity must be a multiple of chunk=3"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_k": 20}, "top_k must be a multiple"),
        ({"capacity": 100}, "capacity must be a multiple"),
        ({"capacity": "1MiB"}, "capacity must be"),
        ({"layers": []}, "layers must name"),
        ({"layers": [1, 1]}, "layers must name"),
        ({"layers": [-1]}, "layers must be"),
        ({"bias": float("nan")}, "bias must be"),
        ({"per_head": 1}, "per_head must be"),
        ({"bias": float("inf")}, "bias must be"),
        ({"bias": "high"}, "bias must be"),
        ({"read_only": 1}, "read_only must be"),
        ({"distance": -1}, "distance must be"),
        ({"namespace": ""}, "a namespace is"),
        ({"namespace": ["a", "a"]}, "a namespace is"),
        ({"namespace": 7}, "a namespace is"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.MemoryBank(**arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memorybank()", "the end of a chain"),
        ("memorybank() >> full()", "the end of a chain"),
        ("memorybank() | full()", "the end of a chain"),
        ("streamingllm(64) | memorybank()", "the end of a chain"),
        ("streamingllm(64) >> memorybank() >> full()", "ends with a bank"),
        ("streamingllm(64) >> memorybank() >> memorybank()", "ends with a bank"),
        ("streamingllm(64) >> memorybank() | quantized(8)", "a bank is the end of a chain"),
        ("full() >> memorybank()", "give the bank a distance"),
        ("lminfinite(64, middle_top_k=8) >> memorybank(distance=9)", "read a selection"),
        ("hip(64) >> memorybank(distance=9)", "read a selection"),
        ("(sirllm(160) | hip(32)) >> memorybank()", "read a selection"),
        ("snapkv(64) >> memorybank()", "keeps other tokens for each head"),
        ("(streamingllm(64) | quantized(8)) >> memorybank()", "compresses its tokens"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_it_is_built(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "StreamingLLM(budget=64, sinks=4) >> MemoryBank()",
        "StreamingLLM(budget=64, sinks=4) >> SirLLM(budget=64, sinks=0, recent=0) >> MemoryBank(chunk=4, top_k=8)",
        "Full() >> MemoryBank(read_only=True, bias=-1e999, distance=9, namespace='a')",
        "StreamingLLM(budget=64, sinks=4) >> MemoryBank(top_k=256, bias=2.0, per_head=False)",
        "SirLLM(budget=64, sinks=4) >> MemoryBank(path='x.bank', capacity=32, layers=(1, 2), bias=-0.5, namespace=['a', 'b'])",
    ],
)
def test_a_text_of_it_is_read_back(text: str) -> None:
    policy = parse(text)
    assert repr(policy) == text
    assert repr(parse(repr(policy))) == text
    assert (policy.stored_keys, policy.moves) == ("pre_rope", True)


@pytest.mark.parametrize(
    ("text", "distance"),
    [
        ("streamingllm(64, sinks=4)", 63),
        ("streamingllm('6KiB')", 63),
        ("lminfinite(40, sinks=8)", 40),
        ("sirllm(48)", 47),
        ("streamingllm(24) >> sirllm(16, sinks=0, recent=0)", 39),
    ],
)
def test_a_bank_is_seen_as_far_as_the_oldest_token_before_it(text: str, distance: int) -> None:
    policy: Any = parse(f"{text} >> memorybank()")
    assert policy.distance(32 if "KiB" in text else 1) == distance
    assert parse(f"{text} >> memorybank(distance=5)").distance(1) == 5  # type: ignore[attr-defined]


def test_handles_of_a_bank_are_one_bank() -> None:
    bank = kvsieve.MemoryBank(chunk=4, capacity=64)
    other = bank.namespace(["a", "b"])
    assert (bank.names, other.names, other.chunk) == (("default",), ("a", "b"), 4)
    assert other.book is bank.book
    assert bank != kvsieve.MemoryBank(chunk=4, capacity=64)
    assert (bank.like(bias=-2.0).bias, bank.like(top_k=8).book is bank.book) == (-2.0, True)
    reader = kvsieve.MemoryBank(chunk=4, capacity=64).like(read_only=True)
    assert not reader.book.terms.read_only
    for wrong in ({"chunk": 8}, {"bias": None}, {"top_k": 5}):
        with pytest.raises(PolicyError):
            bank.like(**wrong)
    with pytest.raises(PolicyError, match="read-only"):
        kvsieve.MemoryBank("x", read_only=True).like(read_only=False)
    assert os.fspath(kvsieve.MemoryBank(Path("x")).path or "") == "x"
