"""What kernels must compute for SelectiveV, RefreshKV and Quest, as functions of a device: under the shim, and on a GPU."""

from __future__ import annotations

import random
from typing import Any

import torch
from kernel_blocks import (
    TOLERANCE,
    Blocks,
    Mixed,
    PackedBlocks,
    channels_of,
    close,
    defined,
    flat,
    random_spans,
    rope_of,
    table_of,
)
from kvsieve._core import PACKED
from kvsieve.backends.cuda.ops.attend import HIGHEST, LOGITS
from kvsieve.backends.cuda.ops.launch import LAYOUTS
from kvsieve.backends.reference.definition import bound_scores
from kvsieve.policy.storage import Packing
from operations import ops
from search_cases import Row, SparseLayer, infinite

Told = tuple[torch.dtype, int, int, bool, "Packing | None"]
"""Dtype, size, group, whether keys turn, and how some blocks are packed."""

TOLD: list[Told] = [
    (torch.float32, 16, 1, False, None),
    (torch.float32, 16, 3, False, None),
    (torch.float32, 16, 6, False, None),
    (torch.float32, 64, 4, True, None),
    (torch.bfloat16, 128, 4, True, None),
    (torch.float32, 16, 2, False, Packing(8, 0, 0, 16)),
    (torch.bfloat16, 128, 4, False, Packing(128, 4, 4, 32)),
]


def told(case: Told, device: torch.device) -> None:
    """The highest probability of every key in a group, and the logits of every query head, of random spans."""
    dtype, size, group, raw, packing = case
    rng, rope = random.Random(size + group), rope_of(size, "half")
    for seed in range(3):
        plain = Blocks(rng.choice([1, 2]), size, size, dtype, seed, device)
        packed, held = None, plain
        if packing is not None:
            sets = [channels_of(rng, plain.heads, size, packing.key_kept, None)]
            packed = PackedBlocks(packing, sets, size, size, dtype, seed, device)
            held = Mixed(plain, packed)  # type: ignore[assignment]
        rows, queries = rng.choice([(1, 1), (2, 1), (1, 3)])
        heads, generator = plain.heads * group, torch.Generator().manual_seed(seed)
        q = torch.randn(rows, queries, heads, size, generator=generator).to(dtype).transpose(1, 2)
        shifts = [rng.randint(-100, 100_000) for _ in range(3)]
        count = len(plain.places) + (0 if packed is None else len(packed.places))
        spans = random_spans(rng, rows * queries, count, len(shifts), raw)
        spans = [
            [(b if b < len(plain.places) else PACKED + b - len(plain.places), *rest) for b, *rest in mine] for mine in spans
        ]  # fmt: skip
        softcap, scale = rng.choice([None, 3.0]), size**-0.5
        sinks = torch.randn(heads, generator=generator) if seed else None
        one_head = Single(held, group)
        _, lse, scores = defined(q, held, spans, rope, shifts, 1.0, scale, softcap, sinks)
        _, _, each = defined(q, one_head, spans, rope, shifts, 1.0, scale, softcap, None)  # type: ignore[arg-type]
        _, _, shares = defined(q, one_head, spans, rope, shifts, 1.0, scale, softcap, sinks)  # type: ignore[arg-type]
        key_starts = torch.tensor([0, *(m.shape[1] for m in scores)]).cumsum(0)
        starts, table = flat(spans)
        given: dict[str, Any] = {
            "q": q.to(device),
            "blocks": plain.table,
            "starts": starts.to(device),
            "spans": table.to(device),
            "rotations": table_of(rope, shifts).to(device),
            "in_block": table_of(rope, list(range(64))).to(device),
            "kv_heads": plain.heads,
            "value_dim": size,
            "splits": rng.choice([1, 2, 5]),
            "scale": scale,
            "softcap": softcap or 0.0,
            "layout": LAYOUTS["half"],
            "raw": raw,
            "sink_logits": None if sinks is None else sinks.to(device),
            "key_starts": key_starts.to(device),
            "total_keys": int(key_starts[-1]),
            "packed": None if packed is None else packed.table,
            "format": None if packed is None else packed.format,
        }
        _, _, highest = ops.attend(**given, told=HIGHEST)
        want = torch.cat([x.view(plain.heads, group, -1).amax(1) for x in shares], 1)
        close(highest, want, 5e-5)
        out, found, logits = ops.attend(**given, told=LOGITS)
        assert out.shape == (rows, queries, heads, 0)
        seen = lse > -torch.inf
        assert torch.equal(found.cpu() == -torch.inf, ~seen)
        torch.testing.assert_close(found.cpu().double()[seen], lse[seen], atol=1e-4, rtol=1e-5)
        flat_lse = lse.view(rows * queries, heads)
        want = torch.cat([x.log() + mine[:, None] for x, mine in zip(each, flat_lse)], 1)
        torch.testing.assert_close(logits.cpu().double(), want, atol=2e-4, rtol=1e-4)


