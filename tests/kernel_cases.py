"""What every CUDA kernel must compute, as functions of a device: run under the shim on the CPU, and on a GPU."""

from __future__ import annotations

import random
from typing import Any

import torch
from kernel_blocks import TOLERANCE, Blocks, Mixed, PackedBlocks, channels_of, close, defined, flat, random_spans, rope_of, table_of
from kvsieve._core import PACKED
from kvsieve.backends import attention
from kvsieve.backends.cuda.ops.launch import LAYOUTS
from kvsieve.backends.cuda.ops.residents import slot_width
from kvsieve.backends.reference.backend import ReferenceBackend
from kvsieve.policy.storage import Channels, Packing
from operations import ops

Case = tuple[torch.dtype, int, int, int, str, int, bool]
"""Dtype, key and value size, group, layout, rotated channels, raw."""

CASES: list[Case] = [
    (torch.float32, 16, 16, 1, "half", 16, False),
    (torch.float32, 16, 16, 2, "half", 8, True),
    (torch.float32, 16, 16, 3, "interleaved", 16, False),
    (torch.float32, 16, 16, 6, "half", 16, False),
    (torch.float32, 16, 16, 8, "half", 4, True),
    (torch.float32, 16, 16, 11, "half", 16, False),
    (torch.float32, 16, 16, 16, "half", 16, False),
    (torch.float32, 16, 16, 21, "half", 16, False),
    *((torch.float32, 16, 16, group, "half", 16, False) for group in (4, 5, 7, 9, 10, 12, 13, 14, 15)),
    (torch.float32, 8, 24, 5, "half", 8, False),
    (torch.float32, 64, 64, 4, "half", 64, True),
    (torch.bfloat16, 64, 64, 3, "half", 64, False),
    (torch.bfloat16, 128, 128, 4, "half", 128, True),
    (torch.bfloat16, 96, 96, 1, "interleaved", 48, True),
    (torch.float16, 128, 128, 16, "half", 64, True),
    (torch.float16, 256, 256, 2, "half", 256, False),
]
"""Few enough to compile for the CPU in half a minute, and each way through the kernel at least once."""


def attend(case: Case, device: torch.device) -> None:
    """Random spans of random queries, whatever comes with them, against the definition."""
    dtype, key_dim, value_dim, group, layout, rotary, raw = case
    rng = random.Random(key_dim * 1000 + group)
    for seed in range(4):
        held = Blocks(rng.choice([1, 2]), key_dim, value_dim, dtype, seed, device)
        rows, queries = rng.choice([(1, 1), (2, 1), (1, 3)])
        heads = held.heads * group
        q = torch.randn(rows, queries, heads, key_dim, generator=torch.Generator().manual_seed(seed)).to(dtype).transpose(1, 2)
        rope = None if seed == 3 else rope_of(key_dim, layout, rotary)
        shifts = [rng.randint(-100, 100_000) for _ in range(3)]
        spans = random_spans(rng, rows * queries, len(held.places), len(shifts), raw)
        softcap, factor, scale = rng.choice([None, 3.0]), rng.choice([1.0, 1.44]) if raw else 1.0, key_dim**-0.5
        sinks = torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if rng.random() < 0.5 else None
        out, lse, scores = defined(q, held, spans, rope, shifts, factor, scale, softcap, sinks)
        key_starts = torch.tensor([0, *(m.shape[1] for m in scores)]).cumsum(0)
        starts, table = flat(spans)
        got = ops.attend(
            q=q.to(device),
            blocks=held.table,
            starts=starts.to(device),
            spans=table.to(device),
            rotations=None if rope is None else table_of(rope, shifts).to(device),
            in_block=None if rope is None else table_of(rope, list(range(64))).to(device),
            kv_heads=held.heads,
            value_dim=value_dim,
            splits=rng.choice([1, 2, 5]),
            scale=scale,
            softcap=softcap or 0.0,
            layout=0 if rope is None else LAYOUTS[layout],
            factor=factor if rope is not None else 1.0,
            raw=raw,
            sink_logits=None if sinks is None else sinks.to(device),
            key_starts=key_starts.to(device) if seed % 2 else None,
            total_keys=int(key_starts[-1]) if seed % 2 else 0,
        )
        assert got[0].dtype == dtype
        close(got[0], out, TOLERANCE[dtype])
        found = got[1].cpu().double()
        assert torch.equal(found == -torch.inf, lse == -torch.inf)
        seen = lse > -torch.inf
        torch.testing.assert_close(found[seen], lse[seen], atol=3e-5, rtol=1e-5)
        if seed % 2:
            close(got[2], torch.cat(scores, 1), 1e-5)


