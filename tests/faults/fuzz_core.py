"""Calls everything of the compiled core with random arguments: a typed error or a result, never a panic, an abort or a hang.

    python tests/faults/fuzz_core.py --calls 100000

Signatures come from the stub `_core.pyi`, so what is added to the core is called too, with any arguments. Those alone would seldom
get past the checks of shapes, so half of the calls are ones that work (:func:`working`) with some of their arguments changed. Calls
run in child processes, because an abort ends one; the call that it died in stands in a file. Objects (stores, planners, steps) are
kept, and called in any order.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
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
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from odd_tensors import floats, odd_tensor, short  # noqa: E402

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

    @property
    def key(self) -> str:
        """Its name with its class's."""
        return self.name if self.owner is None else f"{self.owner}.{self.name}"


@dataclass
class Work:
    """A call that works: of what, and with which arguments."""

    key: str
    function: Callable[..., Any]
    arguments: list[Any]
    named: dict[str, Any]


@dataclass
class Fuzzer:
    rng: random.Random
    core: Any
    calls: list[Call]
    pool: dict[str, list[Any]] = field(default_factory=lambda: collections.defaultdict(list))
    works: list[Work] = field(default_factory=list)
    returned: set[str] = field(default_factory=set)

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
            repeated = np.broadcast_to(made[:1], (rng.choice((3, 1 << 20, 1 << 33)), *made.shape[1:]))
            made = made[::-1] if rng.random() < 0.5 else repeated
        return made

    def value(self, text: str) -> Any:
        """Something of an annotation, mostly."""
        if self.rng.random() < 0.03:
            return self.rng.choice((None, -1, "x", [], object()))
        return self.of(ast.parse(text, mode="eval").body)

    def near(self, value: Any) -> Any:
        """Something else where `value` would work: mostly of its kind."""
        rng = self.rng
        match value:
            case np.ndarray() if value.size and rng.random() < 0.7:
                changed = value.copy()
                if rng.random() < 0.5 and value.dtype.kind != "b":
                    for _ in range(rng.choice((1, 2, 8))):
                        at = tuple(rng.randrange(length) for length in value.shape)
                        changed[at] = self.real() if value.dtype.kind == "f" else self.array(value.dtype).ravel()[:1].sum()
                    return changed
                axis = rng.randrange(value.ndim)
                return (
                    changed.take(range(value.shape[axis] - 1), axis),
                    np.repeat(changed, 2, axis),
                    changed[::-1],
                    changed[None],
                )[rng.randrange(4)]
            case np.ndarray():
                return self.array(value.dtype)
            case bool():
                return not value
            case int():
                return value + rng.choice((1, -1, 64)) if rng.random() < 0.3 else self.integer()
            case float():
                return self.real()
            case str():
                return rng.choice(WORDS)
            case list() | tuple() if value:
                held = list(value)
                at = rng.randrange(len(held))
                if rng.random() < 0.7:
                    held[at] = self.near(held[at])
                elif isinstance(value, list):
                    held = held[:at] + held[at + 1 :] if rng.random() < 0.5 else [*held, held[at]]
                return type(value)(held)
            case None:
                # Never an array without end: PyO3 makes room for a list's length before it looks at it, and that ends the process.
                return rng.choice((0.5, 2, [1], np.ones(3, np.float32)))
        if type(value).__name__ == "Tensor":
            return odd_tensor(rng, self.near(floats(value)))
        others = self.pool[type(value).__name__]
        return rng.choice(others) if others and rng.random() < 0.9 else None

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
            case ast.Name(id="Any" | "type"):
                return rng.choice((None, self.integer(), self.real(), "x", int, np.ndarray))
            case ast.Name(id=name):
                return rng.choice(self.pool[name]) if self.pool[name] else None
            case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=inner):
                return [self.of(inner) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 9)))]
            case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
                return tuple(self.of(part) for part in parts)
            case ast.Subscript(value=ast.Name(id="PathLike")):
                return tempfile.gettempdir()
            case ast.Attribute(attr="Tensor"):
                return odd_tensor(rng, self.array(np.float32))
            case ast.Subscript(value=ast.Attribute(attr="NDArray"), slice=inner):
                named = KINDS.get(ast.unparse(inner))
                some = (np.float32, np.float32, np.int16, np.float16, np.float64, np.int64, np.uint8)
                return self.array(named if named is not None and rng.random() < 0.97 else rng.choice(some))
        raise NotImplementedError(ast.unparse(node))

    def one(self, note: Callable[[str], None]) -> None:
        """Makes one call, and keeps what it returns."""
        if self.rng.random() < 0.5:
            work = self.rng.choice(self.works)
            key, function, arguments, named = work.key, work.function, list(work.arguments), dict(work.named)
            for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3))):
                places = [*range(len(arguments)), *named]
                if not places:
                    break
                at = self.rng.choice(places)
                if isinstance(at, int):
                    arguments[at] = self.near(arguments[at])
                else:
                    named[at] = self.near(named[at])
        else:
            call = self.rng.choice(self.calls)
            arguments = [self.value(text) for _, text, needed in call.parameters if needed or self.rng.random() < 0.5]
            named = {name: self.value(text) for name, text, needed in call.keywords if needed or self.rng.random() < 0.5}
            if call.extra is not None:
                for name in self.rng.sample(("block", "page", "budget", "top_k", "blocks", "chunk", "x"), self.rng.randrange(4)):
                    named[name] = self.value(call.extra)
            if call.owner is not None and not self.pool[call.owner]:
                return
            *classes, name = call.name.split(".")
            target = self.rng.choice(self.pool[call.owner]) if call.owner else self.core
            target = target if call.owner or not classes else getattr(target, classes[0])
            key, function = call.key, (lambda: getattr(target, name)) if call.kind == "property" else getattr(target, name)
        told = [*map(short, arguments), *(f"{name}={short(value)}" for name, value in named.items())]
        note(f"{key}({', '.join(told)})")
        made = function(*arguments, **named)
        self.returned.add(key)
        for thing in made if isinstance(made, list) else [made]:
            if type(thing).__name__ in OBJECTS:
                self.keep(thing)

    def keep(self, thing: Any) -> None:
        held = self.pool[type(thing).__name__]
        if len(held) < 12:
            held.append(thing)
        else:
            held[self.rng.randrange(12)] = thing


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
        if isinstance(node, ast.FunctionDef) and node.name != "fail_at":  # which makes others fail, on purpose
            calls.append(one(node, None))
        elif isinstance(node, ast.ClassDef):
            OBJECTS.add(node.name)
            calls += [one(inner, node.name) for inner in node.body if isinstance(inner, ast.FunctionDef)]
    return calls


