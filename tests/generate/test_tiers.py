"""Streams that hold more than their budget of memory: every output is that of the stream that holds all in memory."""

from __future__ import annotations

import os
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, pad_left, same_memory
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.errors import BackendError, BudgetError, PolicyError, StateError, TierError, TierFullError, UnsupportedError
from kvsieve.policy import Memory, Tiered
from kvsieve.runtime.fetching import Fetching
from tier_cases import BLOCK, most_in_memory
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def tiered(disk: Any, blocks: int = 3, base: Any = None, **others: Any) -> Any:
    return (base or kvsieve.Full()) | Memory(storage=Tiered(blocks * BLOCK, str(disk), **others))


def files(folder: Path) -> list[str]:
    """Descriptors of this process that lead to files that were in ``folder``."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            links.append(f"/proc/self/fd/{name}")
    return links


@pytest.mark.slow
@BACKEND
@pytest.mark.parametrize("options", [{}, {"background": True}], ids=["recency", "background"])
def test_a_long_text(backend: str, options: Any, tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 700)
    policy = tiered(tmp_path, **options)
    with kvsieve.stream(model, kvsieve.Full(), backend) as full, kvsieve.stream(model, policy, backend) as stream:
        chunks = [300, 64, 1, 1, 1, 200, 1]
        assert torch.equal(forwards(model, stream.cache, ids, chunks), forwards(model, full.cache, ids, chunks))
        assert same_memory(full, stream)
        for store in stream._engine.stores.values():
            store.finish()  # type: ignore[attr-defined]
        stats = stream.stats().tiers
        assert stats is not None
        assert full.stats().tiers is None
        assert stats.loads > 0
        assert stats.spills > 0
        assert stats.bytes_in_file > 0
        # Three full blocks a layer, and what is not full yet. The reference frees nothing.
        assert most_in_memory(stream) <= 4
        assert backend == "reference" or stats.bytes_in_memory <= 4 * BLOCK < full.stats().bytes_held
        assert stats.file_bytes >= stats.bytes_in_file
        assert stream.stats().as_dict()["tiers"]["loads"] == stats.loads
        assert list(tmp_path.iterdir()) == [], "the file has no name"


@BACKEND
@pytest.mark.parametrize("name", ["hip", "refresh_kv"])
def test_with_a_selection(backend: str, name: str, tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 330)
    base = kvsieve.HiP(64, sinks=4, window=16, dense_layers=1) if name == "hip" else kvsieve.RefreshKV(64, stride=4)
    with kvsieve.stream(model, base, backend) as plain, kvsieve.stream(model, tiered(tmp_path, base=base), backend) as stream:
        assert torch.equal(forwards(model, stream.cache, ids, [300, 1]), forwards(model, plain.cache, ids, [300, 1]))


@BACKEND
def test_rows_crops_marks_and_forks(backend: str, tmp_path: Path) -> None:
    model = tiny.model()
    rows = [tiny.ids(1, n, seed=n)[0] for n in (400, 290)]
    ids, mask = pad_left(rows)
    policies = (kvsieve.Full(), tiered(tmp_path, keep=64))
    streams = [kvsieve.stream(model, policy, backend) for policy in policies]
    more = [tiny.ids(2, 80, seed=seed) for seed in range(4)]

    def same(*calls: Any) -> None:
        results = [[call(stream) for call in calls] for stream in streams]
        for one, other in zip(*results):
            assert one is None or torch.equal(one, other)
        assert same_memory(*streams)

    def read(new: torch.Tensor, chunk: int) -> Any:
        return lambda stream: stream.feed(new, chunk=chunk)

    same(lambda stream: stream.feed(ids, mask, chunk=150))
    marks = [stream.mark() for stream in streams]
    same(read(more[0], 80), lambda stream: stream.cache.crop(-300), read(more[1], 40))
    same(lambda stream: stream.cache.reorder_cache(torch.tensor([1, 1])), read(more[2], 80))
    forks = [stream.fork() for stream in streams]
    same(read(more[3], 80))
    for fork in forks:
        fork.feed(more[0], chunk=16)
    assert same_memory(*forks)
    same(read(more[1], 1))
    for stream, mark in zip(streams, marks):
        stream.rewind(mark)
    same(read(more[2], 80))
    assert same_memory(*forks)
    for stream in streams:
        stream.close()
    assert len(files(tmp_path)) == (backend == "cpu"), "a fork has the file still"
    forks[1].feed(more[1], chunk=40)
    forks[0].feed(more[1], chunk=40)
    assert same_memory(*forks)
    for fork in forks:
        fork.close()
    assert len(files(tmp_path)) == (backend == "cpu"), "and so have marks"
    for held in (marks, streams, forks):
        held.clear()
    del mark, stream, fork
    assert files(tmp_path) == []


@BACKEND
def test_generate_and_beams(backend: str, tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 320)
    for kwargs in ({}, {"num_beams": 3}):
        answers = []
        for policy in (kvsieve.Full(), tiered(tmp_path, keep=10)):
            with kvsieve.stream(model, policy, backend) as stream:
                first = stream.generate(ids, max_new_tokens=6, do_sample=False, **kwargs)
                answers.append((first, stream.generate(tiny.ids(1, 130, 1), max_new_tokens=6, do_sample=False, **kwargs)))
        assert all(torch.equal(a, b) for a, b in zip(*answers))
    with kvsieve.stream(model, tiered(tmp_path), backend) as stream, kvsieve.stream(model, kvsieve.Full(), backend) as full:
        mine, theirs = (greedy(model, ids, 8, past_key_values=one.cache) for one in (stream, full))
        assert torch.equal(mine, theirs)
        stream.reset()
        stats = stream.stats().tiers
        assert stats is not None
        assert (stats.bytes_in_file, stats.loads) == (0, 0)
        assert torch.equal(stream.generate(ids, max_new_tokens=3, do_sample=False)[0, -3:], theirs[0, 320:323])


@BACKEND
def test_documents_that_are_joined(backend: str, tmp_path: Path) -> None:
    model = tiny.model()
    joined = []
    for policy in (kvsieve.Full(), tiered(tmp_path, keep=64)):
        stream = kvsieve.stream(model, policy, backend)
        stream.feed(tiny.ids(1, 70))
        forks = [stream.fork() for _ in range(3)]
        for seed, fork in enumerate(forks):
            fork.feed(tiny.ids(1, 200, seed), chunk=50)
        joined.append(stream.join(forks))
        joined[-1].feed(tiny.ids(1, 90, 9), chunk=30)
    assert same_memory(*joined)


def test_the_newest_tokens_stay(tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiered(tmp_path, blocks=5, keep=150), "cpu") as stream:
        stream.feed(tiny.ids(1, 900), chunk=300)

        def spilled() -> list[bool]:
            planner, store = stream._engine.planner, stream._engine.stores[0]
            return [store._tier.is_spilled(block) for block, _, _ in planner.runs(0, 0)]  # type: ignore[attr-defined]

        # 900 tokens are 14 blocks and 4 tokens: three blocks hold the newest 150 but for those.
        assert spilled()[-4:] == [False] * 4
        assert sum(spilled()) == 9
        stream.cache.crop(-500)
        assert spilled()[-3:] != [False] * 3
        stream.feed(tiny.ids(1, 1))
        assert spilled()[-4:] == [False] * 4


@BACKEND
def test_the_attention_that_blocks_got_is_told_where_they_leave_by_it(backend: str, tmp_path: Path) -> None:
    """Of every lookup of a layer once, all rows together; with what is told of the window it is all there was."""
    base = kvsieve.InfLLM(64, blocks=3, block=32, representatives=2, sinks=8, query_block=64)
    heads, layers = tiny.model().config.num_attention_heads, tiny.model().config.num_hidden_layers
    with kvsieve.stream(tiny.model(), tiered(tmp_path, 5, base, keep=64, order="scores"), backend) as stream:
        stream.feed(torch.cat([tiny.ids(1, 300, seed) for seed in range(2)]))
        told: list[tuple[list[int], list[float]]] = []
        near: list[float] = []
        for store in stream._engine.stores.values():
            watch(store, "score", lambda given, _: told.append(given))
            watch(store, "attend_pieces", lambda _, found: near.append(float(found.scores.sum())))
        stream.feed(tiny.ids(2, 1))
        assert len(told) == layers
        assert len(near) == 2 * layers
        for layer, (blocks, mass) in enumerate(told):
            assert len(set(blocks)) == len(blocks)
            assert set(blocks) == {block for row in range(2) for block in far_blocks(stream, layer, row)}
            assert sum(mass) + sum(near[2 * layer : 2 * layer + 2]) == pytest.approx(2 * heads, abs=1e-4)
            assert min(mass) > 0
    with kvsieve.stream(tiny.model(), tiered(tmp_path, 5, base, keep=64), backend) as stream:
        stream.feed(tiny.ids(1, 300))
        for store in stream._engine.stores.values():
            watch(store, "score", lambda given, _: pytest.fail(f"nobody asked for {given}"))
        stream.feed(tiny.ids(1, 1))


def watch(store: Any, name: str, see: Any) -> None:
    """Have every call of a store's method seen: what it was given, and what it answered."""
    method = getattr(store, name)

    def call(*given: Any) -> Any:
        found = method(*given)
        see(given, found)
        return found

    setattr(store, name, call)


