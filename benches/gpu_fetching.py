"""InfLLM's and LongHeads' layers on a GPU: what one decoded token and one block of a prompt's queries take, beside dense attention.

By the wall clock, the host's part among it: which blocks are read is told to the host, which lays out what the kernel reads. And
what it takes to bring blocks from the host's memory.
"""

from __future__ import annotations

from typing import Any

from gpu_measure import Bench, Dense, caught

__all__ = ["fetching", "host"]


def fetching(b: Bench) -> dict[str, Any]:
    """One layer behind so many tokens, pre-RoPE: summaries compared, blocks read; checked against the definition."""
    import torch

    rows: dict[str, Any] = {}
    for length in b.lengths if b.dry else [32 << 10, 128 << 10, 1 << 20]:
        row = rows[str(length)] = {}
        if b.left < 30:
            row["error"] = "no time left"
            continue
        with caught(row, "dense"):
            held = Dense(b, length, raw=True)
            row["dense"] = {"us": round(b.wall(lambda h=held: h.attend(0), 100), 1)}
            for name, policy in policies(b).items():
                with caught(row, name):
                    row[name] = layer(b, held, policy)
                    row[name]["times_as_fast_as_dense"] = round(row["dense"]["us"] / row[name]["token_us"], 2)
            del held
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def policies(b: Bench) -> dict[str, Any]:
    """With the papers' settings."""
    import kvsieve

    few = {"window": 32, "blocks": 2, "block": 16, "sinks": 4, "query_block": 16}
    infllm = {"window": 4096, "blocks": 32, "query_block": 512, **(few if b.dry else {})}
    return {
        "InfLLM": kvsieve.InfLLM(**infllm),
        "InfLLM per head": kvsieve.InfLLM(**infllm, per_head=True),
        "LongHeads": kvsieve.LongHeads(64, chunk=16) if b.dry else kvsieve.LongHeads(4096),
    }


def layer(b: Bench, held: Dense, policy: Any) -> dict[str, Any]:
    """Errors against the definition, then times: of a token, of what it reads alone, and of a block of a prompt's queries."""
    import torch
    from kvsieve._core import Residents
    from layer_steps import FetchingStep, Layer

    backend, store, width = held.backend, held.stores[0], policy.fetching.query_block
    # A block of queries begins at a multiple of its size.
    begin = (held.length - width) // width * width
    many = [torch.randn(1, heads, width, b.dim, device=b.device).to(b.dtype) for heads in (b.heads, b.kv_heads, b.kv_heads)]
    row: dict[str, Any] = {"queries": width}
    for name, first, q, new in (("token", held.length, held.q, (held.k, held.v)), ("block", begin, many[0], many[1:])):
        step = FetchingStep(policy, Layer(backend, store, first, *new, held.call, b.heads))
        assert {block for block, _, _ in step.runs} <= {block for block, _, _ in held.runs}, "one store serves all"
        residents = Residents(step.step, 0)
        got, want = step.checked(q, lambda lo, hi, at=residents: store.read(at.runs(lo, hi)))
        error = float((got.double() - want).norm() / want.norm())
        assert error < 2e-2, f"{error:.3f} off"
        row["relative_error" if name == "token" else "relative_error_of_block"] = error
        row[f"{name}_us"] = round(b.wall(lambda s=step, x=q: s.run(x), 200 if name == "token" else 5), 1)
        if name == "token":
            row["compared"], row["tokens_read"] = step.last.choice.compared, step.tokens_read
            given = q[0], first, residents, step.last.choice.pieces, held.call, step.part.summary.needs_scores
            row["token_chosen_us"] = round(b.wall(lambda x=given: store.attend_pieces(*x), 200), 1)
    return row


def host(b: Bench) -> dict[str, Any]:
    """Blocks of one layer of which a quarter is on the device: random ones are fetched, and compared with what was written."""
    import random

    import kvsieve
    import torch
    from kvsieve import backends
    from layer_steps import holding

    length, wanted = (1000, 3) if b.dry else (128 << 10, 32)
    backend, planner = backends.get("cuda"), holding(kvsieve.Full(), length)
    example = torch.zeros(1, b.kv_heads, 1, b.dim, dtype=b.dtype, device=b.device)
    store, runs = backend.make_store(example, example), planner.runs(0, 0)
    store.set_tier(backend.make_tier(None), len(runs) // 4, None)
    for run in runs:
        x = torch.full((b.kv_heads, run[2] - run[1], b.dim), float(run[0] % 100), dtype=b.dtype, device=b.device)
        store.write([run], x, -x)
        store.trim([])
    rng = random.Random(0)

    def fetch() -> None:
        chosen = rng.sample(runs[:-1], wanted)
        store.fetch(chosen)
        k, v = store.read(chosen)
        found.append((k[0, ::64, 0], v[0, ::64, 0], [float(block % 100) for block, _, _ in chosen]))

    found: list[Any] = []
    before, taken = store.tier_counts(), b.wall(fetch, 50)
    counts = store.tier_counts()
    for k, v, want in found:
        assert k.tolist() == want == (-v).tolist(), "what was fetched is not what was written"
    loads, rounds = counts.loads - before.loads, len(found)
    moved = (counts.bytes_read - before.bytes_read) / rounds
    row = {"blocks": len(runs), "fetched": wanted, "loaded": round(loads / rounds, 1), "us": round(taken, 1)}
    return {**row, "gb_per_s": round(moved / taken / 1e3, 2), "host_bytes": counts.bytes_in_file}
