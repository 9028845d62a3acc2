"""Texts without end: what a bounded stream holds, and what a token costs it, late in a text against early in it.

    python tests/faults/long_run.py --tokens 1000000 --policy "StreamingLLM(512)" --way feed

A text of `--tokens` goes through a model so small that the stream's own work is measured. The ways: `feed` (pieces of 1,000),
`stream.generate` (turns of 490 tokens and 10 of answer), `model.generate` (turns of a caller who passes ids of all columns, 192
tokens and 8 of answer), `forward` (a caller's own loop of forwards over 16 tokens and then one), and `streams`: streams that are
opened, fed, forked, answered from and closed.

Memory is the process's resident memory, sampled at 64 moments after the first 32,768 tokens; its slope is that of the line between
the least of the first quarter of the samples and the least of the last one, for what is free between two calls differs. The ids of
the conversation are told apart: 4 bytes a token, which the transcript keeps. Time is CPU time of the thread a token, the median of
the calls around 32,768 tokens and of as many last ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import kvsieve
import torch
import transformers
from kvsieve import methods

EARLY = 32_768
SAMPLES = 64
CALLS = 20
"""Calls that a time is the median of."""
SLOPE = 1024
"""Bytes that 1,000 tokens may cost beside their ids."""
SLOWER = 1.2
"""Times as long as early in the text a token may take at its end."""
IDS = 4
"""Bytes of a token in the transcript."""

POLICIES = (
    "StreamingLLM(512)",
    "LMInfinite(508)",
    "SirLLM(512)",
    "SnapKV(512)",
    "H2O(512)",
    "StreamingLLM(256) >> SirLLM(256, sinks=0, recent=0)",
    "StreamingLLM(512) | Quantized(8)",
    "StreamingLLM(512) | ThinK(0.5)",
)
WAYS = ("feed", "stream.generate", "model.generate", "forward")


def small() -> Any:
    """A random model of one layer."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def calls(stream: kvsieve.Stream, way: str) -> tuple[int, Callable[[], Any]]:
    """Tokens of a call, and the call."""
    ids = torch.randint(1, 128, (1, 1000), generator=torch.Generator().manual_seed(0))
    model = stream.model
    if way == "feed":
        return 1000, lambda: stream.feed(ids)
    if way == "stream.generate":
        return 500, lambda: stream.generate(ids[:, :490], max_new_tokens=10, do_sample=False)
    if way == "forward":

        def forwards() -> None:
            with torch.no_grad():
                model(input_ids=ids[:, :16], past_key_values=stream.cache, use_cache=True)
                model(input_ids=ids[:, 16:17], past_key_values=stream.cache, use_cache=True)

        return 17, forwards

    told = torch.zeros(1, 0, dtype=torch.long)

    def turn() -> None:
        nonlocal told
        # A prompt of all columns is what transformers asks for; it reads those that the cache has not.
        told = model.generate(
            torch.cat([told, ids[:, : 192 + (told.shape[1] > 0)][:, -192:]], 1),
            past_key_values=stream.cache,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )

    return 200, turn


def run(policy: str, way: str, tokens: int) -> dict[str, Any]:
    """One row: what was measured."""
    torch.set_num_threads(1)
    with kvsieve.stream(small(), methods.parse(policy), backend="cpu") as stream:
        size, call = calls(stream, way)
        total, early = max(tokens // size, 2 * CALLS), min(EARLY, tokens // 2) // size
        every = max((total - early) // SAMPLES, 1)
        times, samples = [], []
        for at in range(total):
            before = time.thread_time()
            call()
            times.append((time.thread_time() - before) / size)
            if at >= early and (at - early) % every == 0:
                gc.collect()
                samples.append((stream.seen, resident_bytes()))
        seen, resident = stream.seen, stream.stats().resident
    quarter = max(len(samples) // 4, 1)
    first, last = (min(some, key=lambda sample: sample[1]) for some in (samples[:quarter], samples[-quarter:]))
    ids = 8 + IDS if way == "model.generate" else IDS  # the caller holds the ids as well
    slope = (last[1] - first[1]) / max(last[0] - first[0], 1) * 1000 - ids * 1000
    at_early = median(times[max(early - CALLS // 2, 0) :][:CALLS])
    late = median(times[-CALLS:])
    return {
        "policy": policy,
        "way": way,
        "tokens": seen,
        "resident": resident,
        "bytes_per_1000_tokens": round(slope),
        "us_a_token_early": round(at_early * 1e6, 2),
        "us_a_token_late": round(late * 1e6, 2),
        "slower": round(late / at_early, 3),
    }


def streams(count: int) -> dict[str, Any]:
    """Streams that come and go, each with a fork that answers and a mark: bytes of the process a stream."""
    torch.set_num_threads(1)
    model, ids = small(), torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    samples = []
    for at in range(count):
        with kvsieve.stream(model, kvsieve.StreamingLLM(32, sinks=2), backend="cpu") as stream:
            stream.feed(ids)
            mark = stream.mark()
            with stream.fork() as fork:
                fork.feed(ids[:, :9])
            stream.rewind(mark)
            stream.feed(ids[:, :5])
        if at * SAMPLES // count != (at + 1) * SAMPLES // count:
            gc.collect()
            samples.append((at + 1, resident_bytes()))
    quarter = max(len(samples) // 4, 1)
    # The first quarter is that after a quarter of all: allocators and caches have settled.
    first, last = (min(some, key=lambda s: s[1]) for some in (samples[quarter : 2 * quarter], samples[-quarter:]))
    return {"way": "streams", "streams": count, "bytes_a_stream": round((last[1] - first[1]) / max(last[0] - first[0], 1), 1)}


def verdict(row: dict[str, Any]) -> str | None:
    """What is wrong with a row, if anything."""
    if row["way"] == "streams":
        return f"{row['bytes_a_stream']} bytes a stream" if row["bytes_a_stream"] > 64 else None
    if row["bytes_per_1000_tokens"] > SLOPE:
        return f"{row['bytes_per_1000_tokens']} bytes of memory every 1,000 tokens"
    return None


def slow(row: dict[str, Any]) -> bool:
    """Whether a token at the end takes too long."""
    return bool(row.get("slower", 0) > SLOWER)


def rows(policies: list[str], ways: list[str], tokens: int, count: int) -> Iterator[dict[str, Any]]:
    """Every row asked for, made one by one."""
    for way in ways:
        if way == "streams":
            yield streams(count)
            continue
        for policy in policies:
            yield run(policy, way, tokens)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of a text")
    parser.add_argument("--streams", type=int, default=2_000, help="streams opened and closed")
    parser.add_argument("--policy", action="append", help="a policy as text; every bounded one by default")
    parser.add_argument("--way", action="append", choices=[*WAYS, "streams"], help="by default all")
    args = parser.parse_args(argv)
    wrong = 0
    for row in rows(args.policy or list(POLICIES), args.way or [*WAYS, "streams"], args.tokens, args.streams):
        problem = verdict(row)
        wrong += problem is not None or slow(row)
        print(json.dumps({**row, "wrong": problem, "slow": slow(row)}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
