"""Ctrl-C at random moments of reading, answering, saving, compressing and searching.

    python tests/faults/interrupts.py --moments 500

A thread sends SIGINT at a random moment of a call. `KeyboardInterrupt` must come within 200 ms of the main thread's own CPU time,
so that other programs do not count. Then the stream is rewound to a mark from before the call. It must hold what it held, answer
the call again as a twin that nobody interrupted, and hold the same afterwards, bit for bit. A file that was being saved is loaded,
and is the old one or the new one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import drive
import kvsieve
import tiny
import torch
from systems import SYSTEMS

LATE = 0.2
PROMPT = tiny.ids(1, 700, 1)


def feed(stream: kvsieve.Stream, folder: Path) -> Any:
    stream.feed(PROMPT, chunk=256)


def answer(stream: kvsieve.Stream, folder: Path) -> Any:
    return stream.generate(PROMPT[:, :90], max_new_tokens=12, do_sample=False).tolist()


def save(stream: kvsieve.Stream, folder: Path) -> Any:
    stream.save(folder / "session")


def one_token(stream: kvsieve.Stream, folder: Path) -> Any:
    return drive.forwards(stream.model, stream.cache, PROMPT[:, :8], [1]).argmax(-1).tolist()


CALLS: dict[str, tuple[str, Callable[[kvsieve.Stream, Path], Any]]] = {
    "feed": ("streaming_llm", feed),
    "feed, scores": ("sirllm", feed),
    "generate": ("sirllm", answer),
    "generate, heads": ("snapkv", answer),
    "save": ("full", save),
    "compress, ThinK": ("think", feed),
    "compress, Quantized": ("quantized", feed),
    "compress, token by token": ("think_quantized", one_token),
    "search, HiP": ("hip", feed),
    "search, Quest": ("quest", answer),
    "fetch, InfLLM": ("infllm", answer),
}


def interrupted(call: Callable[[], Any], wait: float) -> tuple[bool, float]:
    """Whether the call was, after ``wait`` seconds of this thread's own time, and how much of it the exception took to come."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    begin, sent, over = time.clock_gettime(clock), [0.0], threading.Event()

    def send() -> None:
        while time.clock_gettime(clock) - begin < wait:
            if over.wait(0.0005):
                return
        sent[0] = time.clock_gettime(clock)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    try:
        sender.start()
        call()
        over.set()
        sender.join()
        # One that was sent at the very end comes now.
        time.sleep(0)
    except KeyboardInterrupt:
        over.set()
        late = time.clock_gettime(clock) - sent[0]
        sender.join()
        return True, late
    return False, 0.0


def run(name: str, moments: int, seed: int) -> dict[str, Any]:
    """One row: a call interrupted so many times."""
    system, call = CALLS[name]
    rng, wrong, hit, latest = random.Random(seed), [], 0, 0.0
    with tempfile.TemporaryDirectory() as place, kvsieve.stream(tiny.model(), SYSTEMS[system].of_rows(1), "cpu") as stream:
        folder = Path(place)
        stream.feed(tiny.ids(1, 300, 2))
        mark = stream.mark()
        stream.rewind(mark)
        before = drive.snapshot(stream)
        times = []
        for _ in range(3):
            began = time.thread_time()
            wanted = call(stream, folder)
            times.append(time.thread_time() - began)
            after = drive.snapshot(stream)
            stream.rewind(mark)
        for _ in range(moments):
            was, late = interrupted(lambda: call(stream, folder), rng.random() * min(times))
            hit, latest = hit + was, max(latest, late)
            if was and late > LATE:
                wrong.append(f"{name}: raised after {late * 1000:.0f} ms")
            stream.rewind(mark)
            if not same(before, drive.snapshot(stream)):
                wrong.append(f"{name}: rewound it does not hold what it held")
            if name == "save":
                with kvsieve.load(folder / "session", stream.model) as loaded:
                    if not same(before, drive.snapshot(loaded)):
                        wrong.append(f"{name}: the file is neither the old one nor the new one")
            if call(stream, folder) != wanted or not same(after, drive.snapshot(stream)):
                wrong.append(f"{name}: done again it is not as ever")
            stream.rewind(mark)
    row = {"call": name, "moments": moments, "interrupted": hit, "latest_ms": round(latest * 1000, 1)}
    return {**row, "wrong": wrong}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=66, help="of all calls together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--call", action="append", choices=list(CALLS))
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed, names = 0, args.call or list(CALLS)
    for name in names:
        row = run(name, max(args.moments // len(names), 1), args.seed)
        failed += len(row["wrong"])
        print(json.dumps({**row, "wrong": row["wrong"][:5], "seed": args.seed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
