"""One layer's step of decode over a long text under the policies that keep all of it and read a part, beside attention to all keys.

InfLLM and LongHeads choose blocks by their summaries, RefreshKV reads what heads chose before, and at every tenth step reads all
and chooses anew. All of them read one store, and their times are taken in turns. Queries take turns too, so that InfLLM with a
quarter of the blocks in memory finds some of what it fetches there, and the others in the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall, HeadSets
from kvsieve.backends.pieces import attend_pieces
from kvsieve.facts import LayerRope
from kvsieve.methods.refresh_kv import RefreshSelection
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.blocks import Blocks
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.part import Forward, LayerInput
from kvsieve.runtime.summaries import Summed, Table
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 8, 2, 128
BUDGET, STRIDE = 4096, 10
QUERIES = 8
BLOCK_BYTES = 64 * KV_HEADS * 2 * DIM * 4


class Text:
    """Random keys, values, and queries of one layer, of which the last token is new."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        self.length = length
        self.k, self.v = (torch.randn(1, KV_HEADS, length + 1, DIM, generator=generator) for _ in "kv")
        self.queries = [torch.randn(1, HEADS, 1, DIM, generator=generator) for _ in range(QUERIES)]
        self.new = self.k[:, :, -1:], self.v[:, :, -1:]
        frequencies = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        self.call = AttendCall(DIM**-0.5)
        self.placed = AttendCall(DIM**-0.5, rope=LayerRope(frequencies, "half"))
        self.generator = generator
        self.runs: Any = None

    def planner(self, policy: Any) -> Any:
        planner = make_planner(policy.specs(1), policy.stored_keys)
        planner.restore(self.length, [(self.length, [(list(range(self.length)), [0.0] * self.length)])])
        assert self.runs in (None, planner.runs(0, 0)), "one store serves all"
        self.runs = planner.runs(0, 0)
        return planner

    def store(self) -> Any:
        store = get("cpu").make_store(self.k, self.v)
        store.write(self.runs, self.k[0, :, :-1], self.v[0, :, :-1])
        return store

    def turns(self, run: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        """``run`` with one query after another."""
        queries = itertools.cycle(self.queries)
        return lambda: run(next(queries))


class Fetched:
    """A policy that fetches, at one step of one layer."""

    def __init__(self, text: Text, policy: Any, store: Any) -> None:
        rule, planner = policy.fetching, text.planner(policy)
        self.text, self.rule, self.store = text, rule, store
        setting: Any = SimpleNamespace(policy=policy, facts=SimpleNamespace(layers=(), trained_length=None), blocks=Blocks(planner))
        part = Fetching.of(setting)
        assert part is not None
        self.part = part
        # Not the keys' own, so that queries choose here and there.
        self.summaries = torch.randn(KV_HEADS, rule.num_blocks(text.length), DIM, generator=text.generator)
        behind = text.length - rule.start - self.summaries.shape[1] * rule.block
        scores = torch.zeros(KV_HEADS, behind if part.summary.needs_scores else 0)
        part.rows = [{0: Summed(Table.of(self.summaries), scores)}]
        if not part.summary.needs_scores:
            # The chunk that is being filled.
            queries = (torch.zeros(HEADS, behind, DIM),) if behind else ()
            part.rows = [{0: Summed(Table.of(self.summaries), scores, queries)}]
        self.forward = Forward([1], 1, [text.length], step=planner.begin_residents([1], 1))

    def run(self, q: torch.Tensor) -> torch.Tensor:
        self.part.begin(self.forward)
        out = self.part.attend(LayerInput(0, q, *self.text.new, self.text.placed, self.forward, self.store))
        assert out is not None
        return out

    def check(self) -> int:
        """What it chooses, and answers, is what the definition does, in float64; tokens that a head reads."""
        text, rule = self.text, self.rule
        for q in text.queries:
            out = self.run(q)[0, 0]
            last = self.part._reads[0][0]
            assert last is not None
            among = rule.candidates(text.length)
            mean = q[0, :, 0].double().view(KV_HEADS, -1, DIM).sum(1)
            products = (self.summaries[:, among.start : among.stop].double() * mean[:, None]).sum(-1)
            judged = products if rule.per_head else products.sum(0, keepdim=True)
            best = judged.topk(rule.limit(text.length), -1).indices.sort(-1).values + among.start
            assert last.choice.blocks == best.tolist()
            assert last.choice.compared == len(among)
            whole = text.k[0].double(), text.v[0].double()
            pieces = rule.pieces(text.length, 1, best.tolist())
            want = attend_pieces(
                q[0].double(), text.length, pieces, lambda lo, hi, kv=whole: tuple(x[:, lo:hi] for x in kv), text.placed, False
            )
            torch.testing.assert_close(out.double(), want.out[:, 0], atol=1e-5, rtol=0)
        return sum(hi - lo for lo, hi in last.read(0))


@torch.no_grad()
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_step_of_one_layer(benchmark: Any, length: int, tmp_path: Any) -> None:
    text = Text(length)
    full = text.planner(kvsieve.Full()).begin([1], 1, True, False)
    store = text.store()
    infllm, longheads = Fetched(text, kvsieve.InfLLM(), store), Fetched(text, kvsieve.LongHeads(4096), store)
    read = {"infllm": infllm.check(), "longheads": longheads.check()}

    spilling = text.store()
    spilling.set_tier(get("cpu").make_tier(str(tmp_path)), length // 64 // 4, None)
    newest = [block for block, _, _ in text.runs[-(4096 // 64) - 2 :]]
    spilling.trim(newest)
    tiered = Fetched(text, kvsieve.InfLLM(host_budget=1 << 30), spilling)

    def tiered_step(q: torch.Tensor) -> torch.Tensor:
        out = tiered.run(q)
        spilling.trim(newest)
        return out

    tiered.part.rows = infllm.part.rows
    assert all(torch.equal(tiered_step(q), infllm.run(q)) for q in text.queries), "where blocks lie changes no output"

    rule = RefreshSelection(BUDGET)

    def choose(q: torch.Tensor) -> HeadSets:
        _, (scores,) = store.run_with_sets(q, *text.new, full, text.call, [None])
        assert scores is not None
        tokens, order = rule.choose(scores[:, :-1])
        return HeadSets(tokens.contiguous(), order.contiguous(), 0, length)

    sets = choose(text.queries[0])
    whole = store.run(text.queries[0], *text.new, full, text.call)[0, 0].double()
    partial = store.run_with_sets(text.queries[0], *text.new, full, text.call, [sets])[0][0, 0].double()
    for head in range(KV_HEADS):
        group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
        logits = text.queries[0][0, group, 0].double() @ text.k[0, head].double().T * DIM**-0.5
        torch.testing.assert_close(whole[group], logits.softmax(-1) @ text.v[0, head].double(), atol=1e-5, rtol=0)
        named = sets.read(head, length + 1)
        assert len(named) == BUDGET + 1
        chosen = logits[:, named].softmax(-1) @ text.v[0, head, named].double()
        torch.testing.assert_close(partial[group], chosen, atol=1e-5, rtol=0)

    before = spilling.tier_counts()
    took = interleaved(
        {
            "all": text.turns(lambda q: store.run(q, *text.new, full, text.call)),
            "infllm": text.turns(infllm.run),
            "infllm_tiered": text.turns(tiered_step),
            "longheads": text.turns(longheads.run),
            "refreshkv_partial": text.turns(lambda q: store.run_with_sets(q, *text.new, full, text.call, [sets])),
            "refreshkv_full": text.turns(choose),
        }
    )
    moved = [now - then for now, then in zip(spilling.tier_counts(), before)]
    fetched = moved[0] + moved[1]
    took["refreshkv"] = (took["refreshkv_full"] + (STRIDE - 1) * took["refreshkv_partial"]) / STRIDE
    fast = {f"{name}_times_as_fast": round(took["all"] / took[name], 2) for name in took if name != "all"}
    facts = {
        "length": length,
        "keys_read": {**read, "refreshkv_partial": BUDGET + 1},
        "tier_hit_rate": round(moved[0] / fetched, 3),
        "tier_bytes_read_a_token": round(moved[3] / (fetched / (sum(tiered_blocks(tiered)) or 1))),
        "summary_bytes_a_token": round(infllm.part.bytes_of_summaries / length, 2),
        "key_and_value_bytes_a_token": BLOCK_BYTES // 64,
    }
    record(benchmark, text.turns(infllm.run), took, **fast, **facts)


def tiered_blocks(fetched: Fetched) -> list[int]:
    """One for each block of 64 tokens that a step fetches."""
    last = fetched.part._reads[0][0]
    assert last is not None
    residents = fetched.part._residents[0]
    return [1 for piece in last.choice.pieces for _ in residents.runs(piece.lo, piece.hi)]
