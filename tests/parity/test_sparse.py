"""Sparse attention in Rust against the specification: the same choices, range for range, and the same outputs.

Queries and keys are multiples of 1/8, so that scores are exact in any dtype and order, and ties (of which there are many) are ties.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import kvsieve
import numpy as np
import pytest
import torch
from kvsieve import _core
from kvsieve.backends.cpu.tensors import view
from kvsieve.backends.reference.definition import Selection, first_stage, group_scores, kept, region, sparse_attend
from kvsieve.backends.reference.select.hip import hip_search
from kvsieve.backends.reference.select.infinite import infinite_hip_search
from kvsieve.errors import KvsieveError, PolicyError, ShapeError, UnsupportedError
from kvsieve.policy.specs import make_planner

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HIP = {"budget": 20, "block": 2, "representative": "middle", "sinks": 3, "window": 9, "refresh": [4], "query_block": 16}
INFINITE = {
    "stages": [(16, 96), (4, 32), (2, 12)],
    "representative": "first",
    "sinks": 3,
    "window": 9,
    "refresh": [8, 4, 2],
    "query_block": 16,
    "page_bounds": False,
}


class Naive:
    """One row by the specification."""

    def __init__(self, kind: str, rule: dict[str, Any], scale: float, softcap: float | None) -> None:
        self.kind, self.rule, self.scale, self.softcap = kind, rule, scale, softcap
        self.found: Selection | None = None
        self.k = self.v = torch.empty(0)
        self.at = self.step = self.since = 0
        self.searched = self.read = 0

    def choose(self, q: torch.Tensor, positions: list[int], start: int) -> None:
        rule = self.rule
        if start == 0:
            lo, hi = region(positions, rule["sinks"], rule["window"])
        else:
            assert self.found is not None
            lo, hi = self.found.lo, self.found.hi
        scores = group_scores(q, self.k, positions, rule["window"], rule.get("query_stride", 1))
        if self.kind == "hip":
            self.found = hip_search(scores, lo, hi, rule["budget"], rule["block"], rule["representative"])
        else:
            chunks, keep = zip(*rule["stages"])
            inputs = self.found.inputs if start and self.found else ()
            self.found = infinite_hip_search(scores, lo, hi, chunks, keep, rule["representative"], start=start, inputs=inputs)
        self.searched += sum(self.found.reads)

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first, count = self.at, k.shape[1]
        self.k = torch.cat([self.k, k], 1) if self.at else k
        self.v = torch.cat([self.v, v], 1) if self.at else v
        self.at += count
        out, lo = [], 0
        while lo < count:
            size = min(count - lo, self.rule["query_block"] - (first + lo) % self.rule["query_block"])
            positions = list(range(first + lo, first + lo + size))
            mine = q[:, lo : lo + size]
            refresh = self.rule["refresh"]
            most = self.rule["stages"][-1][1] if self.kind == "infinite" else self.rule["budget"]
            follows = size == 1 and self.found is not None and self.found.hi - self.found.lo > most
            start = first_stage(self.step, refresh) if follows else 0
            if start is not None:
                self.choose(mine, positions, start)
                if start == 0:
                    self.step, self.since = 0, positions[-1]
            self.step += 1
            assert self.found is not None
            visible = kept(self.found, positions, self.at, self.rule["sinks"], self.rule["window"] + positions[-1] - self.since)
            self.read += int(visible.sum())
            out.append(sparse_attend(mine.double(), self.k.double(), self.v.double(), visible, self.scale, self.softcap)[0])
            lo += size
        return torch.cat(out, 1)


class Fast:
    """Some rows in Rust."""

    def __init__(self, kind: str, rule: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.sparse = _core.Sparse(kind, **rule)
        self.planner = make_planner(kvsieve.Full().specs(1), "post_rope")
        self.store = _core.Store(shape[0], shape[1], shape[1], DTYPES[dtype])
        self.scale, self.softcap = shape[1] ** -0.5, None

    def feed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], threads: int = 1
    ) -> tuple[torch.Tensor, np.ndarray, tuple[int, int]]:
        step = self.planner.begin(lens, q.shape[2], True, False)
        self.store.append(view(k), view(v), step)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
        lse = np.empty(q.shape[:3], np.float32)
        work = self.sparse.attend(self.store, view(q), step, self.scale, self.softcap, None, view(out), lse, threads)
        self.planner.commit()
        return out, lse, work


def eighths(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-16, 17, shape, generator=generator) / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_rust_is_the_specification(kind: str, dtype: torch.dtype) -> None:
    for seed in range(8):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 2]), 1 + seed, rng.choice([8, 16, 33, 64, 128])
        rule = dict(HIP if kind == "hip" else INFINITE)
        rule["sinks"], rule["window"] = rng.choice([0, 3, 5]), rng.choice([0, 1, 9, 40])
        rule["query_block"] = rng.choice([1, 8, 16])
        rule["query_stride"] = rng.choice([1, 1, 3, 4, 16])
        if kind == "hip":
            rule["representative"] = ("middle", "first", "last", "oracle")[seed % 4]
            rule["block"], rule["budget"], rule["refresh"] = (
                rng.choice([1, 2, 3, 8]),
                rng.choice([4, 20, 64]),
                [rng.choice([1, 3, 8])],
            )
        else:
            rule["representative"] = ("first", "middle")[seed % 2]
        fast = Fast(kind, rule, (heads, dim), dtype)
        naive = [Naive(kind, rule, fast.scale, None) for _ in range(rows)]
        first = rng.choice([1, 30, 300])
        begin = (first, [rng.randint(1, first) for _ in range(rows)])
        searched = read = 0
        for width, lens in [begin, *((n, [n] * rows) for n in (1, 1, 1, 40, 1, 1, 5, *[1] * 12))]:
            q, k = eighths(generator, rows, heads * group, width, dim), eighths(generator, rows, heads, width, dim)
            v = torch.randn(rows, heads, width, dim, generator=generator)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            out, _, work = fast.feed(q, k, v, lens, threads=rng.choice([1, 2]))
            searched, read = searched + work[0], read + work[1]
            for row, n in enumerate(lens):
                want = naive[row].feed(q[row, :, width - n :], k[row, :, width - n :], v[row, :, width - n :]).transpose(0, 1)
                got = out[row, width - n :].double()
                assert float((got - want).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(want.abs().max()))
                assert out[row, : width - n].abs().sum() == 0
                found = naive[row].found
                assert found is not None
                for head, (ranges, end, reads, rounds) in enumerate(fast.sparse.choice(row)):
                    assert end == naive[row].found.hi
                    assert ranges[:, 0].tolist() == found.starts[head].tolist(), (seed, head)
                    assert ranges[:, 1].tolist() == found.ends[head].tolist()
                    assert (reads, rounds) == (found.reads[head], found.rounds[head])
        assert searched == sum(one.searched for one in naive)
        assert read == sum(one.read for one in naive)


def step_of(fast: Fast, generator: torch.Generator, width: int, heads: int = 2, group: int = 2, dim: int = 16) -> Any:
    q, k = eighths(generator, 1, heads * group, width, dim), eighths(generator, 1, heads, width, dim)
    return q, k, torch.randn(1, heads, width, dim, generator=generator)


@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_a_budget_for_all_is_the_dense_answer(kind: str) -> None:
    """To the last bit but for the order of sums: no key is scored, and every key is read."""
    rule = {**HIP, "budget": 512} if kind == "hip" else {**INFINITE, "stages": [(16, 512), (2, 512)], "refresh": [2, 1]}
    fast, generator = Fast(kind, rule, (2, 16), torch.float32), torch.Generator().manual_seed(0)
    for width in (200, 1, 1, 7, 1):
        q, k, v = step_of(fast, generator, width)
        step = fast.planner.begin([width], width, True, False)
        fast.store.append(view(k), view(v), step)
        out, dense = torch.empty(1, width, 4, 16), torch.empty(1, width, 4, 16)
        searched, _ = fast.sparse.attend(fast.store, view(q), step, 0.25, None, None, view(out))
        assert searched == 0
        if step.has_spans:
            fast.store.attend(view(q), step, None, 0.25, None, None, view(dense))
            assert float((out - dense).abs().max()) <= 1e-6
        fast.planner.commit()


def test_learned_sinks_and_soft_caps() -> None:
    fast, generator = Fast("hip", HIP, (2, 16), torch.float32), torch.Generator().manual_seed(0)
    naive = Naive("hip", HIP, 0.25, 3.0)
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    for width in (150, 1, 1):
        q, k, v = step_of(fast, generator, width)
        step = fast.planner.begin([width], width, True, False)
        fast.store.append(view(k), view(v), step)
        out, lse = torch.empty(1, width, 4, 16), np.empty((1, 4, width), np.float32)
        fast.sparse.attend(fast.store, view(q), step, 0.25, 3.0, sinks, view(out), lse)
        fast.planner.commit()
        want = naive.feed(q[0], k[0], v[0]).transpose(0, 1)
        total = np.logaddexp(lse[0], sinks[:, None])
        weight = torch.from_numpy(np.exp(lse[0] - total)).T[..., None]
        assert float((out[0] - want * weight).abs().max()) <= 1e-5


def test_where_a_text_is_cut_does_not_matter() -> None:
    """At multiples of the query block, and then token by token with a refresh at each."""
    rule = {**HIP, "refresh": [1], "query_block": 8}
    generator = torch.Generator().manual_seed(0)
    q, k, v = step_of(Fast("hip", rule, (2, 16), torch.float32), generator, 240)
    outs = []
    for sizes in ([240], [64, 8, 168], [8] * 30):
        fast, at, out = Fast("hip", rule, (2, 16), torch.float32), 0, []
        for size in sizes:
            out.append(fast.feed(*(x[:, :, at : at + size].contiguous() for x in (q, k, v)), [size])[0])
            at += size
        outs.append(torch.cat(out, 1))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_threads_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    fasts = [Fast("infinite", INFINITE, (2, 16), torch.float32) for _ in range(2)]
    for width in (150, 1, 1, 1):
        q, k, v = step_of(fasts[0], generator, width)
        one, two = (fast.feed(q, k, v, [width], threads)[0] for fast, threads in zip(fasts, (1, 2)))
        assert torch.equal(one, two)


def test_a_crop_makes_it_choose_anew() -> None:
    fast, generator = Fast("hip", {**HIP, "refresh": [100]}, (2, 16), torch.float32), torch.Generator().manual_seed(0)
    for width in (150, 1, 1):
        work = fast.feed(*step_of(fast, generator, width), [width])[2]
    assert work[0] == 0, "the choice should have stood"
    fast.planner.crop(1)
    assert fast.feed(*step_of(fast, generator, 1), [1])[2][0] > 0
    assert fast.feed(*step_of(fast, generator, 1), [1])[2][0] == 0
    fast.sparse.reset()
    assert fast.sparse.choice(0) == []
    assert fast.feed(*step_of(fast, generator, 1), [1])[2][0] > 0


class Pair:
    """Rows in Rust and by the specification, which must agree after every step."""

    def __init__(self, rows: int, kind: str = "hip", **change: Any) -> None:
        rule = {**(HIP if kind == "hip" else INFINITE), **change}
        self.fast, self.generator = Fast(kind, rule, (2, 16), torch.float32), torch.Generator().manual_seed(0)
        self.naive = [Naive(kind, rule, 0.25, None) for _ in range(rows)]

    def data(self, width: int) -> list[torch.Tensor]:
        return [eighths(self.generator, len(self.naive), heads, width, 16) for heads in (4, 2, 2)]

    def step(self, data: list[torch.Tensor]) -> None:
        width = data[0].shape[2]
        out, _, work = self.fast.feed(*data, [width] * len(self.naive))
        before = sum(one.searched for one in self.naive)
        for row, naive in enumerate(self.naive):
            want = naive.feed(*(x[row] for x in data)).transpose(0, 1)
            assert float((out[row] - want).abs().max()) <= 2e-6 * max(1.0, float(want.abs().max()))
        assert work[0] == sum(one.searched for one in self.naive) - before, "not at the same steps"

    def steps(self, *widths: int) -> None:
        for width in widths:
            self.step(self.data(width))


class TestState:
    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_a_forward_that_died(self, kind: str) -> None:
        """Undone, and run again, it chooses what it would have chosen, when it would have."""
        pair = Pair(2, kind)
        pair.steps(150, 1, 1, 1)
        for width in (1, 1, 9, 1, 1, 1, 1, 1):
            q, k, v = pair.data(width)
            step = pair.fast.planner.begin([width] * 2, width, True, False)
            pair.fast.store.append(view(k), view(v), step)
            pair.fast.sparse.attend(pair.fast.store, view(q), step, 0.25, None, None, view(torch.empty(2, width, 4, 16)))
            pair.fast.planner.rollback()
            for _ in range(2):
                pair.fast.sparse.undo()
            pair.steps(width)

    def test_what_was_committed_is_not_undone(self) -> None:
        pair = Pair(1, refresh=[100])
        pair.steps(150, 1, 1)
        pair.fast.sparse.commit()
        pair.fast.sparse.undo()
        pair.steps(1, 1)

    def test_the_first_forward_is_undone(self) -> None:
        fast = Pair(1).fast
        generator = torch.Generator().manual_seed(0)
        fast.feed(*step_of(fast, generator, 150), [150])
        fast.sparse.undo()
        assert fast.sparse.choice(0) == []

    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_rows_are_reordered(self, kind: str) -> None:
        pair = Pair(3, kind)
        pair.steps(150, 1, 1)
        for index in ([2, 0, 1], [1, 1, 0], [0, 0, 2, 1], [3, 1]):
            pair.fast.planner.select_rows(index)
            pair.fast.sparse.select_rows(index)
            pair.naive = [copy.copy(pair.naive[i]) for i in index]
            pair.steps(1, 1, 1)
        with pytest.raises(PolicyError):
            pair.fast.sparse.select_rows([0, 2])

    @pytest.mark.parametrize("kind", ["hip", "infinite"])
    def test_forks_and_marks(self, kind: str) -> None:
        pair = Pair(2, kind)
        pair.steps(150, 1, 1)
        other = Pair(2, kind)
        other.fast.store, other.fast.planner, other.fast.sparse = pair.fast.store, pair.fast.planner.fork(), pair.fast.sparse.fork()
        other.naive = [copy.copy(one) for one in pair.naive]
        mark, planner, naive = pair.fast.sparse.state(), pair.fast.planner.fork(), [copy.copy(one) for one in pair.naive]
        other.generator.manual_seed(7)
        for _ in range(5):
            pair.steps(1)
            other.steps(1)
        pair.fast.planner, pair.naive = planner, naive
        pair.fast.sparse.return_to(mark)
        pair.steps(1, 1, 1)
        other.steps(1)

    def test_states_of_another_rule(self) -> None:
        state = Pair(1).fast.sparse.state()
        with pytest.raises(UnsupportedError, match="another rule"):
            Pair(1, budget=22).fast.sparse.return_to(state)
        Pair(1).fast.sparse.return_to(state)


class TestErrors:
    @pytest.mark.parametrize(
        "change",
        [{"budget": 0}, {"block": 0}, {"representative": "nearest"}, {"refresh": [0]}, {"query_block": 0}, {"query_stride": 0}],
    )
    def test_hip(self, change: dict[str, Any]) -> None:
        with pytest.raises(PolicyError):
            _core.Sparse("hip", **{**HIP, **change})

    @pytest.mark.parametrize(
        "change",
        [
            {"stages": []},
            {"stages": [(8, 8), (3, 3)], "refresh": [1, 1]},
            {"stages": [(8, 12)], "refresh": [1]},
            {"refresh": [1]},
            {"refresh": [1, 1, 0]},
            {"representative": "last"},
        ],
    )
    def test_infinite(self, change: dict[str, Any]) -> None:
        with pytest.raises(PolicyError):
            _core.Sparse("infinite", **{**INFINITE, **change})

    def test_shapes(self) -> None:
        fast, generator = Fast("hip", HIP, (2, 16), torch.float32), torch.Generator().manual_seed(0)
        q, k, v = step_of(fast, generator, 3)
        step = fast.planner.begin([3], 3, True, False)
        fast.store.append(view(k), view(v), step)
        out = torch.empty(1, 3, 4, 16)
        for bad_q, bad_out in ((q[:, :, :2], out), (q[..., :8], out), (q[:, :3], out[:, :, :3].contiguous()), (q, out[:, :2])):
            with pytest.raises(ShapeError):
                fast.sparse.attend(fast.store, view(bad_q), step, 1.0, None, None, view(bad_out))
        with pytest.raises(ShapeError):
            fast.sparse.attend(fast.store, view(q), step, 1.0, None, None, view(out), np.empty((1, 4, 2), np.float32))
        with pytest.raises(KvsieveError):
            fast.sparse.attend(fast.store, view(q), step, 1.0, None, None, view(out), None, 0)
