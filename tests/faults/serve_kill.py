"""kill -9 at random moments of a process that answers conversations and writes them to files.

    python tests/faults/serve_kill.py --times 100

A child serves four conversations over one folder, and reports each answer whose end was told. It is killed at a random moment.
Another child opens the folder and goes on with each conversation. It must either continue what was remembered, and then answer as
a service that nobody killed, or say that it read the conversation again, and then answer as one that has only read it. In every
other round answers are durable: what was reported must continue. Owners are new in each round, the folder is not: what earlier
rounds left half-written lies there. Every other two rounds the folder is one that servers share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvsieve
import serve_cases as cases
import torch
from kvsieve.serve.service import Service
from serve_cases import answer, ask, job

TURNS, NEW = 4, 6
TALKS = [[f"{name} asks for {what} {turn}, and for no more than that" for turn in range(TURNS + 1)] for name, what in (
    ("ada", "water"), ("bob", "bread"), ("cat", "a boat and some rope to hold it"), ("dan", "nothing"))]  # fmt: skip
POLICIES = {"sirllm": lambda: kvsieve.SirLLM(64, recent=8), "full": kvsieve.Full, "snapkv": lambda: kvsieve.SnapKV(64, observe=8)}
OPTIONS: dict[str, Any] = {"eos_token_id": None}
OWN, SHARED = "sessions", "shared"
"""Folders: of one server at a time, and of several."""


def messages(talk: int, said: list[str]) -> list[tuple[str, str]]:
    """A conversation after these answers, with its next question."""
    found = []
    for asked, answered in zip(TALKS[talk], said):
        found += [("user", asked), ("assistant", answered)]
    return [*found, ("user", TALKS[talk][len(said)])]


def expected(policy: str, report: Callable[[Any], None]) -> None:
    """Of each conversation and turn: what a service answers that goes on, and one that has only read what was said.

    In a child as well: after threads have multiplied matrices, MKL hangs in a process that is forked.
    """
    goes_on: list[list[str]] = []
    with cases.service(POLICIES[policy]()) as service:
        for talk in range(len(TALKS)):
            said: list[str] = []
            for _ in range(TURNS + 1):
                said.append(answer(service, messages(talk, said), NEW, owner=f"{talk}", **OPTIONS).text())
            goes_on.append(said)
        read = [
            [answer(service, messages(talk, said[:k]), NEW, owner=f"{talk} {k}", **OPTIONS).text() for k in range(TURNS + 1)]
            for talk, said in enumerate(goes_on)
        ]
    report([goes_on, read])


def opened(policy: str, folder: Path, durable: bool) -> Service:
    where = f"file://{folder}" if folder.name == SHARED else folder
    return cases.service(POLICIES[policy](), sessions=where, durable=durable, disk=4 << 20)


# --------------------------------------------------------------------------------------------------------------------- the children


def forked(work: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
    """A child that does ``work``; its number, and where its reports are read, a line of JSON each."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    try:
        os.close(reads)
        work(lambda line: void(os.write(writes, json.dumps(line).encode() + b"\n")))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def void(_: Any) -> None:
    """Nothing."""


def lines(reads: int, until: float | None = None) -> Iterator[Any]:
    """Reports of a child, whole lines, until it ends or time is up."""
    held = b""
    while True:
        left = None if until is None else max(until - time.monotonic(), 0.0)
        if not select.select([reads], [], [], left)[0]:
            return
        piece = os.read(reads, 65536)
        if not piece:
            return
        *whole, held = (held + piece).split(b"\n")
        yield from (json.loads(line) for line in whole)


def serve(policy: str, folder: Path, name: str, durable: bool, report: Callable[[Any], None]) -> None:
    """All conversations, turn by turn. What was reported was told to a client."""
    with opened(policy, folder, durable) as service:
        report("open")
        said: list[list[str]] = [[] for _ in TALKS]
        for _ in range(TURNS):
            asked = [
                ask(service, job(messages(talk, said[talk]), NEW, owner=f"{name} {talk}", **OPTIONS)) for talk in range(len(TALKS))
            ]
            for talk, heard in enumerate(asked):
                if heard.wait().error is not None:
                    raise heard.error  # type: ignore[misc]
                said[talk].append(heard.text())
                report([talk, heard.text()])
            time.sleep(0.01)  # nobody asks: conversations are written


