"""A process that gets no more memory from the system: streams that grow until they are refused, and go on.

    python tests/faults/limits.py --refusals 400

`RLIMIT_AS` is set a little above what the process has, and a stream reads and answers until an allocation fails. That must be a
`MemoryError`, or torch's own `RuntimeError` where a matrix of the model found no place. Then the limit is lifted. The stream is
rewound to a mark from before the call: it must hold what a twin holds that did the same and was never refused, in no more memory;
and what was refused, done again, must leave both the same, bit for bit. A stream may instead say that it must be reset. Each
policy has a process of its own, so that one that ends is noticed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import drive
import kvsieve
import tiny
import torch
from kvsieve.errors import StateError
from systems import SYSTEMS

MIB = 1 << 20
ROOM = (0, MIB // 8, MIB // 2, MIB, 2 * MIB)
"""Bytes above what the process has."""
BLOCK = 64 * 2 * 2 * 4 * 128 * 4
"""Bytes of 64 tokens in both layers: a block may be there in part, or whole."""
ROUNDS = 40
"""Calls after which nothing more is refused, so that a policy under which nothing ever is ends too."""

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

POLICIES: dict[str, Callable[[], Any]] = {
    "Full": kvsieve.Full,
    "Full, reserved": kvsieve.Full,
    "StreamingLLM": lambda: kvsieve.StreamingLLM(256),
    "SirLLM": lambda: kvsieve.SirLLM(256),
    "SnapKV": lambda: kvsieve.SnapKV(256),
    "H2O": lambda: kvsieve.H2O(256),
    "Quantized": lambda: kvsieve.Quantized(8, group=8),
    "ThinK": lambda: kvsieve.ThinK(0.5),
    "HiP": SYSTEMS["hip"].make,
    "InfLLM": SYSTEMS["infllm"].make,
    "LongHeads, tiers": lambda: kvsieve.LongHeads(96, chunk=16) | kvsieve.Memory(storage=kvsieve.policy.Tiered("4MiB")),
}


RESERVED = "Full, reserved"
"""The only one whose blocks lie in addresses that are reserved beforehand, for its heads' blocks are whole pages."""


def model(name: str) -> Any:
    """One whose tokens take 8 KB of keys and values, and little else."""
    return tiny.model(num_attention_heads=4, num_key_value_heads=4, head_dim=128 if name == RESERVED else 120)


