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
            for name, rule in rules(b).items():
                with caught(row, name):
                    row[name] = layer(b, held, rule)
                    row[name]["times_as_fast_as_dense"] = round(row["dense"]["us"] / row[name]["token_us"], 2)
            del held
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def rules(b: Bench) -> dict[str, Any]:
    """The papers' settings."""
    import kvsieve

    few = {"window": 32, "blocks": 2, "block": 16, "sinks": 4, "query_block": 16}
    infllm = {"window": 4096, "blocks": 32, "query_block": 512, **(few if b.dry else {})}
    long_heads = kvsieve.LongHeads(64, chunk=16) if b.dry else kvsieve.LongHeads(4096)
    return {
        "InfLLM": kvsieve.InfLLM(**infllm).memories[0].roles.select,
        "InfLLM per head": kvsieve.InfLLM(**infllm, per_head=True).memories[0].roles.select,
        "LongHeads": long_heads.memories[0].roles.select,
    }


def layer(b: Bench, held: Dense, rule: Any) -> dict[str, Any]:
    """Errors against the definition, then times: of a token, of what it reads alone, and of a block of queries."""
    import torch
    from kvsieve._core import Residents
    from kvsieve.backends.pieces import attend_pieces
    from kvsieve.backends.ranking import greatest

    store, residents = held.stores[0], Residents(held.step, 0)
    scored = rule.summary == "representatives"
    among = rule.candidates(held.length)
    summaries = torch.randn(len(among), b.kv_heads, b.dim, device=b.device)
    width = rule.query_block
    queries = torch.randn(b.heads, width, b.dim, device=b.device).to(b.dtype)

    def pieces(first: int, q: Any) -> list[Any]:
        mean = q.float().mean(1).view(b.kv_heads, -1, b.dim).sum(1)
        if rule.per_head:
            scores = (summaries.transpose(0, 1) * mean[:, None]).sum(-1)
        else:
            scores = (summaries.flatten(1) * mean.flatten()).sum(-1)[None]
        count = len(rule.candidates(first))
        found = greatest(scores[:, :count], rule.limit(first)) + among.start
        return rule.pieces(first, q.shape[1], found.tolist())

    def attend(first: int, q: Any, asked: list[Any] | None = None) -> Any:
        return store.attend_pieces(q, first, residents, asked or pieces(first, q), held.call, scored)

    row: dict[str, Any] = {"compared": len(among)}
    token, first = held.q[0], held.length
    begin = (held.length - width) // width * width
    for name, at, q in (("relative_error", first, token), ("relative_error_of_block", begin, queries[:, -8:])):
        asked = pieces(at, q)
        read = lambda lo, hi: store.read(residents.runs(lo, hi))  # noqa: E731
        want = attend_pieces(q.float(), at, asked, read, held.call, scored)
        row[name] = error = float((attend(at, q, asked).out.float() - want.out).norm() / want.out.norm())
        assert error < 2e-2, f"{error:.3f} off"
    asked = pieces(first, token)
    row["tokens_read"] = sum(piece.hi - piece.lo for piece in asked if piece.head in (None, 0))
    row["token_us"] = round(b.wall(lambda: attend(first, token), 200), 1)
    row["token_chosen_us"] = round(b.wall(lambda: attend(first, token, asked), 200), 1)
    row["queries"], row["block_us"] = width, round(b.wall(lambda: attend(begin, queries), 5), 1)
    return row


def host(b: Bench) -> dict[str, Any]:
    """Blocks of one layer of which a quarter is on the device: random ones are fetched, and compared with what was written."""
    import random

    import kvsieve
    import torch
    from kvsieve import backends
    from kvsieve.policy.specs import make_planner

    length, wanted = (1000, 3) if b.dry else (128 << 10, 32)
    backend, planner = backends.get("cuda"), make_planner(kvsieve.Full().specs(1), "post_rope")
    planner.restore(length, [(length, [(list(range(length)), [0.0] * length)])])
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
