"""What packing frees, by the allocator's books and by the system's: SmolLM2-135M's cache of 8,000 tokens, 369 MB in float32."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.methods.parser import parse
from kvsieve.runtime.compression import Compression

FULL = 8000 * 30 * 2 * 3 * 64 * 4
"""Bytes of keys and values: tokens, layers, keys and values, heads, channels, float32."""

# A model with the layers and heads of SmolLM2-135M and next to nothing else. All but the last tokens of the prompt are put into its
# stores: what they cost to compute is not what is asked here. Each policy has a process of its own, forked where that is possible:
# what the one frees is not there for the next.
CHILD = """
import json, os, pathlib, resource, sys
import kvsieve, torch, transformers

def resident():
    path = pathlib.Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.exists() else None

torch.set_num_threads(1)
torch.manual_seed(0)
TOKENS, TAIL = 8000, 40
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=36, intermediate_size=32, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, max_position_embeddings=16384,
)
model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
ids = torch.randint(0, 128, (1, TAIL))
policies = sys.argv[1:]
while len(policies) > 1:
    child = os.fork()
    if child == 0:
        policies = policies[:1]
    else:
        assert os.waitpid(child, 0)[1] == 0
        del policies[0]
with kvsieve.stream(model, kvsieve.methods.parse(policies[0])) as stream:
    engine, head = stream._engine, TOKENS - TAIL
    engine.begin_at(head, [(head, [(list(range(head)), [float("nan")] * head)])])
    before = resident()
    rss = lambda: None if before is None else resident() - before
    k, v = torch.randn(3, head, 64), torch.randn(3, head, 64)
    for index in range(30):
        store = engine.make_store(index, k[None], v[None])
        store.write(engine.planner.runs(0, 0), k, v)
    del k, v
    stream.feed(ids)
    read = {"held": stream.stats().bytes_held, "rss": rss()}
    stream.end_turn()
    stats = stream.stats()
    packed = {"held": stats.bytes_held, "rss": rss()}
    with torch.no_grad():
        finite = bool(model(ids[:, :1], past_key_values=stream.cache).logits.isfinite().all())
found = {"read": read, "packed": packed, "full": stats.bytes_full, "seen": stats.seen, "finite": finite}
print(json.dumps({"policy": policies[0], **found}))
"""


SHARES = {"ThinK(0.5)": 0.76, "Quantized(4)": 0.18, "ThinK(0.5) | Quantized(4)": 0.14}
"""What each policy holds at most, as a share of the full cache."""


def in_processes(policies: list[str]) -> Iterator[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", CHILD, *policies], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


@pytest.fixture(scope="module")
def after_8000_tokens() -> dict[str, dict[str, Any]]:
    """What a process holds under each policy."""
    policies = ["Full()", *SHARES]
    calls = [policies] if hasattr(os, "fork") else [[policy] for policy in policies]
    found = {one["policy"]: one for call in calls for one in in_processes(call)}
    for one in found.values():
        assert one["seen"] == 8000
        assert one["full"] == FULL
        assert one["finite"]
    return found


@pytest.mark.parametrize("policy", list(SHARES))
def test_what_packing_frees_is_free(policy: str, after_8000_tokens: dict[str, dict[str, Any]]) -> None:
    """The bytes held fall to a share of the full cache's, and the resident memory of the process falls with them."""
    full, share = after_8000_tokens["Full()"], SHARES[policy]
    read, packed = after_8000_tokens[policy]["read"], after_8000_tokens[policy]["packed"]
    assert read["held"] == full["packed"]["held"] >= FULL
    assert packed["held"] <= share * full["packed"]["held"]
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from Linux's /proc")
    freed = read["held"] - packed["held"]
    assert read["rss"] - packed["rss"] >= 0.95 * freed
    assert packed["rss"] <= packed["held"] + 0.03 * FULL


def test_a_policy_that_packs_nothing_frees_nothing(after_8000_tokens: dict[str, dict[str, Any]]) -> None:
    full = after_8000_tokens["Full()"]
    assert full["read"] == full["packed"]


