"""One layer's step of decode under InfLLM, its choice of blocks included, beside attention to all keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.backends.pieces import attend_pieces
from kvsieve.facts import LayerRope
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.blocks import Blocks
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.part import Forward, LayerInput
from kvsieve.runtime.summaries import Summed, Table
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 8, 2, 128


def planned(policy: Any, length: int) -> tuple[Any, Any, Any]:
    """A planner that holds ``length`` tokens, where they lie, and the step of one more."""
    planner = make_planner(policy.specs(1), policy.stored_keys)
    planner.restore(length, [(length, [(list(range(length)), [0.0] * length)])])
    return planner, planner.runs(0, 0), planner.begin([1], 1, True, False)


@torch.no_grad()
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_step_of_one_layer(benchmark: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    k, v = (torch.randn(1, KV_HEADS, length + 1, DIM, generator=generator) for _ in "kv")
    q = torch.randn(1, HEADS, 1, DIM, generator=generator)
    policy, backend = kvsieve.InfLLM(), get("cpu")
    rule = policy.fetching
    assert rule is not None
    planner, runs, _ = planned(policy, length)
    _, same, dense_step = planned(kvsieve.Full(), length)
    assert runs == same, "one store serves both"
    store = backend.make_store(k, v)
    store.write(runs, k[0, :, :-1], v[0, :, :-1])

    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    call, dense_call = AttendCall(DIM**-0.5, rope=LayerRope(frequencies, "half")), AttendCall(DIM**-0.5)
    facts = SimpleNamespace(layers=(), trained_length=None)
    setting: Any = SimpleNamespace(policy=policy, facts=facts, blocks=Blocks(planner))
    part = Fetching.of(setting)
    assert part is not None
    summaries = torch.randn(KV_HEADS, rule.num_blocks(length), DIM, generator=generator)
    table = Table.of(summaries)
    behind = length - rule.start - len(table) * rule.block
    part.rows = [{0: Summed(table, torch.zeros(KV_HEADS, behind))}]
    planner.rollback()
    forward = Forward([1], 1, [length], step=planner.begin_residents([1], 1))
    layer = LayerInput(0, q, k[:, :, -1:], v[:, :, -1:], call, forward, store)

    def fetching() -> torch.Tensor:
        part.begin(forward)
        out = part.attend(layer)
        assert out is not None
        return out

    def dense() -> torch.Tensor:
        return store.run(q, layer.k, layer.v, dense_step, dense_call)

    got, last = fetching()[0, 0], part._reads[0][0]
    assert last is not None
    assert last.choice.compared == len(table)
    products = (summaries.double() * q[0, :, 0].double().view(KV_HEADS, -1, DIM).sum(1)[:, None]).sum((0, 2))
    best = products.topk(rule.blocks).indices.sort().values.tolist()
    assert last.choice.blocks == [best]
    pieces = rule.pieces(length, 1, [best])
    want = attend_pieces(
        q[0].double(), length, pieces, lambda lo, hi: (k[0, :, lo:hi].double(), v[0, :, lo:hi].double()), call, False
    )
    torch.testing.assert_close(got.double(), want.out[:, 0], atol=1e-5, rtol=0)
    took = interleaved({"all": dense, "fetching": fetching})
    read = sum(hi - lo for lo, hi in last.read(0))
    record(benchmark, fetching, took, length=length, read=read, times_as_fast=round(took["all"] / took["fetching"], 2))
