"""A conversation in which the core fails at the n-th place, for every n: by a panic, or for want of memory.

    python tests/faults/inject.py --every 1 --system hip

For each step of a conversation (reading, answering, forward by forward, evicting by position, a fork, a crop, the end of a turn, a
session file) the places are counted that the step meets (`kvsieve_core::fault`). Then the step is done again with the n-th of them
failing, from a mark before it. Each time the failure must be a `MemoryError`, or the `RuntimeError` of a panic; rewound to the mark
the stream must hold what it held there, in as much memory; and the step, done again, must answer as ever and leave the same memory,
bit for bit. A stream may instead say that its layers no longer agree (`StateError`), where a change that all of them must make
failed in their midst: then it must be as new once it is reset. Whatever else happens is told.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import drive
import kvsieve
import tiny
import torch
from kvsieve import _core
from kvsieve.errors import KvsieveError, StateError
from systems import OF_EVERY_KIND, PROMPT, SYSTEMS

ALL = 1 << 40
KINDS = {"memory": False, "panic": True}


class _Refused(Exception):
    """The step is refused under this policy: there is nothing to try."""


def steps(folder: Path) -> dict[str, Callable[[kvsieve.Stream], Any]]:
    """What is done to a stream, by name; each returns something to compare."""

    def read(stream: kvsieve.Stream) -> Any:
        stream.feed(tiny.ids(1, PROMPT, 1))

    def answer(stream: kvsieve.Stream) -> Any:
        return stream.generate(tiny.ids(1, 9, 2), max_new_tokens=4, do_sample=False).tolist()

    def forwards(stream: kvsieve.Stream) -> Any:
        return drive.forwards(stream.model, stream.cache, tiny.ids(1, 6, 3), [3, 1]).argmax(-1).tolist()

    def forget(stream: kvsieve.Stream) -> Any:
        stream.evict(20, 31)

    def fork(stream: kvsieve.Stream) -> Any:
        with stream.fork() as child:
            return child.generate(tiny.ids(1, 5, 4), max_new_tokens=3, do_sample=False).tolist()

    def crop(stream: kvsieve.Stream) -> Any:
        stream.cache.crop(-1)

    def save(stream: kvsieve.Stream) -> Any:
        stream.save(folder / "session")
        with kvsieve.load(folder / "session", stream.model) as again:
            return again.generate(tiny.ids(1, 3, 5), max_new_tokens=2, do_sample=False).tolist()

    def end(stream: kvsieve.Stream) -> Any:
        stream.end_turn()

    return {
        "read": read, "answer": answer, "forwards": forwards, "evict": forget, "fork": fork, "crop": crop, "save": save, "end": end,
    }  # fmt: skip


def held(stream: kvsieve.Stream) -> tuple[int, int]:
    """Blocks in use, and bytes of keys and values: less is no leak, for a stream that is rewound gives back what nobody needs."""
    return stream._engine.planner.used_blocks, stream._engine.bytes_held


class Conversation:
    """One system's stream on its way, and what was found wrong."""

    def __init__(self, name: str, kind: str, folder: Path, every: int) -> None:
        self.name, self.kind, self.every = name, kind, every
        self.system, self.model, self.steps = SYSTEMS[name], tiny.model(), steps(folder)
        self.stream = self.opened()
        # Of 64 tokens in every layer. It is there once, however many steps fail.
        self.room = sum(
            64 * x.num_kv_heads * (x.key_dim + x.value_dim) * x.dtype.itemsize for x in self.stream._engine.facts.layers
        )
        self.done: list[str] = []
        self.tried: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def opened(self) -> kvsieve.Stream:
        """A stream of its own, closed by :meth:`close`."""
        return kvsieve.stream(self.model, self.system.of_rows(1), "cpu")

    def close(self) -> None:
        """Whatever was armed is not any more."""
        _core.fail_at(self.kind == "panic", 0)
        self.stream.close()

    def armed(self, step: Callable[[kvsieve.Stream], Any], nth: int) -> BaseException | None:
        """What the step raised with its ``nth`` place failing."""
        _core.fail_at(KINDS[self.kind], nth)
        try:
            step(self.stream)
        except (KvsieveError, RuntimeError, MemoryError) as error:
            return error
        finally:
            self.left = _core.fail_at(KINDS[self.kind], 0)
        return None

    def run(self) -> None:
        """The whole conversation."""
        for name, step in self.steps.items():
            try:
                self.one(name, step)
            except _Refused:
                continue
            self.done.append(name)

    def one(self, name: str, step: Callable[[kvsieve.Stream], Any]) -> None:
        """One step: counted, made to fail everywhere, and then done."""
        mark, before = self.stream.mark(), held(self.stream)
        self.stream.rewind(mark)
        before = held(self.stream)
        try:
            wanted = step(self.stream)
        except KvsieveError as error:
            raise _Refused from error
        after = drive.snapshot(self.stream)
        self.stream.rewind(mark)
        unarmed = self.armed(step, ALL)
        if unarmed is not None:
            self.wrong.append(f"{self.name} {name}: the step itself raised {unarmed!r}")
            return
        places = ALL - self.left
        self.stream.rewind(mark)
        for nth in range(1, places + 1, self.every):
            if not self.fails(f"{self.name} {name} {self.kind} {nth} of {places}", step, nth, mark, before):
                self.replay()
                mark = self.stream.mark()
            elif step(self.stream) != wanted or not self.same(after, drive.snapshot(self.stream)):
                self.wrong.append(f"{self.name} {name} {self.kind} {nth} of {places}: done again it was not as ever")
            self.stream.rewind(mark)
        step(self.stream)

    def fails(self, where: str, step: Callable[[kvsieve.Stream], Any], nth: int, mark: Any, before: tuple[int, int]) -> bool:
        """Whether the stream is of use after the failure."""
        error = self.armed(step, nth)
        self.tried[self.kind] += 1
        # None where somebody met it who has something else to fall back to.
        if error is not None and not self.expected(error):
            self.wrong.append(f"{where}: {type(error).__name__}: {error}")
        # Its traceback holds what the call's frames do.
        del error
        try:
            self.stream.rewind(mark)
        except StateError as refused:
            self.tried["broken"] += 1
            if "reset this stream" not in str(refused):
                self.wrong.append(f"{where}: cannot be rewound: {refused}")
            return False
        if self.holds_more(before):
            gc.collect()
            self.stream.rewind(mark)
        if self.holds_more(before):
            self.wrong.append(f"{where}: holds {held(self.stream)} in place of {before}")
        return True

    def holds_more(self, before: tuple[int, int]) -> bool:
        """Whether there are more blocks than before, or more bytes than are kept once made: bounds of pages, and room of a block in
        each layer, which grows as it fills."""
        (blocks, size), (had, least) = held(self.stream), before
        return blocks > had or size > 1.02 * least + self.room

    def expected(self, error: BaseException) -> bool:
        """A panic's own class, or want of memory."""
        return type(error).__name__ == "PanicException" if KINDS[self.kind] else isinstance(error, MemoryError)

    def same(self, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        """Whether two memories are the same bit for bit. What a bank recalls lies in other pieces after a rewind, whose sums differ
        in a last bit."""
        if a.keys() != b.keys():
            return False
        if "recalls" not in self.system.doing:
            return all(torch.equal(a[name], b[name]) for name in a)
        return all(torch.allclose(a[name].double(), b[name].double(), atol=1e-3, equal_nan=True) for name in a)

    def replay(self) -> None:
        """A stream that is broken is as new once it is reset."""
        self.stream.reset()
        if self.system.make().bank is not None:
            # What a bank holds is not forgotten.
            self.stream.close()
            self.stream = self.opened()
        for name in self.done:
            self.steps[name](self.stream)


def run(names: list[str], kinds: list[str], every: int) -> Iterator[dict[str, Any]]:
    """One row for each system and kind of failure."""
    for name in names:
        for kind in kinds:
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                talk = Conversation(name, kind, Path(folder), every)
                try:
                    talk.run()
                finally:
                    talk.close()
            row = {"system": name, "kind": kind, "steps": len(talk.done), "tried": talk.tried[kind], "broken": talk.tried["broken"]}
            yield {**row, "seconds": round(time.monotonic() - began, 1), "wrong": talk.wrong}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="try every so many-th place")
    parser.add_argument("--system", action="append", choices=list(SYSTEMS), help="by default one of every kind")
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    args = parser.parse_args(argv)
    wrong = 0
    for row in run(args.system or OF_EVERY_KIND, args.kind or list(KINDS), args.every):
        print(json.dumps({**row, "wrong": row["wrong"][:5]}), flush=True)
        wrong += len(row["wrong"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
