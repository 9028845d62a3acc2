"""What the tests of a bank share.

Without a model: tokens that say which they are, and what a file of them holds. With one: a stream whose policy ends with a bank.
"""

from __future__ import annotations

from typing import Any

import kvsieve
import tiny
import torch
from kvsieve.backends import recall
from kvsieve.bank import file
from kvsieve.bank.entries import BankLayer, Entries, Shape

# ---------------------------------------------------------------------------------------------------------------- without a model


def shape_of(chunk: int = 4, capacity: int = 64, heads: int = 1, dim: int = 2, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape((BankLayer(0, heads, dim, dim, dtype), BankLayer(3, heads, dim, dim + 1, dtype)), chunk, capacity)


def tokens(shape: Shape, first: int, count: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Keys and values of which each says the number of its token, its layer and its head."""
    found: list[dict[int, torch.Tensor]] = []
    for side in (1, -1):
        dims = {x.index: x.key_dim if side == 1 else x.value_dim for x in shape.layers}
        at = torch.arange(first, first + count).float()[None, :, None]
        heads = torch.arange(shape.layers[0].num_kv_heads)[:, None, None] / 8
        found.append({i: (side * (at + heads) + i / 64).expand(-1, -1, d).to(shape.layers[0].dtype) for i, d in dims.items()})
    return found[0], found[1]


def held(entries: Entries) -> list[list[int]]:
    """The tokens of every whole chunk, by what their keys say; layers, values and means are compared."""
    count, chunk = entries.num_chunks, entries.shape.chunk
    if not count:
        return []
    found = []
    for layer in entries.shape.layers:
        every = torch.arange(count).expand(layer.num_kv_heads, 1, count)
        k, v, seen = recall.gather(entries, layer.index, every)
        seen = torch.ones(k.shape[:3], dtype=torch.bool) if seen is None else seen
        numbers = (k[0, 0, :, 0] - layer.index / 64).view(count, chunk)
        real = seen[0, 0].view(count, chunk)
        found.append([[round(float(x)) for x, there in zip(*row) if there] for row in zip(numbers, real)])
        assert torch.equal(v[0, 0, :, -1][seen[0, 0]], (layer.index / 64 * 2 - k[0, 0, :, 0])[seen[0, 0]])
        means = torch.cat([p.segment.means[layer.index][:, p.lo : p.hi] for p in entries.pieces], 1)
        want = torch.stack([k[0, 0].view(count, chunk, -1)[at][real[at]].float().mean(0) for at in range(count)])
        torch.testing.assert_close(means[0], want)
    assert found[0] == found[1]
    return found[0]


def content(dtype: torch.dtype = torch.float32) -> file.Content:
    shape = shape_of(chunk=4, capacity=64, dtype=dtype)
    ragged = Entries(shape).append(*tokens(shape, 0, 90)).flush().append(*tokens(shape, 90, 7))
    return shape, {"weights": "abc"}, {"a": ragged, "b": Entries(shape).append(*tokens(shape, 0, 3)), "c": Entries(shape)}


# ------------------------------------------------------------------------------------------------------------------- with a model

WINDOW = 24
"""Tokens of the policy before the bank."""


def window() -> Any:
    return kvsieve.StreamingLLM(WINDOW, sinks=2)


def bank_of(**changes: Any) -> kvsieve.MemoryBank:
    return kvsieve.MemoryBank(**{"chunk": 4, "top_k": 16, "capacity": 256, **changes})


def opened(bank: kvsieve.MemoryBank, backend: str = "cpu") -> kvsieve.Stream:
    return kvsieve.stream(tiny.model(), window() >> bank, backend)


def written(bank: kvsieve.MemoryBank, name: str = "default") -> int:
    return bank.book.entries(name).written


def numbers(bank: kvsieve.MemoryBank, name: str = "default") -> torch.Tensor:
    """All keys of the first layer, the oldest token first: ``[n, Hkv * D]``."""
    entries = bank.book.entries(name)
    found = [p.segment.keys[0][:, p.lo : p.hi].flatten(1, 2) for p in entries.pieces]
    if entries.tail:
        last = entries.pieces[-1]
        found.append(last.segment.keys[0][:, last.hi, : entries.tail])
    return torch.cat(found, 1).transpose(0, 1).flatten(1)
