"""A conversation's cost must not depend on what was seen: 1,000,000 tokens under a budget of 512, by `feed` and by `generate`.

The model is so small that the stream's own work is measured. Time is CPU time a token, early (2 % of the text) and at its end;
memory is what the process gained between the two. The ids are kept: 8 bytes a token, stated apart.

    pytest benches/test_flat.py --tokens 1000000 --benchmark-json flat.json
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import kvsieve
import pytest
import torch
import transformers

SAMPLES = 20
"""Calls that one figure is the median of."""


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fed(stream: kvsieve.Stream, ids: torch.Tensor) -> None:
    stream.feed(ids)


def answered(stream: kvsieve.Stream, ids: torch.Tensor) -> None:
    """A turn of which ten tokens are the answer."""
    out = stream.generate(ids[:, :-10], max_new_tokens=10, do_sample=False)
    assert out.shape == ids.shape


@pytest.mark.parametrize(("door", "tokens_a_call"), [(fed, 1000), (answered, 500)], ids=["feed", "generate"])
def test_time_and_memory_are_flat(
    benchmark: Any, door: Callable[[kvsieve.Stream, torch.Tensor], None], tokens_a_call: int, request: pytest.FixtureRequest
) -> None:
    torch.set_num_threads(1)
    total = request.config.getoption("--tokens")
    calls = total // tokens_a_call
    assert calls > 2 * SAMPLES, "too few tokens to compare two ranges"
    piece = torch.randint(1, 128, (1, tokens_a_call), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    with kvsieve.stream(model(), kvsieve.StreamingLLM(512), backend="cpu") as stream:
        figures = {}
        for call in range(calls):
            before = time.thread_time()
            door(stream, piece)
            times.append((time.thread_time() - before) / tokens_a_call)
            if call + 1 in (early := max(calls // 50, SAMPLES), calls):
                figures["early" if call + 1 == early else "late"] = (median(times[-SAMPLES:]), resident_bytes())
        ids = stream.ids[0]
        assert len(ids) == calls * tokens_a_call
        assert torch.equal(ids[-tokens_a_call:][: tokens_a_call - 10], piece[0, :-10])
        assert stream.stats().resident <= 512 + 2 * 64
        (early_s, early_bytes), (late_s, late_bytes) = figures["early"], figures["late"]
        grown = (late_bytes - early_bytes) / (total - early * tokens_a_call)
        benchmark.extra_info.update(
            tokens=total,
            early_us_a_token=round(early_s * 1e6, 2),
            late_us_a_token=round(late_s * 1e6, 2),
            ratio=round(late_s / early_s, 3),
            bytes_a_token=round(grown, 2),
            of_these_ids=8,
        )
        benchmark.pedantic(lambda: door(stream, piece), rounds=3, iterations=1)
