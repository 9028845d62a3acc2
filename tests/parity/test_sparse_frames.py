"""Sparse attention over pre-RoPE keys and compressed ones, in Rust against the specification.

Keys and queries are odd multiples of 1/8 and rotations are quarter turns, so that scores are exact in any dtype and order, and ties
are ties. Where rotations are a model's, or keys are codes, scores are not, and no two of them are equal.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import kvsieve
import numpy as np
import pytest
import torch
from kvsieve import _core
from kvsieve.backends.cpu.tensors import view
from kvsieve.backends.reference.definition import (
    Selection,
    consecutive_attend,
    first_stage,
    group_scores,
    kept,
    placed,
    region,
    relative,
    sparse_attend,
)
from kvsieve.backends.reference.select.hip import hip_search
from kvsieve.backends.reference.select.infinite import infinite_hip_search
from kvsieve.errors import ShapeError, UnsupportedError
from kvsieve.facts import LayerRope
from kvsieve.methods import think
from kvsieve.policy.specs import make_planner
from kvsieve.policy.storage import Channels
from raw_cases import TOLERANCE, quarters

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
HIP = {"budget": 20, "block": 2, "representative": "middle", "sinks": 3, "window": 9, "refresh": [4], "query_block": 8}
INFINITE = {
    "stages": [(16, 96), (4, 32), (2, 12)],
    "representative": "first",
    "sinks": 3,
    "window": 9,
    "refresh": [8, 4, 2],
    "query_block": 8,
    "page_bounds": False,
}
TRUE = _core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())
SLOTS = _core.Memory(_core.Eviction.own(4096, 0, 0), _core.PositionRule.in_cache())

Mode = Literal["stored", "placed", "relative", "consecutive"]


def model_rope(rng: random.Random, dim: int) -> LayerRope:
    pairs = rng.choice([dim // 2, dim // 4])
    turns = 1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    return LayerRope(turns, rng.choice(["half", "interleaved"]), rng.choice([1.0, 1.3]))


def eighths(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return (torch.randint(-8, 8, shape, generator=generator) * 2 + 1) / 8


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


class Row:
    """One row by the specification: its residents, pre-RoPE, and what it has chosen."""

    def __init__(self, kind: str, rule: dict[str, Any], mode: Mode, in_cache: bool, rope: LayerRope | None, scale: float) -> None:
        self.kind, self.rule, self.mode, self.in_cache, self.rope, self.scale = kind, rule, mode, in_cache, rope, scale
        self.found: Selection | None = None
        self.k = self.v = torch.empty(0)
        self.true = torch.empty(0, dtype=torch.int64)
        self.seen = self.step = self.since = self.next = 0
        self.searched = self.read = 0

    def at(self, indices: list[int]) -> list[int]:
        """Where the policy shows these residents."""
        return indices if self.in_cache else self.true[indices].tolist()

    def turned(self, q: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64, `placed`."""
        return placed(q.double(), self.k.double(), self.at(positions), self.at(list(range(self.k.shape[1]))), self.rope)

    def scored(self, q: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as a search takes them. Quarter turns are exact in any dtype, those of a model as good as the dtype."""
        if self.mode in ("relative", "consecutive"):
            return relative(q.double(), self.k.double(), self.rule["window"], self.rope)
        return (q, self.k) if self.mode == "stored" else self.turned(q, positions)

    def choose(self, q: torch.Tensor, k: torch.Tensor, positions: list[int], start: int) -> None:
        rule = self.rule
        if start == 0:
            lo, hi = region(positions, rule["sinks"], rule["window"])
        else:
            assert self.found is not None
            lo, hi = self.found.lo, self.found.hi
        scores = group_scores(q, k, positions, rule["window"], rule.get("query_stride", 1))
        if self.kind == "hip":
            self.found = hip_search(scores, lo, hi, rule["budget"], rule["block"], rule["representative"])
        else:
            chunks, keep = zip(*rule["stages"])
            inputs = self.found.inputs if start and self.found else ()
            self.found = infinite_hip_search(scores, lo, hi, chunks, keep, rule["representative"], start=start, inputs=inputs)
        self.searched += sum(self.found.reads)

    def answer(self, q: torch.Tensor, visible: torch.Tensor, positions: list[int]) -> torch.Tensor:
        if self.mode == "consecutive":
            q, k, v = q.double(), self.k.double(), self.v.double()
            return consecutive_attend(q, k, v, visible, positions, self.rope, self.scale)[0]
        q, k = (q.double(), self.k.double()) if self.mode == "stored" else self.turned(q, positions)
        return sparse_attend(q, k, self.v.double(), visible, self.scale)[0]

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first, count = self.k.shape[1] if self.seen else 0, k.shape[1]
        self.k = torch.cat([self.k, k], 1) if self.seen else k
        self.v = torch.cat([self.v, v], 1) if self.seen else v
        self.true = torch.cat([self.true, torch.arange(self.seen, self.seen + count)])
        self.seen += count
        all_at = list(range(first, first + count))
        asked, keys = self.scored(q, all_at)
        masks, lo = [], 0
        while lo < count:
            size = min(count - lo, self.rule["query_block"] - (first + lo) % self.rule["query_block"])
            positions = all_at[lo : lo + size]
            refresh = self.rule["refresh"]
            most = self.rule["stages"][-1][1] if self.kind == "infinite" else self.rule["budget"]
            follows = size == 1 and self.found is not None and self.next == positions[0]
            follows = follows and self.found is not None and self.found.hi - self.found.lo > most
            start = first_stage(self.step, refresh) if follows else 0
            if start is not None:
                self.choose(asked[:, lo : lo + size], keys, positions, start)
                if start == 0:
                    self.step, self.since = 0, positions[-1]
            self.step, self.next = self.step + 1, positions[-1] + 1
            assert self.found is not None
            window = self.rule["window"] + positions[-1] - self.since
            masks.append(kept(self.found, positions, self.k.shape[1], self.rule["sinks"], window))
            lo += size
        visible = torch.cat(masks, 1)
        self.read += int(visible.sum())
        return self.answer(q, visible, all_at)

    def keep(self, indices: list[int]) -> None:
        self.k, self.v, self.true = self.k[:, indices], self.v[:, indices], self.true[indices]


class Rows:
    """Some rows in Rust and by the specification, which must agree after every step."""

    def __init__(
        self,
        kind: str,
        mode: Mode,
        spec: _core.Memory,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        rope: LayerRope | None,
        seed: int,
        make: Any = eighths,
        **change: Any,
    ) -> None:
        rule = {**(HIP if kind == "hip" else INFINITE), **change}
        self.rows, self.heads, self.group, self.dim = shape
        self.sparse = _core.Sparse(kind, **rule)
        self.frame = "post_rope" if mode == "stored" else "pre_rope"
        self.planner = _core.Planner([spec], self.frame)
        self.store = _core.Store(self.heads, self.dim, self.dim, DTYPES[dtype])
        self.mode, self.dtype, self.rope, self.make, self.scale = mode, dtype, rope, make, self.dim**-0.5
        self.generator = torch.Generator().manual_seed(seed)
        self.naive = [Row(kind, rule, mode, spec is SLOTS, rope, self.scale) for _ in range(self.rows)]

    def step(self, width: int, lens: list[int] | None = None, threads: int = 1) -> None:
        lens = lens or [width] * self.rows
        q = self.make(self.generator, self.rows, self.heads * self.group, width, self.dim).to(self.dtype)
        k = self.make(self.generator, self.rows, self.heads, width, self.dim).to(self.dtype)
        v = torch.randn(self.rows, self.heads, width, self.dim, generator=self.generator).to(self.dtype)
        step = self.planner.begin(lens, width, True, False)
        self.store.append(view(k), view(v), step)
        out, lse = torch.empty(self.rows, width, q.shape[1], self.dim, dtype=q.dtype), np.empty(q.shape[:3], np.float32)
        rope = None if self.rope is None else self.rope.core
        raw, relative_, consecutive = (
            self.frame == "pre_rope",
            self.mode in ("relative", "consecutive"),
            self.mode == "consecutive",
        )
        work = self.sparse.attend(
            self.store, view(q), step, self.scale, None, None, view(out), lse, threads, rope, raw, relative_, consecutive
        )
        self.planner.commit()
        before = [(one.searched, one.read) for one in self.naive]
        for row, n in enumerate(lens):
            want = self.naive[row].feed(*(x[row, :, width - n :] for x in (q, k, v))).transpose(0, 1)
            got = out[row, width - n :].double()
            found = self.naive[row].found
            assert found is not None
            for head, (ranges, _, reads, rounds) in enumerate(self.sparse.choice(row)):
                assert ranges[:, 0].tolist() == found.starts[head].tolist(), (row, head)
                assert ranges[:, 1].tolist() == found.ends[head].tolist()
                assert (reads, rounds) == (found.reads[head], found.rounds[head])
            assert float((got - want).abs().max()) <= TOLERANCE[self.dtype] * max(1.0, float(want.abs().max()))
            assert out[row, : width - n].abs().sum() == 0
        assert work[0] == sum(one.searched - old[0] for one, old in zip(self.naive, before))
        assert work[1] == sum(one.read - old[1] for one, old in zip(self.naive, before))

    def keep(self, rng: random.Random, count: int) -> None:
        """Lets all but ``count`` residents go, another set in each row."""
        for row, naive in enumerate(self.naive):
            have = self.planner.resident(0, row)
            mine = sorted(rng.sample(range(have), min(count, have)))
            self.store.apply(self.planner.keep(0, row, mine))
            naive.keep(mine)

    def pack(self, upto: int, packing: tuple[int, int, int, int], channels: Channels) -> None:
        """Packs residents up to number ``upto`` of each row; the specification goes on with what is now stored."""
        self.store.set_packing(*packing)
        for row, naive in enumerate(self.naive):
            old = self.planner.num_packed(row)
            first = self.planner.runs(0, row)[0][0]
            moves = self.planner.pack(row, min(upto, self.planner.resident(0, row)), packing[3] if packing[1] else 1)
            if old:
                self.store.pack(moves, like=first)
            else:
                self.store.pack(moves, channels.index.numpy(), list(channels.pairs))
            runs = [np.array(column, np.int64) for column in zip(*self.planner.runs(0, row))]
            shape = (self.heads, self.planner.resident(0, row), self.dim)
            k, v = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
            self.store.gather(*runs, view(k), view(v))
            naive.k, naive.v = k, v


def any_rule(rng: random.Random, kind: str) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "sinks": rng.choice([0, 3, 5]),
        "window": rng.choice([0, 1, 9, 40]),
        "query_block": rng.choice([1, 8, 16]),
        "query_stride": rng.choice([1, 3, 4]),
    }
    if kind == "hip":
        rule["representative"] = rng.choice(["middle", "first", "last", "oracle"])
        rule["block"], rule["budget"], rule["refresh"] = rng.choice([1, 2, 3, 8]), rng.choice([4, 20, 64]), [rng.choice([1, 3, 8])]
    else:
        rule["representative"] = rng.choice(["first", "middle"])
    return rule


def any_rows(rng: random.Random, kind: str, mode: Mode, spec: _core.Memory, dtype: torch.dtype, **change: Any) -> Rows:
    shape = (rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3, 4, 7]), rng.choice([8, 16, 32, 64, 128]))
    rope = change.pop("rope", quarters)(rng, shape[3])
    rule = {**any_rule(rng, kind), **change.pop("rule", {})}
    return Rows(kind, mode, spec, shape, dtype, rope, rng.randint(0, 1 << 30), **change, **rule)


class TestRawFrame:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mode", ["placed", "relative", "consecutive"])
    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_rust_is_the_specification(self, kind: str, mode: Mode, dtype: torch.dtype) -> None:
        for seed in range(4):
            rng = random.Random(seed)
            rows = any_rows(rng, kind, mode, TRUE, dtype)
            first = rng.choice([1, 30, 300])
            rows.step(first, [rng.randint(1, first) for _ in rows.naive])
            for width in (1, 1, 1, 40, 1, 1, 5, *[1] * 9):
                rows.step(width, threads=rng.choice([1, 2]))

    @pytest.mark.parametrize("mode", ["placed", "relative", "consecutive"])
    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_tokens_stand_in_slots(self, kind: str, mode: Mode) -> None:
        """And leave, so that a token's number is not its position."""
        for seed in range(4):
            rng = random.Random(seed)
            rows = any_rows(rng, kind, mode, SLOTS, rng.choice(list(DTYPES)))
            rows.step(200, [rng.randint(1, 200) for _ in rows.naive])
            for count in (500, 150, 90, 91, 60):
                rows.step(rng.choice([1, 20]))
                rows.keep(rng, count)
                for width in (1, 1, rng.choice([1, 3, 30]), 1, 1):
                    rows.step(width)

    @pytest.mark.parametrize("mode", ["placed", "relative", "consecutive"])
    def test_the_rotation_of_a_model(self, mode: Mode) -> None:
        for seed in range(4):
            rng = random.Random(seed)
            rows = any_rows(rng, "hip", mode, rng.choice([TRUE, SLOTS]), torch.float32, rope=model_rope, make=normal)
            for width in (250, 1, 1, 7, 1, 1, 30, 1):
                rows.step(width)

    @pytest.mark.parametrize("mode", ["placed", "relative", "consecutive"])
    def test_no_rotation_at_all(self, mode: Mode) -> None:
        """A layer without positions."""
        rows = Rows("hip", mode, TRUE, (2, 2, 2, 16), torch.float32, None, 0)
        for width in (150, 1, 1, 7, 1):
            rows.step(width)

    @pytest.mark.parametrize("mode", ["placed", "relative", "consecutive"])
    def test_a_budget_for_all_is_the_dense_answer(self, mode: Mode) -> None:
        rope = model_rope(random.Random(0), 16)
        rows = Rows("hip", mode, SLOTS, (1, 2, 2, 16), torch.float32, rope, 0, normal, budget=4096)
        for width in (200, 1, 7):
            rows.step(width)
        q, step = normal(rows.generator, 1, 4, 1, 16), rows.planner.begin([1], 1, True, False)
        k, v = (normal(rows.generator, 1, 2, 1, 16) for _ in range(2))
        rows.store.append(view(k), view(v), step)
        out, dense = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)
        relative_, consecutive = mode != "placed", mode == "consecutive"
        work = rows.sparse.attend(
            rows.store, view(q), step, 0.25, None, None, view(out), None, 1, rope.core, True, relative_, consecutive
        )
        rows.store.attend(view(q), step, rope.core, 0.25, None, None, view(dense), None, 1, True)
        assert work[0] == 0
        assert float((out - dense).abs().max()) <= 1e-5

    def test_relative_scores_do_not_depend_on_where_a_key_stands(self) -> None:
        g, rope = torch.Generator().manual_seed(0), model_rope(random.Random(1), 16)
        q, k = normal(g, 2, 3, 16), normal(g, 1, 20, 16)
        scores = group_scores(*relative(q.double(), k.double(), 30, rope), [70, 71, 72], 30)
        order = torch.randperm(20, generator=g)
        moved = group_scores(*relative(q.double(), k[:, order].double(), 30, rope), [70, 71, 72], 30)
        assert np.allclose(scores[:, order], moved)
        assert not np.allclose(
            scores, group_scores(*placed(q.double(), k.double(), [70, 71, 72], range(20), rope), [70, 71, 72], 30)
        )


