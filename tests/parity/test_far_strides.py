"""Offsets past 2^31 and 2^32 elements: the same bits as from contiguous arrays.

A long context's tensors are that large, a test machine's memory is not. So the arrays lie in sparse mappings: gigabytes of
addresses, of which a few pages are touched. An offset that loses its upper half lands on other pages, whose zeros or other tokens
differ from the data.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope

FAR = 2**31 + 192
"""Elements between neighbours along the far axis: the second lies past 2^31 and, at index 2, the third past 2^32."""

DTYPES = ["float32", "bfloat16", "float16"]
ROPE = _core.Rope([1.0, 0.1, 0.01, 0.001], "half", 1.0)
ROWS, HEADS, KV_HEADS, TOKENS, DIM = 3, 6, 3, 3, 8


def mapping(nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        pytest.skip(f"OFFSETS PAST 2^31 WENT UNTESTED: this system refuses a sparse mapping of {nbytes >> 30} GiB ({error})")


def far(x: Any, axis: int) -> Any:
    """A copy of ``x`` whose neighbours along ``axis`` lie ``FAR`` elements apart; the other axes are packed."""
    strides, step = [0] * x.ndim, 1
    for at in reversed(range(x.ndim)):
        strides[at] = FAR if at == axis else step
        step *= 1 if at == axis else x.shape[at]
    assert step < FAR
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides))
    memory = mapping(extent * x.itemsize)
    made = np.ndarray(x.shape, x.dtype, buffer=memory, strides=[s * x.itemsize for s in strides])
    made[...] = x
    if x.shape[axis] > 1:
        # What a lost upper half would read in place of the element at index 1.
        wrong = np.frombuffer(memory, x.dtype, count=1, offset=(FAR % 2**31) * x.itemsize)
        assert wrong[0] != made.take(1, axis).flat[0]
    return made


def noise(seed: int, dtype: str, *shape: int) -> Any:
    """Random numbers of ``dtype``; 16-bit floats as their bits."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    return x.numpy() if dtype == "float32" else x.view(torch.int16).numpy()


def opened() -> Any:
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.in_cache())], "pre_rope")
    return planner, planner.begin([TOKENS] * ROWS, TOKENS, True, False)


def filled(dtype: str, k: Any, v: Any, step: Any) -> _core.Store:
    store = _core.Store(KV_HEADS, DIM, DIM, dtype)
    store.append(k, v, step)
    return store


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_reads_far_apart_tokens(dtype: str, axis: int) -> None:
    k, v = (noise(seed, dtype, ROWS, KV_HEADS, TOKENS, DIM) for seed in (1, 2))
    planner, step = opened()
    store = filled(dtype, far(k, axis), far(v, axis), step)
    planner.commit()
    for row in range(ROWS):
        blocks, lo, hi = (np.array(column) for column in zip(*planner.runs(0, row)))
        got_k, got_v = (np.zeros((KV_HEADS, TOKENS, DIM), k.dtype) for _ in "kv")
        store.gather(blocks, lo, hi, got_k, got_v)
        np.testing.assert_array_equal(got_k, k[row])
        np.testing.assert_array_equal(got_v, v[row])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_reads_far_apart_queries(dtype: str, axis: int) -> None:
    k, v = (noise(seed, dtype, ROWS, KV_HEADS, TOKENS, DIM) for seed in (1, 2))
    q = noise(3, dtype, ROWS, HEADS, TOKENS, DIM)
    _planner, step = opened()
    store = filled(dtype, k, v, step)
    outs = []
    for queries in (q, far(q, axis)):
        out, lse = np.zeros((ROWS, TOKENS, HEADS, DIM), q.dtype), np.zeros((ROWS, HEADS, TOKENS), np.float32)
        store.attend(queries, step, ROPE, 0.5, None, None, out, lse, 1, True)
        outs.append((out, lse))
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    np.testing.assert_array_equal(outs[0][1], outs[1][1])
    assert outs[0][0].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_takes_tensors_with_far_strides(dtype: str, axis: int) -> None:
    kind = getattr(torch, dtype)
    near = [noise(heads, dtype, ROWS, heads, TOKENS, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rope = LayerRope(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64), "half")
    outs = []
    for arrays in (near, [far(x, axis) for x in near]):
        _planner, step = opened()
        q, k, v = (torch.from_numpy(x).view(kind) for x in arrays)
        outs.append(get("cpu").make_store(k, v).run(q, k, v, step, AttendCall(0.5, rope=rope)))
    assert torch.equal(*outs)
    assert outs[0].float().norm() > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_writes_far_into_its_outputs(dtype: str) -> None:
    """Outputs are contiguous, so they are far apart by being long: one head's tokens span more than 2^31 elements."""
    k, v = (noise(seed, dtype, ROWS, KV_HEADS, TOKENS, DIM) for seed in (1, 2))
    planner, step = opened()
    store = filled(dtype, k, v, step)
    planner.commit()
    total = FAR // DIM
    at = total - TOKENS - 5
    blocks, lo, hi = (np.array(column) for column in zip(*planner.runs(0, 1)))
    shape = (KV_HEADS, total, DIM)
    outs = [np.ndarray(shape, k.dtype, buffer=mapping(math.prod(shape) * k.itemsize)) for _ in "kv"]
    store.gather(blocks, lo, hi, *outs, at)
    for out, want in zip(outs, (k[1], v[1])):
        np.testing.assert_array_equal(out[:, at : at + TOKENS], want)
        assert not out[:, at - 5 : at].any()
        assert not out[:, at + TOKENS :].any()
        assert not out[:, :64].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_surprisal_reads_far_apart_rows(dtype: str) -> None:
    logits, ids = noise(4, dtype, 3, 1000), np.array([7, 999, 512])
    want = _core.surprisal(logits, ids, dtype)
    np.testing.assert_array_equal(_core.surprisal(far(logits, 0), ids, dtype), want)
    assert len(set(want)) == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_reads_far_apart_rows(dtype: str, axis: int) -> None:
    x, at = noise(5, dtype, 3, 3, 3, DIM), np.array([3, 1000, 123_456_789])
    near, got = np.empty_like(x), np.empty_like(x)
    _core.rotate(x, at, ROPE, near, dtype=dtype)
    _core.rotate(far(x, axis), at, ROPE, got, dtype=dtype)
    np.testing.assert_array_equal(got, near)