@functools.cache
def shaped(heads: int, dim: int, dtype: torch.dtype) -> Any:
    """A model of one layer with so many KV heads of that size."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=4 * heads, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=dim, max_position_embeddings=32768,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@contextmanager
def after_a_prompt(model: Any, policy: str, tokens: int) -> Iterator[kvsieve.Stream]:
    """A stream that has read so many tokens. All but the last are put into its store: computing them is not what is tested."""
    with kvsieve.stream(model, parse(policy), "cpu") as stream:
        engine, head = stream._engine, tokens - 40
        engine.begin_at(head, [(head, [(list(range(head)), [float("nan")] * head)])])
        (layer,) = engine.facts.layers
        k, v = torch.randn(2, layer.num_kv_heads, head, layer.key_dim, dtype=layer.dtype)
        store = engine.make_store(layer.index, k[None], v[None])
        store.write(engine.planner.runs(0, 0), k, v)
        del k, v
        stream.feed(torch.randint(0, 128, (1, 40)))
        yield stream


SHAPES = pytest.mark.parametrize(("heads", "dim"), [(3, 64), (8, 128)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def lengths(heads: int) -> list[int]:
    """Where blocks end, just before and just after, and in between; fewer of them where a token is large."""
    every = [2000, 2001, 2016, 2017, 2047, 2048, 2049, 2080, 2081, 2500, 4100, 8191, 8225, 20000]
    return every if heads == 3 else [2000, 2017, 2048, 2081, 8225]


@DTYPES
@SHAPES
def test_thinner_keys_hold_at_most_what_they_promise(heads: int, dim: int, dtype: torch.dtype) -> None:
    """Half of the key channels are a quarter of the bytes; recent tokens, unfilled blocks and a short answer are two hundredths."""
    model = shaped(heads, dim, dtype)
    for tokens in lengths(heads):
        with after_a_prompt(model, "ThinK(0.5)", tokens) as stream, torch.no_grad():
            for at in range(1, 49):
                model(torch.tensor([[at]]), past_key_values=stream.cache)
                if at in (1, 2, 16, 33, 48):
                    stats = stream.stats()
                    share = stats.bytes_held / stats.bytes_full
                    assert stats.seen == tokens + at
                    assert 0.75 < share <= 0.77, f"{share:.4f} at {tokens} + {at}"


@DTYPES
@SHAPES
@pytest.mark.parametrize("policy", ["Quantized(4)", "Quantized(2)", "ThinK(0.4) | Quantized(4)", "ThinK(0.4, flush_every=16)"])
def test_nothing_is_held_beside_unfilled_blocks(policy: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Packed tokens, plain ones, and what one packed block lacks: wherever blocks end, while an answer is packed as it comes."""
    model = shaped(heads, dim, dtype)
    for tokens in lengths(heads)[::3]:
        with after_a_prompt(model, policy, tokens) as stream, torch.no_grad():
            engine = stream._engine
            (packing,) = engine.parts.the(Compression).packing.values()
            token = engine.facts.bytes_per_token
            packed = heads * sum(packing.bits_per_token(dim, dtype)) / 8
            for at in range(1, 71):
                model(torch.tensor([[at]]), past_key_values=stream.cache)
                settled = engine.planner.num_packed(0)
                plain = engine.planner.resident(0, 0) - settled
                channels = 2 * heads * packing.key_kept
                exact = settled * packed + plain * token + channels
                assert exact <= stream.stats().bytes_held <= exact + 63 * packed + 14 * token, f"{tokens} + {at}"


def test_blocks_that_a_fork_shares_are_counted_once_and_given_back() -> None:
    model = shaped(3, 64, torch.float32)
    with after_a_prompt(model, "ThinK(0.5)", 2081) as stream, torch.no_grad():
        model(torch.tensor([[1]]), past_key_values=stream.cache)
        before = stream.stats().bytes_held
        with stream.fork() as fork:
            assert fork.stats().bytes_held == before
            for at in range(40):
                model(torch.tensor([[at]]), past_key_values=fork.cache)
            fork.reset()
        stream.end_turn()
        assert stream.stats().bytes_held <= before
