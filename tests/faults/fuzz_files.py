"""Session and bank files that were changed: every one is refused by a typed error, or holds what the original holds.

Real files are written by streams of every policy and by a bank, and then changed: bits, bytes and stretches of any place, cuts,
what the header says (keys, numbers, shapes, offsets, texts), tensors swapped. Some files are *signed* again after the change, as a
program with ill intent would do: their digest is right, and only the checks of their content are left.

    python tests/faults/fuzz_files.py --executions 100000 --seed 1

What is wrong is told, one line each, and the exit status is 1:

    RAW       an error that is not kvsieve's own
    SILENT    a file that was not signed again was loaded
    NAMELESS  an error that does not name the file
    CHANGED   a signed file was loaded, and the stream, saved again, holds something else than the file
    BROKEN    a signed file was loaded, and the stream's next token is a raw error

Files lie in memory where the system has a place for that, so that the disk is not what is waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kvsieve
import torch
from kvsieve import methods
from kvsieve.bank import file as bank_file
from kvsieve.errors import KvsieveError, UnsupportedError
from kvsieve.model import fingerprint

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import tiny  # noqa: E402
from systems import SYSTEMS  # noqa: E402

START = len(b'{"__metadata__":{"sha256":"') + 8
"""Where the digest is."""

MEMORY = "/dev/shm"
ANSWERS = 0.1
"""How many of the streams that are loaded answer; the others read two tokens, which takes a fifth of the time."""

NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**57, 2**63, 2**64, -(2**63), 10**30, 0.5, True, None, "x", [], {})


# ------------------------------------------------------------------------------------------------------------------ real files


def written(folder: Path) -> Iterator[tuple[str, Any, bytes]]:
    """Of every policy a name, its model, and the file that a stream of two rows wrote; a bank's has no model."""
    made = {name: (tiny.model(), system.of_rows(2)) for name, system in SYSTEMS.items()}
    made |= {name: (tiny.model(), make(24)) for name, make in tiny.POLICIES.items()}
    made["sliding"] = tiny.model("gemma2"), kvsieve.StreamingLLM(24, sinks=2)
    path = folder / "real"
    for name, (model, policy) in made.items():
        with kvsieve.stream(model, policy, "cpu") as stream:
            with contextlib.suppress(KvsieveError):
                stream.pin(1, 3)
            stream.generate(tiny.ids(2, 70), max_new_tokens=3, do_sample=False)
            if policy.bank is not None:
                continue  # what the stream remembers is in its bank, whose file comes last
            try:
                stream.save(path)
            except UnsupportedError:  # a policy that no text describes
                continue
        yield name, model, path.read_bytes()
    shape = bank_file.Shape((bank_file.BankLayer(0, 2, 4, 4, torch.float32),), 4, 64)
    entries = bank_file.Entries(shape)
    keys = {0: torch.randn(2, 30, 4)}
    bank_file.write(path, (shape, {"weights": "abc"}, {"a": entries.append(keys, keys), "b": entries}))
    yield "bank", None, path.read_bytes()