PackedCase = tuple[torch.dtype, int, int, int, str, int, bool, int, int, int, int]
"""As :data:`Case`, then kept channels, bits of keys, of values, and the group."""

PACKED_CASES: list[PackedCase] = [
    (torch.float32, 16, 16, 2, "half", 16, False, 8, 0, 0, 16),
    (torch.float32, 16, 16, 3, "half", 16, True, 10, 0, 0, 16),
    (torch.float32, 16, 16, 2, "interleaved", 8, True, 11, 4, 4, 8),
    (torch.float32, 16, 32, 5, "half", 16, False, 16, 8, 2, 32),
    (torch.float32, 64, 64, 2, "half", 64, True, 30, 4, 4, 16),
    (torch.float32, 16, 16, 9, "half", 16, False, 5, 2, 8, 8),
    (torch.float32, 16, 16, 1, "half", 16, False, 7, 0, 4, 16),
    (torch.bfloat16, 128, 128, 4, "half", 128, False, 64, 0, 0, 32),
    (torch.bfloat16, 128, 128, 4, "half", 128, True, 78, 0, 0, 32),
    (torch.bfloat16, 128, 128, 4, "half", 128, False, 128, 4, 4, 32),
    (torch.float16, 64, 64, 1, "half", 32, True, 39, 2, 2, 64),
    (torch.float16, 96, 64, 2, "half", 64, False, 96, 0, 0, 32),
    (torch.bfloat16, 256, 256, 2, "half", 256, False, 200, 8, 8, 8),
]


def packed_attend(case: PackedCase, device: torch.device) -> None:
    """As :func:`attend`, over plain and packed blocks of several sets of channels, mixed."""
    dtype, key_dim, value_dim, group, layout, rotary, raw, kept, key_bits, value_bits, share = case
    rng = random.Random(key_dim * 1000 + group + kept)
    packing = Packing(kept, key_bits, value_bits, share)
    for seed in range(3):
        heads = rng.choice([1, 2])
        rope = None if seed == 2 else rope_of(key_dim, layout, rotary)
        # Keys that turn after they were packed must have kept pairs; an odd number needs a channel that does not turn.
        whole = raw and rope is not None
        sets = [channels_of(rng, heads, key_dim, kept, rope if whole else None) for _ in range(2)]
        plain = Blocks(heads, key_dim, value_dim, dtype, seed, device)
        packed = PackedBlocks(packing, sets, key_dim, value_dim, dtype, seed, device)
        held = Mixed(plain, packed)
        rows, queries = rng.choice([(1, 1), (2, 1), (1, 3)])
        q = (
            torch.randn(rows, queries, heads * group, key_dim, generator=torch.Generator().manual_seed(seed))
            .to(dtype)
            .transpose(1, 2)
        )
        shifts = [rng.randint(-100, 100_000) for _ in range(3)]
        spans = random_spans(rng, rows * queries, len(plain.places) + len(packed.places), len(shifts), raw)
        spans = [
            [(b if b < len(plain.places) else PACKED + b - len(plain.places), *rest) for b, *rest in mine] for mine in spans
        ]  # fmt: skip
        softcap, factor, scale = rng.choice([None, 3.0]), rng.choice([1.0, 1.44]) if raw else 1.0, key_dim**-0.5
        out, lse, scores = defined(q, held, spans, rope, shifts, factor, scale, softcap, None)
        key_starts = torch.tensor([0, *(m.shape[1] for m in scores)]).cumsum(0)
        starts, table = flat(spans)
        got = ops.attend(
            q=q.to(device),
            blocks=plain.table,
            starts=starts.to(device),
            spans=table.to(device),
            rotations=None if rope is None else table_of(rope, shifts).to(device),
            in_block=None if rope is None else table_of(rope, list(range(64))).to(device),
            kv_heads=heads,
            value_dim=value_dim,
            splits=rng.choice([1, 2, 5]),
            scale=scale,
            softcap=softcap or 0.0,
            layout=0 if rope is None else LAYOUTS[layout],
            factor=factor if rope is not None else 1.0,
            raw=raw,
            sink_logits=None,
            key_starts=key_starts.to(device),
            total_keys=int(key_starts[-1]),
            packed=packed.table,
            format=packed.format,
        )
        close(got[0], out, max(TOLERANCE[dtype], 5e-6))
        found = got[1].cpu().double()
        assert torch.equal(found == -torch.inf, lse == -torch.inf)
        seen = lse > -torch.inf
        torch.testing.assert_close(found[seen], lse[seen], atol=1e-4, rtol=1e-5)
        close(got[2], torch.cat(scores, 1), 5e-5)


