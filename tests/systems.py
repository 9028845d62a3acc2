"""Every published system and what it joins, so small that a tiny model evicts, selects or compresses under it.

The registry's row of a system is its row here; beside them stand other settings and what systems join. The tests that hold for
every system run over this table (`tests/generate/test_systems.py`), so that a new one is tried with forks, rows and reorders by its
row in the registry alone.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kvsieve
from kvsieve import methods
from kvsieve.methods import SYSTEMS as PUBLISHED
from kvsieve.methods.quantized import QuantizedStorage
from kvsieve.policy.compose import with_bank

PROMPT = 260
"""Tokens of a prompt under which every system is at work."""


@dataclass(frozen=True)
class System:
    """A policy, and what may be asked of it.

    Attributes:
        make: the policy.
        doing: what it is found doing once the prompt has been read and a token decoded: ``"evicts"``, ``"selects"``, ``"stores"``,
            ``"recalls"``.
    """

    make: Callable[[], Any]
    doing: tuple[str, ...]

    @property
    def retains(self) -> bool:
        """Whether it keeps every token where it is."""
        return "evicts" not in self.doing and len(self.make().memories) == 1

    def of_rows(self, rows: int) -> Any:
        """The policy of a batch of so many texts."""
        policy = self.make()
        if policy.bank is None:
            return policy
        return with_bank(policy, policy.bank.namespace([f"row {row}" for row in range(rows)]))

    @property
    def tolerance(self) -> float:
        """How far logits may be apart. Keys in codes are coded again when they move together after an eviction, and which ones move
        depends on what a fork or another row shares: up to half a step of 255."""
        return 5e-3 if "evicts" in self.doing and isinstance(self.make().compression, QuantizedStorage) else 1e-4


def arguments_of(system: methods.System) -> tuple[list[Any], dict[str, Any]]:
    """Those of a published system in its row of the registry, so that a new one is called without a line of its own."""
    calls = (node for node in ast.walk(ast.parse(system.small)) if isinstance(node, ast.Call))
    (call,) = (call for call in calls if ast.unparse(call.func) == system.text_name)
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    return [ast.literal_eval(argument) for argument in call.args], named


_SMALL = {system.page.replace("-", "_"): system for system in PUBLISHED}


def _row(system: methods.System) -> System:
    several: dict[str, tuple[str, ...]] = {"nothing": (), "recalls": ("evicts", "recalls")}
    return System(functools.partial(methods.parse, system.small), several.get(system.does, (system.does,)))


def _hip() -> Any:
    return methods.parse(_SMALL["hip"].small)


def _quest(**changes: Any) -> Any:
    return kvsieve.Quest(**{"budget": 32, "sinks": 0, "window": 64, "query_block": 16, "query_stride": 3, **changes})


def _infllm() -> Any:
    return methods.parse(_SMALL["infllm"].small)


def _refresh_kv() -> Any:
    return methods.parse(_SMALL["refresh_kv"].small)


def _think(**changes: Any) -> Any:
    return kvsieve.ThinK(0.5, recent=8, observe=8, **changes)


def _codes(**changes: Any) -> Any:
    return kvsieve.Quantized(8, group=16, residual=8, **changes)


def _sirllm(budget: int = 48) -> Any:
    return kvsieve.SirLLM(budget, sinks=2, recent=8)


SYSTEMS: dict[str, System] = {
    **{name: _row(system) for name, system in _SMALL.items()},
    "lm_infinite_middle": System(lambda: kvsieve.LMInfinite(38, sinks=2, middle_top_k=8, middle_from_layer=1), ("selects",)),
    "quest_rarely": System(lambda: _quest(refresh=(8, 2), sinks=64), ("selects",)),
    "refresh_kv_fixed": System(lambda: kvsieve.RefreshKV(48, stride=3, similarity=None, kernel=3), ("selects",)),
    "infllm_per_head": System(
        lambda: kvsieve.InfLLM(24, blocks=2, block=4, representatives=1, sinks=2, per_head=True, query_block=16), ("selects",)
    ),
    "infllm_bounds": System(
        lambda: kvsieve.InfLLM(24, blocks=2, block=4, sinks=2, per_head=True, query_block=16, summary="bounds"), ("selects",)
    ),
    "longheads_mean": System(lambda: kvsieve.LongHeads(96, chunk=16, summary="mean"), ("selects",)),
    # Three blocks of 64 tokens in memory: of a prompt some lie in the file.
    "infllm_tiered": System(
        lambda: kvsieve.InfLLM(24, blocks=2, block=8, representatives=1, sinks=2, query_block=16, host_budget="96KiB"),
        ("selects", "spills"),
    ),
    "longheads_tiered": System(
        lambda: kvsieve.LongHeads(96, chunk=16) | kvsieve.Memory(storage=kvsieve.policy.Tiered("96KiB")), ("selects", "spills")
    ),
    "think_flush": System(lambda: _think(flush_every=16), ("stores",)),
    "think_prefill": System(lambda: _think(when="prefill"), ("stores",)),
    "quantized_prefill": System(lambda: _codes(when="prefill"), ("stores",)),
    "think_quantized": System(lambda: _think() | _codes(), ("stores",)),
    "think_quantized_prefill": System(lambda: _think(when="prefill") | _codes(), ("stores",)),
    "sirllm_hip": System(lambda: _sirllm(160) | _hip(), ("evicts", "selects")),
    "sirllm_think": System(lambda: _sirllm() | _think(flush_every=4), ("evicts", "stores")),
    "sirllm_think_prefill": System(lambda: _sirllm() | _think(when="prefill"), ("evicts", "stores")),
    "streaming_quantized": System(lambda: kvsieve.StreamingLLM(48, sinks=2) | _codes(), ("evicts", "stores")),
    "snapkv_think": System(lambda: kvsieve.SnapKV(48, observe=8, kernel=3) | _think(flush_every=4), ("evicts", "stores")),
    "h2o_quantized_prefill": System(lambda: kvsieve.H2O(48, recent=8) | _codes(when="prefill"), ("evicts", "stores")),
    "hip_think": System(lambda: _hip() | _think(), ("selects", "stores")),
    "hip_quantized_prefill": System(lambda: _hip() | _codes(when="prefill"), ("selects", "stores")),
    "quest_think": System(lambda: _quest() | _think(), ("selects", "stores")),
    "quest_think_flush": System(lambda: _quest() | _think(flush_every=4), ("selects", "stores")),
    "quest_quantized_prefill": System(lambda: _quest() | _codes(when="prefill"), ("selects", "stores")),
    "quest_think_quantized": System(lambda: _quest(sinks=64) | (_think() | _codes()), ("selects", "stores")),
    "sirllm_quest": System(lambda: _sirllm(160) | _quest(), ("evicts", "selects")),
    "sirllm_quest_think": System(lambda: _sirllm(160) | _quest() | _think(flush_every=4), ("evicts", "selects", "stores")),
    "infllm_quantized": System(lambda: _infllm() | _codes(), ("selects", "stores")),
    "infllm_think": System(lambda: _infllm() | _think(flush_every=4), ("selects", "stores")),
    "longheads_quantized": System(lambda: kvsieve.LongHeads(96, chunk=16) | _codes(), ("selects", "stores")),
    "longheads_think_quantized_prefill": System(
        lambda: kvsieve.LongHeads(96, chunk=16) | (_think(when="prefill") | _codes()), ("selects", "stores")
    ),
    "refresh_kv_think": System(lambda: _refresh_kv() | _think(flush_every=4), ("selects", "stores")),
    "refresh_kv_quantized_prefill": System(lambda: _refresh_kv() | _codes(when="prefill"), ("selects", "stores")),
    "chain": System(
        lambda: kvsieve.StreamingLLM(24, sinks=2) >> kvsieve.SirLLM(24, sinks=0, recent=0),
        ("evicts",),
    ),
    "memory_bank_of_scores": System(
        lambda: _sirllm(40) >> kvsieve.MemoryBank(capacity=64, layers=[1], chunk=1, top_k=6, bias=1.0, per_head=False),
        ("evicts", "recalls"),
    ),
    "chain_to_all": System(lambda: kvsieve.StreamingLLM(24, sinks=2) >> kvsieve.Full(), ()),
}

ON_CUDA = [
    name
    for name, system in SYSTEMS.items()
    if name.startswith(("memory_bank", "refresh_kv", "selective_v", "quest", "sirllm_hip")) and "stores" not in system.doing
]
ON_CUDA += ["infllm", "infllm_bounds", "infllm_tiered", "longheads"]
"""Systems that ask more of a store than attention, and that the CUDA backend serves."""


def _of_every_kind() -> list[str]:
    """Every published system, and one row of each other set of things that a system is found doing."""
    found = {SYSTEMS[name].doing: name for name in reversed(SYSTEMS) if name not in _SMALL}
    known = {SYSTEMS[name].doing for name in _SMALL}
    return [name for name in SYSTEMS if name in _SMALL or (SYSTEMS[name].doing not in known and found[SYSTEMS[name].doing] == name)]


OF_EVERY_KIND = _of_every_kind()
"""What is tried on every release of transformers: the settings of a policy change nothing about how a model reaches it."""
