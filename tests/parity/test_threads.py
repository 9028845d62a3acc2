"""Threads: their number changes no bit, forks keep working, and Python goes on while a kernel runs.

Everything here is large enough for the kernels to share the work: small calls run on the caller's thread whatever they are told.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kvsieve import _core

HEADS, KV_HEADS, DIM = 6, 3, 64
ROPE = _core.Rope([10000.0 ** (-i / 32) for i in range(32)], "half", 1.0)


def elements(seed: int, dtype: str, *shape: int) -> Any:
    """Random numbers of ``dtype``; 16-bit floats as their bits."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if dtype == "float32":
        return x
    return x.astype(np.float16).view(np.int16) if dtype == "float16" else (x.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


class Layer:
    """A store with ``tokens`` tokens, and a step that adds ``queries``."""

    def __init__(self, tokens: int, queries: int = 1, dtype: str = "float32", frame: str = "post_rope") -> None:
        self.planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], frame)
        self.planner.restore(tokens, [(tokens, [(list(range(tokens)), [0.0] * tokens)])])
        self.runs = tuple(np.array(column) for column in zip(*self.planner.runs(0, 0)))
        self.store = _core.Store(KV_HEADS, DIM, DIM, dtype)
        self.k, self.v = (elements(seed, dtype, KV_HEADS, tokens, DIM) for seed in (1, 2))
        self.store.write(*self.runs, self.k, self.v)
        self.step = self.planner.begin([queries], queries, True, False)
        self.new = elements(3, dtype, 1, KV_HEADS, queries, DIM)
        self.store.append(self.new, self.new, self.step)
        self.q = elements(4, dtype, 1, HEADS, queries, DIM)

    def attend(self, threads: int) -> Any:
        """Output and log-sum-exp, as one array of bits."""
        out = np.zeros((1, self.q.shape[2], HEADS, DIM), self.q.dtype)
        lse = np.zeros(self.q.shape[:3], np.float32)
        self.store.attend(self.q, self.step, ROPE, 0.125, None, None, out, lse, threads, True)
        return np.concatenate([out.view(np.uint8).ravel(), lse.view(np.uint8).ravel()])


