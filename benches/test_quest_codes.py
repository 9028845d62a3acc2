"""One layer's decode attention with Quest over keys and values in 4 bits, beside Quest over tokens as they came and all codes."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import torch
from kvsieve import _core
from kvsieve.backends import get
from kvsieve.backends.attention import attend
from kvsieve.backends.base import AttendCall
from kvsieve.policy.storage import Channels, Packing
from rounds import interleaved, record

HEADS, KV_HEADS, DIM = 32, 8, 128
RESIDUAL = 64


class Layer:
    """One layer that holds a text, in codes or as it came."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, bits: int) -> None:
        self.backend, length = get("cpu"), k.shape[2]
        self.planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")
        held = list(range(length - 1))
        self.planner.restore(length - 1, [(length - 1, [(held, [0.0] * len(held))])])
        self.store = self.backend.make_store(k, v)
        self.store.write(self.planner.runs(0, 0), k[0, :, :-1], v[0, :, :-1])
        if bits:
            self.store.set_packing(Packing(DIM, bits, bits, 32))
            self.store.pack(self.planner.pack(0, length - RESIDUAL, 32), Channels.all(k[0], None))
            self.store.free_unused(self.planner.blocks_in_use(), self.planner.packed_in_use())
        self.step = self.planner.begin([1], 1, True, False)
        self.new, self.call = (k[:, :, -1:], v[:, :, -1:]), AttendCall(DIM**-0.5)

    def all(self, q: torch.Tensor) -> torch.Tensor:
        return self.store.run(q, *self.new, self.step, self.call)

    def selected(self, q: torch.Tensor, search: Any) -> torch.Tensor:
        """Every call selects anew, as every token does."""
        search.reset()
        return self.store.run_selected(q, *self.new, self.step, self.call, search)

    def exact(self, q: torch.Tensor, search: Any, rule: Any) -> torch.Tensor:
        """Softmax over what was chosen, of what is stored, in float64: ``[H, Dv]``."""
        k, v = (x.double() for x in self.store.read(self.planner.runs(0, 0)))
        found, group = [], HEADS // KV_HEADS
        for head, choice in enumerate(search.choice(0)):
            read = torch.zeros(1, k.shape[1], dtype=torch.bool)
            for lo, hi in choice.ranges:
                read[0, lo:hi] = True
            read[0, : rule.sinks] = read[0, k.shape[1] - rule.window :] = True
            mine = q[0, head * group : (head + 1) * group].double()
            found.append(attend(mine, k[head : head + 1], v[head : head + 1], read, self.call.scale)[0][:, 0])
        return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("length", [32768, 131072])
def test_a_step_of_one_layer(benchmark: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, length, DIM, generator=generator).bfloat16() for _ in "kv")
    q = torch.randn(1, HEADS, 1, DIM, generator=generator).bfloat16()
    rule, layers = kvsieve.Quest(1024).selection, {bits: Layer(k, v, bits) for bits in (0, 4)}
    searches = {bits: layers[bits].backend.make_selection(rule) for bits in layers}
    for bits, layer in layers.items():
        got, want = layer.selected(q, searches[bits])[0, 0].double(), layer.exact(q, searches[bits], rule)
        assert float((got - want).abs().max() / want.abs().max()) < 3e-2
    runs = {
        "all": lambda: layers[0].all(q),
        "all_codes": lambda: layers[4].all(q),
        "quest": lambda: layers[0].selected(q, searches[0]),
        "quest_codes": lambda: layers[4].selected(q, searches[4]),
    }
    took = interleaved(runs)
    record(
        benchmark,
        runs["quest_codes"],
        took,
        length=length,
        bytes={bits: layer.store.bytes_held for bits, layer in layers.items()},
        codes_over_plain=round(took["quest_codes"] / took["quest"], 2),
        times_as_fast_as_all_codes=round(took["all_codes"] / took["quest_codes"], 2),
    )
