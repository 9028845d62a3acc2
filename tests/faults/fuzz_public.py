"""Calls the public face of kvsieve with wrong arguments: a result or a typed error, and a stream that goes on as if uncalled.

    python tests/faults/fuzz_public.py --calls 100000 --seed 1

What is public, and a call of each that works, is in `tests/public_calls.py`; what comes in the place of an argument is in
`tests/hostile.py`. The first calls are those that work, as they are. Then half of them have one argument replaced by something
hostile, and the other half several. Calls run in child processes, because some errors end one; the call that it died in stands in a
file.

What is wrong is told, one line each, and the exit status is 1:

    RAW      an error that is not kvsieve's own, nor Python's about the number or the names of arguments
    CHANGED  a call was refused, and the stream says something else next than one that was never called
    BROKEN   a call was not refused, and the next one is a raw error
    TEXT     a policy whose text does not say what it is
    DIED     the process ended, or the call took too long
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvsieve
import torch
from kvsieve import methods, policy
from kvsieve.errors import KvsieveError

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import tiny  # noqa: E402
from hostile import Nothing, hostile  # noqa: E402
from public_calls import Scene, Work, attempts, public  # noqa: E402

SECONDS = 20
"""A call that takes longer counts as one that hangs."""
MEMORY = 8 << 30
PYTHONS = re.compile(
    r"unexpected keyword argument|missing \d+ required|positional arguments? but|multiple values for|unsupported operand type"
)
"""What Python itself says of the number and the names of arguments, and of operators."""
SCENES = ("full", "streaming_llm", "sirllm", "snapkv", "h2o", "lm_infinite", "hip", "quest", "infllm", "longheads", "refresh_kv")
SCENES += ("selective_v", "think_quantized", "memory_bank", "chain", "sirllm_think", "infllm_tiered")
CALLS_OF_A_SCENE = 40
NOT_EVERYWHERE = {
    "Answer",
    "Batch.add",
    "Stream",
    "Stream.evict",
    "Stream.feed",
    "Stream.join",
    "Stream.kept",
    "Stream.pin",
    "Stream.read_twice",
}
NOT_EVERYWHERE |= {"Stream.remember", "Stream.trace", "StreamCache.crop", "load", "model.generate()", "stream"}
"""What some policies refuse, so that it works in some scenes only."""
THEIRS: dict[str, set[int | str]] = {
    "Stream.generate": {"max_new_tokens", "num_beams", "do_sample", "eos_token_id", "logits_processor"},
    "model()": {0, "logits_to_keep", "attention_mask", "position_ids", "use_cache"},
    "model.generate()": {0},
}
"""Arguments that are transformers' own: it, or torch, says what is wrong with them; no id is out of the embedding's range."""


# ------------------------------------------------------------------------------------------------------------------ one call


class Fuzzer:
    """Calls, one after the other, and what is wrong with how they end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.scene: Scene | None = None
        self.expected: dict[tuple[str, int, str], Any] = {}
        self.returned: set[str] = set()
        self.numbers = [("full", at) for at in range(len(self.works("full", 1, "cpu")))]
        for name, key in (("hip", "Stream.trace"), ("memory_bank", "Stream.remember")):
            self.numbers += [(name, at) for at, work in enumerate(self.works(name, 1, "cpu")) if work.key == key]

    def works(self, name: str, rows: int, backend: str) -> list[Work]:
        scene = self.scene
        if scene is None or (scene.name, scene.rows, scene.backend) != (name, rows, backend):
            self.forget()
            scene = self.scene = Scene(name, rows, backend)
            if (name, rows, backend) not in self.expected:
                self.expected[name, rows, backend] = scene.told()
        return list(attempts(scene))

    def forget(self) -> None:
        if self.scene is not None:
            self.scene.close()
        self.scene = None

    def one(self, number: int, note: Callable[[str], None]) -> str | None:
        """Makes one call; what is wrong with it."""
        rng = random.Random(f"{self.seed} {number}")
        if number < len(self.numbers):
            name, at = self.numbers[number]
            work = self.works(name, 1, "cpu")[at]
        else:
            lot = random.Random(f"{self.seed} {number // CALLS_OF_A_SCENE}")
            works = self.works(lot.choice(SCENES), lot.choice((1, 1, 2)), lot.choice(("cpu", "cpu", "reference")))
            keys = sorted({work.key for work in works})
            key = rng.choice(keys)
            work = rng.choice([work for work in works if work.key == key])
        arguments, named, changed = list(work.arguments), dict(work.named), set()
        places: list[Any] = [*range(work.stays, len(arguments)), *named]
        if number >= len(self.numbers) and places:
            for place in rng.sample(places, 1 if rng.random() < 0.5 else rng.randint(1, len(places))):
                if isinstance(place, int):
                    arguments[place] = hostile(arguments[place], name_of(work.call, place), rng)
                else:
                    named[place] = hostile(named[place], place, rng)
                changed.add(place)
        told = [*map(short, arguments), *(f"{key}={short(value)}" for key, value in named.items())]
        note(f"{work.key}({', '.join(told)}) in {self.scene.name, self.scene.rows, self.scene.backend}")
        return self.judge(work, arguments, named, changed, rng)

    def judge(self, work: Work, arguments: list[Any], named: dict[str, Any], changed: set[Any], rng: random.Random) -> str | None:
        assert self.scene is not None
        scene = self.scene
        try:
            made = work.call(*arguments, **named)
        except KvsieveError as err:
            if not changed and work.key not in NOT_EVERYWHERE:
                return f"REFUSED {type(err).__name__}: {err}"
            wrong = f"RAW an error of several lines: {err!r}" if "\n" in str(err) else None
        except Exception as err:
            at = where()
            by_python = isinstance(err, TypeError) and PYTHONS.search(str(err))
            wrong = None if by_python else f"RAW {type(err).__name__}: {err} @ {at}"
            theirs = changed & THEIRS.get(work.key, set()) and not at.startswith("kvsieve/")
            if theirs and "out of range in self" not in str(err):
                wrong = None
                if self.expected[scene.name, scene.rows, scene.backend][0] != [row.tolist() for row in scene.stream.ids]:
                    self.forget()  # it failed in the midst of its answer, which is as documented
                    return None
        else:
            return self.finished(work, made, rng)
        if wrong is not None or work.key.split(".")[0] not in ("Stream", "StreamCache", "model()", "model", "load", "stream"):
            return wrong
        key = scene.name, scene.rows, scene.backend
        try:
            now = scene.told()
        except Exception as err:
            self.forget()
            return f"CHANGED {type(err).__name__}: {err}"
        if now != self.expected[key]:
            self.forget()
            return f"CHANGED {now} was {self.expected[key]}"
        return None

    def finished(self, work: Work, made: Any, rng: random.Random) -> str | None:
        """What the call returned can be used, and so can the stream that it changed."""
        assert self.scene is not None
        scene = self.scene
        self.returned.add(work.key)
        try:
            if isinstance(made, policy.Policy):
                return drive(made, rng)
            if isinstance(made, kvsieve.Stream) and made is not scene.stream:
                with contextlib.closing(made):
                    made.generate(scene.next, max_new_tokens=1, do_sample=False)
            if isinstance(made, kvsieve.MemoryBank):
                drive(kvsieve.StreamingLLM(16) >> made, rng)
                made.close()
            if work.key.split(".")[0] in ("Stream", "StreamCache", "model()", "model", "Answer", "Batch"):
                rows = len(scene.stream.ids) or scene.rows
                with contextlib.suppress(KvsieveError):
                    scene.stream.generate(tiny.ids(rows, 3), max_new_tokens=1, do_sample=False)
                scene.stream.stats()
                self.forget()
            if scene.policy.bank is not None:
                self.forget()  # what a fork or a batch has read is in the bank, and the stream's next answer may recall it
        except KvsieveError:
            self.forget()
        except Exception as err:
            self.forget()
            return f"BROKEN {type(err).__name__}: {err} @ {where()}"
        return None


