"""Workers that take turns: each in a process of its own, asked one after the other, round by round. Knows no rival."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Asked", "Fault", "Process", "Workers", "turns"]


class Fault(Exception):
    """A worker that died, hung or answered with an error; the message is one line."""


class Asked(Protocol):
    """Whatever answers requests."""

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Process:
    """A worker's process: requests and answers are lines of JSON on its standard input and output.

    Args:
        command: what to start; its standard error goes to ``log``.
        environment: added to this process's own.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened, env={**os.environ, **environment}
            )
        self._rest = b""

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to ``request``.

        Raises `Fault` if there is none within ``timeout`` seconds, when the worker has died, or if it answered with an error. After
        the first two it is not running any more.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        line = self._line(time.monotonic() + timeout, timeout)
        try:
            told = json.loads(line)
        except ValueError:
            self.close()
            raise Fault(f"answered with something that is no JSON: {line[:80]!r}") from None
        if "error" in told:
            raise Fault(told["error"])
        return dict(told)

    def _line(self, until: float, timeout: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(until - time.monotonic(), 0)):
                    self.close()
                    raise Fault(f"no answer within {timeout:g} seconds")
                found = os.read(self._process.stdout.fileno(), 1 << 20)
                if not found:
                    raise self._died()
                self._rest += found
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _died(self) -> Fault:
        self.close()
        said = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Fault(f"the worker ended with {self._process.returncode}" + (f": {said[-1][:300]}" if said else ""))

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        with self._process:
            self._process.kill()


class Workers:
    """Starts a worker when it is first asked, and again after it has died; keeps all others alive."""

    def __init__(self, start: Callable[[str], Asked], timeout: float) -> None:
        self._start, self._timeout = start, timeout
        self._running: dict[str, Asked] = {}

    def ask(self, worker: str, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of ``worker``. Raises `Fault`; then the worker is started anew for the next request."""
        if worker not in self._running:
            self._running[worker] = self._start(worker)
        try:
            return self._running[worker].ask(request, self._timeout)
        except Fault:
            self._running.pop(worker).close()
            raise

    def close(self) -> None:
        """Ends them all."""
        while self._running:
            self._running.popitem()[1].close()


def turns(
    keys: Iterable[str],
    missing: Callable[[str], int],
    measure: Callable[[str], None],
    fail: Callable[[str, str], None],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Rounds of every row, in turns, until none is missing: the machine's other work hits all alike.

    Args:
        keys: the rows, in order.
        missing: how many rounds a row still lacks; asked before each.
        measure: one round of a row. It raises `Fault` if the rival failed.
        fail: told the row and the error; such a row gets no further turn.
        between: called before every turn of all rows.
    """
    waiting = list(keys)
    while waiting := [key for key in waiting if missing(key) > 0]:
        between()
        most = max(map(missing, waiting))
        for key in list(waiting):
            if missing(key) < most:  # the others catch up with it first
                continue
            try:
                measure(key)
            except Fault as fault:
                fail(key, str(fault))
                waiting.remove(key)
