"""What sparse attention costs one layer on a GPU, beside attention to everything: HiP and InfiniteHiP; a section of `gpu.py`."""

from __future__ import annotations

import math
from typing import Any

from gpu_measure import Bench, Dense, caught

__all__ = ["sparse", "sparse_error"]


def sparse(b: Bench) -> dict[str, Any]:
    """Decode attention of one layer to what HiP and InfiniteHiP choose, beside all of it; and a chunk that is appended."""
    import torch

    rows: dict[str, Any] = {}
    for length in b.lengths if b.dry else [32 << 10, 128 << 10, 1 << 20]:
        row = rows[str(length)] = {}
        if b.left < 30:
            row["error"] = "no time left"
            continue
        with caught(row, "dense"):
            held = Dense(b, length, raw=False)
            row["dense"] = b.microseconds(held.attend)
            for name, rule in searches(b).items():
                with caught(row, name):
                    row[name] = sparse_row(b, held, rule)
                    row[name]["times_as_fast_as_dense"] = {
                        how: round(row["dense"]["us"] / row[name][how], 2) for how in ("scheduled", "every_step")
                    }
            with caught(row, "chunk"):
                row["chunk"] = sparse_chunk(b, held)
            del held
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def searches(b: Bench) -> dict[str, Any]:
    """The papers' settings: 512 tokens in blocks of two, every 8 steps; 2,048 in three stages, every 16, 8 and 4."""
    from types import SimpleNamespace

    few = {"query_block": 16, "query_stride": 4, "sinks": 4, "window": 16}
    hip = {
        "sinks": 16,
        "window": 256,
        "query_block": 64,
        "query_stride": 8,
        "budget": 512,
        **(few | {"budget": 32} if b.dry else {}),
    }
    stages = ((32, 128), (8, 64), (4, 32)) if b.dry else ((256, 32768), (32, 8192), (8, 2048))
    infinite = {"sinks": 256, "window": 1024, "query_block": 64, "query_stride": 8, **(few if b.dry else {})}
    return {
        "HiP": SimpleNamespace(kind="hip", representative="middle", block=2, refresh=8, **hip),
        "InfiniteHiP": SimpleNamespace(kind="infinite", representative="first", stages=stages, refresh=(16, 8, 4), **infinite),
    }


def sparse_row(b: Bench, held: Dense, rule: Any) -> dict[str, Any]:
    """Error against attention over what was chosen; then the time of each kind of step, and of the rule's mixture of them."""
    from kvsieve.backends.cuda.selection import RowChoice

    shape, found = (b.kv_heads, b.dim), [held.backend.make_selection(rule) for _ in held.stores]
    asked = held.backend.context.plan(held.step, b.device).residents()

    def run(i: int) -> Any:
        store, search = held.stores[i % len(held.stores)], found[i % len(held.stores)]
        asked.residents = asked.residents._replace(blocks=store.table)
        return search.run(held.q, shape, asked, held.call)

    outs = [run(i) for i in range(len(found))]
    row: dict[str, Any] = {"keys_scored": found[-1].work[0] // b.kv_heads, "keys_read": found[-1].work[1] // b.kv_heads}
    row["relative_error"] = error = sparse_error(held, found[-1], outs[-1])
    assert error < 1e-2, f"{error:.3f} off"

    def again(i: int) -> Any:
        out = run(i)
        found[i % len(found)].undo()
        return out

    refresh = found[0].rule.refresh
    cycle = math.lcm(*refresh)
    kinds = [found[0].rule.due(step) for step in range(cycle)]
    chosen = [search._choices[0] for search in found]
    for kind in dict.fromkeys(kinds):
        for search, choice in zip(found, chosen):
            facts = choice.facts._replace(next=held.length, step=kinds.index(kind))
            search._choices = [RowChoice(facts, choice.slots)]
        row["choice stands" if kind is None else f"from stage {kind + 1}"] = b.microseconds(again)
    times = {kind: row["choice stands" if kind is None else f"from stage {kind + 1}"]["us"] for kind in kinds}
    row["scheduled"] = round(sum(times[kind] for kind in kinds) / cycle, 2)
    row["every_step"] = times[0]
    return row


def sparse_error(held: Dense, search: Any, out: Any) -> float:
    """Of the last store's answer, against float32 attention over sinks, window, and what was chosen."""
    import torch

    (k, v), rule, facts = held.stores[-1].read(held.runs), search.rule, search._choices[0].facts
    group, errors = held.q.shape[1] // k.shape[0], []
    for head, mine in enumerate(search.choice(0)):
        kept = torch.zeros(k.shape[1], dtype=torch.bool)
        kept[: min(rule.sinks, facts.hi)] = True
        kept[facts.hi :] = True
        for lo, hi in mine.ranges.tolist():
            kept[lo:hi] = True
        at = kept.nonzero()[:, 0].to(k.device)
        q = held.q[0, head * group : (head + 1) * group, 0].float()
        want = torch.softmax(q @ k[head, at].float().T * held.call.scale, -1) @ v[head, at].float()
        errors.append(float((out[0, 0, head * group : (head + 1) * group].float() - want).norm() / want.norm()))
    return max(errors)


def sparse_chunk(b: Bench, held: Dense) -> dict[str, Any]:
    """A chunk of a prompt behind all these tokens: everything, and what each search chooses. By the wall clock."""
    import torch

    width = 40 if b.dry else 4096
    q = torch.randn(1, b.heads, width, b.dim, device=b.device).to(b.dtype)
    k, v = (torch.randn(1, b.kv_heads, width, b.dim, device=b.device).to(b.dtype) for _ in "kv")
    step = held.planner.begin([width], width, False, False)
    store, row = held.stores[0], {"tokens": width}
    try:
        row["dense_us"] = round(b.wall(lambda: store.run(q, k, v, step, held.call), 3), 1)
        for name, rule in searches(b).items():
            search = held.backend.make_selection(rule)
            taken = b.wall(lambda s=search: store.run_selected(q, k, v, step, held.call, s), 3)
            row[f"{name}_us"], row[f"{name}_times_as_fast"] = round(taken, 1), round(row["dense_us"] / taken, 2)
    finally:
        held.planner.rollback()
    return row