def drive(made: policy.Policy, rng: random.Random) -> str | None:
    """A policy says in its text what it is, and a stream runs under it or refuses it."""
    text = repr(made)
    plain = not any(part in text for part in ("object at", "Memory(", "Tiered", "Chain("))
    if plain and repr(methods.parse(text)) != text:
        return f"TEXT {text}"
    if rng.random() < 0.5:
        with kvsieve.stream(tiny.model(), made, "cpu") as stream:
            stream.generate(tiny.ids(1, 40), max_new_tokens=2, do_sample=False)
    return None


def where() -> str:
    """The innermost places of the error that is being handled."""
    import traceback

    frames = traceback.extract_tb(sys.exc_info()[2])
    package = str(Path(kvsieve.__file__).parent)
    ours = [frame for frame in frames if frame.filename.startswith(package)]
    names = [frame.filename.replace(package, "kvsieve") for frame in [*frames[-1:], *reversed(ours[-2:])]]
    return " < ".join(f"{name}:{frame.lineno}" for name, frame in zip(names, [*frames[-1:], *reversed(ours[-2:])]))


def name_of(call: Callable[..., Any], place: int) -> str:
    try:
        names = list(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return ""
    return names[place] if place < len(names) else ""


def short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{str(value.dtype)[6:]}{list(value.shape) if not value.is_nested else ''} {value.layout} {value.device}>"
    if isinstance(value, torch.nn.Module | kvsieve.Stream | Nothing):
        return type(value).__name__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {short(inner)}" for key, inner in value.items()) + "}"
    text = ascii(value)
    return text if len(text) < 120 else text[:120] + "..."