def working(core: Any) -> tuple[list[Any], list[Work]]:
    """Objects of every class, and calls that work on them; some only until others have changed what they are of."""
    rows, heads, kv_heads, new, dim = 2, 4, 2, 3, 8
    keep_all, own = core.Eviction.keep_all(), core.Eviction.own(9, 2, 3)
    evictions = [keep_all, own, core.Eviction.window(2, 5), core.Eviction.surprisal(9, 2, 3)]
    rules = [core.PositionRule.original(), core.PositionRule.in_cache(), core.PositionRule.capped(4), core.PositionRule.fixed(3)]
    memories = [core.Memory(keep_all, rules[0]), core.Memory(own, rules[0]), core.Memory(evictions[3], rules[0])]
    planner, choosing, scored = (core.Planner([memory], "post_rope") for memory in memories)
    rope = core.Rope([1.0, 0.5, 0.25, 0.1])
    q, k = np.ones((rows, heads, new, dim), np.float32), np.ones((rows, kv_heads, new, dim), np.float32)
    out, lse = np.empty((rows, new, heads, dim), np.float32), np.empty((rows, heads, new), np.float32)
    stores = [core.Store(kv_heads, dim, dim, "float32") for _ in range(2)]
    store, packed = stores
    step = planner.begin([new, 2], new, True, True)
    residents = core.Residents(step, 0)
    for one in stores:
        one.append(k, k, step)
    planner.commit()
    last = planner.begin([1, 1], 1, True, False)
    for one in stores:
        one.append(k[:, :, :1], k[:, :, :1], last)
    planner.commit()
    for other in (choosing, scored):
        other.begin([8, 8], 8, True, False)
        other.commit()
    whole = core.Store(kv_heads, dim, dim, "float32")
    many = np.ones((1, kv_heads, 128, dim), np.float32)
    blocks = core.Planner([memories[0]], "post_rope")
    long = blocks.begin([128], 128, True, False)
    whole.append(many, many, long)
    blocks.commit()
    file = core.TierFile(tempfile.gettempdir())
    tier = core.Tier(whole, file, 1 << 14, 0.5)
    packed.set_packing(dim, 4, 4, 4)
    plan = planner.fork()
    moves = plan.pack(0, 4, 1)
    channels = np.tile(np.arange(dim), (kv_heads, 1))
    hip = {"sinks": 1, "window": 2, "refresh": [4], "query_block": 4, "budget": 8, "block": 2, "representative": "middle"}
    sparse = core.Sparse("hip", **hip)
    state = sparse.state()
    zero, two = np.array([0]), np.array([2])
    pieces = [(-1, 0, 1, 5, True), (0, 1, 3, 2, False)]
    chosen = (np.array([[0], [1]]), np.array([[0], [0]]), 0, 2)
    numbers = (0.3, None, None)
    of = {"read": (np.array([0]), zero, two, np.empty((kv_heads, 2, dim), np.float32), np.empty((kv_heads, 2, dim), np.float32))}
    works: list[Work] = []

    def add(thing: Any, name: str, *arguments: Any, **named: Any) -> None:
        kind = f"{type(thing).__name__}." if type(thing).__name__ in OBJECTS else ""
        works.append(Work(kind + name, getattr(thing, name), list(arguments), named))

    add(store, "append", k, k, step)
    add(store, "attend", q, step, None, *numbers, out, lse, threads=1)
    add(store, "attend", q, step, rope, *numbers, out)
    add(core, "decode", store, *map(torch.tensor, (q, k, k)), step, rope, *numbers, torch.tensor(out), threads=1)
    add(store, "attend_mass", q, step, None, *numbers, out, lse)
    add(store, "gather", *of["read"], at=0, spilled=False)
    add(store, "write", *(x.copy() for x in of["read"]))
    add(store, "permute", np.array([[0, 0, 3]]), np.array([[0, 2], [1, 2]]), np.array([[0, 0, 2]]))
    add(store, "free_unused", np.ones(4, bool), None)
    add(core.Store(kv_heads, dim, dim, "float32"), "set_packing", dim, 4, 4, 4)
    add(packed, "pack", moves, channels, [4, 4])
    full = core.Store(kv_heads, dim, dim, "float32")
    full.append(k, k, step)
    full.set_packing(dim, 4, 4, 4)
    full.pack(moves, channels, [4, 4])
    add(full, "channels", core.PACKED)
    add(store, "apply", planner.fork().evict([0], 1, 2))
    alone = q[0], k[0], k[0], np.array([0, 0, 1]), np.array([3, 3, 3])
    wide = {"out": np.empty((new, heads, dim), np.float32), "lse": np.empty((heads, new), np.float32)}
    add(core, "attend_dense", *alone, 0.3, 5.0, **wide, dtype="float32", threads=1)
    add(core, "attend_heaviest", store, q, step, [True, False], None, *numbers, out, top=2, mass=1.0, renormalise=True)
    add(core, "attend_highest", store, q, step, [True, True], *numbers, out)
    one_q, one_out = q[:, :, :1].copy(), np.empty((rows, 1, heads, dim), np.float32)
    add(core, "attend_sets", store, one_q, last, [chosen, None], *numbers, one_out)
    lse_of_one, out_of_one = np.empty(heads, np.float32), np.empty((1, heads, dim), np.float32)
    asked = (store, q[:1, :, :1].copy(), residents, pieces)
    add(core, "attend_pieces", *asked, rope, *numbers, out_of_one, lse_of_one, scored=0, told=True)
    add(sparse, "attend", store, one_q, last, *numbers, one_out, np.empty((rows, heads, 1), np.float32), chunk=False)
    add(sparse, "select_rows", [1, 0])
    add(sparse, "return_to", state)
    add(sparse, "choice", 0)
    add(core, "Sparse", "hip", **hip)
    add(core, "rotate", np.ones((2, 3, dim), np.float32), np.arange(3), rope, np.empty((2, 3, dim), np.float32), inverse=False)
    add(core, "surprisal", np.ones((3, 7), np.float32), np.array([0, 6, 2]))
    add(core, "top_k", np.ones((3, 7), np.float32), 4)
    add(core, "linear", *(np.ones(n, np.float32) for n in ((2, 5), (7, 5), 7, (2, 7))), 1)
    add(core, "linear_lent", *(torch.ones(n) for n in ((2, 5), (7, 5), (7,), (2, 7))), 1)
    add(core, "lenders", torch.Tensor)
    add(core, "keep_surprisal", np.ones(9, np.float32), 1, 2, 5, 1)
    add(core, "keep_surprisal_published", np.ones(9, np.float32), 1, 3, 2, 1)
    for name, arguments in (
        ("begin", ([1, 1], 1, True, True)),
        ("begin_residents", ([1, 1], 1)),
        ("num_packed", (0,)),
        ("pack", (0, 4, 1, 0)),
        ("seen", (0,)),
        ("positions", (0, 0)),
        ("scores", (0, 0)),
        ("runs", (0, 0)),
        ("resident", (0, 0)),
        ("newest_blocks", (0, 0, 2)),
        ("pin", (None, 1, 2, False)),
        ("pins", (0,)),
        ("set_pins", (0, [(0, 2)], False)),
        ("unpin", (None, 0, 2)),
        ("evict", ([0], 1, 2)),
        ("crop", (1,)),
        ("crop_rows", ([1, 1],)),
        ("select_rows", ([1, 0],)),
        ("join", ([planner.fork()], [[0], [0]])),
    ):
        add(planner.fork(), name, *arguments)
    add(core.Planner(memories[:1], "post_rope"), "restore", 4, [(4, [([0, 2], [0.5, 0.25])])])
    for name in ("commit", "rollback"):
        opened = planner.fork()
        opened.begin([1, 1], 1, True, False)
        add(opened, name)
    add(choosing.fork(), "keep", 0, 0, [0, 1, 4, 5, 6, 7])
    add(choosing.fork(), "sieve", 0, 0, 4, 3)
    add(choosing.fork(), "evict_per_head", 0, 3, 5, 4, 3)
    add(scored.fork(), "set_scores", 0, np.ones(8, np.float32))
    add(scored.fork(), "decay", [0.5])
    for name in ("spill", "fetch", "hold", "trim", "prefetch"):
        add(tier, name, np.array([0, 1]))
    add(tier, "score", np.array([0, 1]), np.array([0.5, 0.25]))
    add(tier, "is_spilled", 0)
    add(core, "Tier", core.Store(kv_heads, dim, dim, "float32"), file, 1 << 20, None)
    add(core, "Store", kv_heads, dim, dim, "float32")
    add(core, "Rope", [1.0, 0.5], "half", 1.0)
    add(core, "Residents", step, 0)
    add(core, "Planner", memories[:1], "post_rope")
    add(core, "Memory", keep_all, rules[0], 5, 0)
    things = [*evictions, *rules, *memories, planner, choosing, scored, step, last, long, *stores, whole, file, tier, rope]
    return [*things, residents, moves, sparse, state, *step.parts()], works


