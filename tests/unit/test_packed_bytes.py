"""What packing frees, by the allocator's books and by the system's: SmolLM2-135M's cache of 8,000 tokens, 369 MB in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FULL = 8000 * 30 * 2 * 3 * 64 * 4
"""Bytes of keys and values: tokens, layers, keys and values, heads, channels, float32."""

# A model with the layers and heads of SmolLM2-135M and next to nothing else. All but the last tokens of the prompt are put into its
# stores: what they cost to compute is not what is asked here.
CHILD = """
import json, pathlib, resource, sys
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
with kvsieve.stream(model, kvsieve.policies.parse(sys.argv[1])) as stream:
    engine, head = stream._engine, TOKENS - TAIL
    engine.restore(head, [(head, [(list(range(head)), [float("nan")] * head)])])
    before = resident()
    rss = lambda: None if before is None else resident() - before
    for index in range(30):
        k, v = torch.randn(3, head, 64), torch.randn(3, head, 64)
        store = engine.stores[index] = engine.backend.make_store(k[None], v[None])
        if engine.packer is not None:
            store.set_packing(engine.packer.packing[index])
        store.write(engine.planner.runs(0, 0), k, v)
    del k, v
    stream.feed(ids)
    read = {"held": stream.stats().bytes_held, "rss": rss()}
    stream.end_turn()
    stats = stream.stats()
    packed = {"held": stats.bytes_held, "rss": rss()}
    with torch.no_grad():
        finite = bool(model(ids[:, :1], past_key_values=stream.cache).logits.isfinite().all())
print(json.dumps({"read": read, "packed": packed, "full": stats.bytes_full, "seen": stats.seen, "finite": finite}))
"""


def after_8000_tokens(policy: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, policy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["seen"] == 8000
    assert found["full"] == FULL
    assert found["finite"]
    return found


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return after_8000_tokens("Full()")


@pytest.mark.parametrize(("policy", "share"), [("ThinK(0.5)", 0.76), ("Quantized(4)", 0.18), ("ThinK(0.5) | Quantized(4)", 0.14)])
def test_what_packing_frees_is_free(policy: str, share: float, full: dict[str, Any]) -> None:
    """The bytes held fall to a share of the full cache's, and the resident memory of the process falls with them."""
    found = after_8000_tokens(policy)
    read, packed = found["read"], found["packed"]
    assert read["held"] == full["packed"]["held"] >= FULL
    assert packed["held"] <= share * full["packed"]["held"]
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from Linux's /proc")
    freed = read["held"] - packed["held"]
    assert read["rss"] - packed["rss"] >= 0.95 * freed
    assert packed["rss"] <= packed["held"] + 0.03 * FULL


def test_a_policy_that_packs_nothing_frees_nothing(full: dict[str, Any]) -> None:
    assert full["read"] == full["packed"]
