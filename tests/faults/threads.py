"""Streams in threads, forks of the process in the middle of them, and workers of a DataLoader.

    python tests/faults/threads.py --rounds 50

`own`: eight threads, each with a stream of its own, on one model and on several, answer as each does alone. `shared`: eight threads
use one stream at once: each call returns or is refused by a `StateError` that says so, and afterwards the stream holds exactly what
the calls that returned told it. `forks`: the process is forked while other threads are anywhere in their turns; the child opens and
closes streams, uses those that were open, and ends by itself. `workers`: a DataLoader's workers while a stream is at work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvsieve
import tiny
import torch
from kvsieve.errors import StateError
from systems import OF_EVERY_KIND, SYSTEMS

THREADS = 8
PATIENCE = 60
"""Seconds after which a child hangs."""


def answers(model: Any, name: str, seed: int) -> list[list[int]]:
    """A conversation under one system."""
    found = []
    with kvsieve.stream(model, SYSTEMS[name].of_rows(1), "cpu") as stream:
        stream.feed(tiny.ids(1, 130, seed))
        for turn in range(2):
            ids = stream.generate(tiny.ids(1, 5 + seed % 3, seed + turn), do_sample=False, max_new_tokens=4)
            found.append(ids[0].tolist())
    return found


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What each of the threads returned or raised."""
    found: list[Any] = [None] * THREADS

    def one(at: int) -> None:
        try:
            found[at] = work(at)
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=one, args=(at,), name=f"worker {at}") for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def own(rounds: int) -> tuple[int, list[str]]:
    """Conversations compared, and those that differ."""
    wrong, count = [], 0
    for turn in range(rounds):
        names = [OF_EVERY_KIND[(turn * THREADS + at) % len(OF_EVERY_KIND)] for at in range(THREADS)]
        models = [tiny.model(seed=at if turn % 2 else 0) for at in range(THREADS)]
        wanted = [answers(models[at], names[at], at) for at in range(THREADS)]
        for at, got in enumerate(in_threads(lambda at, m=models, n=names: answers(m[at], n[at], at))):  # type: ignore[misc]
            count += 1
            if got != wanted[at]:
                wrong.append(f"own {names[at]}: {got!r} in place of {wanted[at]}"[:300])
    return count, wrong


def shared(rounds: int) -> tuple[int, list[str]]:
    """Calls of several threads on one stream, and what was wrong with them."""
    wrong, count, model = [], 0, tiny.model()
    for turn in range(rounds):
        with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
            stream.feed(tiny.ids(1, 20))
            told = [0] * THREADS

            def use(at: int, stream: kvsieve.Stream = stream, told: list[int] = told, turn: int = turn) -> list[str]:
                rng, strange = random.Random(turn * THREADS + at), []
                for _ in range(6):
                    call, size = rng.randrange(4), rng.randrange(1, 9)
                    try:
                        if call == 0:
                            stream.feed(tiny.ids(1, size, at))
                            told[at] += size
                        elif call == 1:
                            told[at] += stream.generate(tiny.ids(1, size, at), do_sample=False, max_new_tokens=3).shape[1]
                        elif call == 2:
                            stream.mark()
                        else:
                            stream.end_turn()
                    except StateError as refused:
                        if "in use by thread" not in str(refused):
                            strange.append(f"shared: {refused}")
                    except BaseException as error:
                        strange.append(f"shared: {type(error).__name__}: {error}")
                return strange

            for found in in_threads(use):
                count += 6
                wrong += [str(found)] if isinstance(found, BaseException) else found
            ids = stream.ids[0][None]
            if ids.shape[1] != 20 + sum(told):
                wrong.append(f"shared: {ids.shape[1]} tokens in the stream, {20 + sum(told)} were told")
                continue
            with kvsieve.stream(model, kvsieve.Full(), "cpu") as twin:
                unread = ids.shape[1] - stream.seen
                twin.feed(ids[:, : ids.shape[1] - unread])
                last = tiny.ids(1, 3, 99)
                mine = stream.generate(last, do_sample=False, max_new_tokens=3)
                told_again = torch.cat([ids[:, ids.shape[1] - unread :], last], 1)
                if twin.generate(told_again, do_sample=False, max_new_tokens=3)[0, -3:].tolist() != mine[0, -3:].tolist():
                    wrong.append("shared: the stream does not answer as one that was told what it holds")
    return count, wrong


def forks(rounds: int) -> tuple[int, list[str]]:
    """Forks of the process, and those whose child did not end well."""
    model, wrong, rng = tiny.model(), [], random.Random(0)
    wanted, stop, streams = answers(model, "sirllm", 3), threading.Event(), []

    def busy(at: int) -> None:
        while not stop.is_set():
            with kvsieve.stream(model, SYSTEMS[OF_EVERY_KIND[at]].of_rows(1), "cpu") as stream:
                streams[at:] = [stream]
                stream.feed(tiny.ids(1, 60, at))
                stream.generate(tiny.ids(1, 4), do_sample=False, max_new_tokens=8)

    threads = [threading.Thread(target=busy, args=(at,), daemon=True) for at in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(rounds):
        time.sleep(rng.random() * 0.05)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            status = 3
            try:
                status = 0 if answers(model, "sirllm", 3) == wanted else 1
                for stream in streams:
                    try:
                        stream.stats()
                        stream.mark()
                        stream.close()
                    except StateError:
                        pass
            except BaseException as error:
                print(f"forks: {type(error).__name__}: {error}", file=sys.stderr)
                status = 2
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status:
            what = "hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"ended with {status}"
            wrong.append(f"forks: the child of fork {turn} {what}")
    stop.set()
    for thread in threads:
        thread.join()
    return rounds, wrong


class _Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> torch.Tensor:
        return tiny.ids(1, 8, at)[0]


def workers(rounds: int) -> tuple[int, list[str]]:
    """Batches that workers made for a stream, and what differs from those made here."""
    model, wrong, count = tiny.model(), [], 0

    def read(**loading: Any) -> list[list[int]]:
        found = []
        with kvsieve.stream(model, kvsieve.StreamingLLM(32, sinks=2), "cpu") as stream:
            for batch in torch.utils.data.DataLoader(_Texts(), batch_size=1, **loading):
                found.append(stream.generate(batch, do_sample=False, max_new_tokens=2)[0].tolist())
        return found

    wanted = read()
    for _ in range(rounds):
        count += len(wanted)
        if read(num_workers=2, timeout=PATIENCE) != wanted:
            wrong.append("workers: a stream answers otherwise beside them")
    return count, wrong


PARTS = {"own": own, "shared": shared, "forks": forks, "workers": workers}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="by default all")
    args = parser.parse_args(argv)
    sys.setswitchinterval(1e-4)
    failed = 0
    for name in args.part or PARTS:
        count, wrong = PARTS[name](args.rounds if name != "forks" else args.rounds * 4)
        failed += len(wrong)
        print(json.dumps({"part": name, "count": count, "wrong": wrong[:10]}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
