"""A load on `kvsieve serve`: clients that talk, edit, ask again and leave, for some minutes, on this machine's own address.

    python benches/serve_load.py --minutes 1 --json load.json -- --policy "sirllm(1024)" --memory 256MiB

What follows `--` is for the server, which this starts and ends. Each client has conversations of its own, with messages of a few
words to some hundreds, streamed or not; one request in twenty is left in the middle. A 429 is waited out and tried again, any other
error counts. Seconds of a step are the server's (`kvsieve_step_seconds`), interpolated within the histogram's bounds.

It fails, with status 1, where there was an error, where a step in a hundred took more than three times the median, or where what
conversations hold was above `--memory` at one of the moments, every two seconds, at which the server was asked.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

TEXT = "the sea is wide and the tide comes in twice a day while ships of all kinds lie in the harbour and wait for the wind"
LENGTHS = (5, 20, 20, 60, 60, 200)
"""Words of a message; one of these, at random."""
ANSWERS = (4, 16, 16, 48)
"""Most tokens of an answer."""
LEAVES, EDITS, TURNS = 0.05, 0.1, 8
SPREAD = 3.0
"""How many times the median step the 99th of a hundred may take."""
PAUSE = 2.0
"""Seconds between two looks at the server."""


class Client(threading.Thread):
    """One client until a moment: conversations of up to :data:`TURNS` turns, one after the other."""

    def __init__(self, address: str, number: int, until: float) -> None:
        super().__init__(name=f"client {number}")
        self._address, self._until, self._random = address, until, random.Random(number)
        self._number, self._talks = number, 0
        self.statuses: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []
        self.first: list[float] = []
        """Seconds until the first piece of each streamed answer."""
        self._connection: http.client.HTTPConnection | None = None
        self.usage: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        while time.monotonic() < self._until:
            self._talks += 1
            told: list[dict[str, str]] = [{"role": "system", "content": "You know the sea, and answer briefly."}]
            for _ in range(self._random.randint(1, TURNS)):
                words = self._random.choices(TEXT.split(), k=self._random.choice(LENGTHS))
                told.append({"role": "user", "content": " ".join(words)})
                answer = self._ask(told)
                if answer is None:
                    return
                if self._random.random() < EDITS:
                    told[-1] = {"role": "user", "content": " ".join(words[::-1])}
                    answer = self._ask(told) or ""
                told.append({"role": "assistant", "content": answer})

    def _ask(self, told: list[dict[str, str]]) -> str | None:
        """The answer, what there was of it where the client leaves; None once the time is over."""
        stream = self._random.random() < 0.7
        asked = {"messages": told, "stream": stream, "max_tokens": self._random.choice(ANSWERS), "temperature": 0.8, "seed": 1}
        asked |= {"stream_options": {"include_usage": True}} if stream else {}
        while time.monotonic() < self._until:
            began, connection = time.monotonic(), http.client.HTTPConnection(self._address, timeout=600)
            self._connection = connection
            headers = {"Content-Type": "application/json", "X-Session-Key": f"{self._number}"}
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(asked), headers)
                answer = connection.getresponse()
                self.statuses[str(answer.status)] += 1
                if answer.status == 429:
                    answer.read()
                    time.sleep(float(answer.headers["Retry-After"]))
                    continue
                if answer.status != 200:
                    self.errors.append(f"{answer.status}: {answer.read(500)!r}")
                    return ""
                return self._streamed(answer, began) if stream else self._whole(json.loads(answer.read()))
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self._wrong(f"{type(error).__name__}: {error}")
                return ""
            finally:
                connection.close()
        return None

    def _whole(self, body: dict[str, Any]) -> str:
        self._count(body["usage"])
        return str(body["choices"][0]["message"]["content"])

    def _streamed(self, answer: http.client.HTTPResponse, began: float) -> str:
        text, leaves = "", self._random.random() < LEAVES
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return text
            body = json.loads(line.removeprefix(b"data: "))
            if "error" in body:
                self.errors.append(f"in a stream: {body['error']}")
                return text
            if body.get("usage"):
                self._count(body["usage"])
            for choice in body["choices"]:
                if choice["delta"].get("content"):
                    if not text:
                        self.first.append(time.monotonic() - began)
                    text += choice["delta"]["content"]
            if leaves and len(text) > 10:
                self.statuses["left"] += 1
                return text
        self._wrong("a stream ended without [DONE]")
        return text

    def _wrong(self, error: str) -> None:
        """What goes wrong once the time is over is that this client leaves."""
        if time.monotonic() < self._until:
            self.errors.append(error)
        else:
            self.statuses["left at the end"] += 1

    def leave(self) -> None:
        """The time is over: an answer that has not come is not waited for."""
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _count(self, usage: dict[str, Any]) -> None:
        self.usage["answers"] += 1
        self.usage["prompt"] += usage["prompt_tokens"]
        self.usage["said"] += usage["completion_tokens"]
        self.usage["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
        self.usage["read_again"] += usage["kvsieve"]["read_again"]


# ------------------------------------------------------------------------------------------------------------------- the server


def metrics(address: str) -> dict[tuple[str, str], float]:
    """Values by name and label."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    families = text_string_to_metric_families(text)
    return {(one.name, ",".join(one.labels.values())): one.value for family in families for one in family.samples}


