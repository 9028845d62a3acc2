"""The operations of the CPU backend, each checked before it is timed, beside torch and the bandwidth of the same run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope
from rounds import interleaved, read_bandwidth, record

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {"9/3/64": (9, 3, 64), "32/8/128": (32, 8, 128)}


def rope(head_dim: int) -> LayerRope:
    return LayerRope(1e4 ** (-torch.arange(head_dim // 2).double() / (head_dim // 2)), "half")


def filled(shape: str, dtype: torch.dtype, length: int, frame: str) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    _, heads, dim = SHAPES[shape]
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], frame)
    planner.restore(length, [(length, [(list(range(length)), [0.0] * length)])])
    k, v = (torch.randn(heads, length, dim).to(dtype) for _ in "kv")
    store = get("cpu").make_store(k[None], v[None])
    store.write(planner.runs(0, 0), k, v)
    return planner, store, k, v


@pytest.mark.parametrize("length", [1024, 8192, 65536])
@pytest.mark.parametrize("frame", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_attend(benchmark: Any, shape: str, dtype: str, frame: str, length: int) -> None:
    """One layer's decode step: append and attend."""
    heads, kv_heads, dim = SHAPES[shape]
    torch.manual_seed(0)
    planner, store, k, v = filled(shape, DTYPES[dtype], length, frame)
    q, new = torch.randn(1, heads, 1, dim).to(k.dtype), torch.randn(1, kv_heads, 1, dim).to(k.dtype)
    call = AttendCall(scale=dim**-0.5, rope=rope(dim))
    step = planner.begin([1], 1, True, False)
    packed_q = q.reshape(1, kv_heads, heads // kv_heads, dim)

    def ours() -> torch.Tensor:
        out: torch.Tensor = store.run(q, new, new, step, call)
        return out

    wide_k, wide_v = torch.cat([k, new[0]], 1).double(), torch.cat([v, new[0]], 1).double()
    wide_q = q[0].double()
    if frame == "pre_rope":
        wide_k, wide_q = rope(dim).rotate(wide_k, torch.arange(length + 1)), rope(dim).rotate(wide_q, torch.tensor([length]))
    group = heads // kv_heads
    logits = (wide_q.reshape(kv_heads, group, dim) @ wide_k.transpose(1, 2)) * dim**-0.5
    want = (logits.softmax(-1) @ wide_v).reshape(1, 1, heads, dim)
    error = float((ours().double() - want).norm() / want.norm())
    assert error < (1e-5 if dtype == "f32" else 1e-2)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    runs = {
        "kvsieve": ours,
        "packed_torch": lambda: sdpa(packed_q, k[None], v[None]),
        "generate_default": lambda: sdpa(q, k[None], v[None], enable_gqa=True),
    }
    medians = interleaved(runs, rounds=9 if length < 65536 else 5)
    moved = 2 * kv_heads * length * dim * k.element_size()
    facts = {
        "gb_per_s": round(moved / medians["kvsieve"] / 1e9, 2),
        "read_gb_per_s": round(read_bandwidth() / 1e9, 2),
        "error": error,
    }
    record(benchmark, ours, medians, shape=shape, dtype=dtype, frame=frame, length=length, **facts)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_surprisal(benchmark: Any, dtype: str) -> None:
    """256 rows of a 49,152-word vocabulary, beside torch's log-softmax and gather."""
    logits, ids = torch.randn(256, 49152).to(DTYPES[dtype]), torch.randint(0, 49152, (256,))
    backend = get("cpu")
    want = torch.nn.functional.cross_entropy(logits.double(), ids, reduction="none").float()
    torch.testing.assert_close(backend.surprisal(logits, ids), want, rtol=1e-5, atol=1e-5)

    def theirs() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")

    medians = interleaved({"kvsieve": lambda: backend.surprisal(logits, ids), "torch": theirs})
    record(benchmark, lambda: backend.surprisal(logits, ids), medians, dtype=dtype, bytes_read=logits.nbytes)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_append(benchmark: Any, shape: str) -> None:
    """4,096 tokens stored one by one, as decoding does; time is for all of them, planning included."""
    _, heads, dim = SHAPES[shape]
    tokens = torch.randn(1, heads, 4096, dim)
    rows = [np.ascontiguousarray(tokens[:, :, i : i + 1].numpy()) for i in range(4096)]

    def fill() -> tuple[Any, Any]:
        planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
        store = get("cpu").make_store(tokens, tokens)
        for row in rows:
            store._core.append(row, row, planner.begin([1], 1, True, False))
            planner.commit()
        return planner, store

    planner, store = fill()
    assert all(torch.equal(got, tokens[0]) for got in store.read(planner.runs(0, 0)))
    record(benchmark, fill, interleaved({"kvsieve": fill}), shape=shape, tokens=4096)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gather(benchmark: Any, dtype: str) -> None:
    """32,768 tokens of 8 heads of 128 read back, beside a copy of as many bytes."""
    planner, store, k, v = filled("32/8/128", DTYPES[dtype], 32768, "post_rope")
    runs = planner.runs(0, 0)
    assert all(torch.equal(got, want) for got, want in zip(store.read(runs), (k, v)))
    medians = interleaved({"kvsieve": lambda: store.read(runs), "copy": lambda: (k.clone(), v.clone())})
    record(benchmark, lambda: store.read(runs), medians, dtype=dtype, ratio=round(medians["kvsieve"] / medians["copy"], 3))


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_prefill(benchmark: Any, dtype: str, length: int) -> None:
    """A prompt in one chunk: stored and attended to, beside torch's fused attention alone."""
    heads, kv_heads, dim = SHAPES["9/3/64"]
    kind = DTYPES[dtype]
    q = torch.randn(1, heads, length, dim).to(kind)
    k, v = (torch.randn(1, kv_heads, length, dim).to(kind) for _ in "kv")
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "post_rope")
    step = planner.begin([length], length, False, True)
    backend = get("cpu")
    call = AttendCall(scale=dim**-0.5, rope=rope(dim))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours() -> torch.Tensor:
        return backend.make_store(k, v).run(q, k, v, step, call)

    def theirs(dtype: torch.dtype = kind) -> torch.Tensor:
        return sdpa(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True, enable_gqa=True)

    want = theirs(torch.float64).transpose(1, 2)
    error = float((ours().double() - want).norm() / want.norm())
    assert error < (1e-5 if dtype == "f32" else 1e-2)
    medians = interleaved({"kvsieve": ours, "torch": theirs})
    record(benchmark, ours, medians, dtype=dtype, length=length, error=error)


def test_compaction(benchmark: Any) -> None:
    """A score-based rule lets 64 of 1,088 tokens go: every kept key and value bit-identical, in one pass."""
    planner = _core.Planner([_core.Memory(_core.Eviction.surprisal(1024, 4, 64), _core.PositionRule.in_cache())], "pre_rope")
    k = torch.randn(8, 1088, 128)
    store = get("cpu").make_store(k[None], k[None])

    def refill() -> Any:
        planner.reset()
        scores = np.random.default_rng(0).random(1088).tolist()
        planner.restore(1088, [(1088, [(list(range(1088)), scores)])])
        store.write(planner.runs(0, 0), k, k)
        return planner.settle(True)

    store.apply(refill())
    kept = planner.positions(0, 0)
    got, _ = store.read(planner.runs(0, 0))
    assert len(kept) == 1024
    assert torch.equal(got, k[:, kept])
    benchmark.extra_info["bytes_held"] = store.bytes_held
    benchmark.pedantic(store.apply, setup=lambda: ((refill(),), {}), rounds=9)