@pytest.mark.parametrize("frame", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_of_threads_changes_no_bit(dtype: str, frame: str) -> None:
    layer = Layer(13_000, 3, dtype, frame)
    one = layer.attend(1)
    assert one.any()
    for threads in (2, 3, 2):
        np.testing.assert_array_equal(layer.attend(threads), one)


def test_two_python_threads_share_a_store_and_a_pool() -> None:
    layer = Layer(13_000)
    want, wrong = layer.attend(1), []

    def work(threads: int) -> None:
        wrong.extend(i for i in range(20) if not np.array_equal(layer.attend(threads), want))

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------------------------------- forks

# Fresh interpreters: a test run has threads of its own, which a fork would leave behind in whatever state they were in.
SETUP = """
import multiprocessing, os, signal, sys
import numpy as np
from kvsieve import _core

planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
planner.restore(20_000, [(20_000, [(list(range(20_000)), [0.0] * 20_000)])])
runs = [np.array(column) for column in zip(*planner.runs(0, 0))]
x = np.random.default_rng(0).standard_normal((3, 20_000, 64), np.float32)
store = _core.Store(3, 64, 64, "float32")
store.write(*runs, x, x)
step = planner.begin([1], 1, True, False)
new = x[None, :, :1].copy()
store.append(new, new, step)
q = np.random.default_rng(1).standard_normal((1, 6, 1, 64), np.float32)

def attend(threads):
    out = np.zeros((1, 1, 6, 64), np.float32)
    store.attend(q, step, None, 0.125, None, None, out, None, threads)
    return out.tobytes()

def check(threads):
    signal.alarm(60)
    return attend(threads) == want

want = attend(1)
# Whoever waits for threads that are not there waits for ever; alarms are not inherited, so that every child sets its own.
signal.alarm(100)
"""


def in_fresh_python(code: str) -> None:
    """Runs ``code`` after the setup; it must end by itself, and well."""
    code = SETUP + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_attends_after_its_parent_did() -> None:
    in_fresh_python(
        """
        assert attend(2) == want, "the parent's pool must have run before the fork"
        child = os.fork()
        if child == 0:
            # Again with the parent's number of threads, with another, and from a grandchild.
            good = check(2) and check(3) and check(2)
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if check(2) else 1)
            good &= os.waitpid(grandchild, 0)[1] == 0
            os._exit(0 if good else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert attend(2) == want, "the parent's own pool must be as it was"
        """
    )


def test_a_forked_child_stores_into_its_own_copy() -> None:
    in_fresh_python(
        """
        assert attend(2) == want
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            store.append(-10 * new, new, step)
            other = attend(1)
            os._exit(0 if other != want and attend(2) == other else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert attend(2) == want
        """
    )


def test_multiprocessing_by_fork() -> None:
    in_fresh_python(
        """
        assert attend(2) == want
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(check, [2, 2, 1, 3], chunksize=1) == [True] * 4
        assert attend(2) == want
        """
    )


def test_a_fork_while_another_thread_stores_leaves_the_child_a_whole_store() -> None:
    in_fresh_python(
        """
        import threading, time
        stop = threading.Event()

        def write():
            sign = 1
            while not stop.is_set():
                sign = -sign
                store.write(*runs, sign * x, sign * x)

        writer = threading.Thread(target=write)
        writer.start()
        k, v = np.empty_like(x), np.empty_like(x)
        good = []
        for pause in np.random.default_rng(2).random(40) * 0.02:
            time.sleep(pause)
            child = os.fork()
            if child == 0:
                # Whoever waits for a thread that is not there is ended by the alarm.
                signal.alarm(20)
                store.gather(*runs, k, v, 0)
                whole = (k == v).all() and ((k == x).all() or (k == -x).all())
                store.write(*runs, 3 * x, 3 * x)
                store.gather(*runs, k, v, 0)
                attend(2)
                os._exit(0 if whole and (k == 3 * x).all() else 1)
            good.append(os.waitpid(child, 0)[1])
            if good[-1]:
                break
        stop.set()
        writer.join()
        assert not good[-1], good
        """
    )


def test_a_fork_while_other_threads_read_leaves_the_child_a_store_to_write_to() -> None:
    in_fresh_python(
        """
        import threading, time
        stop = threading.Event()

        def read():
            while not stop.is_set():
                attend(1)

        readers = [threading.Thread(target=read) for _ in range(2)]
        [reader.start() for reader in readers]
        good = []
        for pause in np.random.default_rng(2).random(40) * 0.02:
            time.sleep(pause)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                same = attend(1) == want
                store.append(-10 * new, new, step)
                store.write(*runs, 3 * x, 3 * x)
                store.free_unused(np.zeros(400, bool))
                os._exit(0 if same and store.bytes == 0 else 1)
            good.append(os.waitpid(child, 0)[1])
            if good[-1]:
                break
        stop.set()
        [reader.join() for reader in readers]
        assert not good[-1], good
        assert attend(1) == want
        """
    )


# --------------------------------------------------------------------------------------------------------------------------- GIL


def others_run_during(call: Callable[[], Any]) -> bool:
    """Whether another Python thread gets to run between the beginning and the end of ``call``.

    The interpreter is told never to take the lock away from a thread, so that others run only if ``call`` gives it up.
    """
    ran: list[bool] = []
    gate, ready = threading.Lock(), threading.Event()
    gate.acquire()

    def other() -> None:
        ready.set()
        with gate:
            ran.append(True)

    worker = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    try:
        worker.start()
        ready.wait()
        sys.setswitchinterval(1000.0)
        gate.release()
        call()
        seen = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        worker.join()
    return seen


def releases(call: Callable[[], Any]) -> bool:
    """Whether others run during ``call``, in one of thirty tries: a busy system may wake them too late."""
    return any(others_run_during(call) for _ in range(30))


def test_a_call_that_keeps_the_lock_is_told_apart() -> None:
    assert not releases(lambda: sum(range(1_000_000)))


@pytest.mark.parametrize("threads", [1, 2])
def test_others_run_during_attend(threads: int) -> None:
    layer = Layer(40_000, 16)
    out = np.empty((1, 16, HEADS, DIM), np.float32)
    # Nothing but the call itself: numpy gives the lock up too.
    assert releases(lambda: layer.store.attend(layer.q, layer.step, ROPE, 0.125, None, None, out, None, threads))


def test_others_run_while_tokens_are_stored_and_gathered() -> None:
    layer = Layer(60_000)
    k, v = np.empty_like(layer.k), np.empty_like(layer.v)
    assert releases(lambda: layer.store.write(*layer.runs, layer.k, layer.v))
    assert releases(lambda: layer.store.gather(*layer.runs, k, v))
    np.testing.assert_array_equal(k, layer.k)
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    step, store = planner.begin([60_000], 60_000, True, False), _core.Store(KV_HEADS, DIM, DIM, "float32")
    assert releases(lambda: store.append(layer.k[None], layer.v[None], step))


def test_others_run_during_the_kernels_without_a_store() -> None:
    logits, ids = np.ones((2048, 20_000), np.float32), np.arange(2048)
    assert releases(lambda: _core.surprisal(logits, ids))
    assert releases(lambda: _core.top_k(logits, 64))
    assert releases(lambda: _core.linear(logits[:64], logits, None, np.empty((64, 2048), np.float32)))
    x, at = logits[:, :8192].reshape(-1, 64), np.arange(2048 * 128)
    out = np.empty_like(x)
    assert releases(lambda: _core.rotate(x, at, ROPE, out))
