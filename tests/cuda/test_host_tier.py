"""Blocks on the host, under the emulator: no output changes, nothing is read that is not there, copies are late until joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulator
import kvsieve
import pytest
import tier_cases
import tiny
import torch
from drive import forwards, pad_left, same_memory
from kvsieve.errors import BackendError, StateError, UnsupportedError
from kvsieve.graphs import GraphDecoder
from tier_cases import BLOCK, tiered


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    with emulator.emulated(emulator.Emulator(processors=2)) as made:
        yield made


@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_changes_an_output(seed: int) -> None:
    tier_cases.schedule("cuda", seed, None)


def test_what_is_not_on_the_device_is_never_read() -> None:
    tier_cases.never_read("cuda", None)


def test_what_fits_the_capacity_stays() -> None:
    tier_cases.what_fits_stays("cuda", None)


def test_memory_is_given_back() -> None:
    twins = tier_cases.Twins("cuda", None, capacity=3, rows=1)
    block = 64 * 2 * tier_cases.HEADS * tier_cases.DIM * 4
    for _ in range(6):
        twins.feed(twins.planners[0], [64])
        twins.tiered.trim([])
        assert twins.tiered.bytes_held <= 3 * block
    assert twins.file.bytes() == (3 * block, 3 * block)


@pytest.mark.parametrize("base", list(tier_cases.BASES))
def test_where_blocks_lie_changes_no_output(base: str) -> None:
    tier_cases.model(base, torch.device("cpu"))


def test_rows_marks_beams_and_forks() -> None:
    model = tiny.model()
    ids, mask = pad_left([tiny.ids(1, n, seed=n)[0] for n in (260, 190)])
    streams = [kvsieve.stream(model, policy, "cuda") for policy in (kvsieve.Full(), tiered(kvsieve.Full(), keep=64))]

    def same(call: Callable[[Any], Any]) -> None:
        one, other = (call(stream) for stream in streams)
        assert one is None or torch.equal(one, other)
        assert same_memory(*streams)

    same(lambda stream: stream.feed(ids, mask, chunk=150))
    marks = [stream.mark() for stream in streams]
    same(lambda stream: stream.generate(tiny.ids(2, 70, 1), max_new_tokens=4, do_sample=False))
    forks = [stream.fork() for stream in streams]
    same(lambda stream: stream.feed(tiny.ids(2, 80, 2), chunk=40))
    for fork in forks:
        fork.feed(tiny.ids(2, 20, 3), chunk=16)
    assert same_memory(*forks)
    for stream, mark in zip(streams, marks):
        stream.rewind(mark)
    same(lambda stream: stream.cache.crop(-100))
    same(lambda stream: stream.generate(tiny.ids(2, 9, 4), max_new_tokens=4, num_beams=2, do_sample=False))
    assert same_memory(*forks)
    for each in (*streams, *forks):
        each.close()


def test_its_budget_is_the_devices(tmp_path: Path) -> None:
    model = tiny.model()
    policy = kvsieve.InfLLM(16, blocks=2, block=4, representatives=2, sinks=2, query_block=8, host_budget=5 * BLOCK)
    with kvsieve.stream(model, policy, "cuda") as stream:
        stream.feed(tiny.ids(1, 500), chunk=100)
        tiers = stream.stats().tiers
        assert tiers is not None
        assert tiers.spills > 0
        stream.save(tmp_path / "stream")
        want = forwards(model, stream.cache, tiny.ids(1, 9, 2), [1])
    with kvsieve.load(tmp_path / "stream", model, backend="cuda") as loaded:
        assert torch.equal(forwards(model, loaded.cache, tiny.ids(1, 9, 2), [1]), want)
        tiers = loaded.stats().tiers
        assert tiers is not None
        assert tiers.spills > 0


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(BackendError, match="none in a file; leave disk="):
        kvsieve.stream(model, tiered(kvsieve.Full(), disk=str(tmp_path)), "cuda")
    with kvsieve.stream(model, tiered(kvsieve.Full()), "cuda") as stream:
        stream.feed(tiny.ids(1, 10))
        store: Any = stream._engine.stores[0]
        with pytest.raises(StateError, match="has blocks already"):
            store.set_tier(None, 3, None)
        with pytest.raises(UnsupportedError, match="come from the host"):
            GraphDecoder(stream)