# -------------------------------------------------------------------------------------------------------------------- changes


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the tensors behind it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def signed(data: bytes) -> bytes:
    """The same with the digest that its bytes have now."""
    blank = data[:START] + b"0" * 64 + data[START + 64 :]
    return blank[:START] + hashlib.sha256(blank).hexdigest().encode() + blank[START + 64 :]


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """Every place in plain data: a container, and the key or index in it."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *leaves(inner)]
    return found


def other(value: Any, lot: random.Random) -> Any:
    """Something else in place of ``value``, mostly close to it."""
    kind = lot.random()
    if isinstance(value, int) and not isinstance(value, bool) and kind < 0.5:
        return value + lot.choice((-2, -1, 1, 2, 16, 1000))
    if isinstance(value, list) and value and kind < 0.5:
        return lot.choice((value[:-1], value + value[-1:], value[::-1], [*value, 0]))
    if isinstance(value, str) and value and kind < 0.5:
        at = lot.randrange(len(value))
        return value[:at] + lot.choice("0123456789()=,abz/") + value[at + 1 :]
    return lot.choice(NUMBERS)


def change_header(data: bytes, key: str, lot: random.Random) -> bytes:
    """Something that the header says is something else, or is not there."""
    header, body = split(data)
    inner = json.loads(header["__metadata__"][key])
    outer = lot.random() < 0.4
    tree = {name: entry for name, entry in header.items() if name != "__metadata__"} if outer else inner
    for _ in range(lot.choice((1, 1, 1, 2, 3))):
        places = leaves(tree)
        container, at = lot.choice(places)
        what = lot.random()
        if what < 0.15 and isinstance(container, dict):
            del container[at]
        elif what < 0.25 and isinstance(container, dict):
            container[lot.choice(("x", "0", "keys.0.0.0", f"{at}x"))] = container.pop(at)
        else:
            container[at] = other(container[at], lot)
    metadata = header["__metadata__"]
    if outer:
        return joined({"__metadata__": metadata, **tree}, body)
    return joined({**header, "__metadata__": {**metadata, key: json.dumps(inner)}}, body)


def swap_tensors(data: bytes, lot: random.Random) -> bytes:
    """Two tensors under each other's names, or one of another shape of the same size, or another dtype."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    a, b = lot.choice(names), lot.choice(names)
    entry = header[a]
    what = lot.random()
    if what < 0.5 and a != b:
        order = [b if name == a else a if name == b else name for name in header]
        return joined(dict(zip(order, header.values())), body)
    if what < 0.75 and len(entry["shape"]) > 1:
        entry["shape"] = entry["shape"][::-1]
    else:
        entry["dtype"] = lot.choice(("F32", "I32", "F16", "I16", "BF16", "U8", "I64", "F64", "BOOL", "X"))
    return joined(header, body)


