"""Whole prompts of SmolLM2-135M, from the call to the first token: ours beside `model.generate` with transformers' own cache.

All read the same pages of Python's reference, in turns, on `--threads` threads; seconds of the clock, for torch's threads spin
while they wait.
Under `Full()` the logits of the first token must be those of transformers'; bounded policies read another context by design.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.bench.subject import load, text_ids

POLICIES = ("full()", "streamingllm(1024)", "sirllm(1024)")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = {4096: 3, 16384: 1}
MOST_OFF = {"f32": 1e-3, "bf16": 0.06}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("length", list(ROUNDS))
def test_the_first_token(benchmark: Any, length: int, dtype: str, pytestconfig: pytest.Config) -> None:
    threads = pytestconfig.getoption("--threads")
    made, tokenizer = load("smollm2", DTYPES[dtype])
    ids = text_ids("smollm2", tokenizer, length)
    asked = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def stock(ids: torch.Tensor) -> torch.Tensor:
        return made.generate(ids, **asked).logits[0].float()

    def ours(policy: str, ids: torch.Tensor) -> torch.Tensor:
        with kvsieve.stream(made, kvsieve.methods.parse(policy)) as stream:
            return stream.generate(ids, **asked).logits[0].float()

    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"transformers": stock}
    runs |= {policy: functools.partial(ours, policy) for policy in POLICIES}
    for run in runs.values():
        run(ids[:, :600])  # imports, probes, allocations
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        logits = {}
        for _ in range(ROUNDS[length]):
            for name, run in runs.items():
                began = time.perf_counter()
                logits[name] = run(ids)
                seconds[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    off = float((logits["full()"] - logits["transformers"]).norm() / logits["transformers"].norm())
    assert off < MOST_OFF[dtype]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    benchmark.extra_info.update(
        length=length,
        dtype=dtype,
        threads=threads,
        rounds=ROUNDS[length],
        seconds={name: round(median, 2) for name, median in medians.items()},
        times={name: round(medians["transformers"] / median, 2) for name, median in medians.items()},
        off=off,
    )
    benchmark.pedantic(lambda: ours("full()", ids), rounds=1)