# ------------------------------------------------------------------------------------------------------------------ processes


def child(seed: int, first: int, calls: int, notes: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    with open(notes, "r+b") as file, mmap.mmap(file.fileno(), 4096) as told, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)

        def note(text: str) -> None:
            data = f"{number} {text}".encode()[:4000]
            told[: len(data) + 1] = data + b"\0"

        number = first
        fuzzer = Fuzzer(seed)
        for number in range(first, first + calls):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            wrong = fuzzer.one(number, note)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if wrong is not None:
                fuzzer.forget()
                last = bytes(told).split(b"\0")[0].decode(errors="replace")
                print(f"{' '.join(wrong.split())[:400]} | {last}", flush=True)
        fuzzer.forget()
        os.chdir("/")
    print("RETURNED", *sorted(name.replace(" ", "_") for name in fuzzer.returned))
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
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = done.stdout.splitlines()
            whole = done.stdout.endswith("DONE\n")
            wrong += [line for line in lines if not line.startswith(("RETURNED", "DONE"))]
            if whole:
                returned = set(lines[-2].split()[1:])
                break
            last = Path(notes.name).read_bytes().split(b"\0")[0].decode(errors="replace")
            if not last:
                raise RuntimeError(f"the child did not begin:\n{done.stderr}")
            wrong.append(f"DIED {done.returncode} {done.stderr.strip().splitlines()[-1:]} | {last}")
            first = int(last.split()[0]) + 1
    for line in wrong:
        tell(line)
    return wrong, returned


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int)
    parser.add_argument("--notes")
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        child(arguments.seed, arguments.child, arguments.calls, arguments.notes)
        return 0
    began = time.perf_counter()
    wrong, returned = run(arguments.calls, arguments.seed)
    print(f"{arguments.calls:,} calls in {time.perf_counter() - began:.0f} s, {len(wrong)} of them wrong")
    print(f"nothing was returned by: {', '.join(sorted(public() - returned)) or 'none'}")
    print(json.dumps({"calls": arguments.calls, "wrong": wrong[:20]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
