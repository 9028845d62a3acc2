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


def exact(entries: Entries, q: torch.Tensor, own: torch.Tensor, lse: torch.Tensor, rope: LayerRope) -> torch.Tensor:
    """Float64 ``[H, D]``: of each KV head the chunks whose means have the greatest products, in one softmax with what is there."""
    pieces = [(piece.segment.keys[0], piece.segment.values[0], slice(piece.lo, piece.hi)) for piece in entries.pieces]
    k, v = (torch.cat([piece[side][:, piece[2]].flatten(1, 2) for piece in pieces], 1).double() for side in (0, 1))
    means = k.unflatten(1, (-1, CHUNK)).mean(2)
    group, out = HEADS // KV_HEADS, []
    turned = rope.rotate(q.double(), torch.tensor([1023]))[:, 0]
    for head in range(HEADS):
        kv = head // group
        best = (means[kv] @ turned[kv * group : (kv + 1) * group].sum(0)).topk(TOP_K // CHUNK).indices
        tokens = (best[:, None] * CHUNK + torch.arange(CHUNK)).flatten()
        logits = torch.cat([k[kv, tokens] @ turned[head] * DIM**-0.5, lse[head].double()])
        out.append(logits.softmax(0) @ torch.cat([v[kv, tokens], own[head, None].double()]))
    return torch.stack(out)


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

    torch.testing.assert_close(answer()[0].double(), exact(entries, q, own[0], lse, rope), atol=1e-5, rtol=0)
    took = interleaved({"search": lambda: recall.choose(entries, 0, asks, TOP_K // CHUNK), "all": answer})
    record(benchmark, answer, took, length=length, pieces=len(entries.pieces), chunk=CHUNK, top_k=TOP_K)
