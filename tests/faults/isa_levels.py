"""Conversations of all systems on every instruction set of this machine: they retain, select and answer the same.

    python tests/faults/isa_levels.py --system hip --system sirllm

Each level runs in a child of its own, forked before the core has chosen one. Retained positions, selections and the choice among
equals must be identical to the portable level's, outputs within :data:`TOLERANCE`. Prompts in bfloat16 are multiplied in float32 on
all of them: where the processor multiplies in bfloat16, surprisal differs in its last digits, and so may what is retained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import drive
import kvsieve
import numpy as np
import tiny
from kvsieve import _core
from kvsieve.backends.cpu import prefill
from kvsieve.errors import KvsieveError
from systems import OF_EVERY_KIND, PROMPT, SYSTEMS

TOLERANCE = 2e-3
"""Of logits, whose size is some units: float32 sums in other orders, and codes that a last bit has moved by half a step."""


def conversation(name: str, dtype: Any) -> dict[str, np.ndarray]:
    """A prompt, a turn, forwards, and what is retained and was read after each."""
    model, found = tiny.model(dtype=dtype), {}
    with kvsieve.stream(model, SYSTEMS[name].of_rows(2), "cpu") as stream:
        stream.feed(tiny.ids(2, PROMPT, 1))
        for at, width in enumerate((1, 1, 9, 1)):
            logits = drive.forward(model, stream.cache, tiny.ids(2, width, 10 + at))
            found[f"{at} out"] = logits.float().numpy()
            found |= {f"{at} {key}": value for key, value in told(stream).items()}
        stream.end_turn()
        found |= {f"end {key}": value for key, value in told(stream).items()}
    return found


def told(stream: kvsieve.Stream) -> dict[str, np.ndarray]:
    """Positions by head, and what was selected."""
    found = {}
    for layer in stream._engine.facts.layers:
        for head in range(layer.num_kv_heads):
            for row, kept in enumerate(stream.kept(layer.index, head)):
                found[f"kept {layer.index} {head} {row}"] = np.asarray(kept.positions)
    try:
        traces = stream.trace()
    except KvsieveError:
        return found
    for trace in traces:
        for row, heads in enumerate(trace.rows):
            for head, read in enumerate(heads):
                found[f"read {trace.index} {row} {head}"] = np.asarray(read.read)
                found[f"found {trace.index} {row} {head}"] = np.asarray(read.found)
    return found


def equals() -> dict[str, np.ndarray]:
    """What is chosen among equals: the first ones, on every level."""
    scores = np.zeros((3, 1000), np.float32)
    scores[1, ::7], scores[2, 500:] = 1.0, np.nan
    found = {"top_k": _core.top_k(scores, 40), "surprisal": np.array(_core.keep_surprisal(scores[0], 4, 8, 100))}
    assert found["top_k"][0].tolist() == list(range(40))
    assert found["top_k"][1].tolist() == list(range(0, 280, 7))
    # Keys that are all the same: every block scores the same.
    heads, dim, tokens = 2, 32, 2048
    both: dict[str, Any] = {"sinks": 4, "window": 64, "query_block": 16}
    for kind, rule in (
        ("hip", {"budget": 128, "block": 8, "representative": "middle", "refresh": [1]}),
        ("infinite", {"stages": [(32, 512), (8, 128)], "representative": "first", "refresh": [1, 1], "page_bounds": False}),
    ):
        planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
        store, ones = _core.Store(heads, dim, dim, "float32"), np.ones((1, heads, tokens, dim), np.float32)
        store.append(ones, ones, planner.begin([tokens], tokens, True, False))
        planner.commit()
        step = planner.begin([1], 1, True, False)
        store.append(ones[:, :, :1], ones[:, :, :1], step)
        sparse, out = _core.Sparse(kind, **both, **rule), np.empty((1, 1, heads, dim), np.float32)
        sparse.attend(store, ones[:, :, :1], step, 1.0, None, None, out)
        for head, (chosen, *_) in enumerate(sparse.choice(0)):
            found[f"{kind} {head}"] = np.asarray(chosen)
    return found


def made(names: list[str]) -> dict[str, np.ndarray]:
    """Everything, by a key whose last word begins with ``out`` where it may differ a little."""
    import torch

    found = {f"equals {key}": value for key, value in equals().items()}
    for name in names:
        for dtype in (torch.float32, torch.bfloat16) if name in ("sirllm", "hip") else (torch.float32,):
            found |= {f"{name} {str(dtype)[6:]} {key}": value for key, value in conversation(name, dtype).items()}
    return found


def compare(one: Any, other: Any) -> list[str]:
    """What differs."""
    if set(one) != set(other):
        return [f"other keys: {sorted(set(one) ^ set(other))[:5]}"]
    wrong = []
    for key in sorted(one):
        a, b = one[key], other[key]
        if not key.endswith(" out"):
            if not np.array_equal(a, b):
                wrong.append(f"{key}: {a.tolist()} and {b.tolist()}"[:300])
        elif "bfloat16" not in key and not np.abs(a - b).max() <= TOLERANCE * max(np.abs(a).max(), 1.0):
            wrong.append(f"{key}: {np.abs(a - b).max()} apart")
    return wrong


def in_child(level: str, names: list[str], path: Path) -> None:
    """What :func:`made` makes on this level, in a file.

    Raises:
        RuntimeError: if it cannot.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ["KVSIEVE_ISA"] = level
            assert _core.isa() == level
            chosen = prefill.kernels()._replace(bfloat16=None)
            prefill.kernels = lambda: chosen  # type: ignore[assignment]
            np.savez(path, **made(names))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the script failed on {level}")


def run(names: list[str]) -> dict[str, Any]:
    """Every level against the first one: how many things were compared, and what differs."""
    first, *others = _core.isa_levels()
    compared, wrong = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for level in (first, *others):
            in_child(level, names, Path(folder) / f"{level}.npz")
        want = dict(np.load(Path(folder) / f"{first}.npz"))
        for level in others:
            compared += len(want)
            wrong += [f"{level}: {what}" for what in compare(want, dict(np.load(Path(folder) / f"{level}.npz")))]
    return {"levels": [first, *others], "systems": len(names), "compared": compared, "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--system", action="append", choices=list(SYSTEMS), help="by default one of every kind")
    found = run(parser.parse_args(argv).system or OF_EVERY_KIND)
    print(json.dumps({**found, "wrong": found["wrong"][:20]}))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
