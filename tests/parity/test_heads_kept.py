"""SnapKV and H2O beside loops over lists: which tokens each head keeps, and logits over exactly those."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
import transformers
from drive import forward
from naive_heads import NaiveHeads

GROUPS = {1: {"num_key_value_heads": 4}, 3: {"num_attention_heads": 6, "hidden_size": 96}, 4: {"num_key_value_heads": 1}}
RULES: dict[str, tuple[Any, dict[str, int]]] = {
    "snapkv": (lambda budget: kvsieve.SnapKV(budget, observe=8, kernel=5), {"observe": 8, "kernel": 5}),
    "h2o": (lambda budget: kvsieve.H2O(budget, recent=6, sinks=3), {"recent": 6, "sinks": 3}),
}
RULE = pytest.mark.parametrize("rule", list(RULES))
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


def heads(stream: kvsieve.Stream, row: int = 0) -> dict[int, list[list[int]]]:
    """What each head of each layer holds of one row."""
    layers = stream._engine.facts.layers
    return {x.index: [stream.kept(x.index, h)[row].positions.tolist() for h in range(x.num_kv_heads)] for x in layers}


def follow(model: Any, rule: str, budget: int, sizes: list[int], backend: str) -> None:
    """Chunks of these sizes through a stream and through the lists, compared after each."""
    make, settings = RULES[rule]
    naive, ids = NaiveHeads(model, rule, budget, **settings), tiny.ids(1, sum(sizes), 5)
    differ = False
    with kvsieve.stream(model, make(budget), backend) as stream:
        lo = 0
        for size in sizes:
            part = ids[:, lo : lo + size]
            torch.testing.assert_close(forward(model, stream.cache, part), naive.forward(part), atol=1e-4, rtol=1e-4)
            got = heads(stream)
            assert got == naive.held
            differ = differ or len({str(kept) for layer in got.values() for kept in layer}) > 1
            lo += size
        stream.end_turn()
        naive.evict(force=True)
        assert heads(stream) == naive.held
        assert stream.stats().resident == min(budget, sum(sizes))
    assert differ, "all heads of all layers kept the same: nothing was tested"


@BACKEND
@RULE
@pytest.mark.parametrize("group", list(GROUPS))
def test_what_each_head_keeps(group: int, rule: str, backend: str) -> None:
    """A prompt over the budget, tokens, a chunk of few and one of many queries."""
    follow(tiny.model(**GROUPS[group]), rule, 30, [50, 1, 1, 5, 20, 1], backend)


@BACKEND
@RULE
def test_decoding_past_a_block(rule: str, backend: str) -> None:
    follow(tiny.model(), rule, 20, [16, *[1] * 140], backend)


def full_layers_only(family: str) -> Any:
    """A tiny model of a family that has sliding layers, without them."""
    torch.manual_seed(0)
    name = tiny.FAMILIES[family][0]
    config = tiny.config(family, layer_types=["full_attention"] * 3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(4.0)
    return model


@BACKEND
@RULE
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gpt_neox", "qwen3"])
def test_softcaps_learned_sinks_and_partial_rotary(family: str, rule: str, backend: str) -> None:
    model = full_layers_only(family) if family in ("gemma2", "gpt_oss") else tiny.model(family)
    follow(model, rule, 24, [40, 1, 1, 20, 3], backend)


@BACKEND
@RULE
def test_the_smallest_budgets(rule: str, backend: str) -> None:
    follow(tiny.model(), rule, {"snapkv": 9, "h2o": 12}[rule], [30, 1, 20, 1], backend)


@BACKEND
def test_a_budget_of_recent_tokens_only_is_a_window(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(12, recent=12), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 40))
        assert all(kept == list(range(28, 40)) for layer in heads(stream).values() for kept in layer)
