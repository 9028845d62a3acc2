"""Calls everything of the compiled core with random arguments: a typed error or a result, never a panic, an abort or a hang.

    python tests/faults/fuzz_core.py --calls 100000

Signatures come from the stub `_core.pyi`, so what is added to the core is called too. Calls run in child processes, because an
abort ends one; the call that it died in stands in a file. Objects (stores, planners, steps) are kept, and called in any order.
"""

from __future__ import annotations

import argparse
import ast
import collections
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SMALL = (0, 1, 2, 3, 5, 16, 63, 64, 65, 128)
LARGE = (-1, 257, 4096, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 2**40, 2**57, 2**63 - 1, 2**63, 2**64 - 1, 2**64)
WORDS = ("float32", "float16", "bfloat16", "pre_rope", "post_rope", "half", "interleaved", "", "hip", "quest", "none")
SECONDS = 20
"""A call that takes longer counts as one that hangs."""
MEMORY = 6 << 30
ALLOWED = (TypeError, OverflowError, MemoryError)
"""Beside the library's own: what an argument of another type is told, and a number that the type does not have."""


KINDS = {f"np.{kind}": getattr(np, kind) for kind in ("float32", "int64", "int32", "bool_", "float64")}
OBJECTS: set[str] = set()
"""The classes of the stub."""


@dataclass
class Call:
    """One function, method, property or constructor: `owner` is the class that it needs an object of."""

    name: str
    owner: str | None
    parameters: list[tuple[str, str, bool]]
    keywords: list[tuple[str, str, bool]]
    kind: str
    extra: str | None = None