def packed_tokens(dtype: torch.dtype, key_bits: int, value_bits: int, group: int, kept: int, device: torch.device) -> None:
    """Packing, reading back and carrying give the specification's bytes, all of them."""
    rng = random.Random(kept)
    key_dim, value_dim, heads = 24, 32, 2
    packing = Packing(kept, key_bits, value_bits, group)
    sets = [channels_of(rng, heads, key_dim, kept, None)]
    plain = Blocks(heads, key_dim, value_dim, dtype, 1, device)
    packed = PackedBlocks(packing, sets, key_dim, value_dim, dtype, 2, device)
    spoilt = {0: torch.nan, 1: torch.inf, 2: 0.0, 3: 7e4, 4: 1e-9}
    for block, value in spoilt.items():
        slab, i = plain.places[block]
        for x in plain.slabs[slab]:
            x[0, 64 * i + 9, 3] = value if dtype != torch.float16 or abs(value) < 6e4 else 6.5e4
    packed.check()
    moves: list[list[int]] = []
    for to in range(len(packed.blocks)):
        slot = rng.choice([0, 0, 5, 16])
        while slot < 64:
            run, pieces = rng.choice([1, 2, 3]), []
            for _ in range(run):
                length = min(rng.randint(1, 40), 64 - slot)
                if length:
                    block, start = rng.randrange(7), rng.randint(0, 64 - length)
                    moves.append([block, to, start | slot << 16, length])
                    pieces.append(plain.read(block, start, start + length))
                    slot += length
            k, v = (torch.cat(x, 1) for x in zip(*pieces))
            packed.blocks[to].write(slot - k.shape[1], k, v)
            slot += rng.choice([3, 20])
    starts = [i for i, m in enumerate(moves) if i == 0 or moves[i - 1][1] != m[1]] + [len(moves)]
    up = (torch.tensor(x, dtype=torch.int32).to(device) for x in (moves, starts))
    ops.pack(plain.table, packed.table, *up, heads, key_dim, value_dim, dtype, packed.format, False)
    packed.check()

    runs = [[4, 3, 64, 0], [0, 0, 1, 61], [2, 10, 10, 62], [1, 0, 30, 62]]
    k, v = (torch.full((heads, 92, d), 9.0, dtype=dtype, device=device) for d in (key_dim, value_dim))
    ops.unpack(packed.table, torch.tensor(runs, dtype=torch.int32).to(device), k, v, key_dim, value_dim, dtype, packed.format)
    want = [torch.cat([packed.read(b, lo, hi)[i] for b, lo, hi, _ in runs], 1).to(dtype) for i in range(2)]
    for got, exact in zip((k.cpu(), v.cpu()), want):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)

    moves = []
    for _ in range(20):
        length = rng.randint(1, 64)
        a, b = rng.randint(0, 64 - length), rng.randint(0, 64 - length)
        block, to = rng.choice([(1, 1), (rng.randrange(5), rng.randrange(5))])
        moves.append([block, to, a | b << 16, length])
        parts = [(x.values, y.values) for x, y in [(packed.blocks[block], packed.blocks[to])]]
        if not key_bits:
            parts.append((packed.blocks[block].keys, packed.blocks[to].keys))
        if value_bits:
            parts += list(zip(packed.blocks[block].value_scales or (), packed.blocks[to].value_scales or ()))
        for source, target in parts:
            target[:, b : b + length] = source[:, a : a + length].clone()
    ops.carry(packed.table, torch.tensor(moves, dtype=torch.int32).to(device), heads, value_dim, dtype, packed.format)
    packed.check()