class TestOtherPlaces:
    def test_slots_of_rotated_keys(self) -> None:
        """A window that has let tokens go shows them elsewhere, by turning the query; single queries only."""
        policy = kvsieve.StreamingLLM(budget=64, sinks=2)
        rope, g = model_rope(random.Random(3), 16), torch.Generator().manual_seed(0)
        planner = make_planner(policy.specs(1), "post_rope")
        store, sparse = _core.Store(2, 16, 16, "float32"), _core.Sparse("hip", **{**HIP, "budget": 512})
        for width in (60, 60, 1, 1):
            q, k, v = normal(g, 1, 4, width, 16), normal(g, 1, 2, width, 16), normal(g, 1, 2, width, 16)
            step = planner.begin([width], width, True, False)
            store.append(view(k), view(v), step)
            if width == 1:
                out, dense = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)
                sparse.attend(store, view(q), step, 0.25, None, None, view(out), None, 1, rope.core)
                store.attend(view(q), step, rope.core, 0.25, None, None, view(dense))
                assert float((out - dense).abs().max()) <= 1e-5
            planner.commit()
            store.apply(planner.settle(False))

    def test_keys_at_one_distance(self) -> None:
        """LM-Infinite's sinks: whoever looks sees them there, so a search scores them there for single queries."""
        spec = _core.Memory(_core.Eviction.window(3, 40), _core.PositionRule.capped(40), visible=40)
        rope, g = model_rope(random.Random(3), 16), torch.Generator().manual_seed(0)
        planner, store = _core.Planner([spec], "pre_rope"), _core.Store(1, 16, 16, "float32")
        sparse = _core.Sparse("hip", **{**HIP, "budget": 512, "sinks": 0})
        for width in (60, 1, 1):
            q, k, v = normal(g, 1, 2, width, 16), normal(g, 1, 1, width, 16), normal(g, 1, 1, width, 16)
            step = planner.begin([width], width, True, False)
            store.append(view(k), view(v), step)
            if width == 1:
                out, dense = torch.empty(1, 1, 2, 16), torch.empty(1, 1, 2, 16)
                sparse.attend(store, view(q), step, 0.25, None, None, view(out), None, 1, rope.core, True)
                store.attend(view(q), step, rope.core, 0.25, None, None, view(dense), None, 1, True)
                assert float((out - dense).abs().max()) <= 1e-5
            planner.commit()

    @pytest.mark.parametrize("width", [6, 40])
    def test_a_window_that_slides_over_several_queries(self, width: int) -> None:
        policy, g = kvsieve.StreamingLLM(budget=8, sinks=2), torch.Generator().manual_seed(0)
        planner, store = make_planner(policy.specs(1), policy.stored_keys), _core.Store(2, 16, 16, "float32")
        sparse = _core.Sparse("hip", **HIP)
        for _ in range(2):
            q, k, v = normal(g, 1, 4, width, 16), normal(g, 1, 2, width, 16), normal(g, 1, 2, width, 16)
            step = planner.begin([width], width, True, False)
            store.append(view(k), view(v), step)
            planner.commit()
        with pytest.raises(UnsupportedError, match="shows every query all"):
            sparse.attend(store, view(q), step, 1.0, None, None, view(torch.empty(1, width, 4, 16)))

    def test_a_chain(self) -> None:
        specs = [
            _core.Memory(_core.Eviction.own(10, 0, 0), _core.PositionRule.in_cache()),
            _core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache()),
        ]
        planner, store, g = _core.Planner(specs, "pre_rope"), _core.Store(1, 16, 16, "float32"), torch.Generator().manual_seed(0)
        sparse, rope = _core.Sparse("hip", **HIP), model_rope(random.Random(0), 16)
        for width in (70, 1):
            q, k, v = normal(g, 1, 1, width, 16), normal(g, 1, 1, width, 16), normal(g, 1, 1, width, 16)
            step = planner.begin([width], width, True, False)
            store.append(view(k), view(v), step)
            if width == 1:
                with pytest.raises(UnsupportedError, match="one memory"):
                    sparse.attend(store, view(q), step, 1.0, None, None, view(torch.empty(1, 1, 1, 16)), None, 1, rope.core, True)
            planner.commit()
            if width > 1:
                store.apply(planner.keep(0, 0, list(range(30, 40))))

    @pytest.mark.parametrize(
        ("frame", "change", "match"),
        [
            ("post_rope", (True, False), "has rotated"),
            ("post_rope", (False, True), "has rotated"),
            ("pre_rope", (False, True), "score it as relative"),
        ],
    )
    def test_what_does_not_go_together(self, frame: str, change: tuple[bool, bool], match: str) -> None:
        planner, store = _core.Planner([TRUE], frame), _core.Store(1, 16, 16, "float32")
        step, x = planner.begin([1], 1, True, False), torch.zeros(1, 1, 1, 16)
        store.append(view(x), view(x), step)
        rope = model_rope(random.Random(0), 16).core
        with pytest.raises(UnsupportedError, match=match):
            _core.Sparse("hip", **HIP).attend(store, view(x), step, 1.0, None, None, view(x.clone()), None, 1, rope, True, *change)

    @pytest.mark.parametrize("relative_", [False, True])
    def test_a_rotation_wider_than_the_keys(self, relative_: bool) -> None:
        planner, store, g = _core.Planner([TRUE], "pre_rope"), _core.Store(1, 16, 16, "float32"), torch.Generator().manual_seed(0)
        q = normal(g, 1, 1, 99, 16)
        step = planner.begin([99], 99, True, False)
        store.append(view(q), view(q), step)
        rope = _core.Rope([0.5] * 9)
        with pytest.raises(ShapeError):
            _core.Sparse("hip", **HIP).attend(
                store, view(q), step, 1.0, None, None, view(torch.empty(1, 99, 1, 16)), None, 1, rope, True, relative_
            )