def far_blocks(stream: kvsieve.Stream, layer: int, row: int) -> set[int]:
    """Blocks of the tokens that a row's last query read beyond its window."""
    read = stream._engine.parts.the(Fetching).read[layer][row]
    assert read is not None
    slots = [block for block, lo, hi in stream._engine.planner.runs(0, row) for _ in range(lo, hi)]
    return {slots[token] for piece in read.choice.pieces[1:] for token in range(piece.lo, piece.hi)}


def test_reads_of_all_rows_begin_before_one_of_them_attends(tmp_path: Path) -> None:
    """A single row's own fetch begins them all."""
    base = kvsieve.InfLLM(64, blocks=3, block=32, sinks=8, query_block=64, summary="bounds")
    for rows in (1, 2):
        with kvsieve.stream(tiny.model(), tiered(tmp_path, 5, base, keep=64), "cpu") as stream:
            stream.feed(torch.cat([tiny.ids(1, 600, seed) for seed in range(rows)]))
            events: list[Any] = []
            stores = list(stream._engine.stores.values())
            for store in stores:
                watch(store, "prefetch", lambda given, _, events=events: events.append(set(given[0])))
                for name in ("fetch", "attend_pieces"):
                    watch(store, name, lambda given, _, events=events, name=name: events.append(name))
            stream.feed(tiny.ids(rows, 1))
            read = stream._engine.parts.the(Fetching).read
            for layer in range(len(stores)):
                if rows > 1:
                    runs = {run for row in range(rows) for run in runs_read(stream, read[layer][row], row)}
                    assert events.pop(0) == runs
                for _ in range(rows):
                    assert [events.pop(0), events.pop(0)] == ["fetch", "attend_pieces"]
            assert not events