def begin(fuzzer: Fuzzer) -> None:
    """Objects and calls that work, to begin with."""
    for name in OBJECTS:
        fuzzer.pool[name] = []
    things, fuzzer.works = working(fuzzer.core)
    for thing in things:
        fuzzer.keep(thing)


def child(seed: int, first: int, calls: int, notes: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    np.seterr(all="ignore")
    import kvsieve
    from kvsieve import _core

    _core.lenders(torch.Tensor, torch.nn.Parameter)  # before a random call decides it for the process
    known = read_stub(Path(kvsieve.__file__).with_name("_core.pyi"))
    with open(notes, "r+b") as file, mmap.mmap(file.fileno(), 4096) as told:

        def note(text: str) -> None:
            data = f"{number} {text}".encode()[:4000]
            told[: len(data) + 1] = data + b"\0"

        fuzzer, returned = None, set[str]()
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
            returned |= fuzzer.returned
    print("RETURNED", *sorted(returned))
    print("DONE", flush=True)


def run(calls: int, seed: int, tell: Callable[[str], None] = print) -> tuple[list[str], set[str]]:
    """Makes `calls` calls; what went wrong, a line each, and what returned something in the last child."""
    wrong, first, returned = [], 0, set[str]()
    with tempfile.NamedTemporaryFile() as notes:
        while first < calls:
            notes.truncate(0)
            notes.truncate(4096)
            asked = {"--child": first, "--calls": calls - first, "--seed": seed, "--notes": notes.name}
            command = [sys.executable, __file__, *(str(word) for pair in asked.items() for word in pair)]
            environment = {**os.environ, "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            wrong += [line for line in done.stdout.splitlines() if line.startswith("RAW ")]
            if done.stdout.endswith("DONE\n"):
                returned = set(done.stdout.splitlines()[-2].split()[1:])
                break
            last = Path(notes.name).read_bytes().split(b"\0")[0].decode(errors="replace")
            if not last:
                raise RuntimeError(f"the child did not begin:\n{done.stderr}")
            wrong.append(f"DIED {done.returncode} {done.stderr.strip().splitlines()[-1:]} | {last}")
            tell(wrong[-1])
            first = int(last.split()[0]) + 1
    return wrong, returned


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
    import kvsieve

    began = time.perf_counter()
    wrong, returned = run(arguments.calls, arguments.seed)
    for line in wrong:
        print(line)
    print(f"{arguments.calls:,} calls in {time.perf_counter() - began:.0f} s, {len(wrong)} of them no result and no typed error")
    missing = {call.key for call in read_stub(Path(kvsieve.__file__).with_name("_core.pyi"))} - returned
    print(f"nothing was returned by: {', '.join(sorted(missing)) or 'none'}")
    print(json.dumps({"calls": arguments.calls, "wrong": wrong[:20]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