def quantile(found: dict[tuple[str, str], float], name: str, share: float) -> float | None:
    """Of a histogram, interpolated between the bounds around it; None if that is above all bounds, or there is nothing."""
    steps = sorted((float(bound), count) for (one, bound), count in found.items() if one == f"{name}_bucket")
    below, lower = 0.0, 0.0
    for bound, count in steps:
        if count and count >= share * steps[-1][1]:
            return None if bound == float("inf") else lower + (bound - lower) * (share * steps[-1][1] - below) / (count - below)
        below, lower = count, bound
    return None


def resident(process: int) -> dict[str, float]:
    """MiB of a process now, and at most so far; empty where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    told = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: round(int(value.split()[0]) / 1024, 1) for name, value in told.items()}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{at}": round(ordered[min(len(ordered) * at // 100, len(ordered) - 1)], 3) for at in (50, 99)} if ordered else {}


def load(address: str, process: int, clients: int, minutes: float) -> dict[str, Any]:
    """What the clients found, and the server tells, after so many minutes."""
    until = time.monotonic() + 60 * minutes
    threads = [Client(address, number, until) for number in range(clients)]
    for thread in threads:
        thread.start()
    marks: list[dict[str, float]] = []
    while time.monotonic() < until:
        time.sleep(min(PAUSE, max(until - time.monotonic(), 0)))
        now = metrics(address)
        held = now[("kvsieve_held_bytes", "")] / 2**20
        marks.append({"seconds": round(60 * minutes - (until - time.monotonic())), "held_mib": round(held, 1), **resident(process)})
    for thread in threads:
        thread.leave()
    for thread in threads:
        thread.join()
    found, usage = metrics(address), sum((thread.usage for thread in threads), collections.Counter[str]())
    statuses = sum((thread.statuses for thread in threads), collections.Counter[str]())
    errors = [error for thread in threads for error in thread.errors]
    steps = {name: quantile(found, "kvsieve_step_seconds", share) for name, share in (("p50", 0.5), ("p99", 0.99))}
    limit = found[("kvsieve_memory_limit_bytes", "")] / 2**20
    median, late, most = steps["p50"], steps["p99"], max(mark["held_mib"] for mark in marks)
    return {
        "kept": {
            "no error but 429": not errors,
            "steps": median is not None and late is not None and late <= SPREAD * median,
            "memory": most <= limit,
        },
        "statuses": dict(statuses),
        "errors": len(errors),
        "first_errors": errors[:5],
        "usage": dict(usage),
        "first_token_seconds": spread([one for thread in threads for one in thread.first]),
        "step_seconds": steps,
        "p99_times_median": None if not median or late is None else round(late / median, 2),
        "steps": found[("kvsieve_step_seconds_count", "")],
        "memory": marks[:: max(len(marks) // 12, 1)],
        "most_held_mib": most,
        "memory_limit_mib": limit,
        "server": {name: value for (name, label), value in sorted(found.items()) if name.endswith("_total") and not label},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    parser.add_argument("server", nargs="*", help="options of kvsieve serve, after --")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "kvsieve.cli", "serve", "--port", "0", *arguments.server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            told = re.search(r"http://(\S+)/v1", line)
            if told is None:
                return server.wait() or 1
            before = resident(server.pid)
            found = load(told[1], server.pid, arguments.clients, arguments.minutes)
        finally:
            server.send_signal(signal.SIGTERM)
    settings = {"clients": arguments.clients, "minutes": arguments.minutes, "options": arguments.server}
    found = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        **settings,
        "before": before,
        **found,
    }
    found["exit_status"] = server.returncode
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(found["kept"].values()) and not server.returncode else 1


if __name__ == "__main__":
    sys.exit(main())