def change_body(data: bytes, lot: random.Random) -> bytes:
    """A few bytes of one tensor are others."""
    header, body = split(data)
    entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    small = [x for x in entries if 0 < x[1] - x[0] <= 1024] or [x for x in entries if x[0] < x[1]]
    begin, end = lot.choice(small)
    size = lot.choice((1, 4, 8))
    at = begin + lot.randrange(max((end - begin) // size, 1)) * size
    new = lot.choice((lot.randbytes(size), b"\0" * size, b"\xff" * size, lot.randrange(200).to_bytes(size, "little")))
    return data[: len(data) - len(body)] + body[:at] + new + body[at + size :]


def damage(data: bytes, lot: random.Random) -> bytes:
    """What a disk or a transfer does."""
    changed, what, at = bytearray(data), lot.randrange(8), lot.randrange(len(data))
    if what == 0:
        changed[at] ^= 1 << lot.randrange(8)
    elif what == 1:
        changed[at : at + 8] = lot.randbytes(8)
    elif what == 2:
        size = lot.randrange(1, 4096)
        changed[at : at + size] = bytes(len(changed[at : at + size]))
    elif what == 3:
        del changed[at:]
    elif what == 4:
        changed += lot.randbytes(lot.randrange(1, 64))
    elif what == 5:
        changed[at:at] = lot.randbytes(lot.randrange(1, 16))
    elif what == 6:
        del changed[at : at + lot.randrange(1, 64)]
    else:
        to = lot.randrange(len(data))
        changed[at : at + 64], changed[to : to + 64] = changed[to : to + 64], changed[at : at + 64]
    return bytes(changed)


def changed(data: bytes, key: str, lot: random.Random) -> tuple[bytes, bool]:
    """Another file, and whether it was signed again."""
    what = lot.random()
    if what < 0.3:
        return damage(data, lot), False
    if what < 0.6:
        new = change_header(data, key, lot)
    elif what < 0.8:
        new = swap_tensors(data, lot)
    else:
        new = change_body(data, lot)
    return (signed(new), True) if lot.random() < 0.9 else (new, False)


# ---------------------------------------------------------------------------------------------------------------------- checks


def content(data: bytes) -> tuple[Any, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """What a file says, without the order in which it says it."""
    header, body = split(data)
    metadata = header.pop("__metadata__")
    told = {name: text for name, text in metadata.items() if name != "sha256"}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        held = body[begin:end]
        if name.startswith("scores."):  # nan stands for none, whatever its bits
            held = torch.frombuffer(bytearray(held), dtype=torch.float32).nan_to_num(torch.inf).numpy().tobytes() if held else held
        tensors[name] = entry["dtype"], tuple(entry["shape"]), held
    said = {name: json.loads(text) for name, text in told.items()}
    for header in said.values():
        header.pop("tokenizer", None)  # the stream is loaded and saved without one
        with contextlib.suppress(KvsieveError, TypeError, KeyError):  # with what it leaves to the defaults
            header["policy"] = repr(methods.parse(header["policy"]))
    return said, tensors


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The places where two contents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [place for key in {**a, **b} for place in differences(a.get(key), b.get(key), f"{prefix}/{key}")]
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [place for x, y in zip(a, b) for place in differences(x, y, prefix)]
    return [] if a == b and type(a) is type(b) else [f"{prefix}: {str(a)[:60]} {str(b)[:60]}"]


def load_stream(model: Any, path: Path, data: bytes, was_signed: bool, answers: bool) -> str | None:
    """What is wrong with how this file is treated, if anything is; what is loaded answers, or reads."""
    try:
        stream = kvsieve.load(path, model, "cpu")
    except KvsieveError as err:
        return None if str(path) in str(err) else f"NAMELESS {type(err).__name__}: {err}"
    with stream:
        if not was_signed:
            return "SILENT"
        again = path.with_name("again")
        stream.save(again)
        different = differences(content(data), content(again.read_bytes()))
        if stream.policy.compression is not None:  # what was thinned or coded is so again
            different = [place for place in different if not place.startswith(("/keys", "/values"))]
        if different:
            return f"CHANGED {different}"
        try:
            if answers:
                stream.generate(tiny.ids(2, 2), max_new_tokens=2, do_sample=False)
            else:
                stream.feed(tiny.ids(2, 2))
        except KvsieveError:
            pass
        except Exception as err:
            return f"BROKEN {type(err).__name__}: {err}"
    return None


def load_bank(path: Path, data: bytes, was_signed: bool) -> str | None:
    try:
        found = bank_file.read(path)
    except KvsieveError:
        return None
    if not was_signed:
        return "SILENT"
    again = path.with_name("again")
    bank_file.write(again, found)
    different = differences(content(data), content(again.read_bytes()))
    return f"CHANGED {different}" if different else None


def run(executions: int, seed: int, tell: Callable[[str], None] = print, only: str = "") -> tuple[list[str], Counter[str]]:
    """Lines about what went wrong, and how many files were treated rightly and wrongly."""
    lot, wrong, counts = random.Random(seed), [], Counter[str]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)))
        real = [(*one, content(one[2])) for one in written(folder) if only in one[0]]
        weights = {}
        for _, model, _, _ in real:
            if model is not None and id(model) not in weights:
                # Nothing here changes a model: it is served all the time, and its fingerprint is taken once.
                stack.enter_context(kvsieve.stream(model, kvsieve.Full(), "cpu"))
                weights[id(model)] = fingerprint.weights(model)
        stack.enter_context(mock.patch.object(fingerprint, "weights", lambda model: weights[id(model)]))
        path = folder / "changed"
        for at in range(executions):
            system, model, data, holds = real[at % len(real)]
            key = "kvsieve" if model is not None else bank_file.KIND.key
            new, was_signed = changed(data, key, lot)
            if new == data or (was_signed and content_or_none(new) == holds):
                continue
            path.write_bytes(new)
            answers = lot.random() < ANSWERS
            try:
                told = load_bank(path, new, was_signed) if model is None else load_stream(model, path, new, was_signed, answers)
            except Exception as err:
                told = f"RAW {type(err).__name__}: {err}"
            counts["fine" if told is None else "wrong"] += 1
            if told is not None:
                line = f"{told[:300]} | {system}, seed {seed}, execution {at}"
                wrong.append(line)
                tell(line)
    return wrong, counts


def content_or_none(data: bytes) -> Any:
    try:
        return content(data)
    except Exception:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="files of policies whose name has this in it")
    args = parser.parse_args()
    wrong, counts = run(args.executions, args.seed, only=args.only)
    print(json.dumps({"executions": args.executions, "files": counts.total(), "wrong": wrong[:20]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
