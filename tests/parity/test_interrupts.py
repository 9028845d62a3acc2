"""Long calls answer Ctrl-C, and running out of memory is an exception that leaves everything as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kvsieve import _core

TRIES = 20


class Rung(Exception):
    """What the signal's handler raises."""


@pytest.fixture
def bell() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Rung

    before, interval = signal.signal(signal.SIGUSR1, ring), sys.getswitchinterval()
    # Other threads run only when this one releases the GIL.
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGUSR1, before)


def rung_inside(call: Callable[[], Any], finished: Callable[[], bool]) -> bool:
    """Whether a signal, sent once ``call`` has released the GIL, ended it before its work was done.

    The thread that sends it may be late on a busy machine, so there are several tries.
    """
    for _ in range(TRIES):
        gate = threading.Lock()
        gate.acquire()

        def send(gate: threading.Lock = gate) -> None:
            gate.acquire()
            os.kill(os.getpid(), signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        inside = False
        try:
            gate.release()
            call()
            sender.join()
        except Rung:
            inside = not finished()
        sender.join()
        if inside:
            return True
    return False


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals that a process may send itself")
@pytest.mark.parametrize("threads", [1, 2])
def test_attend_stops_at_a_signal(bell: None, threads: int) -> None:
    heads, dim, tokens = 8, 128, 48 << 10
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    planner.restore(tokens, [(tokens, [(list(range(tokens)), [0.0] * tokens)])])
    store = _core.Store(heads, dim, dim, "float32")
    zeros = np.zeros((heads, tokens, dim), np.float32)
    store.write(*(np.array(column) for column in zip(*planner.runs(0, 0))), zeros, zeros)
    step = planner.begin([1], 1, True, False)
    store.append(zeros[None, :, :1], zeros[None, :, :1], step)
    q, out = np.ones((1, heads, 1, dim), np.float32), np.empty((1, 1, heads, dim), np.float32)

    def call() -> None:
        out.fill(7)
        store.attend(q, step, None, 1.0, None, None, out, None, threads, False)

    call()
    assert not out.any()
    assert rung_inside(call, lambda: not out.all())
    assert (out == 7).all()
    call()
    assert not out.any()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals that a process may send itself")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sparse_chunk_stops_at_a_signal(bell: None, threads: int) -> None:
    heads, dim, tokens = 8, 128, 8192
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    store = _core.Store(heads, dim, dim, "float32")
    ones = np.ones((1, heads, tokens, dim), np.float32)
    step = planner.begin([tokens], tokens, True, False)
    store.append(ones, ones, step)
    rule = {"budget": 512, "block": 8, "representative": "middle", "sinks": 4, "window": 512, "refresh": [8], "query_block": 64}
    sparse = _core.Sparse("hip", **rule)
    out = np.empty((1, tokens, heads, dim), np.float32)

    def call() -> None:
        out.fill(7)
        sparse.attend(store, ones, step, 0.01, None, None, out, None, threads, chunk=True)

    # What was not reached is zero, or still seven where the signal came before the first query's turn.
    assert rung_inside(call, lambda: bool((abs(out - 1) < 0.5).all()))
    call()
    assert len(sparse.choice(0)) == heads
    np.testing.assert_allclose(out, 1, rtol=1e-5)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals that a process may send itself")
def test_surprisal_stops_at_a_signal(bell: None) -> None:
    logits, ids = np.zeros((512, 1 << 18), np.float32), np.zeros(512, np.int64)
    got: list[Any] = []
    assert rung_inside(lambda: got.append(_core.surprisal(logits, ids)), lambda: bool(got))


def test_a_torch_chunk_is_cut_where_one_call_would_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt in pieces is the prompt in one: between the pieces Python answers signals."""
    import torch
    from kvsieve.backends.cpu import prefill

    torch.manual_seed(0)
    for old, count, own in [(0, 300, True), (130, 70, True), (500, 33, True), (200, 40, False)]:
        q, k, v = torch.randn(6, count, 32), torch.randn(2, old + count * own, 32), torch.randn(2, old + count * own, 32)
        monkeypatch.setattr(prefill, "WORK", 1 << 60)
        whole = prefill.dense(q, k, v, old, 0.2)
        monkeypatch.setattr(prefill, "WORK", 4 * 3 * 32 * 32 * 64)
        monkeypatch.setattr(prefill, "QUERIES", 16)
        with unittest.mock.patch.object(prefill, "flash", wraps=prefill.flash) as flash:
            pieces = prefill.dense(q, k, v, old, 0.2)
        assert flash.call_count > 4
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_running_out_of_memory_changes_nothing() -> None:
    code = """
    import resource
    import numpy as np
    from kvsieve import _core

    heads, dim = 8, 128
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    store = _core.Store(heads, dim, dim, "float32")
    few = np.random.default_rng(0).random((1, heads, 100, dim), np.float32)
    store.append(few, few, planner.begin([100], 100, True, False))
    planner.commit()
    held = store.bytes

    # 1.6 GB to store, from one row of zeros; room for a quarter of it.
    many = 200_000
    zeros = np.lib.stride_tricks.as_strided(np.zeros(dim, np.float32), (1, heads, many, dim), (0, 0, 0, 4))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), unlimited[1]))
    step = planner.begin([many], many, True, False)
    try:
        store.append(zeros, zeros, step)
        raise SystemExit("there was room")
    except MemoryError as err:
        print(err)
    planner.rollback()
    assert store.bytes == held
    resource.setrlimit(resource.RLIMIT_AS, unlimited)

    k, v = np.empty((2, heads, 100, dim), np.float32)
    store.gather(*(np.array(column) for column in zip(*planner.runs(0, 0))), k, v, 0)
    assert (k == few[0]).all() and (v == few[0]).all()
    store.append(few, few, planner.begin([100], 100, True, False))
    planner.commit()
    assert planner.seen(0) == 200
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not reserve" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_without_addresses_to_spare_a_cache_takes_no_more_than_it_needs() -> None:
    code = """
    import resource
    import numpy as np
    from kvsieve import _core

    heads, dim = 8, 128
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    store = _core.Store(heads, dim, dim, "float32")
    x = np.random.default_rng(0).random((1, heads, 100, dim), np.float32)
    step = planner.begin([100], 100, True, False)

    # Room for these tokens, but not for the 64 MB of addresses of the first 8,192.
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), unlimited[1]))
    store.append(x, -x, step)
    assert store.bytes == 2 * heads * (64 + 40) * dim * 4  # the last block grows eight slots at a time
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    planner.commit()

    # With addresses again, later slabs are neighbours; those before stay where they are.
    more = planner.begin([100], 100, True, False)
    store.append(-x, x, more)
    planner.commit()
    k, v = np.zeros((2, heads, 200, dim), np.float32)
    store.gather(*(np.array(column) for column in zip(*planner.runs(0, 0))), k, v, 0)
    both = np.concatenate([x[0], -x[0]], 1)
    assert (k == both).all() and (v == -both).all()
    store.free_unused(np.zeros(4, bool))
    assert store.bytes == 0
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
