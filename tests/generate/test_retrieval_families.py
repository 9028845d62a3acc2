"""What remembers everything and fetches what a query needs, on a model of every family: the backends, and the stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forwards

pytestmark = pytest.mark.slow

POLICIES: dict[str, Callable[[int], Any]] = {
    "infllm": lambda size: kvsieve.InfLLM(size, blocks=2, block=4, representatives=1, sinks=2, query_block=8),
    "longheads": lambda size: kvsieve.LongHeads(size, chunk=8),
    "refresh_kv": lambda size: kvsieve.RefreshKV(size, stride=3, kernel=3),
    "selective_v": lambda size: kvsieve.SelectiveV(size),
    "memory_bank": lambda size: (
        kvsieve.StreamingLLM(size, sinks=2) >> kvsieve.MemoryBank(capacity=96, layers=[1], chunk=1, top_k=6)
    ),
}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("name", list(POLICIES))
@torch.no_grad()
def test_every_family_fetches(name: str, family: str) -> None:
    model, ids = tiny.model(family), tiny.ids(1, 78, 3)
    got = []
    for backend in tiny.BACKENDS:
        with kvsieve.stream(model, POLICIES[name](24), backend) as stream:
            got.append(forwards(model, stream.cache, ids, [70, 1, 4, 1]))
    scale = float(got[0].abs().max())
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * scale
    # It is at work: the text does not fit.
    full = model(ids).logits
    assert float((got[0][:, -1] - full[:, -1]).abs().max()) > 1e-3 * scale
    with kvsieve.stream(model, POLICIES[name](96), "cpu") as stream:
        whole = forwards(model, stream.cache, ids, [70, 1, 4, 1])
    assert float((whole - full).abs().max()) <= 1e-3 * scale
