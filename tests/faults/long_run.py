"""Texts without end: what a bounded stream holds, and what a token costs it, late in a text against early in it.

    python tests/faults/long_run.py --tokens 1000000 --policy "StreamingLLM(512)" --way feed

A text of `--tokens` goes through a model so small that the stream's own work is measured. The ways: `feed` (pieces of 1,000),
`stream.generate` (turns of 490 tokens and 10 of answer), `model.generate` (turns of a caller who passes ids of all columns, 492
tokens and 8 of answer), `forward` (a caller's own loop of forwards over 128 tokens and then one), and `streams`: streams that are
opened, fed, forked, answered from and closed.

Memory is the process's resident anonymous memory (pages of libraries are read when they are first needed, and are no stream's),
sampled at 64 moments after the first 32,768 tokens, each time once the allocator has given back what is free; its slope is that of
the line between the least of the first quarter of the samples and the least of the last one. The ids of the conversation are told
apart: 4 bytes a token, which the transcript keeps, and 8 of a caller who passes all columns. They come 32 KB at a time, so that a
slope may be too high by a chunk over its length, which counts in short texts. What is allocated is told beside it.
Time is CPU time of the thread a token: at the end the calls take turns with those of another stream that has read 32,768 tokens,
and the medians are compared, so that a busy machine is as busy for both. What a caller's columns themselves cost transformers (ids
and masks as long as the text, made anew by every `model.generate`) is measured on transformers' own cache of a sliding window, as
the difference between the two lengths, and taken off; all four take turns, and the allocator keeps what is freed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
COLUMNS = 0.05
"""Of what a caller's columns cost: so exactly that is known."""
IDS = 4
"""Bytes of a token in the transcript."""
CHUNK = 32 * 1024
"""Bytes that ids come by: of two moments one may have just got a chunk, and the other not yet."""

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


def small(kind: type = transformers.LlamaConfig, **more: Any) -> Any:
    """A random model of one layer."""
    config = kind(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class _Allocated(ctypes.Structure):
    """What glibc's `mallinfo2` tells."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def memory() -> tuple[int, int]:
    """Resident anonymous bytes of the process once the allocator has given back what is free, and bytes that are allocated."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Allocated
    libc.malloc_trim(0)
    found = libc.mallinfo2()
    resident = int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024
    return resident, found.uordblks + found.hblkhd


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """What is freed stays with the process: columns of megabytes would cost pages or none, by where in the heap they lie."""
    libc = ctypes.CDLL(None)
    large, top = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    libc.mallopt(large, 32 << 20)
    libc.mallopt(top, 2**31 - 1)
    yield
    libc.mallopt(large, 128 << 10)
    libc.mallopt(top, 128 << 10)


def slopes(samples: list[tuple[int, int, int]], first: slice, last: slice) -> tuple[float, float, int]:
    """Bytes that one of what is counted costs, resident and allocated, between the least of two stretches of samples; and how many
    were counted between those of the resident ones."""
    found, counted = [], []
    for column in (1, 2):
        a, b = (min(samples[part], key=lambda sample: sample[column]) for part in (first, last))
        counted.append(max(b[0] - a[0], 1))
        found.append((b[column] - a[column]) / counted[-1])
    return found[0], found[1], counted[0]


def calls(stream: kvsieve.Stream, way: str) -> tuple[int, Callable[[], Any]]:
    """Tokens of a call, and the call."""
    ids = torch.randint(1, 128, (1, 1000), generator=torch.Generator().manual_seed(0))
    model = stream.model
    if way == "feed":
        return 1000, lambda: stream.feed(ids)
    if way == "stream.generate":
        return 500, lambda: stream.generate(ids[:, :490], max_new_tokens=10, do_sample=False)
    if way == "model.generate":
        return 500, turns(model, stream.cache, stream.seen)

    def forwards() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, :128], past_key_values=stream.cache, use_cache=True)
            model(input_ids=ids[:, 128:129], past_key_values=stream.cache, use_cache=True)

    return 129, forwards


def turns(model: Any, cache: Any, told: int) -> Callable[[], None]:
    """A caller's turns of 492 tokens and 8 of answer, with ids of all columns, as transformers asks for."""
    more = torch.randint(1, 128, (1, 493), generator=torch.Generator().manual_seed(0))
    held = [torch.ones(1, told, dtype=torch.long)]

    def turn() -> None:
        # The last token of an answer is not in the cache yet.
        ids = torch.cat([held[0], more[:, 1:] if held[0].shape[1] else more], 1)
        held[0] = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)

    return turn


