"""The shim that runs kernels on the CPU catches what it is there to catch."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulator
import kernel_cases
import pytest
import search_cases
import torch
from kvsieve.backends.cuda.nvrtc import SOURCES, Module

CPU = torch.device("cpu")


def attend_once(launcher: emulator.Emulator) -> None:
    """One `attend` of 6 heads over 77 ragged spans against its definition.

    Three lookups of spans, the last of an odd number of tiles, and warps that compute what others copied: every barrier matters.
    """
    torch.manual_seed(0)
    rng = random.Random(0)
    q, k, v = torch.randn(6, 16), torch.randn(256, 16), torch.randn(256, 16)
    blocks = torch.tensor([[k.data_ptr() + b * 4096, v.data_ptr() + b * 4096, 256, 0] for b in range(4)])
    ranges = [(rng.randrange(4), rng.randint(0, 40), rng.randint(41, 64)) for _ in range(77)]
    spans = torch.tensor([[b, lo | hi << 8, 0, 0] for b, lo, hi in ranges], dtype=torch.int32)
    starts = torch.tensor([0, len(ranges)], dtype=torch.int32)
    part, lse = torch.full((6, 1, 16), torch.nan), torch.full((6, 1), torch.nan)
    args = [q.data_ptr(), 96, 16, 96, blocks.data_ptr(), starts.data_ptr(), spans.data_ptr(), None, None, 0, 0, 1.0, 0.25, 0.0]
    args += [1, 6, part.data_ptr(), lse.data_ptr(), None, None, 0]
    args += [None, 0, 0, 0, 0]  # no packed blocks
    launcher.launch(Module("attend.cu", ("attend<float, 16, 16, 3, 2, false>",)), (1, 1, 1), 128, args, CPU)
    read = torch.tensor([64 * b + slot for b, lo, hi in ranges for slot in range(lo, hi)])
    x = q.double() @ k[read].double().T * 0.25
    torch.testing.assert_close(part[:, 0].double(), x.softmax(-1) @ v[read].double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse[:, 0].double(), x.logsumexp(-1), atol=1e-5, rtol=0)


def move_once(launcher: emulator.Emulator) -> None:
    k, v = torch.randn(1, 64, 16), torch.randn(1, 64, 16)
    want = k.clone()
    blocks = torch.tensor([[k.data_ptr(), v.data_ptr(), 64, 0]])
    moves = torch.tensor([[0, 0, 1 | 0 << 16, 60], [0, 0, 3 | 2 << 16, 50]], dtype=torch.int32)
    launcher.launch(Module("move.cu", ("move<float, 16, 16>",)), (8, 1, 1), 64, [blocks.data_ptr(), moves.data_ptr(), 2], CPU)
    want[:, :60] = want[:, 1:61].clone()
    want[:, 2:52] = want[:, 3:53].clone()
    assert torch.equal(k, want)


def surprisal_once(launcher: emulator.Emulator) -> None:
    x, ids, out = torch.randn(1, 700) * 5, torch.tensor([3]), torch.empty(1)
    args = [x.data_ptr(), 700, 700, ids.data_ptr(), out.data_ptr()]
    launcher.launch(Module("surprisal.cu", ("surprisal<float>",)), (1, 1, 1), 128, args, CPU)
    torch.testing.assert_close(out, x.logsumexp(1) - x[:, 3], atol=1e-5, rtol=0)


def case_of(run: Callable[[], None]) -> Callable[[emulator.Emulator], None]:
    """A case of `kernel_cases` on a launcher."""

    def once(launcher: emulator.Emulator) -> None:
        with emulator.emulated(launcher):
            run()

    return once


packed_attend_once = case_of(lambda: kernel_cases.packed_attend(kernel_cases.PACKED_CASES[0], CPU))
packed_tokens_once = case_of(lambda: kernel_cases.packed_tokens(*kernel_cases.PACKED_TOKENS[2], CPU))


def searched_once(rule: Any, tokens: int) -> Callable[[emulator.Emulator], None]:
    """A query that searches so many tokens."""

    def once(launcher: emulator.Emulator) -> None:
        launcher.count = 4
        with emulator.emulated(launcher):
            search_cases.one_query(rule, tokens, CPU)

    return once


# More nodes than threads, and fewer; chunks for several thread blocks.
many_nodes, few_nodes = (
    searched_once(search_cases.hip(budget=n, block=1, sinks=0, window=1), tokens) for n, tokens in ((150, 1300), (100, 700))
)
chunks = searched_once(search_cases.infinite(stages=((4, 640), (2, 300)), refresh=(1, 1), sinks=0, window=1), 2600)

CASES = [
    *(("search.cu", r"__syncthreads\(\);", which, many_nodes) for which in (0, 1, 2, 3, 4, 5, 6, 8)),
    ("search.cu", r"__syncthreads\(\);", 7, few_nodes),
    *(("search.cu", r"__syncthreads\(\);", which, chunks) for which in (9, 10, 11)),
    ("sparse.cu", r"__syncthreads\(\);", 0, few_nodes),
    ("sparse.cu", r"__syncwarp\(\);", 0, few_nodes),
    *(("attend.cu", r"__syncthreads\(\);", which, attend_once) for which in (0, 1, 2, 4, 5)),
    ("attend.cu", r"__syncthreads\(\);", 3, packed_attend_once),
    *(
        (f"{file}.cu", r"__syncthreads\(\);", which, packed_tokens_once)
        for file, n in (("pack", 1), ("unpack", 2), ("carry", 2))
        for which in range(n)
    ),
    ("attend.cu", r"__syncwarp\(\);", 0, attend_once),
    ("attend.cu", r"kv_wait<0>\(\);", 0, attend_once),
    *(("move.cu", r"__syncthreads\(\);", which, move_once) for which in range(2)),
    ("surprisal.cu", r"__syncthreads\(\);", 0, surprisal_once),
]


def succeeds(run: Callable[[emulator.Emulator], None], launcher: emulator.Emulator) -> bool:
    """Whether a kernel gives the right answer; in a process of its own, as one that is broken may write anywhere."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)  # the parent's other threads are not here
        seconds = int(time.process_time()) + 30
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # or walk in circles
        try:
            run(launcher)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("file", "pattern", "which", "run"), CASES)
