"""What one layer's parts cost on a GPU: attention to everything, packed blocks, single operations; sections of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_measure import Bench, Dense, caught, rope

__all__ = ["attention", "operations", "packed"]


def attention(b: Bench) -> dict[str, Any]:
    """Dense decode attention of one layer, a query of each head over everything, against torch's and a copy of the same bytes."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    flex = flex_attention if b.dry else torch.compile(flex_attention, dynamic=False)
    rows: dict[str, Any] = {}
    for length in b.lengths:
        row = rows[str(length)] = {}
        with caught(row, "kvsieve rotated"):
            attention_rotated(b, length, flex, row)
        with caught(row, "kvsieve raw"):
            attention_raw(b, length, row)
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def attention_rotated(b: Bench, length: int, flex: Any, row: dict[str, Any]) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    held = Dense(b, length, raw=False)
    row["bytes"], row["layers_rotated_through"] = held.bytes, len(held.stores)
    dense = [[x[None] for x in store.read(held.runs)] for store in held.stores]
    want = sdpa(held.q, *dense[-1], enable_gqa=True).transpose(1, 2).float()
    row["error_against_sdpa"] = error = float((held.out.float() - want).norm() / want.norm())
    assert error < 1e-2, f"attention over {length} tokens is {error:.3f} off"
    to = [torch.empty_like(x) for x in dense[0]]
    runs: dict[str, tuple[Callable[[int], Any], int]] = {
        "kvsieve rotated": (held.attend, 1),
        "sdpa": (lambda i: sdpa(held.q, *dense[i % len(dense)], enable_gqa=True), 1),
        "flex": (lambda i: flex(held.q, *dense[i % len(dense)], enable_gqa=True), 1),
        "copy": (lambda i: [t.copy_(x) for t, x in zip(to, dense[i % len(dense)])], 2),
    }
    for name, (run, times) in runs.items():
        with caught(row, name):
            taken = b.microseconds(run)
            row[name] = {**taken, "gb_per_s": round(times * held.bytes / taken["us"] / 1e3, 1)}


def attention_raw(b: Bench, length: int, row: dict[str, Any]) -> None:
    held = Dense(b, length, raw=True)
    if length <= 32 << 10:
        row["raw_error"] = error = raw_error(b, held)
        assert error < 2e-2, f"raw keys over {length} tokens are {error:.3f} off"
    taken = b.microseconds(held.attend)
    row["kvsieve raw"] = {**taken, "gb_per_s": round(held.bytes / taken["us"] / 1e3, 1)}
    row["raw_over_rotated"] = round(taken["us"] / row["kvsieve rotated"]["us"], 3)