def runs_read(stream: kvsieve.Stream, last: Any, row: int) -> list[tuple[int, int, int]]:
    """Where the tokens lie that a row read last, piece by piece."""
    found, runs = [], stream._engine.planner.runs(0, row)
    starts = [0]
    for _, lo, hi in runs:
        starts.append(starts[-1] + hi - lo)
    for piece in last.choice.pieces:
        for (block, lo, hi), start in zip(runs, starts):
            cut = max(piece.lo - start, 0), min(piece.hi - start, hi - lo)
            if cut[0] < cut[1]:
                found.append((block, lo + cut[0], lo + cut[1]))
    return found


def test_scores_that_nobody_tells_are_refused(tmp_path: Path) -> None:
    for base in (kvsieve.Full(), kvsieve.HiP(64, sinks=4, window=16)):
        with pytest.raises(PolicyError, match="order='recency', or a policy that fetches blocks"):
            kvsieve.stream(tiny.model(), tiered(tmp_path, base=base, order="scores"), "cpu")


@BACKEND
def test_a_session_file_of_a_stream_with_a_budget_of_memory(backend: str, tmp_path: Path) -> None:
    """What lies in the file of blocks is in the session file, which goes on as the stream does."""
    model, ids, more = tiny.model(), tiny.ids(1, 600), tiny.ids(1, 40, 3)
    sizes: dict[str, Any] = {"window": 64, "blocks": 2, "block": 32, "sinks": 8, "query_block": 64}
    policy = kvsieve.InfLLM(**sizes, host_budget=5 * BLOCK, disk=str(tmp_path))
    path = tmp_path / "stream.safetensors"
    with kvsieve.stream(model, kvsieve.InfLLM(**sizes), backend) as plain:
        forwards(model, plain.cache, ids, [200])
        want = forwards(model, plain.cache, more, [8, 1])
    with kvsieve.stream(model, policy, backend) as stream:
        forwards(model, stream.cache, ids, [200])
        before = stream.stats().tiers
        assert before is not None
        assert before.spills > 0
        stream.save(path)
        after = stream.stats().tiers
        assert after is not None
        assert after.loads == before.loads, "saving leaves blocks where they are"
        assert torch.equal(forwards(model, stream.cache, more, [8, 1]), want)
    with kvsieve.load(path, model, backend=backend) as loaded:
        tiers = loaded.stats().tiers
        assert tiers is not None
        assert tiers.bytes_in_file > 0
        assert most_in_memory(loaded) <= 6, "five full ones, and what is being filled"
        assert backend == "reference" or tiers.bytes_in_memory <= 6 * BLOCK
        assert torch.equal(forwards(model, loaded.cache, more, [8, 1]), want)
    unnamed = kvsieve.stream(model, tiered(tmp_path), backend)
    with unnamed, pytest.raises(UnsupportedError, match="cannot be written as text"):
        unnamed.save(path)