def at_columns(columns: int) -> Callable[[], None]:
    """The same turns on transformers' own cache of a sliding window, which says that it has seen so many columns."""
    model = small(transformers.MistralConfig, sliding_window=512)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 600, dtype=torch.long), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.cumulative_length = columns
    return turns(model, cache, columns)


def seconds_of(calls: Sequence[Callable[[], Any]], times: int) -> list[float]:
    """Seconds of CPU of each of several calls, made in turns; the median, for other programs' moments are then everybody's."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(times):
        for call, taken in zip(calls, found):
            before = time.thread_time()
            call()
            taken.append(time.thread_time() - before)
    return [median(taken[1:]) for taken in found]


def run(policy: str, way: str, tokens: int) -> dict[str, Any]:
    """One row: what was measured."""
    torch.set_num_threads(1)
    gc.freeze()  # what was there before need not be looked through at every sample
    model, early = small(), min(EARLY, tokens // 2)
    with kvsieve.stream(model, methods.parse(policy), "cpu") as stream, kvsieve.stream(model, stream.policy, "cpu") as young:
        size, call = calls(stream, way)
        begin, total = early // size, max(tokens // size, 1)
        every, samples = max((total - begin) // SAMPLES, 1), []
        for at in range(total):
            call()
            if at >= begin and (at - begin) % every == 0:
                samples.append((stream.seen, *memory()))
        seen, resident = stream.seen, stream.stats().resident
        young.feed(torch.ones(1, early, dtype=torch.long))
        columns = [at_columns(seen), at_columns(early)] if way == "model.generate" else []
        with memory_kept():
            late, at_early, *theirs_at = seconds_of([call, calls(young, way)[1], *columns], CALLS + 1)
    theirs = max(theirs_at[0] - theirs_at[1], 0.0) if theirs_at else 0.0
    quarter = max(len(samples) // 4, 1)
    ids = 8 + IDS if way == "model.generate" else IDS  # the caller holds the ids as well
    *both, between = slopes(samples, slice(quarter), slice(-quarter, None))
    slope, allocated = (1000 * (one - ids) for one in both)
    us = 1e6 / size
    return {
        "policy": policy,
        "way": way,
        "tokens": seen,
        "resident": resident,
        "bytes_per_1000_tokens": round(slope),
        "allocated_per_1000_tokens": round(allocated),
        "chunk_per_1000_tokens": round(1000 * CHUNK / between),
        "us_a_token_early": round(at_early * us, 2),
        "us_a_token_late": round(late * us, 2),
        "us_of_columns": round(theirs * us, 2),
        "slower": round((late - theirs) / at_early, 3),
    }


def streams(count: int) -> dict[str, Any]:
    """Streams that come and go, each with a fork that answers and a mark: bytes of the process a stream."""
    torch.set_num_threads(1)
    gc.freeze()
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
            samples.append((at + 1, *memory()))
    quarter = max(len(samples) // 4, 1)
    # The first quarter is that after a quarter of all: allocators and caches have settled.
    slope, allocated, _ = slopes(samples, slice(quarter, 2 * quarter), slice(-quarter, None))
    return {"way": "streams", "streams": count, "bytes_a_stream": round(slope, 1), "allocated_a_stream": round(allocated, 1)}


def verdict(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    if row["way"] == "streams":
        return [f"{row['bytes_a_stream']} bytes a stream"] if row["bytes_a_stream"] > 64 else []
    wrong, name = [], f"{row['policy']}, {row['way']}"
    if row["bytes_per_1000_tokens"] > SLOPE + row["chunk_per_1000_tokens"]:
        wrong.append(f"{name}: {row['bytes_per_1000_tokens']} bytes of memory every 1,000 tokens")
    allowed = SLOWER + COLUMNS * row["us_of_columns"] / row["us_a_token_early"]
    if row["slower"] > allowed:
        wrong.append(f"{name}: {row['slower']} times as long a token at the end")
    return wrong


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
        wrong += len(problem)
        print(json.dumps({**row, "wrong": problem}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