def raw_error(b: Bench, held: Dense) -> float:
    """Against rotating all keys first: in a memory that lost nothing, slots are positions."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    k, v = (x.float() for x in held.stores[-1].read(held.runs))
    turn, at = rope(b.dim), torch.arange(k.shape[1], device=b.device)
    k, q = turn.rotate(k, at), turn.rotate(held.q[0].float(), at[-1:])
    want = sdpa(q[None], k[None], v[None], enable_gqa=True).transpose(1, 2)
    return float((held.out.float() - want).norm() / want.norm())


def packed(b: Bench) -> dict[str, Any]:
    """Decode attention of one layer over packed tokens, against the same tokens as they came."""
    import torch
    from kvsieve.methods.think import num_kept_channels
    from kvsieve.policy.storage import Packing

    length = 300 if b.dry else 64 << 10
    group = 16 if b.dry else 32
    whole = b.dim
    formats: dict[str, tuple[Packing, bool]] = {
        "plain": (Packing(whole), False),
        "thin 0.5": (Packing(num_kept_channels(whole, 0.5, "pairs")), False),
        "thin 0.4": (Packing(num_kept_channels(whole, 0.4, "pairs")), False),
        "8 bits": (Packing(whole, 8, 8, group), False),
        "4 bits": (Packing(whole, 4, 4, group), False),
        "2 bits": (Packing(whole, 2, 2, group), False),
        "thin 0.5, 4 bits": (Packing(num_kept_channels(whole, 0.5, "pairs"), 4, 4, group), False),
        "plain, raw": (Packing(whole), True),
        "thin 0.5, raw": (Packing(num_kept_channels(whole, 0.5, "pairs")), True),
        "4 bits, raw": (Packing(whole, 4, 4, group), True),
    }
    rows: dict[str, Any] = {"length": length, "of": b.dim}
    for name, (packing, raw) in formats.items():
        with caught(rows, name):
            held = Dense(b, length, raw)
            if not name.startswith("plain"):
                pack_all(b, held, packing)
            rows[name] = packed_row(b, held, raw)
            base = rows.get("plain, raw" if raw else "plain", {}).get("us")
            if base:
                rows[name]["times_as_fast_as_plain"] = round(base / rows[name]["us"], 3)
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def pack_all(b: Bench, held: Dense, packing: Any) -> None:
    """Pack all but the newest 64 tokens, and plan the next one."""
    import torch
    from kvsieve.methods import think

    queries = torch.randn(b.heads, 32, b.dim)
    keys = held.stores[0].read(held.runs[:2])[0].cpu()
    channels = think.heaviest_channels(queries, keys, packing.key_kept, "pairs", rope(b.dim))
    moves = held.planner.pack(0, (held.length - 64) // 64 * 64, 64)
    in_use, packed_in_use = held.planner.blocks_in_use(), held.planner.packed_in_use()
    for store in held.stores:
        store.set_packing(packing)
        store.pack(moves, channels)
        store.free_unused(in_use, packed_in_use)
    held.step = held.planner.begin([1], 1, True, False)
    for store in held.stores:
        held.out = store.run(held.q, held.k, held.v, held.step, held.call)
    held.planner.commit()
    held.runs = held.planner.runs(0, 0)


def packed_row(b: Bench, held: Dense, raw: bool) -> dict[str, Any]:
    """Error against attention over what is stored, read back at full width; then the time."""
    store = held.stores[-1]
    k, v = (x.float() for x in store.read(held.runs))
    q = held.q[0].float()
    if raw:
        import torch

        turn, at = rope(b.dim), torch.arange(k.shape[1], device=b.device)
        k, q = turn.rotate(k, at), turn.rotate(q, at[-1:])
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    want = sdpa(q[None], k[None], v[None], enable_gqa=True).transpose(1, 2)
    error = float((held.out.float() - want).norm() / want.norm())
    assert error < 2e-2, f"{error:.3f} off"
    taken = b.microseconds(held.attend)
    size = store.bytes_held
    return {**taken, "bytes": size, "gb_per_s": round(size / taken["us"] / 1e3, 1), "relative_error": error}


def operations(b: Bench) -> dict[str, Any]:
    """The other kernels, once each in a size that decoding with a budget of 4,096 meets."""
    import torch
    from kvsieve.backends.cuda.buffers import DeviceRuns
    from kvsieve.backends.runs import columns
    from kvsieve.policy.storage import Packing
    from operations import ops

    held = Dense(b, b.budget, raw=True)
    store, frequencies = held.stores[0], rope(b.dim).inv_freq.to(b.device)
    buffer, table = held.backend.context.plan(held.step, b.device).buffer, store.table
    moves = torch.tensor([[i, i, 1, 63] for i in range(b.budget // 64)], dtype=torch.int32, device=b.device)
    runs = torch.tensor([[i, 0, 64, 64 * i] for i in range(b.budget // 64)], dtype=torch.int32, device=b.device)
    k, _ = ops.gather(table, runs, b.budget, b.kv_heads, b.dim, b.dim, b.dtype)
    at, turned = torch.arange(b.budget, device=b.device), torch.empty(b.budget, b.dim, device=b.device)
    logits = torch.randn(1, 500 if b.dry else 128256, device=b.device).to(b.dtype)
    mine = Dense(b, b.budget, raw=False)
    pack_all(b, mine, Packing(b.dim, 4, 4, 16 if b.dry else 32))
    codes, half = mine.stores[0], b.budget // 128
    again = torch.tensor([[i, i, 0, 64] for i in range(half)], dtype=torch.int32, device=b.device)
    each, read_runs = torch.arange(half + 1, dtype=torch.int32, device=b.device), DeviceRuns(columns(mine.runs), b.device)
    packing = codes._packed.format
    scores = torch.randn(b.heads, 1000 if b.dry else 131072, device=b.device)
    token = torch.tensor([7], device=b.device)
    part = torch.randn(1, b.heads, 49, b.dim, device=b.device)
    sizes = (b.kv_heads, b.dim, b.dim, b.dtype)
    runs_of: dict[str, Callable[[int], Any]] = {
        "append, 1 token": lambda i: ops.append(held.k, held.v, table, buffer.appends, buffer.counts, 1),
        f"attend, {b.budget} raw keys": held.attend,
        "merge, 49 parts": lambda i: ops.merge(part, part[..., 0].contiguous(), None, b.dtype),
        f"move, {len(moves)} of 63 tokens": lambda i: ops.move(table, moves, *sizes),
        f"pack to 4 bits, {64 * half} tokens": lambda i: ops.pack(
            table, codes._packed.table.tensor, again, each, *sizes, packing, False
        ),
        f"read back from 4 bits, {b.budget} tokens": lambda i: codes._read(read_runs),
        f"gather, {b.budget} tokens": lambda i: ops.gather(table, runs, b.budget, *sizes),
        f"rotate, {b.budget} tokens": lambda i: ops.rotate(k, at, frequencies, 1),
        f"rotations, {b.budget} positions": lambda i: ops.rotations(at, None, frequencies, turned),
        f"surprisal, 1 x {logits.shape[1]}": lambda i: ops.surprisal(logits, token),
        f"top_k, 256 of {b.heads} x {scores.shape[1]}": lambda i: ops.top_k(scores, 256),
        f"torch.topk, 256 of {b.heads} x {scores.shape[1]}": lambda i: torch.topk(scores, 256),
    }
    rows: dict[str, Any] = {}
    for name, run in runs_of.items():
        with caught(rows, name):
            rows[name] = b.microseconds(run)
    return rows