def channels_of(rng: random.Random, heads: int, dim: int, rope: LayerRope | None) -> tuple[int, Channels]:
    """Some channels of random keys: single ones, or whole pairs of a rotation."""
    kept_ = think.num_kept_channels(dim, rng.choice([0.25, 0.5, 0.7]), "pairs")
    g = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    q, k = normal(g, heads, 8, dim), normal(g, heads, 30, dim)
    return kept_, think.heaviest_channels(q, k, kept_, "single" if rope is None else "pairs", rope)


class TestPacked:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mode", ["stored", "placed", "relative", "consecutive"])
    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_thin_keys(self, kind: str, mode: Mode, dtype: torch.dtype) -> None:
        """Dropped channels count as zero. A choice stands while tokens are packed under it."""
        for seed in range(4):
            rng = random.Random(seed)
            spec = TRUE if mode == "stored" else rng.choice([TRUE, SLOTS])
            rows = any_rows(rng, kind, mode, spec, dtype)
            kept_, channels = channels_of(rng, rows.heads, rows.dim, None if mode == "stored" else rows.rope)
            rows.rope = None if mode == "stored" else rows.rope
            first = rng.choice([70, 160])
            rows.step(first, [rng.randint(70, first) for _ in rows.naive])
            rows.step(1)
            for upto in (rng.randint(10, 65), rng.randint(66, 140), 400):
                rows.pack(upto, (kept_, 0, 0, 32), channels)
                for width in (1, 1, rng.choice([1, 30, 90]), 1, 1, 1):
                    rows.step(width)

    @pytest.mark.parametrize("mode", ["stored", "placed", "relative", "consecutive"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_codes(self, bits: int, mode: Mode) -> None:
        for seed in range(4):
            rng = random.Random(seed)
            spec = TRUE if mode == "stored" else rng.choice([TRUE, SLOTS])
            rows = any_rows(rng, "hip", mode, spec, torch.float32, make=normal, rope=model_rope)
            kept_, channels = channels_of(rng, rows.heads, rows.dim, rows.rope)
            if mode == "stored":
                rows.rope = None
            group = 8 if rows.dim < 32 else 32
            rows.step(200, [rng.randint(130, 200) for _ in rows.naive])
            for upto in (group * rng.randint(1, 3), 128, 300):
                rows.pack(upto, (kept_, bits, rng.choice([bits, 0]) if upto < 0 else bits, group), channels)
                for width in (1, 1, rng.choice([1, 30]), 1, 1):
                    rows.step(width)

    def test_packed_tokens_that_move(self) -> None:
        """A rule lets some of them go, so that runs begin at odd slots."""
        for seed in range(4):
            rng = random.Random(seed)
            rows = any_rows(rng, "hip", rng.choice(["placed", "relative", "consecutive"]), SLOTS, rng.choice(list(DTYPES)))
            kept_, channels = channels_of(rng, rows.heads, rows.dim, rows.rope)
            rows.step(300, [rng.randint(260, 300) for _ in rows.naive])
            rows.pack(250, (kept_, 0, 0, 32), channels)
            for count in (240, 170, 111):
                rows.step(1)
                rows.keep(rng, count)
                rows.step(1)
                rows.step(1)

    def test_single_channels_are_not_rotated(self) -> None:
        rng = random.Random(0)
        rows = Rows("hip", "placed", TRUE, (1, 1, 1, 16), torch.float32, quarters(rng, 16), 0)
        _, channels = channels_of(rng, 1, 16, None)
        rows.step(100)
        rows.pack(80, (channels.index.shape[1], 0, 0, 32), channels)
        with pytest.raises(UnsupportedError, match="one by one"):
            rows.step(1)
