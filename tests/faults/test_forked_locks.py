"""A fork waits for the package's locks, and its child finds them open; `tests/faults/threads.py` forks in the middle of turns."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import kvsieve
import pytest
from kvsieve import locks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")

SETUP = f"""
import importlib.util, os, signal, threading, time

spec = importlib.util.spec_from_file_location("locks", {str(locks.__file__)!r})
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
one, other, changed = locks.shared_lock(), locks.shared_lock(), []
taken = threading.Event()

def child(check):
    # Alarms are not inherited. Whoever hangs is killed.
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(0 if check() else 1)
    return os.waitpid(pid, 0)[1]

def free(lock):
    return lock.acquire(timeout=1)
"""


def in_fresh_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_waits_until_what_a_lock_guards_is_whole() -> None:
    in_fresh_python(
        """
        def work():
            with one:
                changed.append("half")
                taken.set()
                time.sleep(0.3)
                changed.append("whole")

        thread = threading.Thread(target=work)
        thread.start()
        taken.wait()
        assert child(lambda: changed == ["half", "whole"] and free(one)) == 0
        thread.join()
        assert free(one) and free(other)
        """
    )


def test_a_lock_that_is_not_to_be_had_is_new_in_the_child() -> None:
    in_fresh_python(
        """
        locks.PATIENCE = 0.1
        done = threading.Event()

        def work():
            with one:
                taken.set()
                done.wait()

        thread = threading.Thread(target=work)
        thread.start()
        taken.wait()
        with other:
            assert child(lambda: free(one) and free(other)) == 0
        assert not one.acquire(blocking=False), "the parent's thread holds it still"
        done.set()
        thread.join()
        assert free(one)
        """
    )


def test_every_lock_of_the_package_is_one_of_them() -> None:
    sources = sorted(Path(kvsieve.__file__).parent.rglob("*.py"))
    made = [path.name for path in sources if "Lock()" in path.read_text(encoding="utf-8")]
    assert made == ["locks.py"]
