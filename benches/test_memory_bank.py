"""What a generated token pays for a bank, in one layer: which chunks it finds among all, and attention to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvsieve.backends import recall
from kvsieve.backends.base import AttendCall
from kvsieve.bank.entries import BankLayer, Entries, Shape
from kvsieve.facts import LayerRope
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 9, 3, 64
CHUNK, TOP_K = 16, 64


@torch.no_grad()
@pytest.mark.parametrize("length", [1024, 65536])
def test_recalling_in_one_layer(benchmark: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    entries = Entries(Shape((BankLayer(0, KV_HEADS, DIM, DIM, torch.float32),), CHUNK, 65536))
    entries = entries.append(*({0: torch.randn(KV_HEADS, length, DIM, generator=generator)} for _ in "kv"))
    assert entries.num_tokens == length
    rope = LayerRope(1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM), "half")
    q, own = torch.randn(HEADS, 1, DIM, generator=generator), torch.randn(1, HEADS, DIM, generator=generator)
    lse = torch.randn(HEADS, 1, generator=generator)
    table = recall.table_of(rope, 1023, torch.float32)
    asks = q.view(KV_HEADS, -1, 1, DIM).sum(1)

    def answer() -> torch.Tensor:
        found = recall.recall(rope.turn(q, table), entries, 0, 0, TOP_K // CHUNK, AttendCall(DIM**-0.5))
        return recall.joined(own, lse, found, 0.0)

    assert answer().shape == (1, HEADS, DIM)
    took = interleaved({"search": lambda: recall.choose(entries, 0, asks, TOP_K // CHUNK), "all": answer})
    record(benchmark, answer, took, length=length, pieces=len(entries.pieces), chunk=CHUNK, top_k=TOP_K)