@dataclass
class Fuzzer:
    rng: random.Random
    core: Any
    calls: list[Call]
    pool: dict[str, list[Any]] = field(default_factory=lambda: collections.defaultdict(list))

    def integer(self) -> int:
        return self.rng.choice(SMALL) if self.rng.random() < 0.75 else self.rng.choice(LARGE)

    def real(self) -> float:
        return self.rng.choice((0.0, 1.0, -1.0, 0.5, 1e30, -1e38, float("nan"), float("inf"), float("-inf"), 1e-45))

    def array(self, dtype: Any) -> Any:
        rng = self.rng
        shape = tuple(rng.choice((0, 1, 1, 2, 3, 4, 8, 64, 65)) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 4, 4))))
        while np.prod(shape) > 1 << 16:
            shape = shape[:-1]
        kind = np.dtype(dtype)
        if kind.kind == "b":
            made = np.array(np.random.default_rng(rng.randrange(1 << 30)).integers(0, 2, shape), dtype=bool)
        elif kind.kind in "iu":
            numbers = SMALL if rng.random() < 0.8 else [n for n in LARGE if n < 2 ** (8 * kind.itemsize - 1)]
            made = np.array([rng.choice(numbers) for _ in range(int(np.prod(shape)))], dtype=kind).reshape(shape)
        else:
            made = np.array([self.real() for _ in range(int(np.prod(shape)))], dtype=np.float64).astype(kind).reshape(shape)
        if rng.random() < 0.08 and made.size:
            made = (
                made[::-1]
                if rng.random() < 0.5
                else np.broadcast_to(made[:1], (rng.choice((3, 1 << 20, 1 << 33)), *made.shape[1:]))
            )
        return made

    def value(self, text: str) -> Any:
        """Something of an annotation, mostly."""
        return (
            self.of(ast.parse(text, mode="eval").body)
            if self.rng.random() < 0.97
            else self.rng.choice((None, -1, "x", [], object()))
        )

    def of(self, node: ast.expr) -> Any:
        rng = self.rng
        match node:
            case ast.BinOp(left=left, right=right):
                return self.of(left if rng.random() < 0.5 else right)
            case ast.Constant(value=None):
                return None
            case ast.Name(id="int"):
                return self.integer()
            case ast.Name(id="float"):
                return self.real()
            case ast.Name(id="bool"):
                return rng.random() < 0.5
            case ast.Name(id="str"):
                return rng.choice(WORDS)
            case ast.Name(id="_Triple"):
                return tuple(self.integer() for _ in range(3))
            case ast.Name(id="Any"):
                return rng.choice((None, self.integer(), self.real(), "x"))
            case ast.Name(id=name):
                return rng.choice(self.pool[name]) if self.pool[name] else None
            case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=inner):
                return [self.of(inner) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 9)))]
            case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
                return tuple(self.of(part) for part in parts)
            case ast.Subscript(value=ast.Name(id="PathLike")):
                return tempfile.gettempdir()
            case ast.Subscript(value=ast.Attribute(attr="NDArray"), slice=inner):
                named = KINDS.get(ast.unparse(inner))
                some = (np.float32, np.float32, np.int16, np.float16, np.float64, np.int64, np.uint8)
                return self.array(named if named is not None and rng.random() < 0.97 else rng.choice(some))
        raise NotImplementedError(ast.unparse(node))

    def one(self, note: Callable[[str], None]) -> None:
        """Makes one call, and keeps what it returns."""
        call = self.rng.choice(self.calls)
        arguments = [self.value(text) for _, text, needed in call.parameters if needed or self.rng.random() < 0.5]
        named = {name: self.value(text) for name, text, needed in call.keywords if needed or self.rng.random() < 0.5}
        if call.extra is not None:
            for name in self.rng.sample(("block", "page", "budget", "top_k", "blocks", "chunk", "x"), self.rng.randrange(4)):
                named[name] = self.value(call.extra)
        target = self.core
        if call.owner is not None:
            if not self.pool[call.owner]:
                return
            target = self.rng.choice(self.pool[call.owner])
        elif "." in call.name:
            target = getattr(self.core, call.name.split(".")[0])
        told = [*map(short, arguments), *(f"{name}={short(value)}" for name, value in named.items())]
        note(f"{call.owner or ''} {call.name}({', '.join(told)})")
        found = getattr(target, call.name.split(".")[-1])
        made = found if call.kind == "property" else found(*arguments, **named)
        for thing in made if isinstance(made, list) else [made]:
            if type(thing).__name__ in OBJECTS:
                self.keep(thing)

    def keep(self, thing: Any) -> None:
        held = self.pool[type(thing).__name__]
        if len(held) < 12:
            held.append(thing)
        else:
            held[self.rng.randrange(12)] = thing


def short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"<{value.dtype}{list(value.shape)} {value.ravel()[:6].tolist() if value.size < 1 << 20 else '...'}>"
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def read_stub(path: Path) -> list[Call]:
    """Every call that the stub declares."""
    calls = []

    def one(node: ast.FunctionDef, owner: str | None) -> Call:
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        static = "staticmethod" in marks or node.name == "__new__"
        positional, defaults = node.args.args, len(node.args.args) - len(node.args.defaults)
        first = 0 if owner is None or "staticmethod" in marks else 1
        parameters = [
            (a.arg, ast.unparse(a.annotation), i < defaults) for i, a in enumerate(positional) if i >= first and a.annotation
        ]
        keywords = [
            (a.arg, ast.unparse(a.annotation), d is None)
            for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults)
            if a.annotation
        ]
        extra = ast.unparse(node.args.kwarg.annotation) if node.args.kwarg and node.args.kwarg.annotation else None
        name = owner if node.name == "__new__" else f"{owner}.{node.name}" if static else node.name
        return Call(
            str(name), None if static else owner, parameters, keywords, "property" if "property" in marks else "call", extra
        )

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            calls.append(one(node, None))
        elif isinstance(node, ast.ClassDef):
            OBJECTS.add(node.name)
            calls += [one(inner, node.name) for inner in node.body if isinstance(inner, ast.FunctionDef)]
    return calls


