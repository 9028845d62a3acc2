"""What a decoded token waits for the file of its blocks, under InfLLM over a real text with little of it in memory; and how many
blocks it finds in memory, by the order in which they leave.

    python benches/tier_reads.py [tokens] [budget] [folder of the file]

SmolLM2-135M reads Python's reference pages once. Then the same tokens are decoded again and again from there, in turns: with
blocks read one after the other, and with all reads of a layer begun before the first of them, as a fetch does. Before each token
the system forgets what it holds of the file (`posix_fadvise`), as it must of a file that is larger than memory; then it does not.
The states of both ways are compared bit for bit.

The orders are compared on what the layers fetched, token by token, and on the attention that was told: both are replayed through
the definition of a tier (`BlockTier`), for several capacities, from a text of which nothing is in memory.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import torch
from kvsieve.backends.block_tier import BlockTier, HostCopies
from kvsieve.budget import BLOCK
from kvsieve.evals.models import load_model
from kvsieve.evals.texts import read_text
from kvsieve.policy.storage import Tiered
from kvsieve.runtime import fetching

ONE_BY_ONE, AT_ONCE = "one by one", "begun at once"
STEPS, ROUNDS, REPLAYED, WARM = 12, 5, 96, 32
SIZES: dict[str, Any] = {"window": 1024, "blocks": 16, "block": 128, "sinks": 128, "summary": "bounds"}


def file_of(folder: str) -> int:
    """A descriptor of the stream's file, which has no name."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.islink(path) and os.readlink(path).startswith(folder):
            return os.open(path, os.O_RDONLY)
    raise SystemExit(f"no file in {folder}")


class Watch:
    """Times what a layer's store fetches, and has blocks read one by one before that, where it is to."""

    def __init__(self, store: Any, ways: dict[str, str]) -> None:
        self._store, self._ways, self._fetch, self.waited = store, ways, store.fetch, 0.0
        store.fetch = self.fetch

    def fetch(self, runs: Any) -> None:
        begun = time.perf_counter()
        if self._ways["way"] == ONE_BY_ONE:
            for block, _, _ in runs:
                self._store.hold([block])
        self._fetch(runs)
        self.waited += time.perf_counter() - begun