def go_on(policy: str, folder: Path, name: str, said: list[list[str]], report: Callable[[Any], None]) -> None:
    """The next turn of every conversation, after a restart."""
    with opened(policy, folder, False) as service:
        for talk, texts in enumerate(said):
            heard = answer(service, messages(talk, texts), NEW, owner=f"{name} {talk}", **OPTIONS)
            report([talk, heard.text(), heard.usage().cached, heard.usage().read_again])
        report(["unusable", service.snapshot().unusable])


# ------------------------------------------------------------------------------------------------------------------------ one round


def round_of(policy: str, folder: Path, name: str, durable: bool, wait: float, wanted: Any) -> dict[str, Any]:
    """A kill after ``wait`` seconds, and what became of the conversations."""
    child, reads = forked(lambda report: serve(policy, folder, name, durable, report))
    said: list[list[str]] = [[] for _ in TALKS]

    def note(found: Any) -> None:
        if found != "open":
            said[found[0]].append(found[1])

    for found in lines(reads, time.monotonic() + wait):
        note(found)
    os.kill(child, signal.SIGKILL)
    for found in lines(reads):  # what it had reported until then
        note(found)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    wrong = [] if killed or os.WEXITSTATUS(status) == 0 else ["the child failed by itself"]

    goes_on, read = wanted
    for talk, texts in enumerate(said):
        if texts != goes_on[talk][: len(texts)]:
            wrong.append(f"{policy}: before the kill conversation {talk} was answered otherwise")
    child, reads = forked(lambda report: go_on(policy, folder, name, said, report))
    after = list(lines(reads))
    os.close(reads)
    if os.waitpid(child, 0)[1] or len(after) != len(TALKS) + 1:
        wrong.append(f"{policy}: the folder could not be used after the kill")
        after = []
    counts = {"continued": 0, "read_again": 0}
    for talk, text, cached, again in (one for one in after if one[0] != "unusable"):
        turn = len(said[talk])
        if not turn:
            continue
        counts["read_again" if again else "continued"] += 1
        if again and durable:
            wrong.append(f"{policy}: a durable answer was lost: conversation {talk}, turn {turn}")
        if not again and not cached:
            wrong.append(f"{policy}: conversation {talk} was read again and nobody said so")
        if text != (read if again and not cached else goes_on)[talk][turn] and not (again and cached):
            wrong.append(f"{policy}: after the kill conversation {talk} is answered otherwise ({'read' if again else 'continued'})")
    left = [path.name for path in folder.rglob("*.partial")]
    if left and folder.name == OWN:  # elsewhere another server may be writing them
        wrong.append(f"half-written files stay: {left[:3]}")
    return {"killed": int(killed), **counts, "unusable": sum(one[1] for one in after if one[0] == "unusable"), "wrong": wrong}


def run(policy: str, times: int, seed: int) -> dict[str, Any]:
    """One policy: so many kills."""
    rng, total = random.Random(f"{policy} {seed}"), {"killed": 0, "continued": 0, "read_again": 0, "unusable": 0}
    wrong: list[str] = []
    child, reads = forked(lambda report: expected(policy, report))
    (wanted,) = lines(reads)
    os.close(reads)
    os.waitpid(child, 0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / OWN
        began = time.monotonic()
        child, reads = forked(lambda report: serve(policy, folder, "first", False, report))
        if len(list(lines(reads))) != 1 + len(TALKS) * TURNS or os.waitpid(child, 0)[1]:
            return {"policy": policy, **total, "wrong": ["nobody was killed, and the child failed"]}
        os.close(reads)
        whole = time.monotonic() - began
        for at in range(times):
            folder = Path(place) / (OWN, SHARED)[at // 2 % 2]
            found = round_of(policy, folder, f"{at}", at % 2 == 0, rng.random() * whole * 1.1, wanted)
            wrong += found.pop("wrong")
            total = {name: total[name] + count for name, count in found.items()}
    return {"policy": policy, "rounds": times, **total, "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=6, help="kills of all policies together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--policy", action="append", choices=list(POLICIES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    failed, names = 0, args.policy or list(POLICIES)
    for name in names:
        row = run(name, max(args.times // len(names), 1), args.seed)
        failed += len(row["wrong"])
        print(json.dumps({**row, "wrong": row["wrong"][:5], "seed": args.seed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