def begin(fuzzer: Fuzzer) -> None:
    """Objects that work, for calls to begin with."""
    core, rng = fuzzer.core, fuzzer.rng
    for name in OBJECTS:
        fuzzer.pool[name] = []
    evictions = [core.Eviction.keep_all(), core.Eviction.window(2, 5), core.Eviction.surprisal(9, 2, 3), core.Eviction.own(9, 2, 3)]
    rules = [core.PositionRule.original(), core.PositionRule.in_cache(), core.PositionRule.capped(4), core.PositionRule.fixed(3)]
    memory = core.Memory(rng.choice(evictions), rng.choice(rules))
    planner = core.Planner([memory], "pre_rope")
    step = planner.begin([3, 2], 3, True, True)
    store = core.Store(2, 8, 8, "float32")
    k = np.ones((2, 2, 3, 8), np.float32)
    store.append(k, k, step)
    file = core.TierFile(tempfile.gettempdir())
    things = [
        *evictions,
        *rules,
        memory,
        planner,
        step,
        store,
        file,
        core.Rope([1.0, 0.5, 0.25, 0.1]),
        core.Residents(step, 0),
        *step.parts(),
    ]
    other = core.Store(2, 8, 8, "float32")
    other.append(k, k, step)
    things += [other, core.Tier(other, file, 1 << 20)]
    for thing in things:
        fuzzer.keep(thing)


def child(seed: int, first: int, calls: int, notes: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    np.seterr(all="ignore")
    import kvsieve
    from kvsieve import _core

    known = read_stub(Path(kvsieve.__file__).with_name("_core.pyi"))
    with open(notes, "r+b") as file, mmap.mmap(file.fileno(), 4096) as told:

        def note(text: str) -> None:
            data = f"{number} {text}".encode()[:4000]
            told[: len(data) + 1] = data + b"\0"

        fuzzer = None
        for number in range(first, first + calls):
            if fuzzer is None or number % 200 == 0:
                fuzzer = Fuzzer(random.Random(f"{seed} {number}"), _core, known)
                begin(fuzzer)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                fuzzer.one(note)
            except BaseException as error:
                if not isinstance(error, (*ALLOWED, kvsieve.KvsieveError)):
                    last = bytes(told).split(b"\0")[0].decode(errors="replace")
                    print(f"RAW {type(error).__name__}: {str(error)[:200]} | {last}", flush=True)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print("DONE", flush=True)


def run(calls: int, seed: int, tell: Callable[[str], None] = print) -> list[str]:
    """Makes `calls` calls; what went wrong, a line each."""
    wrong, first = [], 0
    with tempfile.NamedTemporaryFile() as notes:
        while first < calls:
            notes.truncate(0)
            notes.truncate(4096)
            asked = {"--child": first, "--calls": calls - first, "--seed": seed, "--notes": notes.name}
            command = [sys.executable, __file__, *(str(word) for pair in asked.items() for word in pair)]
            environment = {**os.environ, "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            wrong += [line for line in done.stdout.splitlines() if line.startswith("RAW ")]
            if done.stdout.endswith("DONE\n"):
                break
            last = Path(notes.name).read_bytes().split(b"\0")[0].decode(errors="replace")
            if not last:
                raise RuntimeError(f"the child did not begin:\n{done.stderr}")
            wrong.append(f"DIED {done.returncode} {done.stderr.strip().splitlines()[-1:]} | {last}")
            tell(wrong[-1])
            first = int(last.split()[0]) + 1
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int)
    parser.add_argument("--notes")
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        child(arguments.seed, arguments.child, arguments.calls, arguments.notes)
        return 0
    began = time.perf_counter()
    wrong = run(arguments.calls, arguments.seed)
    for line in wrong:
        print(line)
    print(f"{arguments.calls:,} calls in {time.perf_counter() - began:.0f} s, {len(wrong)} of them no result and no typed error")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