def decode(stream: Any, ids: torch.Tensor, watches: list[Watch], forget: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of each token, of its waits for the file, and of CPU time."""
    before, took, waited, cpu = stream.stats().tiers, [], [], []
    for token in ids[0]:
        forget()
        for watch in watches:
            watch.waited = 0.0
        begun, used = time.perf_counter(), time.process_time()
        stream.feed(token.view(1, 1))
        took.append((time.perf_counter() - begun) * 1e3)
        cpu.append((time.process_time() - used) * 1e3)
        waited.append(sum(watch.waited for watch in watches) * 1e3)
    after = stream.stats().tiers
    loads, hits = after.loads - before.loads, after.hits - before.hits
    return {"ms": took[2:], "waited": waited[2:], "cpu": cpu[2:], "loads": loads / len(took), "hit_rate": hits / (hits + loads)}


def replay(events: list[list[tuple[list[int], list[int], list[float]]]], capacity: int, decay: float | None) -> float:
    """The share of fetched blocks that were in memory, after the first tokens.

    Args:
        events: for each layer what each token fetched, and the blocks and attention that were told.
        capacity: blocks of a layer in memory.
    """
    hits = loads = 0
    nothing = torch.zeros(1, 0, 1)
    for layer in events:
        tier = BlockTier(HostCopies(), capacity, decay, lambda _: (nothing, nothing), lambda *_: None, lambda held: held)
        known = sorted({block for fetched, _, _ in layer for block in fetched})
        tier.change((block, BLOCK) for block in known)
        tier.spill(known)
        for at, (fetched, blocks, mass) in enumerate(layer):
            if at == WARM:
                before = tier.counts()
            tier.fetch(fetched)
            tier.score(blocks, mass)
            tier.trim([])
        after = tier.counts()
        hits, loads = hits + after.hits - before.hits, loads + after.loads - before.loads
    return hits / (hits + loads)


def orders(stream: Any, ids: torch.Tensor) -> None:
    """Prints the hit rates of both orders over what the next tokens fetch beyond the window."""
    part, planner = stream._engine.parts.the(fetching.Fetching), stream._engine.planner
    part._scored = True
    events: list[list[Any]] = [[] for _ in stream._engine.stores]
    for mine, store in zip(events, stream._engine.stores.values()):
        fetch, score = store.fetch, store.score

        def fetched(runs: Any, mine: Any = mine, fetch: Any = fetch) -> None:
            newest = set(planner.newest_blocks(0, 0, SIZES["window"] + SIZES["block"]))
            mine.append([sorted({block for block, _, _ in runs} - newest)])
            fetch(runs)

        def told(blocks: Any, mass: Any, mine: Any = mine, score: Any = score) -> None:
            known = {block: more for block, more in zip(blocks, mass) if block in set(mine[-1][0])}
            mine[-1] += [list(known), list(known.values())]
            score(blocks, mass)

        store.fetch, store.score = fetched, told
    for token in ids[0]:
        stream.feed(token.view(1, 1))
    read = statistics.mean(len(fetched) for layer in events for fetched, _, _ in layer)
    for times in (0.75, 1.0, 1.25, 1.5, 2.0, 3.0):
        capacity = round(read * times)
        rates = {str(decay): round(replay(events, capacity, decay), 4) for decay in (None, 0.1, 0.5, 0.9)}
        print(json.dumps({"capacity": capacity, "times_what_is_read": times, "hit_rate_by_decay": rates}), flush=True)


def main(tokens: int = 8192, budget: str = "140MiB", folder: str | None = None) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2")
    ids = tokenizer(read_text(), return_tensors="pt", verbose=False)["input_ids"][:, : tokens + REPLAYED]
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda module, given, out: states.append(out[0, -1].clone()))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        where = Tiered(budget, place, keep=SIZES["window"] + SIZES["block"], order="scores")
        with kvsieve.stream(model, kvsieve.InfLLM(**SIZES) | kvsieve.Memory(storage=where)) as stream:
            stream._engine.parts.the(fetching.Fetching)._scored = False
            stream.feed(ids[:, :tokens], chunk=512)
            file, mark = file_of(str(Path(place).resolve())), stream.mark()
            os.fdatasync(file)
            ways, found, want = {"way": ""}, {}, None  # type: ignore[var-annotated]
            watches = [Watch(store, ways) for store in stream._engine.stores.values()]
            for cold in (True, False):
                for _ in range(ROUNDS):
                    for way in (ONE_BY_ONE, AT_ONCE):
                        ways["way"] = way
                        stream.rewind(mark)
                        states.clear()
                        drop = (lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)) if cold else (lambda: None)
                        row = decode(stream, ids[:, tokens : tokens + STEPS], watches, drop)
                        want = torch.stack(states) if want is None else want
                        assert torch.equal(torch.stack(states), want), "how blocks are read changes an output"
                        rows = found.setdefault((way, cold), {"ms": [], "waited": [], "cpu": []})
                        for name in ("ms", "waited", "cpu"):
                            rows[name] += row.pop(name)
                        rows |= row
            os.close(file)
            for (way, cold), row in found.items():
                row |= {name: round(statistics.median(row[name]), 1) for name in ("ms", "waited", "cpu")}
                told = {name: round(row[name], 3) for name in ("ms", "waited", "cpu", "loads", "hit_rate")}
                print(json.dumps({"way": way, "forgotten": cold, **told}), flush=True)
            stream.rewind(mark)
            ways["way"] = AT_ONCE
            orders(stream, ids[:, tokens:])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:4])
