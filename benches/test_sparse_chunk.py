"""A long prompt with sparse attention, chunk by chunk, beside torch's causal attention over the same tokens.

One key-value head and its group: heads are independent, so ratios are those of whole layers. Both get two threads and are timed
by the clock, in turns. Of 131,072 tokens torch reads one query head only, and its time is multiplied; how far that is fair, a
shorter prompt tells (`torch_one_head_beside_all`).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import kvsieve
import pytest
import torch
from drive import attend_chunk
from kvsieve import _core
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cpu.tensors import view
from kvsieve.backends.reference.definition import bound_scores, group_scores, kept, region, sparse_attend
from kvsieve.backends.reference.select.hip import hip_search
from kvsieve.backends.reference.select.infinite import infinite_hip_search
from kvsieve.policy.specs import make_planner

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"f32": "float32", "bf16": "bfloat16"}
SHAPES = {"32/8/128": (4, 128), "9/3/64": (3, 64)}
THREADS = 2
CHUNK = 4096
RULE: dict[str, Any] = {
    "budget": 1024,
    "block": 8,
    "representative": "middle",
    "sinks": 64,
    "window": 1024,
    "refresh": 8,
    "query_block": 64,
    "query_stride": 8,
}


def prompt(group: int, dim: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys of small integers over 8: scores are exact, so that the specification must choose the same."""
    generator = torch.Generator().manual_seed(0)
    q, k = ((torch.randint(-16, 17, (1, n, length, dim), generator=generator) / 8).to(dtype) for n in (group, 1))
    return q, k, torch.randn(1, 1, length, dim, generator=generator).to(dtype)


STAGES = [(64, 4096), (8, 1024)]


def made(search: str) -> Any:
    """The rule of HiP, or of Quest: as many tokens found among four times as many candidates."""
    if search == "hip":
        return _core.Sparse.hip(**RULE)
    return _core.Sparse.infinite(STAGES, "first", RULE["sinks"], RULE["window"], [8, 8], 64, RULE["query_stride"], bounded=True)


def chosen(search: str, q: torch.Tensor, k: torch.Tensor, positions: list[int]) -> Any:
    """The specification's choice."""
    asked = q, k, positions, RULE["window"], RULE["query_stride"]
    at, scores = region(positions, RULE["sinks"], RULE["window"]), group_scores(*asked)
    if search == "hip":
        return hip_search(scores, *at, RULE["budget"], RULE["block"], RULE["representative"])
    return infinite_hip_search(scores, *at, *zip(*STAGES), bounds=bound_scores(*asked))


def read(
    search: str, x: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: str, chunk: int = CHUNK
) -> tuple[float, torch.Tensor]:
    """Seconds of attention of the whole prompt, storing not counted; and the last chunk's result."""
    q = x[0]
    planner = make_planner(kvsieve.Full().specs(1), "post_rope")
    store, sparse = _core.Store(1, q.shape[3], q.shape[3], NAMES[dtype]), made(search)
    call, seconds, out = AttendCall(q.shape[3] ** -0.5), 0.0, q
    for at in range(0, q.shape[2], chunk):
        mine = [y[:, :, at : at + chunk] for y in x]
        width = mine[0].shape[2]
        step = planner.begin([width], width, True, False)
        store.append(view(mine[1]), view(mine[2]), step)
        start = time.perf_counter()
        out = attend_chunk(store, sparse, mine[0], step, call, THREADS)
        seconds += time.perf_counter() - start
        planner.commit()
    return seconds, out


def dense(x: tuple[torch.Tensor, torch.Tensor, torch.Tensor], heads: int) -> float:
    start = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(x[0][:, :heads], x[1], x[2], is_causal=True, enable_gqa=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("search", ["hip", "quest"])
@pytest.mark.parametrize("length", [32768, 131072])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_prompt(benchmark: Any, shape: str, dtype: str, length: int, search: str) -> None:
    group, dim = SHAPES[shape]
    torch.set_num_threads(THREADS)
    x = prompt(group, dim, length, DTYPES[dtype])

    # The last query block against the specification.
    _, out = read(search, x, dtype)
    positions = list(range(length - 64, length))
    q, k, v = x[0][0, :, positions], x[1][0], x[2][0]
    found = chosen(search, q, k, positions)
    visible = kept(found, positions, length, RULE["sinks"], RULE["window"])
    want = sparse_attend(q.double(), k.double(), v.double(), visible, dim**-0.5)[0].transpose(0, 1)
    error = float((out[0, -64:].double() - want).norm() / want.norm())
    assert error < (1e-5 if dtype == "f32" else 1e-2)

    few = group if length <= 32768 else 1
    short = tuple(y[:, :, :8192].contiguous() for y in x)
    per_head = {n: statistics.median(dense(short, n) for _ in range(3)) / n for n in (1, group)}  # type: ignore[arg-type]
    ours, theirs = [], []
    for _ in range(3 if length <= 32768 else 1):
        ours.append(read(search, x, dtype)[0])
        theirs.append(dense(x, few) / few * group)
    medians = statistics.median(ours), statistics.median(theirs)
    benchmark.extra_info.update(
        search=search,
        shape=shape,
        dtype=dtype,
        length=length,
        threads=THREADS,
        kvsieve_s=round(medians[0], 3),
        torch_s=round(medians[1], 3),
        times_as_fast=round(medians[1] / medians[0], 2),
        torch_heads_timed=few,
        torch_one_head_beside_all=round(per_head[1] / per_head[group], 3),
        error=error,
    )
    benchmark.pedantic(lambda: read(search, x, dtype), rounds=1, iterations=1)
