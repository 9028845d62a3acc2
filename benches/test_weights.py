"""Whole tokens of SmolLM2-135M by the width of its weights, some by compiled code, interleaved, on one thread.

Each model reads the same 2,000 tokens of Python's reference pages through a stream, which is timed, and then says tokens, which is
timed too. Beside the times stands what the widths cost: the negative log-likelihood of the next 512 tokens.
"""

from __future__ import annotations

import time
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.bench.subject import load, text_ids, token, weight_bytes
from rounds import interleaved, record

SEEN, JUDGED = 2000, 512
WIDTHS: dict[str, tuple[torch.dtype, str | None, bool]] = {
    "float32": (torch.float32, None, False),
    "float32, compiled": (torch.float32, None, True),
    "bfloat16": (torch.bfloat16, None, False),
    "int8": (torch.float32, "int8", False),
    "int4": (torch.float32, "int4", False),
    "int4, compiled": (torch.float32, "int4", True),
    "int4, bfloat16": (torch.bfloat16, "int4", False),
}
"""The model's dtype, what its weights become, and whether its tokens are said by compiled code."""
MOST_OFF = {"bfloat16": 0.05, "int8": 0.1, "int4": 0.1, "int4, bfloat16": 0.1}
"""Error of logits after the text, relative to float32. The file's weights have 4 bits: int4 is as near as bfloat16 products are."""
SAME = {"float32, compiled": ("float32", 1e-4), "int4, compiled": ("int4", 0.02)}
"""Whose next token compiled code says, and how far off its logits may be."""


@pytest.mark.parametrize("policy", ["full()", "sirllm(1024)"])
def test_whole_tokens_by_the_width_of_weights(benchmark: Any, policy: str) -> None:
    streams, seconds, nll, logits, read, next_ones = {}, {}, {}, {}, {}, {}
    for width, (dtype, weights, compiled) in WIDTHS.items():
        made, tokenizer = load.__wrapped__("smollm2", dtype, weights)
        ids = text_ids("smollm2", tokenizer, SEEN + JUDGED)
        streams[width] = kvsieve.stream(made, kvsieve.methods.parse(policy))
        read[width] = weight_bytes(made)
        began = time.thread_time()
        streams[width].feed(ids[:, :SEEN])
        seconds[width] = time.thread_time() - began
        with torch.no_grad(), streams[width].fork() as judged:
            said = made(ids[:, SEEN:], past_key_values=judged.cache).logits.float()
        nll[width] = round(float(torch.nn.functional.cross_entropy(said[0, :-1], ids[0, SEEN + 1 :])), 4)
        logits[width] = said
        if compiled:
            kvsieve.compile(made)
        next_ones[width] = token(made, streams[width].cache).float()
    for width, most in MOST_OFF.items():
        off = float((logits[width] - logits["float32"]).norm() / logits["float32"].norm())
        assert 0 < off < most, (width, off)
    for width, (eager, most) in SAME.items():
        off = float((next_ones[width] - next_ones[eager]).norm() / next_ones[eager].norm())
        assert off < most, (width, off)
    del logits
    runs = {width: lambda stream=stream: token(stream.model, stream.cache) for width, stream in streams.items()}
    medians = interleaved(runs, rounds=15, repeat=False)
    record(
        benchmark,
        runs["int8"],
        medians,
        policy=policy,
        seen=SEEN,
        times={width: round(medians["float32"] / median, 3) for width, median in medians.items()},
        prompt_tokens_a_second={width: round(SEEN / taken, 1) for width, taken in seconds.items()},
        nll=nll,
        weight_bytes=read,
    )
    for stream in streams.values():
        stream.close()
