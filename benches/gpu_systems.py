"""What SelectiveV, RefreshKV, Quest and MemoryBank cost one layer on a GPU, beside attention to everything; a section of `gpu.py`.

Each answer is compared with the definition before it is timed. By the wall clock, launches included: these steps decide something
on the host, and no graph holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_measure import Bench, Dense, caught
from gpu_sparse import sparse_error

__all__ = ["systems", "systems_table"]


def systems(b: Bench) -> dict[str, Any]:
    """One query over so many tokens: each system's step, and what is read by it."""
    rows: dict[str, Any] = {}
    for length in b.lengths if b.dry else b.lengths[1:]:
        row = rows[str(length)] = {}
        if b.left < 30:
            row["error"] = "no time left"
            continue
        with caught(row, "dense"):
            held = Dense(b, length, raw=False)
            row["dense"] = everything(b, held)
            for name, measure in (("SelectiveV", selective_v), ("RefreshKV", refresh_kv), ("Quest", quest), ("MemoryBank", bank)):
                with caught(row, name):
                    row[name] = measure(b, held)
            del held
            with caught(row, "HiP past the length"):
                row["HiP past the length"] = extended(b, length)
    return rows


def everything(b: Bench, held: Dense) -> float:
    """Attention to all tokens."""
    return timed(b, held, lambda store: store.run(held.q, held.k, held.v, held.step, held.call))


def timed(b: Bench, held: Dense, run: Callable[[Any], Any]) -> float:
    """Microseconds of one run; the stores take turns, so that none lies in a cache."""
    turn = iter(range(1 << 30))
    return round(b.wall(lambda: run(held.stores[next(turn) % len(held.stores)]), 16), 1)


def close(got: Any, want: Any) -> float:
    """Relative error, which must be small."""
    error = float((got.float() - want.float()).norm() / want.float().norm())
    assert error < 2e-2, f"{error:.3f} off"
    return error


def selective_v(b: Bench, held: Dense) -> dict[str, Any]:
    from kvsieve.backends.heaviest_values import heaviest
    from kvsieve.policy.select import HeaviestValues

    row: dict[str, Any] = {}
    rules = {"100 values": HeaviestValues(16 if b.dry else 100), "mass 0.9": HeaviestValues(None, 0.9)}
    for name, rule in rules.items():
        store = held.stores[-1]
        out, mass = store.run_heaviest(held.q, held.k, held.v, held.step, held.call, rule, [True])
        k, v = (x.float() for x in store.read(held.runs))
        want, _ = heaviest([(held.q[0, :, 0].float(), k, v)], held.call, rule)
        row[f"{name}: relative_error"], row[f"{name}: mass"] = close(out[0, 0], want), round(float(mass.min()), 4)
        row[f"{name}: us"] = timed(
            b, held, lambda s, rule=rule: s.run_heaviest(held.q, held.k, held.v, held.step, held.call, rule, [True])
        )
    return row


def refresh_kv(b: Bench, held: Dense) -> dict[str, Any]:
    from layer_steps import Layer, RefreshStep

    layer = Layer(held.backend, held.stores[-1], held.length, held.k, held.v, held.call, b.heads)
    refresh = RefreshStep(32 if b.dry else 2048, layer, held.step)
    scores = refresh.scores(held.q)
    # Four tokens after the choice: its lowest four are gone, and so many newer ones are read.
    sets = refresh.choose(held.q, newer=4)
    got, want = refresh.checked(held.q, sets, *held.stores[-1].read(held.runs))
    given = (held.q, held.k, held.v, held.step, held.call)
    return {
        "relative_error": close(got.double(), want),
        "full step: us": timed(b, held, lambda s: s.run_with_sets(*given, [None])),
        "choosing: us": round(b.wall(lambda: refresh.rule.choose(scores), 16), 1),
        "partial step: us": timed(b, held, lambda s: s.run_with_sets(*given, [sets])),
    }