def limited(room: int | None) -> None:
    """No more than ``room`` bytes more than there are, or whatever the system has."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if room is None:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + room, hard))


def is_torchs(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "memory" in str(error)


class Talk:
    """A stream and its twin, and what was found wrong."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.lot = name, random.Random(f"{name} {seed}")
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        self.stream, self.twin = (kvsieve.stream(model(self.name), POLICIES[self.name](), "cpu") for _ in range(2))
        for call in (self.call(7, 1), self.call(300, 0)):  # whatever is made at a first call is there
            call(self.stream)
            call(self.twin)
        mark = self.stream.mark()
        self.stream.rewind(mark)
        self.differs("from the beginning")

    def end(self) -> None:
        """Reset, both hold as much after the same text, however often one was refused."""
        call, held = self.call(300, 0), []
        for stream in (self.stream, self.twin):
            stream.reset()
            call(stream)
            held.append(stream._engine.bytes_held)
            stream.close()
        if held[0] != held[1]:
            self.wrong.append(f"{self.name}: holds {held[0]} bytes in the end, its twin {held[1]}")

    def call(self, tokens: int, new: int) -> Callable[[kvsieve.Stream], Any]:
        """A text to read, and so many tokens of answer."""
        ids = torch.tensor([[self.lot.randrange(1, 128) for _ in range(tokens)]])
        if new:
            return lambda stream: stream.generate(ids, max_new_tokens=new, do_sample=False).tolist()
        return lambda stream: stream.feed(ids, chunk=512)

    def differs(self, when: str) -> None:
        mine, other = drive.snapshot(self.stream), drive.snapshot(self.twin)
        if mine.keys() != other.keys() or not all(torch.equal(mine[name], other[name]) for name in mine):
            self.wrong.append(f"{self.name}, {when}: holds something else than its twin")

    def refused(self) -> bool:
        """Whether something was refused once: read under a limit until it is, look at what is left, and go on."""
        done, error, mark = [], None, self.stream.mark()
        calls = [self.call(self.lot.choice((1, 1, 3, 8, 8, 200)), self.lot.choice((0, 0, 12, 24))) for _ in range(6)]
        gc.collect()
        if self.lot.random() < 0.3:  # what the allocator has in reserve is enough for most matrices, and for few blocks
            ctypes.CDLL(None).malloc_trim(0)
        limited(self.lot.choice(ROOM))
        try:
            for call in calls:
                mark = self.stream.mark()
                done.append((call, call(self.stream)))
        except (MemoryError, RuntimeError) as raised:  # a StateError is none of them
            error = raised
        finally:
            limited(None)
        for call, answer in done:
            held = self.twin.mark()  # for what a mark holds is coded later
            if call(self.twin) != answer:
                self.wrong.append(f"{self.name}: another answer than its twin's")
            del held
        if error is None:
            self.over()
            return False
        kind = "typed" if isinstance(error, MemoryError) else "torch" if is_torchs(error) else "other"
        if kind == "other":
            self.wrong.append(f"{self.name}: {type(error).__name__}: {str(error)[:200]}")
        self.counts[kind] += 1
        del error
        try:
            self.stream.rewind(mark)
        except StateError as told:
            self.counts["broken"] += 1
            if "reset this stream" not in str(told):
                self.wrong.append(f"{self.name}: {told}")
            self.stream.reset()
            self.twin.reset()
            return True
        del mark
        again = calls[len(done)] if len(done) < len(calls) else self.call(5, 1)
        mark = self.twin.mark()
        again(self.twin)
        self.twin.rewind(mark)
        del mark
        self.differs("after a refusal")
        gc.collect()
        (blocks, size), (most, bound) = (
            (stream._engine.planner.used_blocks, stream._engine.bytes_held) for stream in (self.stream, self.twin)
        )
        tiers = 4 * MIB + 4 * BLOCK if "tiers" in self.name else 0  # which of as many blocks are in memory may differ
        if blocks > most or size > max(bound + BLOCK, tiers):
            self.wrong.append(f"{self.name}: holds {blocks} blocks and {size} bytes, its twin {most} and {bound}")
        if again(self.stream) != again(self.twin):
            self.wrong.append(f"{self.name}: what was refused is answered otherwise")
        self.differs("done again")
        self.over()
        return True

    def over(self) -> None:
        """A text that has become long ends."""
        if self.stream.seen > 2_000:
            self.stream.reset()
            self.twin.reset()


def child(name: str, refusals: int, rounds: int, seed: int) -> dict[str, Any]:
    """What one policy's process found."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # More than one arena of glibc's would have room of its own, which is counted whether it is used or not.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    torch.set_num_threads(1)
    talk, made = Talk(name, seed), 0
    for _ in range(rounds + refusals):
        made += talk.refused()
        if made >= refusals or len(talk.wrong) > 20:
            break
    talk.end()
    return {"policy": name, "refusals": made, **talk.counts, "wrong": talk.wrong[:5]}


def forked(name: str, refusals: int, rounds: int, seed: int) -> dict[str, Any]:
    """The same, by a process that is forked: what all of them import is imported once."""
    with tempfile.TemporaryFile("w+") as told:
        process = os.fork()
        if not process:
            status = 1
            try:
                told.write(json.dumps(child(name, refusals, rounds, seed)))
                told.flush()
                status = 0
            except BaseException as error:
                told.seek(0)
                told.write(f"{type(error).__name__}: {error}"[:200])
                told.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        told.seek(0)
        text = told.read()
    if status == 0:
        return dict(json.loads(text))
    return {"policy": name, "refusals": 0, "wrong": [f"{name}: the process ended with {status}: {text or 'nothing'}"]}


def run(names: list[str], refusals: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row for each policy."""
    found = []
    for name in names:
        found.append(forked(name, max(refusals // len(names), 1), rounds, seed))
        print(json.dumps(found[-1]), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--refusals", type=int, default=100, help="of all policies together")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of a policy, at most, beside those that are refused")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", action="append", choices=list(POLICIES))
    args = parser.parse_args(argv)
    rows = run(args.policy or list(POLICIES), args.refusals, args.rounds, args.seed)
    if not any(row["refusals"] for row in rows):
        print(json.dumps({"refusals": 0, "wrong": ["nothing was refused"]}))
        return 1
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
