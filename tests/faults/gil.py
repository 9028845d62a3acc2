"""How long a call into the core keeps other Python threads waiting.

    python tests/faults/gil.py --tokens 1000000

A second thread ticks as often as it may while a call runs. Between two ticks the calling thread's own CPU time is taken, so that
other programs do not count; of a call's repetitions the one whose longest gap is shortest counts, for only what the call does
itself is long in each. Bookkeeping runs over `--tokens` residents, kernels over 32,768.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from kvsieve import _core

LONGEST = 0.020
STORED = 32_768
HEADS, DIM = 8, 128


def longest_gap(call: Callable[[], Any], repeat: int) -> float:
    """Seconds of the calling thread between two ticks of another one."""
    clock, found = time.pthread_getcpuclockid(threading.get_ident()), []
    for _ in range(repeat):
        over, ready, gap = threading.Event(), threading.Event(), [0.0]

        def tick(over: threading.Event = over, ready: threading.Event = ready, gap: list[float] = gap) -> None:
            last = time.clock_gettime(clock)
            ready.set()
            while not over.is_set():
                time.sleep(0)
                now = time.clock_gettime(clock)
                gap[0], last = max(gap[0], now - last), now

        ticker = threading.Thread(target=tick)
        ticker.start()
        ready.wait()
        call()
        over.set()
        ticker.join()
        found.append(gap[0])
    return min(found)


def planner_of(tokens: int, rule: Any = None) -> Any:
    made = _core.Planner([_core.Memory(rule or _core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")
    made.restore(tokens, [(tokens, [(list(range(tokens)), [0.0] * tokens)])])
    return made


def bookkeeping(tokens: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of a planner over so many residents."""
    planner = planner_of(tokens)
    everything, scores = list(range(tokens)), np.zeros(tokens, np.float32)

    def step(width: int, parts: bool) -> None:
        planner.begin([width], width, True, parts)
        planner.rollback()

    def residents() -> None:
        planner.begin_residents([1], 1)
        planner.rollback()

    yield "Planner.begin, one token", lambda: step(1, False)
    yield "Planner.begin, 512 tokens and parts", lambda: step(512, True)
    yield "Planner.begin_residents", residents
    yield "Planner.fork", planner.fork
    yield "Planner.positions", lambda: planner.positions(0, 0)
    yield "Planner.scores", lambda: planner.scores(0, 0)
    yield "Planner.runs", lambda: planner.runs(0, 0)
    yield "Planner.blocks_in_use", planner.blocks_in_use
    yield "Planner.tidy", planner.tidy
    yield "Planner.settle", lambda: planner.settle(True)
    empty, positions = planner_of(0), np.arange(tokens)

    def restore() -> None:
        empty.reset()
        empty.restore(tokens, [(tokens, [(positions, scores)])])

    yield "Planner.restore, arrays", restore
    own = planner_of(tokens, _core.Eviction.own(tokens, 4, 4))
    yield "Planner.keep", lambda: own.keep(0, 0, everything)
    yield "Planner.decay", lambda: own.decay([0.5])
    yield "keep_surprisal", lambda: _core.keep_surprisal(scores, 4, 64, tokens // 2)
    logits = np.zeros((512, 49_152), np.float32)
    yield "surprisal", lambda: _core.surprisal(logits, np.zeros(512, np.int64))
    yield "top_k", lambda: _core.top_k(logits, 64)


def kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that touch keys and values."""
    planner = planner_of(STORED)
    runs = tuple(np.array(column) for column in zip(*planner.runs(0, 0)))
    store = _core.Store(HEADS, DIM, DIM, "float32")
    k = np.random.default_rng(0).standard_normal((HEADS, STORED, DIM), np.float32)
    yield "Store.write", lambda: store.write(*runs, k, k)
    out_k, out_v = np.empty_like(k), np.empty_like(k)
    yield "Store.gather", lambda: store.gather(*runs, out_k, out_v)
    step = planner.begin([1], 1, True, False)
    new = np.ascontiguousarray(k[None, :, :1])
    store.append(new, new, step)
    out = np.empty((1, 1, HEADS, DIM), np.float32)
    rope = _core.Rope([10000.0 ** (-i / 64) for i in range(64)], "half", 1.0)
    yield "Store.attend", lambda: store.attend(new, step, None, 0.1, None, None, out)
    yield "Store.attend_mass", lambda: store.attend_mass(new, step, rope, 0.1, None, None, out)
    yield "Store.free_unused", lambda: store.free_unused(np.ones(STORED // 64 + 2, bool))
    hip: dict[str, Any] = {"budget": 512, "block": 8, "representative": "middle", "sinks": 4, "window": 512, "query_block": 64}
    sparse = _core.Sparse("hip", **hip, refresh=[1])
    yield "Sparse.attend", lambda: sparse.attend(store, new, step, 0.1, None, None, out)
    pages: dict[str, Any] = {"stages": [(64, 4096), (8, 512)], "representative": "first", "sinks": 64, "window": 512}
    quest = _core.Sparse("infinite", **pages, query_block=64, refresh=[1, 1], page_bounds=True)
    yield "Sparse.attend, page bounds", lambda: quest.attend(store, new, step, 0.1, None, None, out)
    at = np.arange(STORED)
    yield "rotate", lambda: _core.rotate(k, at, rope, out_k)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    sys.setswitchinterval(1e-4)
    failed = 0
    for calls in (bookkeeping(args.tokens), kernels()):
        for name, call in calls:
            gap = longest_gap(call, args.repeat)
            failed += gap > LONGEST
            wrong = [f"{name}: {gap * 1000:.1f} ms"] if gap > LONGEST else []
            print(json.dumps({"call": name, "gap_ms": round(gap * 1000, 2), "wrong": wrong}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