def test_a_barrier_that_is_removed_is_caught(file: str, pattern: str, which: int, run: object, tmp_path: Path) -> None:
    assert callable(run)
    run(emulator.Emulator())
    broken = emulator.without(SOURCES, file, pattern, which, tmp_path)
    caught = any(not succeeds(run, emulator.Emulator(broken, seed=1000 * seed)) for seed in range(8))
    assert caught, "eight random schedules, and the answer was right in all of them"


FAULTS = {
    "others that will never come": "if (threadIdx.x < 32) __syncwarp(); else if (threadIdx.x != 40) __syncwarp();",
    "a thread ended while others wait": "if (threadIdx.x != 7) __syncthreads();",
    "meet in different operations": "if (threadIdx.x % 2) __syncwarp(); else __ballot_sync(0xffffffffu, true);",
    "warp meet in different operations": "if (threadIdx.x % 2) __shfl_xor_sync(~0u, 1.f, 2); __shfl_xor_sync(~0u, 1.f, 1);",
    "lanes of a warp meet in different": "if (threadIdx.x % 2) __syncwarp(); __shfl_xor_sync(~0u, 1.f, 1);",
    "threads wait for others that": "__shfl_xor_sync(~0u, 1.f, threadIdx.x % 2 ? 2 : 1);",
    "beyond the end of an array": "KV_SHARED(float, x, 16); x[16 + threadIdx.x % 2] = 1.f;",
    "bytes of shared memory": "KV_SHARED(float, x, 13000); x[0] = 1.f;",
}


@pytest.mark.parametrize("message", list(FAULTS))
def test_what_no_kernel_may_do_is_an_error(message: str, tmp_path: Path) -> None:
    (tmp_path / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    (tmp_path / "fault.cu").write_text(f'#include "common.cuh"\n__global__ void fault(i64 unused) {{ {FAULTS[message]} }}\n')
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.Emulator(tmp_path).launch(Module("fault.cu", ("fault",)), (1, 1, 1), 128, [0], CPU)


def test_shared_memory_is_nan_until_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    body = "KV_SHARED(float, x, 128); ((float*)to)[threadIdx.x] = x[threadIdx.x];"
    (tmp_path / "peek.cu").write_text(f'#include "common.cuh"\n__global__ void peek(float* to) {{ {body} }}\n')
    out = torch.zeros(128)
    emulator.Emulator(tmp_path).launch(Module("peek.cu", ("peek",)), (1, 1, 1), 128, [out.data_ptr()], CPU)
    assert out.isnan().all()


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 65504.0, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 1 / 3, -2049.0, torch.inf, torch.nan]
)
def test_half_precision_rounds_as_torch_does(value: float, tmp_path: Path) -> None:
    source = "__global__ void half(const float* x, f16* y, float* z) { y[0] = narrow<f16>(x[0]); z[0] = widen(y[0]); }"
    (tmp_path / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    (tmp_path / "half.cu").write_text(f'#include "common.cuh"\n{source}\n')
    x, y, z = torch.tensor([value]), torch.empty(1, dtype=torch.float16), torch.empty(1)
    launcher = emulator.Emulator(tmp_path)
    launcher.launch(Module("half.cu", ("half",)), (1, 1, 1), 32, [x.data_ptr(), y.data_ptr(), z.data_ptr()], CPU)
    assert torch.equal(y.nan_to_num(7.0), x.half().nan_to_num(7.0))
    assert torch.equal(z.nan_to_num(7.0), x.half().float().nan_to_num(7.0))


def test_every_half_is_widened_as_torch_does(tmp_path: Path) -> None:
    source = "__global__ void every(float* y) { for (i64 i = threadIdx.x; i < 65536; i += 32) y[i] = widen(f16{u16(i)}); }"
    (tmp_path / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    (tmp_path / "every.cu").write_text(f'#include "common.cuh"\n{source}\n')
    found = torch.empty(65536)
    emulator.Emulator(tmp_path).launch(Module("every.cu", ("every",)), (1, 1, 1), 32, [found.data_ptr()], CPU)
    want = torch.arange(65536).to(torch.uint16).view(torch.float16).float()
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), want.signbit())
