"""The core fails where a test says so: a panic is a `RuntimeError`, and what follows is as if the call had not been made.

`make faults` does so at many more places of many more systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import drive
import kvsieve
import numpy as np
import pytest
import tiny
from kvsieve import _core
from kvsieve.runtime.eviction import Eviction
from pages import load
from systems import SYSTEMS

ALL = 1 << 40


@pytest.fixture(scope="module")
def inject() -> ModuleType:
    return load("tests/faults/inject.py")


@pytest.fixture(autouse=True)
def disarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # which takes seconds
    yield
    _core.fail_at(True, 0)
    _core.fail_at(False, 0)


@pytest.mark.parametrize(("system", "kind", "every"), [("sirllm", "memory", 25), ("hip", "panic", 301)])
def test_a_failure_anywhere_is_told_and_changes_nothing(inject: ModuleType, system: str, kind: str, every: int) -> None:
    (row,) = inject.run([system], [kind], every)
    assert row["wrong"] == []
    assert row["tried"] >= 7
    assert row["steps"] >= 6


def calls() -> dict[str, Callable[[], Any]]:
    """A call of every kernel and of every part of a planner that stands by itself."""
    heads, dim, tokens = 2, 32, 300
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    store, x = _core.Store(heads, dim, dim, "float32"), np.ones((1, heads, tokens, dim), np.float32)
    store.append(x, x, planner.begin([tokens], tokens, True, False))
    planner.commit()
    step = planner.begin([1], 1, True, False)
    q, out = np.ascontiguousarray(x[:, :, :1]), np.empty((1, 1, heads, dim), np.float32)
    store.append(q, q, step)
    rope = _core.Rope([1.0 / (i + 1) for i in range(dim // 2)], "half", 1.0)
    rule: dict[str, Any] = {"budget": 32, "block": 4, "representative": "middle", "sinks": 2, "window": 16, "query_block": 16}
    sparse, logits = _core.Sparse("hip", **rule, refresh=[1]), np.zeros((3, 50), np.float32)
    wide, wide_out = np.ones((64, dim), np.float32), np.empty((64, dim), np.float32)
    return {
        "attend": lambda: store.attend(q, step, rope, 1.0, None, None, out),
        "attend_mass": lambda: store.attend_mass(q, step, None, 1.0, None, None, out),
        "attend in threads": lambda: store.attend(q, step, None, 1.0, None, None, out, None, 2),
        "append": lambda: store.append(q, q, step),
        "bytes": lambda: store.bytes,
        "sparse": lambda: sparse.attend(store, q, step, 1.0, None, None, out),
        "state": sparse.state,
        "rotate": lambda: _core.rotate(wide, np.arange(64), rope, wide_out),
        "surprisal": lambda: _core.surprisal(logits, np.zeros(3, np.int64)),
        "top_k": lambda: _core.top_k(logits, 4),
        "linear": lambda: _core.linear(wide, wide, None, np.empty((64, 64), np.float32)),
        "read": lambda: _core.read(logits.ravel()),
        "seen": lambda: planner.seen(0),
        "runs": lambda: planner.runs(0, 0),
        "blocks_in_use": planner.blocks_in_use,
    }


@pytest.mark.parametrize("name", list(calls()))
def test_a_panic_is_a_runtime_error_and_poisons_nothing(name: str) -> None:
    call = calls()[name]
    call()
    _core.fail_at(True, ALL)
    call()
    places = ALL - _core.fail_at(True, 0)
    assert places > 0, "no place of it can fail"
    for nth in range(1, places + 1):
        _core.fail_at(True, nth)
        with pytest.raises(RuntimeError, match="a panic that a test asked for") as raised:
            call()
        assert isinstance(raised.value, Exception)
        assert type(raised.value).__name__ == "PanicException"
        call()


def test_packed_blocks_are_there_again_after_a_panic() -> None:
    heads, dim, tokens, packed = 2, 32, 100, 40
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    store, x = _core.Store(heads, dim, dim, "float32"), np.random.default_rng(1).normal(size=(1, heads, tokens, dim))
    x = np.ascontiguousarray(x, np.float32)
    store.append(x, x, planner.begin([tokens], tokens, True, False))
    planner.commit()
    store.set_packing(dim // 2, 4, 4, 8)
    channels = np.tile(np.arange(0, dim, 2), (heads, 1))
    store.pack(planner.pack(0, packed, 8), channels)

    def held() -> list[Any]:
        blocks, lo, hi = (np.array(each, np.int64) for each in zip(*planner.runs(0, 0)))
        k, v = np.empty((heads, tokens, dim), np.float32), np.empty((heads, tokens, dim), np.float32)
        store.gather(blocks, lo, hi, k, v)
        return [k.tobytes(), v.tobytes(), store.channels(int(blocks[blocks >= _core.PACKED][0]))[0].tolist()]

    before, fork = held(), planner.fork()
    moves = fork.pack(0, 80, 8)
    _core.fail_at(True, ALL)
    store.pack(moves, channels)
    places = ALL - _core.fail_at(True, 0)
    assert places > heads, "the packing itself has places"
    for nth in range(1, places + 1):
        _core.fail_at(True, nth)
        with pytest.raises(RuntimeError, match="a panic that a test asked for"):
            store.pack(moves, channels)
        assert held() == before
        store.pack(moves, channels)
        assert held() == before


def test_an_eviction_that_fails_holds_nothing_on(inject: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = kvsieve.stream(tiny.model(), SYSTEMS["memory_bank"].of_rows(1), "cpu")
    with stream:
        stream.feed(tiny.ids(1, 70, 1))
        mark = stream.mark()
        stream.rewind(mark)
        before, unbroken = inject.held(stream), Eviction.evict

        def fails(*_: Any) -> None:
            raise MemoryError("no memory for the decision")

        for _ in range(2):
            monkeypatch.setattr(Eviction, "evict", fails)
            with pytest.raises(MemoryError, match="no memory for the decision"):
                drive.forwards(stream.model, stream.cache, tiny.ids(1, 6, 3), [3, 1])
            monkeypatch.setattr(Eviction, "evict", unbroken)
            stream.rewind(mark)
            assert inject.held(stream) == before


def test_nothing_is_armed_unless_a_test_says_so() -> None:
    assert _core.fail_at(True, 0) == 0
    assert _core.fail_at(False, 0) == 0
    assert not hasattr(__import__("kvsieve"), "fail_at")
