"""Sparse attention for a chunk of a prompt against the specification, and against itself query by query.

Queries and keys are multiples of 1/8, so that scores are exact in any dtype and order, and ties (of which there are many) are ties.
"""

from __future__ import annotations

import random
from typing import Any

import kvsieve
import numpy as np
import pytest
import torch
from drive import attend_chunk
from kvsieve import _core
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cpu.tensors import view
from kvsieve.backends.reference.definition import Selection, group_scores, kept, region, sparse_attend
from kvsieve.backends.reference.select.hip import hip_search
from kvsieve.backends.reference.select.infinite import infinite_hip_search
from kvsieve.errors import PolicyError, ShapeError, UnsupportedError
from kvsieve.policy.specs import make_planner

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
HIP = {"budget": 20, "block": 2, "representative": "middle", "sinks": 3, "window": 9, "refresh": [1], "query_block": 16}
INFINITE = {
    "stages": [(16, 96), (4, 32), (2, 12)],
    "representative": "first",
    "sinks": 3,
    "window": 9,
    "refresh": [1, 1, 1],
    "query_block": 16,
    "page_bounds": False,
}
RULES: dict[str, dict[str, Any]] = {"hip": HIP, "infinite": INFINITE}


class Layer:
    """Some rows in Rust."""

    def __init__(self, kind: str, rule: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.sparse = _core.Sparse(kind, **rule)
        self.planner = make_planner(kvsieve.Full().specs(1), "post_rope")
        self.store = _core.Store(*shape, DTYPES[dtype])
        self.call = AttendCall(shape[1] ** -0.5)

    def begin(self, k: torch.Tensor, v: torch.Tensor, lens: list[int]) -> _core.Step:
        step = self.planner.begin(lens, k.shape[2], True, False)
        self.store.append(view(k), view(v), step)
        return step

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], threads: int = 1) -> torch.Tensor:
        out = attend_chunk(self.store, self.sparse, q, self.begin(k, v, lens), self.call, threads)
        self.planner.commit()
        return out

    def both(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], *, chunk: bool
    ) -> tuple[torch.Tensor, np.ndarray, tuple[int, int]]:
        """The result, its log-sum-exp, and what was scored and read."""
        step = self.begin(k, v, lens)
        out = torch.full((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), 7.0, dtype=q.dtype)
        lse = np.full(q.shape[:3], 7, np.float32)
        work = self.sparse.attend(
            self.store, view(q), step, self.call.scale, self.call.softcap, None, view(out), lse, 1, chunk=chunk
        )
        self.planner.commit()
        return out, lse, work


def eighths(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-16, 17, shape, generator=generator) / 8


