"""Every backend gives what the reference gives in float64, whatever the shape, the padding, the chunks and the policy."""

from __future__ import annotations

import random
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import Layer, forwards, pad_left
from kvsieve.facts import LayerRope
from kvsieve.methods.sirllm import Surprisal
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import Capped, FixedDistance, InCache, Original
from kvsieve.policy.select import TopKTokens

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}

PARTS: dict[str, Any] = {
    **tiny.POLICIES,
    "window_true": lambda b: Memory(evict=Window(b, sinks=3), position=Original()),
    "window_ceiling_below": lambda b: Memory(evict=Window(b, sinks=3), position=Capped(7)),
    "window_fixed": lambda b: Memory(evict=Window(b, sinks=1), position=FixedDistance(5)),
    "no_sinks": lambda b: kvsieve.StreamingLLM(b, sinks=0),
    "scored_true": lambda b: Memory(evict=Surprisal(b, sinks=2, recent=5), position=Original()),
    "scored_fixed_tail": lambda b: (
        Memory(evict=Window(b // 2, sinks=2), position=InCache())
        >> Memory(evict=Surprisal(b // 2, sinks=0, recent=0), position=FixedDistance(9))
    ),
    "top_k_tail": lambda b: (
        Memory(evict=Window(b // 2, sinks=2), position=Capped(11)) >> Memory(position=FixedDistance(4), select=TopKTokens(2))
    ),
}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)
    assert float(error) <= TOLERANCE[dtype], f"off by {float(error):.2e} of the largest value"


def histories(seed: int) -> tuple[list[tuple[int, list[int]]], int]:
    """(columns, real tokens of each row) of each forward, and the number of rows; pads only before a row's first token."""
    rng = random.Random(seed)
    rows = rng.choice([1, 2, 3])
    sizes = [rng.choice([1, 5, 17, 40, 100])] + [rng.choice([1, 1, 1, 2, 5, 16, 17, 40]) for _ in range(rng.choice([3, 6]))]
    first = [rng.randint(1, sizes[0]) for _ in range(rows)]
    first[rng.randrange(rows)] = sizes[0]
    return [(sizes[0], first)] + [(n, [n] * rows) for n in sizes[1:]], rows


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(PARTS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_attention_of_a_layer(backend: str, policy: str, dtype: torch.dtype, group: int) -> None:
    seed = group * 101 + list(PARTS).index(policy)
    rng = random.Random(seed)
    calls, rows = histories(seed)
    heads, size = rng.choice([1, 2, 3]), rng.choice([8, 16, 32])
    rotary = rng.choice([size, size // 2])
    rope = LayerRope(
        10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary),
        rng.choice(["half", "interleaved"]),
        rng.choice([1.0, 1.0, 1.2]),
    )
    extra: dict[str, Any] = {"rope": rope, "scale": size**-0.5, "softcap": rng.choice([None, None, 5.0])}
    if rng.random() < 0.3:
        extra["sinks"] = torch.randn(heads * group, generator=torch.Generator().manual_seed(seed))
    made = PARTS[policy](24)
    tested, exact = (Layer(name, made, **extra) for name in (backend, "reference"))
    generator = torch.Generator().manual_seed(seed)
    for width, lens in calls:
        q, k, v = (torch.randn(rows, h, width, size, generator=generator) for h in (heads * group, heads, heads))
        # Both are given the very numbers that the dtype can hold, rotated keys included.
        if tested.stored_keys == "post_rope":
            seen = [tested.planner.seen(r) if tested.planner.num_rows else 0 for r in range(rows)]
            first = [s - (width - n) for s, n in zip(seen, lens)]
            q, k = tested.rotated(q, first), tested.rotated(k, first)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scores = [torch.rand(n, generator=generator).numpy() for n in lens] if made.needs_surprisal else None
        got, want = (
            fed(layer, *(x.double() for x in (q, k, v)) if layer is exact else (q, k, v), lens, scores) for layer in (tested, exact)
        )
        close(got, want, dtype)
        for row, n in enumerate(lens):
            assert got[row, : width - n].abs().sum() == 0, "a pad's output is not zero"
        for memory in range(tested.planner.num_memories):
            for row in range(rows):
                assert tested.positions(row, memory) == exact.positions(row, memory)
                held, same = (layer.store.read(layer.planner.runs(memory, row)) for layer in (tested, exact))
                assert torch.equal(held[0].double(), same[0])
                assert torch.equal(held[1].double(), same[1])


def fed(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], scores: Any) -> torch.Tensor:
    """Feeds keys that are rotated as the layer stores them already."""
    rope, layer.rope = layer.rope, None
    try:
        return layer.feed(q, k, v, lens, scores)
    finally:
        layer.rope = rope


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", ["streaming", "sirllm", "full"])
def test_values_may_have_another_size_than_keys(backend: str, policy: str) -> None:
    made = tiny.POLICIES[policy](16)
    rope = LayerRope(torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64), "half")
    tested, exact = (Layer(name, made, rope=rope, scale=0.35) for name in (backend, "reference"))
    torch.manual_seed(0)
    for width in (30, 1, 1, 5, 20):
        q, k, v = torch.randn(1, 4, width, 8), torch.randn(1, 2, width, 8), torch.randn(1, 2, width, 24)
        scores = [torch.rand(width).numpy()] if made.needs_surprisal else None
        got, want = tested.feed(q, k, v, scores=scores), exact.feed(q.double(), k.double(), v.double(), scores=scores)
        close(got, want, torch.float32)


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_logits_of_a_model(family: str, policy: str) -> None:
    model = tiny.model(family)
    ids, mask = pad_left([tiny.ids(1, 90, 1)[0], tiny.ids(1, 61, 2)[0]])
    logits, kept = {}, {}
    for backend in tiny.BACKENDS:
        with kvsieve.stream(model, tiny.POLICIES[policy](30), backend) as stream:
            logits[backend] = forwards(model, stream.cache, ids, [40, 17, 5, 1], mask)
            kept[backend] = [k.positions.tolist() for k in stream.kept()]
    assert kept["cpu"] == kept["reference"]
    for row in range(2):
        real = mask[row].bool()
        a, b = (logits[name][row, real] for name in tiny.BACKENDS)
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_never_changes_an_output(backend: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 8, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    outs = []
    try:
        for n in (2, threads):
            torch.set_num_threads(n)
            layer = Layer(backend, kvsieve.Full(), scale=0.25)
            layer.feed(q[:, :, :299], k[:, :, :299], v[:, :, :299])
            outs.append(layer.feed(q[:, :, 299:], k[:, :, 299:], v[:, :, 299:]))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=0)
