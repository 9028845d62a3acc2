"""Every published system and what it joins, sized so that a tiny model's memory is at work: tokens are evicted, searched or packed.

One row a system. The tests that hold for all of them run over this table (`tests/generate/test_systems.py`), so that a new system
is tried with forks, rows and reorders by adding its row. A test compares its names with the registry's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kvsieve
from kvsieve.methods.quantized import Codes

PROMPT = 300
"""Tokens of a prompt under which every system is at work."""


@dataclass(frozen=True)
class System:
    """A policy, and what may be asked of it.

    Attributes:
        make: the policy.
        doing: what it is found doing once the prompt has been read and a token decoded: ``"evicts"``, ``"searches"``, ``"packs"``.
    """

    make: Callable[[], Any]
    doing: tuple[str, ...]

    @property
    def retains(self) -> bool:
        """Whether it keeps every token where it is."""
        return "evicts" not in self.doing and len(self.make().memories) == 1

    @property
    def tolerance(self) -> float:
        """How far logits may be apart. Keys in codes are coded again when they move together after an eviction, and which ones move
        depends on what a fork or another row shares: up to half a step of 255."""
        return 5e-3 if "evicts" in self.doing and isinstance(self.make().packs, Codes) else 1e-4


def _hip() -> Any:
    return kvsieve.HiP(32, block=4, sinks=2, window=24, dense_layers=1, refresh=4, query_block=16, query_stride=3)


def _infinite() -> Any:
    return kvsieve.InfiniteHiP(
        stages=((16, 96), (4, 48), (2, 24)),
        refresh=(8, 4, 2),
        sinks=2,
        window=24,
        wide=32,
        wide_layers=1,
        query_block=16,
        query_stride=3,
    )


def _quest(**changes: Any) -> Any:
    return kvsieve.Quest(**{"budget": 32, "sinks": 0, "window": 64, "query_block": 16, "query_stride": 3, **changes})


def _think(**changes: Any) -> Any:
    return kvsieve.ThinK(0.5, recent=8, observe=8, **changes)


def _codes(**changes: Any) -> Any:
    return kvsieve.Quantized(8, group=16, residual=8, **changes)


def _sirllm(budget: int = 48) -> Any:
    return kvsieve.SirLLM(budget, sinks=2, recent=8)


SYSTEMS: dict[str, System] = {
    "full": System(kvsieve.Full, ()),
    "streaming_llm": System(lambda: kvsieve.StreamingLLM(40, sinks=2), ("evicts",)),
    "lm_infinite": System(lambda: kvsieve.LMInfinite(38, sinks=2), ("evicts",)),
    "lm_infinite_middle": System(lambda: kvsieve.LMInfinite(38, sinks=2, middle_top_k=8, middle_from_layer=1), ("searches",)),
    "sirllm": System(_sirllm, ("evicts",)),
    "snapkv": System(lambda: kvsieve.SnapKV(48, observe=8, kernel=3), ("evicts",)),
    "h2o": System(lambda: kvsieve.H2O(48, recent=8, sinks=2), ("evicts",)),
    "hip": System(_hip, ("searches",)),
    "infinite_hip": System(_infinite, ("searches",)),
    "quest": System(_quest, ("searches",)),
    "quest_rarely": System(lambda: _quest(refresh=(8, 2), sinks=64), ("searches",)),
    "think": System(_think, ("packs",)),
    "think_flush": System(lambda: _think(flush_every=16), ("packs",)),
    "think_prefill": System(lambda: _think(when="prefill"), ("packs",)),
    "quantized": System(_codes, ("packs",)),
    "quantized_prefill": System(lambda: _codes(when="prefill"), ("packs",)),
    "think_quantized": System(lambda: _think() | _codes(), ("packs",)),
    "think_quantized_prefill": System(lambda: _think(when="prefill") | _codes(), ("packs",)),
    "sirllm_hip": System(lambda: _sirllm(160) | _hip(), ("evicts", "searches")),
    "sirllm_think": System(lambda: _sirllm() | _think(flush_every=4), ("evicts", "packs")),
    "sirllm_think_prefill": System(lambda: _sirllm() | _think(when="prefill"), ("evicts", "packs")),
    "streaming_quantized": System(lambda: kvsieve.StreamingLLM(48, sinks=2) | _codes(), ("evicts", "packs")),
    "snapkv_think": System(lambda: kvsieve.SnapKV(48, observe=8, kernel=3) | _think(flush_every=4), ("evicts", "packs")),
    "h2o_quantized_prefill": System(lambda: kvsieve.H2O(48, recent=8) | _codes(when="prefill"), ("evicts", "packs")),
    "hip_think": System(lambda: _hip() | _think(), ("searches", "packs")),
    "hip_quantized_prefill": System(lambda: _hip() | _codes(when="prefill"), ("searches", "packs")),
    "chain": System(
        lambda: kvsieve.StreamingLLM(24, sinks=2) >> kvsieve.SirLLM(24, sinks=0, recent=0),
        ("evicts",),
    ),
    "chain_to_all": System(lambda: kvsieve.StreamingLLM(24, sinks=2) >> kvsieve.Full(), ()),
}
