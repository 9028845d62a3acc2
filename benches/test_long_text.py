"""One layer's step of decode over a long text under the policies that keep all of it and read a part, beside attention to all keys.

InfLLM and LongHeads choose blocks by their summaries, RefreshKV reads what heads chose before, and at every tenth step reads all
and chooses anew. All of them read one store, and their times are taken in turns. Queries take turns too, so that InfLLM with a
quarter of the blocks in memory finds some of what it fetches there, and the others in the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope
from layer_steps import FetchingStep, Layer, RefreshStep, exact, holding
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
        self.planner = holding(kvsieve.Full(), length)
        self.runs = self.planner.runs(0, 0)

    def store(self) -> Any:
        store = get("cpu").make_store(self.k, self.v)
        store.write(self.runs, self.k[0, :, :-1], self.v[0, :, :-1])
        return store

    def fetching(self, policy: Any, store: Any) -> FetchingStep:
        step = FetchingStep(policy, Layer(get("cpu"), store, self.length, *self.new, self.placed, HEADS), self.generator)
        assert step.runs == self.runs, "one store serves all"
        return step

    def check(self, step: FetchingStep) -> int:
        """What it chooses, and answers, is what the definition does; tokens that a head reads."""
        for q in self.queries:
            got, want = step.checked(q, lambda lo, hi: (self.k[0, :, lo:hi], self.v[0, :, lo:hi]))
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
        return step.tokens_read

    def turns(self, run: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        """``run`` with one query after another."""
        queries = itertools.cycle(self.queries)
        return lambda: run(next(queries))


@torch.no_grad()
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_step_of_one_layer(benchmark: Any, length: int, tmp_path: Any) -> None:
    text = Text(length)
    full = text.planner.begin([1], 1, True, False)
    store = text.store()
    infllm, longheads = text.fetching(kvsieve.InfLLM(), store), text.fetching(kvsieve.LongHeads(4096), store)
    read = {"infllm": text.check(infllm), "longheads": text.check(longheads)}

    spilling = text.store()
    spilling.set_tier(get("cpu").make_tier(str(tmp_path)), length // 64 // 4, None)
    newest = [block for block, _, _ in text.runs[-(4096 // 64) - 2 :]]
    spilling.trim(newest)
    tiered = text.fetching(kvsieve.InfLLM(host_budget=1 << 30), spilling)

    def tiered_step(q: torch.Tensor) -> torch.Tensor:
        out = tiered.run(q)
        spilling.trim(newest)
        return out

    tiered.part.rows = infllm.part.rows
    assert all(torch.equal(tiered_step(q), infllm.run(q)) for q in text.queries), "where blocks lie changes no output"

    refresh = RefreshStep(BUDGET, Layer(get("cpu"), store, length, *text.new, text.call, HEADS), full)
    q = text.queries[0]
    sets = refresh.choose(q)
    whole = exact(q, text.k[0], text.v[0], text.call.scale, [torch.arange(length + 1)] * KV_HEADS)
    torch.testing.assert_close(store.run(q, *text.new, full, text.call)[0, 0].double(), whole, atol=1e-5, rtol=0)
    partial, want = refresh.checked(q, sets, text.k[0], text.v[0])
    torch.testing.assert_close(partial.double(), want, atol=1e-5, rtol=0)

    before = spilling.tier_counts()
    took = interleaved(
        {
            "all": text.turns(lambda q: store.run(q, *text.new, full, text.call)),
            "infllm": text.turns(infllm.run),
            "infllm_tiered": text.turns(tiered_step),
            "longheads": text.turns(longheads.run),
            "refreshkv_partial": text.turns(lambda q: refresh.partial(q, sets)),
            "refreshkv_full": text.turns(refresh.choose),
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


def tiered_blocks(step: FetchingStep) -> list[int]:
    """One for each block of 64 tokens that a step fetches."""
    residents = step.part._residents[0]
    return [1 for piece in step.last.choice.pieces for _ in residents.runs(piece.lo, piece.hi)]
