"""The threads that the core's work is handed to: torch's where it has them, its own in the child of a fork; none changes a bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

CODE = """
import os, signal
import numpy as np
import torch
from kvsieve import _core

torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)  # its threads are there, and busy with waiting
random = np.random.default_rng(0)
q, k, v = (random.normal(size=(heads, 700, 32)).astype(np.float32) for heads in (6, 2, 2))
first, last = np.arange(700), np.full(700, 700)

def answer(threads):
    out, lse = np.empty((700, 6, 32), np.float32), np.empty((6, 700), np.float32)
    _core.attend_dense(q, k, v, first, last, 0.2, None, out=out, lse=lse, threads=threads)
    return out.tobytes() + lse.tobytes()

def threads_now():
    return len(os.listdir("/proc/self/task"))

alone = answer(1)
"""


def in_fresh_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE + textwrap.dedent(code)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_threads_change_no_bit() -> None:
    in_fresh_python(
        """
        for threads in (2, 3, 7):
            assert answer(threads) == alone
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_threads_that_the_system_does_not_give_are_an_error() -> None:
    in_fresh_python(
        """
        import resource

        from kvsieve.errors import UnsupportedError

        with open("/proc/self/statm") as told:
            held = int(told.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (16 << 20), held + (16 << 20)))
        try:
            answer(4000)
        except UnsupportedError:
            assert answer(2) == alone
        else:
            raise AssertionError("so many threads do not fit")
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_work_goes_to_the_threads_that_torch_has() -> None:
    in_fresh_python(
        """
        before = threads_now()
        assert answer(2) == alone
        assert threads_now() == before
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_child_of_a_fork_has_threads_of_its_own() -> None:
    in_fresh_python(
        """
        assert answer(2) == alone
        pid = os.fork()
        if pid == 0:
            signal.alarm(40)  # who hangs is killed
            os._exit(0 if answer(2) == alone and threads_now() > 1 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        """
    )