def test_forks_on_threads(tmp_path: Path) -> None:
    model = tiny.model()
    want = []
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as full:
        for seed in range(3):
            with full.fork() as fork:
                fork.feed(tiny.ids(1, 300, seed), chunk=37)
                want.append(forward(model, fork.cache, tiny.ids(1, 2, seed)))
    got: dict[int, torch.Tensor] = {}
    with kvsieve.stream(model, tiered(tmp_path, keep=64), "cpu") as stream:
        forks = [stream.fork() for _ in range(3)]

        def work(seed: int) -> None:
            forks[seed].feed(tiny.ids(1, 300, seed), chunk=37)
            got[seed] = forward(model, forks[seed].cache, tiny.ids(1, 2, seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(got[seed], want[seed]) for seed in range(3))


# --------------------------------------------------------------------------------------------------------------------- faults


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 500)
    with kvsieve.stream(model, tiered(tmp_path), "cpu") as stream:
        stream.feed(ids, chunk=100)
        mark = stream.mark()
        (file,) = files(tmp_path)
        with open(file, "r+b") as handle:
            whole = handle.read(100)
            handle.seek(0)
            handle.write(bytes(100))
            handle.flush()
            with pytest.raises(TierError, match="damaged"):
                stream.feed(tiny.ids(1, 3))
            handle.seek(0)
            handle.write(whole)
        stream.rewind(mark)
        stream.feed(tiny.ids(1, 3))
        os.truncate(file, 1000)
        with pytest.raises(TierError, match="shorter"):
            stream.feed(tiny.ids(1, 3))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_loses_nothing(background: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the forward that could not write says so, and the stream goes on."""
    model, ids = tiny.model(), tiny.ids(1, 500)
    with (
        kvsieve.stream(model, kvsieve.Full(), "cpu") as full,
        kvsieve.stream(model, tiered(tmp_path, background=background), "cpu") as stream,
    ):
        full.feed(ids)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            with pytest.raises(TierFullError, match="they stay in memory"):
                stream.feed(ids)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert stream.seen == full.seen == 500
        assert torch.equal(*(forwards(model, one.cache, tiny.ids(1, 130, 2), [128, 1]) for one in (stream, full)))
        assert same_memory(full, stream)
        # There is space again. What is written in the background leaves memory once it is in the file.
        for _ in range(1000):
            stats = stream.stats().tiers
            assert stats is not None
            if stats.spills:
                break
            time.sleep(0.01)
            stream.feed(tiny.ids(1, 1))
        assert stats.spills > 0


def test_a_folder_that_is_deleted_while_its_file_is_in_use(tmp_path: Path) -> None:
    """The file has no name, so nobody can delete it; its folder may go, and the file still grows."""
    model, folder = tiny.model(), tmp_path / "blocks"
    folder.mkdir()
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as full, kvsieve.stream(model, tiered(folder), "cpu") as stream:
        for one in (full, stream):
            one.feed(tiny.ids(1, 500), chunk=100)
        assert list(folder.iterdir()) == []
        folder.rmdir()
        before = stream.stats().tiers
        got, want = (forwards(model, one.cache, tiny.ids(1, 400, 2), [100]) for one in (stream, full))
        assert torch.equal(got, want)
        after = stream.stats().tiers
        assert before is not None
        assert after is not None
        assert after.bytes_in_file > before.bytes_in_file


def test_a_forked_process_writes_to_no_file_that_is_not_its_own(tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 500)
    with kvsieve.stream(model, tiered(tmp_path), "cpu") as stream:
        stream.feed(ids, chunk=100)
        store: Any = stream._engine.stores[0]
        runs = stream._engine.planner.runs(0, 0)
        sums = store.read(runs)[0].sum()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert store.read(runs)[0].sum() == sums
                store.hold([block for block, _, _ in runs])
                store.write([(runs[0][0], 0, 1)], *(torch.zeros(2, 1, 16) for _ in range(2)))
                try:
                    store.spill([runs[0][0]])
                except kvsieve.errors.UnsupportedError:
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stream.feed(tiny.ids(1, 100))
        assert store.read(runs)[0].sum() == sums


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(BudgetError, match="give it at least"):
        kvsieve.stream(model, tiered(tmp_path, blocks=3, keep=128), "cpu")
    with pytest.raises(TierError, match="could not create"):
        kvsieve.stream(model, tiered(tmp_path / "none"), "cpu")
    with pytest.raises(BackendError, match="none in a file"):
        replace(CUDA, tiers=False).check_tiers()
    stream = kvsieve.stream(model, tiered(tmp_path), "cpu")
    stream.close()
    with pytest.raises(StateError):
        stream.feed(tiny.ids(1, 3))
    assert files(tmp_path) == []
