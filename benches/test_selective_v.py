"""One layer's decode attention that adds up the heaviest values alone, beside all of them: plain, and as codes of 4 bits."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.backends.heaviest_values import heaviest
from kvsieve.bench.subject import load, text_ids
from kvsieve.policy.select import HeaviestValues
from kvsieve.policy.storage import Channels, Packing
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 32, 8, 128
TOP = 100


@torch.no_grad()
@pytest.mark.parametrize(("length", "value_bits"), [(32768, 0), (131072, 0), (32768, 4)])
def test_a_step_of_one_layer(benchmark: Any, length: int, value_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, length, DIM, generator=generator).bfloat16() for _ in "kv")
    # Twice as long: attention with a point to it.
    q = 2 * torch.randn(1, HEADS, 1, DIM, generator=generator).bfloat16()
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")
    held = list(range(length - 1))
    planner.restore(length - 1, [(length - 1, [(held, [0.0] * len(held))])])
    store = get("cpu").make_store(k, v)
    store.write(planner.runs(0, 0), k[0, :, :-1], v[0, :, :-1])
    if value_bits:
        store.set_packing(Packing(DIM, 0, value_bits, 64))
        store.pack(planner.pack(0, length - 64, 1), Channels.all(k[0], None))
    step, new, call = planner.begin([1], 1, True, False), (k[:, :, -1:], v[:, :, -1:]), AttendCall(DIM**-0.5)
    rule = HeaviestValues(TOP)
    got, mass = store.run_heaviest(q, *new, step, call, rule, [True])
    want, want_mass = heaviest([(q[0, :, 0].double(), k[0].double(), v[0].double())], call, rule)
    assert float((got[0, 0].double() - want).abs().max() / want.abs().max()) < (0.2 if value_bits else 2e-2)
    torch.testing.assert_close(mass[0].double(), want_mass, atol=1e-3, rtol=0)
    took = interleaved(
        {
            "all": lambda: store.run(q, *new, step, call),
            "heaviest": lambda: store.run_heaviest(q, *new, step, call, rule, [True]),
        }
    )
    record(
        benchmark,
        lambda: store.run_heaviest(q, *new, step, call, rule, [True]),
        took,
        length=length,
        mass=round(float(mass.mean()), 3),
        times_as_fast=round(took["all"] / took["heaviest"], 2),
    )


TEXT, STEPS = 8000, 16


@torch.no_grad()
def test_whole_tokens_with_values_in_a_file(benchmark: Any, tmp_path: Any) -> None:
    """SmolLM2-135M after 8,000 tokens of a text: all values, the heaviest, and those with a quarter of the values in memory."""
    subject, tokenizer = load("smollm2", torch.bfloat16)
    ids = text_ids("smollm2", tokenizer, TEXT + 4 * STEPS)
    values = TEXT // 64 * 64 * subject.config.num_hidden_layers * 192 * 2
    policies = {
        "all": kvsieve.Full(),
        "heaviest": kvsieve.SelectiveV(TOP),
        "in_file": kvsieve.SelectiveV(TOP, host_budget=values // 4, disk=tmp_path),
    }
    streams = {name: kvsieve.stream(subject, policy, "cpu") for name, policy in policies.items()}
    for stream in streams.values():
        stream.feed(ids[:, :TEXT])
    turns = {name: iter(range(TEXT, ids.shape[1])) for name in streams}
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in streams}

    def step(name: str) -> None:
        at = next(turns[name])
        logits[name].append(subject(ids[:, at : at + 1], past_key_values=streams[name].cache).logits[0, -1])

    before = streams["in_file"].stats().tiers
    took = interleaved({name: lambda name=name: step(name) for name in streams}, STEPS, repeat=False)
    assert all(torch.equal(one, other) for one, other in zip(logits["heaviest"], logits["in_file"], strict=True))
    stats = {name: stream.stats() for name, stream in streams.items()}
    after = stats["in_file"].tiers
    assert before is not None
    assert after is not None
    steps = len(logits["in_file"])
    record(
        benchmark,
        lambda: step("in_file"),
        took,
        length=TEXT,
        bytes_held={name: one.bytes_held for name, one in stats.items()},
        hit_rate=round((after.hits - before.hits) / (after.hits - before.hits + after.loads - before.loads), 3),
        loads_a_token=round((after.loads - before.loads) / steps, 1),
        bytes_read_a_token=round((after.bytes_read - before.bytes_read) / steps),
        least_mass=round(min(layer.value_mass or 1.0 for layer in stats["in_file"].layers), 3),
    )
    for stream in streams.values():
        stream.close()