class Single:
    """The same blocks, every query head's own: `defined` then tells of each."""

    def __init__(self, held: Any, group: int) -> None:
        self._held, self._group, self.heads, self.dims = held, group, held.heads * group, held.dims

    def read(self, block: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._held.read(block, lo, hi)
        return k.repeat_interleave(self._group, 0), v.repeat_interleave(self._group, 0)


ADDED: list[tuple[torch.dtype, int, int, Packing | None]] = [
    (torch.float32, 16, 1, None),
    (torch.float32, 24, 3, None),
    (torch.bfloat16, 96, 2, None),
    (torch.float16, 256, 1, None),
    (torch.float32, 16, 2, Packing(8, 0, 0, 16)),
    (torch.float32, 32, 2, Packing(16, 0, 8, 16)),
    (torch.bfloat16, 64, 4, Packing(16, 4, 2, 32)),
]
"""Dtype, size of a value, group, and how some blocks are packed."""


def add_values(case: tuple[torch.dtype, int, int, Packing | None], device: torch.device) -> None:
    """Random columns of random spans, some of which are empty; a column without a weight may be anything."""
    dtype, size, group, packing = case
    rng = random.Random(size + group)
    for seed, num in enumerate((1, 7, 150)):
        plain = Blocks(2, 16, size, dtype, seed, device)
        held: Any = plain
        packed = None
        if packing is not None:
            packed = PackedBlocks(packing, [channels_of(rng, 2, 16, packing.key_kept, None)], 16, size, dtype, seed, device)
            held = Mixed(plain, packed)
        spans = random_spans(rng, 4, len(plain.places) + (0 if packed is None else len(packed.places)), 0, False)
        spans = [
            [(b if b < len(plain.places) else PACKED + b - len(plain.places), *rest) for b, *rest in mine] for mine in spans
        ]  # fmt: skip
        spans[2].insert(0, (1, 9, 9, 0, False))
        spans[1].append((0, 3, 40, 0, False))
        spans[2].append((1, 0, 64, 0, False))
        starts, table = flat(spans)
        items, heads = [2, 1], 2 * group
        generator = torch.Generator().manual_seed(seed)
        values = [torch.cat([held.read(block, lo, hi)[1].double() for block, lo, hi, _, _ in spans[i]], 1) for i in items]
        columns = torch.stack([torch.randint(v.shape[1], (heads, num), generator=generator) for v in values])
        weights = torch.rand(2, heads, num, generator=generator)
        weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0.0
        want = torch.stack(
            [
                torch.einsum("hm,hmd->hd", w.double(), v.repeat_interleave(group, 0)[torch.arange(heads)[:, None], at])
                for w, at, v in zip(weights, columns, values)
            ]
        )
        columns[weights == 0] = 1 << 40
        found = ops.add_values(
            columns.to(device),
            weights.to(device),
            torch.tensor(items, dtype=torch.int32).to(device),
            plain.table,
            starts.to(device),
            table.to(device),
            2,
            size,
            dtype,
            None if packed is None else packed.table,
            None if packed is None else packed.format,
        )
        close(found, want, TOLERANCE[dtype])


def page_bounds(dtype: torch.dtype, size: int, device: torch.device) -> None:
    """Of the blocks that are named, and of no other; what is not a number stays none."""
    held = Blocks(2, size, 16, dtype, 0, device)
    held.slabs[0][0][0, 5, 3], held.slabs[0][0][1, 64 + 63, 0], held.slabs[1][0][1, 2, 1] = torch.nan, torch.nan, torch.inf
    bounds = torch.full((len(held.places), 2, 2, size), 9.0, dtype=dtype, device=device)
    held.table[:, 3] = bounds.data_ptr() + torch.arange(len(held.places), device=device) * bounds[0].nbytes
    ops.page_bounds(held.table, torch.tensor([0, 1, 4, 3], dtype=torch.int32).to(device), 2, size, dtype)
    for block in (0, 1, 3, 4):
        keys = held.read(block, 0, 64)[0]
        want = torch.stack([keys.amax(1), keys.amin(1)], 1)
        torch.testing.assert_close(bounds[block].cpu(), want, rtol=0, atol=0, equal_nan=True)
    assert bool((bounds[[2, 5, 6]] == 9).all())


# ----------------------------------------------------------------------------------------------------------------------- Quest


def quest(**changes: Any) -> Any:
    known = {"sinks": 64, "window": 64, "stages": ((64, 192), (2, 32)), "refresh": (1, 1), "query_stride": 3}
    return infinite(**{**known, "page_bounds": True, **changes})


class BoundedRow(Row):
    """A row whose first stage judges blocks by bounds, by the definition."""

    def _choose(self, q: torch.Tensor, positions: list[int], start: int) -> Any:
        from kvsieve.backends.reference.definition import group_scores, region
        from kvsieve.backends.reference.select.infinite import infinite_hip_search

        rule = self.rule
        scores = group_scores(q, self.k, positions, rule.window, rule.query_stride)
        lo, hi = region(positions, rule.sinks, rule.window)
        if start:
            assert self.found is not None
            lo, hi = self.found.lo, self.found.hi
        whole = hi - lo <= rule.stages[-1][1]
        bounds = None if start or whole else bound_scores(q, self.k, positions, rule.window, rule.query_stride)
        inputs = self.found.inputs if start and self.found is not None else ()
        stages = zip(*rule.stages)
        return infinite_hip_search(scores, lo, hi, *stages, rule.representative, start=start, inputs=inputs, bounds=bounds)


def quest_layer(group: int, dtype: torch.dtype, size: int, device: torch.device, seed: int = 0) -> SparseLayer:
    """Prompts of unequal rows, single tokens, candidates and chunks that end blocks: choices, counts and outputs are the
    definition's."""
    rng = random.Random(seed)
    change: dict[str, Any] = {"sinks": rng.choice([0, 64]), "window": rng.choice([64, 90])}
    change["query_block"], change["query_stride"] = rng.choice([1, 8, 64]), rng.choice([1, 3, 16])
    change["refresh"] = rng.choice([(1, 1), (4, 2), (8, 1)])
    rule = quest(**change)
    rows, heads = rng.choice([1, 2]), rng.choice([1, 2])
    tested = SparseLayer(rule, rows, heads, group, size, dtype, device, rng.choice([None, 4.0]), seed=seed)
    tested.rows = [BoundedRow(rule, row.scale, row.softcap, row.sinks) for row in tested.rows]
    first = rng.choice([300, 470])
    tested.feed(first, [first, *(rng.randint(200, first) for _ in range(rows - 1))])
    for width in (1, 1, 5, 1, 70, 1, 1, 16, 16, 16, 16, 1, 1):
        tested.feed(width)
    return tested