PACKED_TOKENS = [
    (torch.float32, 0, 0, 32, 11),
    (torch.bfloat16, 0, 0, 32, 24),
    (torch.bfloat16, 4, 4, 16, 13),
    (torch.float32, 2, 8, 8, 9),
    (torch.float16, 8, 2, 32, 20),
    (torch.float32, 0, 4, 32, 24),
    (torch.bfloat16, 2, 0, 64, 16),
]


def nan_is_seen(where: str, slot: int, device: torch.device) -> None:
    """A nan in a slot that is read shows; in another it does not."""
    held = Blocks(1, 16, 16, torch.float32, 0, device)
    if where == "every key":
        held.slabs[0][0][:] = torch.nan
    else:
        held.slabs[0][where == "value"][0, 64 + slot] = torch.nan
    starts, spans = flat([[(1, 1, 3, 0, False)]])
    q = torch.randn(1, 1, 1, 16).to(device)
    given = {"rotations": None, "in_block": None, "kv_heads": 1, "value_dim": 16, "splits": 3, "scale": 0.25}
    out, _, _ = ops.attend(q, held.table, starts.to(device), spans.to(device), **given)
    assert bool(out.isnan().any()) == (where == "every key" or slot in (1, 2))


def merge(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for parts, sinks in ((1, None), (3, torch.randn(2, generator=generator)), (300, None)):
        part = torch.randn(5, 2, parts, 64, generator=generator)
        lse = torch.randn(5, 2, parts, generator=generator) * 20
        lse[torch.rand(lse.shape, generator=generator) < 0.3] = -torch.inf
        lse[0] = -torch.inf
        part[lse == -torch.inf] = torch.nan  # a part without keys is never read
        out, total = ops.merge(part.to(device), lse.to(device), None if sinks is None else sinks.to(device), torch.float32)
        clean = part.nan_to_num(0.0).double()
        want = attention.merge([(clean[:, :, s].transpose(0, 1), lse[:, :, s].double().T) for s in range(parts)], sinks)
        close(out, want.transpose(0, 1), 1e-6)
        torch.testing.assert_close(total.cpu(), lse.double().logsumexp(-1).float(), atol=1e-5, rtol=1e-6)
        assert out[0].abs().sum() == 0


def append(dtype: torch.dtype, device: torch.device) -> None:
    """Tokens go where they are told, and nowhere else."""
    held = Blocks(2, 16, 24, dtype, 0, device)
    before = [tuple(x.clone() for x in slab) for slab in held.slabs]
    k = torch.randn(3, 5, 2, 16).to(device, dtype).transpose(1, 2)  # [rows, heads, columns, channels], as models hand it over
    v = torch.randn(3, 2, 5, 25).to(device, dtype)[..., 1:]  # rows that begin anywhere
    wanted = [(0, 4, 6, 63), (2, 0, 1, 0), (2, 1, 1, 1), (1, 3, 3, 17)]
    appends = torch.full((8, 4), 1 << 30, dtype=torch.int32)  # what lies beyond the count must not be looked at
    appends[: len(wanted)] = torch.tensor(wanted, dtype=torch.int32)
    counts = torch.tensor([len(wanted), 0], dtype=torch.int32)
    ops.append(k, v, held.table, appends.to(device), counts.to(device), 8)
    for row, column, block, slot in wanted:
        stored = held.read(block, slot, slot + 1)
        assert torch.equal(stored[0][:, 0], k[row, :, column].cpu())
        assert torch.equal(stored[1][:, 0], v[row, :, column].cpu())
        slab, i = held.places[block]
        for x, old in zip(held.slabs[slab], before[slab]):
            x[:, 64 * i + slot] = old[:, 64 * i + slot]
    for slab, old in zip(held.slabs, before):
        assert all(torch.equal(x, y) for x, y in zip(slab, old)), "a slot that no token went to has changed"


def move(dtype: torch.dtype, device: torch.device) -> None:
    """Moves happen in order, each as if through a buffer."""
    rng = random.Random(3)
    held = Blocks(2, 16, 8, dtype, 0, device)
    model = [[x.clone() for x in held.read(block, 0, 64)] for block in range(7)]
    moves = []
    for _ in range(60):
        length = rng.randint(1, 64)
        a, b = rng.randint(0, 64 - length), rng.randint(0, 64 - length)
        block, to = rng.choice([(1, 1), (rng.randrange(7), rng.randrange(7))])
        moves.append([block, to, a | b << 16, length])
        for which in range(2):
            model[to][which][:, b : b + length] = model[block][which][:, a : a + length].clone()
    ops.move(held.table, torch.tensor(moves, dtype=torch.int32).to(device), 2, 16, 8, dtype)
    for block in range(7):
        assert all(torch.equal(x, y) for x, y in zip(held.read(block, 0, 64), model[block]))


def gather(device: torch.device) -> None:
    """Gather reads the runs in their order; scatter is its inverse."""
    held, other = Blocks(2, 16, 8, torch.float16, 0, device), Blocks(2, 16, 8, torch.float16, 1, device)
    runs = torch.tensor([[5, 3, 64, 0], [0, 0, 1, 61], [2, 10, 10, 62], [6, 0, 30, 62]], dtype=torch.int32)
    k, v = ops.gather(held.table, runs.to(device), 92, 2, 16, 8, torch.float16)
    want = [torch.cat([held.read(b, lo, hi)[i] for b, lo, hi, _ in runs.tolist()], 1) for i in range(2)]
    assert torch.equal(k.cpu(), want[0])
    assert torch.equal(v.cpu(), want[1])
    ops.scatter(k, v, other.table, runs.to(device))
    for block, lo, hi, _ in runs.tolist():
        assert all(torch.equal(x, y) for x, y in zip(other.read(block, lo, hi), held.read(block, lo, hi)))
    assert ops.gather(held.table, runs[:0].to(device), 0, 2, 16, 8, torch.float16)[0].shape == (2, 0, 16)


def rotate(layout: str, dtype: torch.dtype, to: torch.dtype | None, device: torch.device) -> None:
    rope = rope_of(24, layout, 16, 1.3)
    x = torch.randn(7, 3, 24).to(dtype).transpose(0, 1)
    at = torch.tensor([0, 1, -5, 1_000_003, 2, 90_000, 7])
    frequencies = rope.inv_freq.to(device)
    got = ops.rotate(x.to(device), at.to(device), frequencies, LAYOUTS[layout], rope.factor, to)
    assert got.dtype == (to or dtype)
    close(got, rope.rotate(x.double(), at), 1e-6 if got.dtype == torch.float32 else TOLERANCE[dtype])
    table = torch.full((8, 16), torch.nan).to(device)
    ops.rotations(at.to(device), torch.tensor([5], dtype=torch.int32).to(device), frequencies, table)
    torch.testing.assert_close(table[:5].cpu(), table_of(rope, at[:5].tolist()), atol=2e-7, rtol=0)
    assert table[5:].isnan().all(), "more positions than count were turned"


def surprisal(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = (torch.randn(7, 1003, generator=generator) * 8).to(dtype)
    ids = torch.randint(0, 1002, (7,), generator=generator)
    want = ReferenceBackend().surprisal(wide[:, 1:].double(), ids)
    got = ops.surprisal(wide.to(device)[:, 1:], ids.to(device))  # rows that begin anywhere
    torch.testing.assert_close(got.cpu(), want.float(), atol=2e-5, rtol=2e-6)
    inf, odd = torch.inf, torch.zeros(6, 5)
    odd[0, 2], odd[1, 2], odd[2, 3], odd[4], odd[5, 1] = torch.nan, -inf, inf, -inf, inf
    odd[5, 0] = torch.nan
    got = ops.surprisal(odd.to(device, dtype), torch.tensor([0, 2, 3, 9, 0, 2]).to(device)).cpu()
    most = torch.finfo(torch.float32).max
    assert got[0].isnan()
    assert got[1:3].tolist() == [most, 0.0]
    assert got[3].isnan(), "an id outside the vocabulary"
    assert got[4:].tolist() == [most, most]


def top_k(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((1, 1), (5, 2), (130, 130), (1000, 37), (777, 1)):
        x = torch.randn(3, n, generator=generator)
        x[1] = torch.randint(-2, 3, (n,), generator=generator).float()  # many ties
        columns, kth = (y.cpu() for y in ops.top_k(x.to(device), k))
        want = x.topk(k, 1).values
        assert torch.equal(x.gather(1, columns).sort(1, descending=True).values, want)
        assert torch.equal(kth, want[:, -1])
        assert (columns.diff(dim=1) > 0).all()
        first = (x[1] == kth[1]).nonzero().flatten()[: int((x[1][columns[1]] == kth[1]).sum())]
        assert set(first.tolist()) <= set(columns[1].tolist()), "of equal values the first are taken"
    x = torch.tensor([[torch.nan, -torch.inf, 2.0, torch.nan, -0.0]])
    assert ops.top_k(x.to(device), 3)[0].tolist() == [[1, 2, 4]]


def every(device: torch.device) -> dict[str, Any]:
    """All small cases but those of `attend`, by name, as functions without arguments."""
    layouts = [(layout, *pair) for layout in LAYOUTS for pair in ((torch.float32, None), (torch.bfloat16, torch.float32))]
    return {
        **{
            f"nan-{where}-{slot}": lambda w=where, s=slot: nan_is_seen(w, s, device)
            for where in ("key", "value", "every key")
            for slot in range(3)
        },
        "merge": lambda: merge(device),
        **{f"append-{d}": lambda d=d: append(d, device) for d in (torch.float32, torch.bfloat16)},
        **{f"move-{d}": lambda d=d: move(d, device) for d in (torch.float32, torch.float16)},
        "gather": lambda: gather(device),
        **{f"rotate-{a[0]}-{a[1]}": lambda a=a: rotate(*a, device) for a in layouts},
        **{f"surprisal-{d}": lambda d=d: surprisal(d, device) for d in (torch.float32, torch.bfloat16)},
        "top_k": lambda: top_k(device),
        **{f"packed-{'-'.join(map(str, a))}": lambda a=a: packed_tokens(*a, device) for a in PACKED_TOKENS},
    }


def operations() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation, flat, on the CPU; `_keep` is what they point into."""
    held = Blocks(2, 16, 8, torch.float32, 0)
    ints = torch.int32
    runs = torch.tensor([[5, 3, 64, 0]], dtype=ints)
    spans = torch.tensor([[5, 3 | 64 << 8 | 1 << 16, 0, 1]], dtype=ints)
    starts, rope = torch.tensor([0, 1], dtype=ints), rope_of(16, "half")
    turned = table_of(rope, [9]), table_of(rope, list(range(64)))
    rest = (2, 8, 1, 0.25, 0.0, 1, 1.0, True, None, torch.tensor([0, 61]), 61)
    k, v = torch.randn(2, 61, 16), torch.randn(2, 61, 8)
    tokens = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 8)
    packed = PackedBlocks(Packing(8, 4, 4, 8), [Channels(torch.arange(8).expand(2, 8), (0, 0))], 16, 8, torch.float32, 0)
    form, moves = list(packed.format), torch.tensor([[1, 2, 0, 5]], dtype=ints)
    packed_runs = torch.tensor([[4, 3, 64, 0]], dtype=ints)
    plain, slots = torch.tensor([[5, 3 | 64 << 8, 0, 0]], dtype=ints), torch.zeros(1, 2, slot_width(4), dtype=ints)
    queries = torch.tensor([[0, 0, 1, 60, 2, 57, 0, 0, 0, *[-1] * 7]], dtype=ints)
    asked = (torch.randn(1, 4, 1, 16), held.table, starts, plain, 1, queries, 1)
    at = torch.zeros(1, 2, dtype=ints)
    bounds = torch.zeros(7, 2, 2, 16)
    bounded = held.table.clone()
    bounded[:, 3] = bounds.data_ptr() + torch.arange(7) * bounds[0].nbytes
    return {
        "hip": (*asked, 2, 4, 1, 2, 4, 0, slots, slots[:0].clone()),
        "narrow": (*asked, 2, 4, 1, 0, 2, 4, 28, 1, 0, 0, None, None, slots, slots[:0].clone(), torch.zeros(4, dtype=ints)),
        "sparse": (*asked, at, 2, 8, 2, 4, 0, 2, 4, slots, slots[:0].clone(), 2, 0.25, 0.0, None),
        "append": (*tokens, held.table, torch.tensor([[0, 0, 1, 1]], dtype=ints), torch.tensor([1], dtype=ints), 1),
        "attend": (torch.randn(1, 4, 1, 16), held.table, starts, spans, *turned, *rest, packed.table, form),
        "pack": (held.table, packed.table, moves, torch.tensor([0, 1], dtype=ints), 2, 16, 8, torch.float32, form, False),
        "unpack": (packed.table, packed_runs, torch.zeros(2, 61, 16), torch.zeros(2, 61, 8), 16, 8, torch.float32, form),
        "carry": (packed.table, moves, 2, 8, torch.float32, form),
        "merge": (torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3), None, torch.float32),
        "gather": (held.table, runs, 61, 2, 16, 8, torch.float32),
        "scatter": (k, v, held.table, runs),
        "move": (held.table, torch.tensor([[1, 2, 0, 5]], dtype=ints), 2, 16, 8, torch.float32),
        "rotations": (torch.tensor([5]), None, rope.inv_freq, torch.zeros(1, 16)),
        "rotate": (k, torch.arange(61), rope.inv_freq, 1, 1.0, None),
        "surprisal": (torch.randn(3, 50), torch.tensor([1, 2, 3])),
        "top_k": (torch.randn(3, 50), 7),
        "add_values": (
            torch.zeros(1, 4, 3, dtype=torch.int64),
            torch.rand(1, 4, 3),
            starts[:1],
            held.table,
            starts,
            plain,
            2,
            8,
            torch.float32,
        ),
        "page_bounds": (bounded, torch.tensor([1, 6], dtype=ints), 2, 16, torch.float32),
        "_keep": (held, packed, bounds),
    }