def new_tokens(
    generator: torch.Generator, rows: int, heads: int, group: int, width: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = eighths(generator, rows, heads * group, width, dims[0]), eighths(generator, rows, heads, width, dims[0])
    return q.to(dtype), k.to(dtype), torch.randn(rows, heads, width, dims[1], generator=generator).to(dtype)


def choose(kind: str, rule: dict[str, Any], q: torch.Tensor, k: torch.Tensor, positions: list[int]) -> Selection:
    scores = group_scores(q, k, positions, rule["window"], rule.get("query_stride", 1))
    bounds = region(positions, rule["sinks"], rule["window"])
    if kind == "hip":
        return hip_search(scores, *bounds, rule["budget"], rule["block"], rule["representative"])
    chunks, keep = zip(*rule["stages"])
    return infinite_hip_search(scores, *bounds, chunks, keep, rule["representative"])


def by_definition(
    kind: str, rule: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttendCall
) -> tuple[torch.Tensor, Selection]:
    """Float64 ``[m, H, Dv]`` of one row's last ``m`` queries over its keys ``[Hkv, n, D]``, and its last choice."""
    count, num = q.shape[1], k.shape[1]
    out, lo = [], 0
    while True:
        size = min(count - lo, rule["query_block"] - (num - count + lo) % rule["query_block"])
        positions = list(range(num - count + lo, num - count + lo + size))
        found = choose(kind, rule, q[:, lo : lo + size], k, positions)
        visible = kept(found, positions, num, rule["sinks"], rule["window"])
        out.append(sparse_attend(q[:, lo : lo + size].double(), k.double(), v.double(), visible, call.scale, call.softcap)[0])
        lo += size
        if lo == count:
            return torch.cat(out, 1).transpose(0, 1), found


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_a_chunk_is_the_specification(kind: str, dtype: torch.dtype) -> None:
    for seed in range(12):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2]), 1 + seed % 6
        dims = rng.choice([(8, 8), (16, 16), (33, 20), (64, 64), (80, 80), (128, 128), (64, 40)])
        rule = {
            **RULES[kind],
            "sinks": rng.choice([0, 3, 5]),
            "window": rng.choice([0, 1, 9, 40]),
            "query_block": rng.choice([2, 8, 16, 64]),
            "query_stride": rng.choice([1, 2, 3, 8, 100]),
        }
        if kind == "hip":
            rule["representative"] = ("middle", "first", "last", "oracle")[seed % 4]
            rule["block"], rule["budget"] = rng.choice([1, 2, 3, 8, 16]), rng.choice([4, 20, 64])
        else:
            rule["representative"] = ("first", "middle")[seed % 2]
        layer = Layer(kind, rule, (heads, *dims), dtype)
        whole: list[tuple[torch.Tensor, ...]] = [()] * rows
        first = rng.choice([2, 30, 300])
        for width, lens in [(first, [rng.randint(1, first) for _ in range(rows)]), *((n, [n] * rows) for n in (40, 1, 130, 17))]:
            q, k, v = new_tokens(generator, rows, heads, group, width, dims, dtype)
            out = layer.feed(q, k, v, lens, rng.choice([1, 2]))
            for row, n in enumerate(lens):
                new = (k[row, :, width - n :], v[row, :, width - n :])
                whole[row] = tuple(torch.cat(pair, 1) for pair in zip(whole[row], new)) if whole[row] else new
                want, found = by_definition(kind, rule, q[row, :, width - n :], *whole[row], layer.call)
                assert_close(out[row, width - n :], want, dtype)
                assert out[row, : width - n].abs().sum() == 0
                for head, (ranges, _, reads, rounds) in enumerate(layer.sparse.choice(row)):
                    assert ranges[:, 0].tolist() == found.starts[head].tolist(), (seed, head)
                    assert ranges[:, 1].tolist() == found.ends[head].tolist()
                    assert (reads, rounds) == (found.reads[head], found.rounds[head])