def quest(b: Bench, held: Dense) -> dict[str, Any]:
    import kvsieve

    policy = kvsieve.Quest(32, candidates=2, sinks=0, window=64) if b.dry else kvsieve.Quest(1024)
    found = {id(store): held.backend.make_selection(policy.selection) for store in held.stores}

    def run(store: Any) -> Any:
        return store.run_selected(held.q, held.k, held.v, held.step, held.call, found[id(store)])

    def again(store: Any) -> Any:
        out = run(store)
        found[id(store)].undo()
        return out

    last = held.stores[-1]
    outs = [run(store) for store in held.stores]
    search = found[id(last)]
    error = sparse_error(held, search, outs[-1])
    assert error < 2e-2, f"{error:.3f} off"
    row = {"relative_error": error, "bounds_read": search.work[0] // b.kv_heads, "keys_read": search.work[1] // b.kv_heads}
    for store in held.stores:
        found[id(store)].undo()
    return {**row, "bytes of bounds": last.held().bounds, "selects anew: us": timed(b, held, again)}


def extended(b: Bench, length: int) -> dict[str, Any]:
    """HiP from keys before RoPE: at true distances, and beyond the trained length."""
    from dataclasses import replace

    import kvsieve
    import torch

    held = Dense(b, length, raw=True)
    policy = kvsieve.HiP(32, sinks=4, window=16, dense_layers=0) if b.dry else kvsieve.HiP(512, dense_layers=0)
    rule, store, row = policy.selection, held.stores[-1], {}
    k, v = (x.float() for x in store.read(held.runs))
    rope, group = held.call.rope, b.heads // b.kv_heads
    for name, past in (("within it", False), ("past it", True)):
        search, call = held.backend.make_selection(rule), replace(held.call, relative=past, consecutive=past)
        out = store.run_selected(held.q, held.k, held.v, held.step, call, search)
        errors = []
        for head, choice in enumerate(search.choice(0)):
            near = [*range(min(rule.sinks, choice.end)), *range(choice.end, length + 1)]
            chosen = [token for lo, hi in choice.ranges.tolist() for token in range(lo, hi)]
            at = torch.tensor(sorted({*near, *chosen}), device=b.device)
            mine, places = slice(head * group, (head + 1) * group), torch.arange(len(at), device=b.device) if past else at
            q, keys = rope.rotate(held.q[0, mine].float(), places[-1:]), rope.rotate(k[head, at], places)
            want = torch.softmax(q[:, 0] @ keys.T * call.scale, -1) @ v[head, at]
            errors.append(close(out[0, 0, mine], want))
        row[f"{name}: relative_error"] = max(errors)
        found = {id(one): held.backend.make_selection(rule) for one in held.stores}

        def again(one: Any, call: Any = call, found: Any = found) -> None:
            one.run_selected(held.q, held.k, held.v, held.step, call, found[id(one)])
            found[id(one)].undo()

        row[f"{name}, selects anew: us"] = timed(b, held, again)
    return row


def bank(b: Bench, held: Dense) -> dict[str, Any]:
    import torch
    from kvsieve.backends.recall import recall
    from kvsieve.bank.entries import BankLayer, Entries, Shape

    tokens = 256 if b.dry else 65536
    shape = Shape((BankLayer(0, b.kv_heads, b.dim, b.dim, b.dtype),), 16, tokens)
    k, v = ({0: torch.randn(b.kv_heads, tokens, b.dim).to(b.dtype)} for _ in "kv")
    entries = Entries(shape).append(k, v)
    given = (held.q, held.k, held.v, held.step, held.call)
    out, lse = held.stores[-1].run_with_lse(*given)
    keys = held.stores[-1].read(held.runs)[0].float()
    q = held.q[0, :, 0].float().view(b.kv_heads, -1, b.dim)
    want = torch.logsumexp(q @ keys.transpose(1, 2) * held.call.scale, -1).flatten()
    row: dict[str, Any] = {"relative_error": close(lse[0, :, 0], want)}
    plain = held.stores[-1].run(*given)
    assert torch.equal(out, plain), "the output is that of run"
    row["attention with its log-sum-exp: us"] = timed(b, held, lambda s: s.run_with_lse(*given))
    row["queries to the host: us"] = round(b.wall(lambda: held.q.to("cpu", torch.float32), 16), 1)
    asked = held.q[0].to("cpu", torch.float32)
    row[f"search of {tokens} tokens on the host: us"] = round(
        b.wall(lambda: recall(asked, entries, 0, held.length, 4, held.call), 16), 1
    )
    return row


def systems_table(record: dict[str, Any]) -> list[str]:
    """The section as a table."""
    found = ["", "| one layer over | dense us | system | step | us |", "|---|---|---|---|---|"]
    for length, row in record.get("systems", {}).items():
        for name in ("SelectiveV", "RefreshKV", "Quest", "MemoryBank", "HiP past the length") if isinstance(row, dict) else ():
            steps = {step.removesuffix(": us"): us for step, us in row.get(name, {}).items() if step.endswith(": us")}
            found += [f"| {length} | {row.get('dense')} | {name} | {step} | {us} |" for step, us in steps.items()]
    return found