@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_a_chunk_leaves_what_its_queries_leave_one_by_one(kind: str) -> None:
    """Choices, counts and log-sum-exp; and decoding goes on from the same choice, whatever its refresh."""
    for seed in range(6):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rule = {**RULES[kind], "query_block": rng.choice([1, 8, 16]), "query_stride": rng.choice([1, 4])}
        rule["refresh"] = [rng.choice([2, 3, 8])] if kind == "hip" else [8, 4, 2]
        layers = [Layer(kind, rule, (2, 16, 16), torch.float32) for _ in "ab"]
        for width, lens in [(90, [90, 71]), *((n, [n, n]) for n in (1, 1, 33, 1, 1, 1, 80, 17, 1, 2, 1, 129, 1, 1))]:
            x = new_tokens(generator, 2, 2, 3, width, (16, 16), torch.float32)
            (out, lse, work), (want, want_lse, want_work) = (
                layer.both(*x, lens, chunk=chunk) for layer, chunk in zip(layers, (True, False))
            )
            assert work == want_work
            assert_close(out, want.double(), torch.float32)
            np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
            for row in range(2):
                for got, other in zip(layers[0].sparse.choice(row), layers[1].sparse.choice(row), strict=True):
                    assert got[0].tolist() == other[0].tolist()
                    assert got[1:] == other[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuts_at_query_blocks_change_no_bit(dtype: torch.dtype) -> None:
    rule = {**HIP, "query_block": 16, "query_stride": 4}
    q, k, v = new_tokens(torch.Generator().manual_seed(0), 1, 2, 3, 320, (64, 64), dtype)
    outs = []
    for sizes in ([320], [64, 16, 240], [32] * 10):
        layer, at, out = Layer("hip", rule, (2, 64, 64), dtype), 0, []
        for size in sizes:
            out.append(layer.feed(*(x[:, :, at : at + size].contiguous() for x in (q, k, v)), [size]))
            at += size
        outs.append(torch.cat(out, 1))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_threads_change_no_bit(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [Layer(kind, RULES[kind], (2, 16, 16), dtype) for _ in "ab"]
    for width, lens in ((230, [230, 99]), (50, [50, 50])):
        x = new_tokens(generator, 2, 2, 2, width, (16, 16), dtype)
        one, two = (layer.feed(*x, lens, threads) for layer, threads in zip(layers, (1, 2)))
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_a_region_within_the_budget_is_the_dense_answer(kind: str, dtype: torch.dtype) -> None:
    """No key is scored, and every key is read: what torch's causal attention says."""
    rule = {**HIP, "budget": 512} if kind == "hip" else {**INFINITE, "stages": [(16, 512), (2, 512)], "refresh": [1, 1]}
    layer, generator = Layer(kind, rule, (2, 64, 64), dtype), torch.Generator().manual_seed(0)
    q, k, v = new_tokens(generator, 1, 2, 3, 300, (64, 64), dtype)
    out, _, (searched, read) = layer.both(q, k, v, [300], chunk=True)
    wide = (x.double() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    assert (searched, read) == (0, 2 * 300 * 301 // 2)
    assert_close(out, want.transpose(1, 2), dtype)


def test_equal_keys_choose_the_earliest() -> None:
    layer, generator = Layer("hip", HIP, (1, 16, 16), torch.float32), torch.Generator().manual_seed(0)
    q, k, v = new_tokens(generator, 1, 1, 2, 200, (16, 16), torch.float32)
    k = torch.ones_like(k)
    out = layer.feed(q, k, v, [200])
    want, found = by_definition("hip", HIP, q[0], k[0], v[0], layer.call)
    assert_close(out[0], want, torch.float32)
    assert layer.sparse.choice(0)[0][0][:, 0].tolist() == found.starts[0].tolist()
    # Of equal halves the left one stays, so the tree goes down its first nodes: all between sinks and something.
    assert found.ends[0].max() - found.starts[0].min() == HIP["budget"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_what_is_not_a_number(kind: str, dtype: torch.dtype) -> None:
    """A key of NaN is not chosen, and spoils those that read it as sink or window; a query of NaN spoils itself."""
    layer, generator = Layer(kind, RULES[kind], (2, 16, 16), dtype), torch.Generator().manual_seed(0)
    q, k, v = new_tokens(generator, 1, 2, 2, 200, (16, 16), dtype)
    k[0, :, 50:57] = torch.nan
    k[0, 1, 120] = torch.nan
    q[0, 3, 150] = torch.nan
    q[0, :, 180:192] = torch.nan
    out = layer.feed(q, k, v, [200])
    want, _ = by_definition(kind, RULES[kind], q[0], k[0], v[0], layer.call)
    assert 0 < int(want.isnan().sum()) < want.numel() // 2
    assert_close(out[0], want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_spoil_only_who_reads_them(dtype: torch.dtype) -> None:
    """Inside a query block, where some queries read a key and others do not yet, or no longer."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = new_tokens(generator, 1, 2, 2, 200, (16, 16), dtype)
    at, other = 133, 140
    v[0, 0, at], v[0, 1, at], v[0, 0, other, 3] = torch.nan, torch.inf, -torch.inf
    out = Layer("hip", HIP, (2, 16, 16), dtype).feed(q, k, v, [200])[0].double()
    clean = v.clone()
    clean[0, :, [at, other]] = 0
    want, _ = by_definition("hip", HIP, q[0], k[0], clean[0], AttendCall(0.25))
    reads = torch.zeros(4, 200, 200, dtype=torch.bool)
    for first in range(0, 200, 16):
        positions = list(range(first, min(first + 16, 200)))
        found = choose("hip", HIP, q[0, :, positions], k[0], positions)
        reads[:, positions] = kept(found, positions, 200, 3, 9).repeat_interleave(2, 0)
    spoilt = (reads[:, :, at] | reads[:, :, other]).T
    assert 20 < int(spoilt.sum()) < spoilt.numel() // 2
    assert_close(out[~spoilt], want[~spoilt], dtype)
    finite = out.isfinite().all(-1)
    assert bool(finite[~spoilt].all())
    assert not bool(finite[spoilt & reads[:, :, at].T].any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learned_sinks_and_soft_caps(dtype: torch.dtype) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for softcap, dims in ((None, (16, 16)), (3.0, (16, 16)), (3.0, (24, 40))):
        layer, generator = Layer("hip", HIP, (2, *dims), dtype), torch.Generator().manual_seed(0)
        layer.call = AttendCall(0.25, softcap, sinks)
        q, k, v = new_tokens(generator, 1, 2, 2, 150, dims, dtype)
        out = layer.feed(q, k, v, [150])[0]
        plain = Layer("hip", HIP, (2, *dims), dtype)
        plain.call = AttendCall(0.25, softcap)
        lse = torch.from_numpy(plain.both(q, k, v, [150], chunk=True)[1])[0]
        want, _ = by_definition("hip", HIP, q[0], k[0], v[0], plain.call)
        weight = torch.exp(lse - torch.logaddexp(lse, sinks[:, None])).T[..., None]
        assert_close(out, want * weight, dtype)


class TestErrors:
    def test_a_stride_of_nothing(self) -> None:
        for kind, rule in RULES.items():
            with pytest.raises(PolicyError, match="query_stride"):
                _core.Sparse(kind, **rule, query_stride=0)
        with pytest.raises(PolicyError, match="stride"):
            group_scores(torch.zeros(2, 3, 4), torch.zeros(1, 5, 4), [2, 3, 4], 1, 0)

    def test_shapes(self) -> None:
        layer, generator = Layer("hip", HIP, (2, 16, 16), torch.float32), torch.Generator().manual_seed(0)
        q, k, v = new_tokens(generator, 1, 2, 2, 20, (16, 16), torch.float32)
        step = layer.begin(k, v, [20])
        for bad in (q[:, :, :19], q[..., :8], q[:, :3], q.half()):
            with pytest.raises(ShapeError):
                attend_chunk(layer.store, layer.sparse, bad, step, layer.call, 1)
        with pytest.raises(ShapeError, match="sinks"):
            attend_chunk(layer.store, layer.sparse, q, step, AttendCall(1.0, None, torch.zeros(3)), 1)
        with pytest.raises(PolicyError, match="softcap"):
            attend_chunk(layer.store, layer.sparse, q, step, AttendCall(1.0, -1.0), 1)
        with pytest.raises(PolicyError, match="threads"):
            attend_chunk(layer.store, layer.sparse, q, step, layer.call, 0)

    def test_a_memory_that_moves_keys(self) -> None:
        policy = kvsieve.StreamingLLM(budget=8, sinks=2)
        layer, generator = Layer("hip", HIP, (2, 16, 16), torch.float32), torch.Generator().manual_seed(0)
        layer.planner = make_planner(policy.specs(1), policy.stored_keys)
        for width in (6, 6):
            q, k, v = new_tokens(generator, 1, 2, 2, width, (16, 16), torch.float32)
            step = layer.begin(k, v, [width])
            layer.planner.commit()
        with pytest.raises(UnsupportedError, match="shows every query all"):
            attend_chunk(layer.store, layer.sparse, q, step, layer.call, 1)
