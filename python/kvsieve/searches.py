"""Which of many tokens a query reads, found by a search: HiP, InfiniteHiP and Quest as select roles.

Every query reads the first ``sinks`` residents, the newest ``window`` and, of those between them, what a search through a few
representative keys, or bounds of keys, finds. `kvsieve.backends.reference.definition` is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError
from kvsieve.roles import Search, _check_count

__all__ = ["STAGES", "StagedSearch", "TreeSearch"]

STAGES = ((256, 32768), (32, 8192), (8, 2048))
"""InfiniteHiP's stages: tokens of a chunk, and tokens that stay."""


@dataclass(frozen=True)
class TreeSearch(Search):
    """A beam search over an implicit binary tree of blocks (HiP); see :func:`kvsieve.HiP`."""

    budget: int = 1024
    block: int = 2
    sinks: int = 16
    window: int = 256
    representative: Literal["centre", "first", "last", "oracle"] = "centre"
    refresh: int = 1
    dense_layers: int = 3
    query_block: int = 64
    query_stride: int = 8
    kind: ClassVar[str] = "hip"

    def __post_init__(self) -> None:
        for name in ("budget", "block", "window", "refresh", "query_block", "query_stride"):
            _check_count(name, getattr(self, name), least=1)
        for name in ("sinks", "dense_layers"):
            _check_count(name, getattr(self, name))
        allowed = ("centre", "first", "last", "oracle")
        if self.representative not in allowed:
            raise PolicyError(f"representative must be one of {', '.join(allowed)}, got {self.representative!r}")

    @property
    def dense_until(self) -> int:
        return self.sinks + self.window + self.budget

    def for_layer(self, index: int, beyond: bool = False) -> TreeSearch | None:
        return None if index < self.dense_layers and not beyond else self


@dataclass(frozen=True)
class StagedSearch(Search):
    """Stages that narrow the tokens down, each judging chunks on their own; see :func:`kvsieve.InfiniteHiP`.

    If ``bounded`` the first one judges blocks by the bounds of their keys; see :func:`kvsieve.Quest`.
    """

    stages: tuple[tuple[int, int], ...] = STAGES
    sinks: int = 256
    window: int = 1024
    refresh: tuple[int, ...] = (16, 8, 4)
    representative: Literal["first", "centre"] = "first"
    dense_layers: int = 0
    wide_layers: int = 3
    wide: int = 4096
    query_block: int = 64
    query_stride: int = 8
    bounded: bool = False
    kind: ClassVar[str] = "infinite"

    def __post_init__(self) -> None:
        for name in ("window", "wide", "query_block", "query_stride"):
            _check_count(name, getattr(self, name), least=1)
        for name in ("sinks", "dense_layers", "wide_layers"):
            _check_count(name, getattr(self, name))
        for name in ("stages", "refresh"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not value:
                raise PolicyError(f"{name} must be a tuple with one entry for each stage, got {value!r}")
        stages = []
        for stage in self.stages:
            if not isinstance(stage, (tuple, list)) or len(stage) != 2:
                raise PolicyError(f"a stage is a pair of the tokens of a chunk and the tokens that stay, got {stage!r}")
            for count in stage:
                _check_count("stages", count, least=1)
            stages.append((stage[0], stage[1]))
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "refresh", tuple(self.refresh))
        for steps in self.refresh:
            _check_count("refresh", steps, least=1)
        if len(self.refresh) != len(stages):
            raise PolicyError(f"refresh must name a pace for each of the {len(stages)} stages, got {self.refresh!r}")
        for (chunk, keep), finer in zip(stages, [*stages[1:], (1, 1)]):
            if keep % chunk or chunk % finer[0]:
                raise PolicyError(
                    f"each stage must keep a multiple of its chunk, and its chunk be a multiple of the next one's: {self.stages!r}"
                )
        if self.wide_layers and self.wide % stages[-1][0]:
            raise PolicyError(f"wide must be a multiple of the last stage's chunk of {stages[-1][0]}, got {self.wide}")
        if self.representative not in ("first", "centre"):
            raise PolicyError(f"representative must be first or centre, got {self.representative!r}")
        if self.bounded:
            if stages[0][0] != BLOCK:
                raise PolicyError(
                    f"bounds are kept of {BLOCK} tokens, so the first stage's chunk must be {BLOCK}, got {stages[0][0]}"
                )
            if self.sinks % BLOCK:
                raise PolicyError(f"sinks must be whole blocks of {BLOCK}, of which bounds are kept, got {self.sinks}")
            if self.window < BLOCK:
                raise PolicyError(f"window must be at least {BLOCK}: bounds are kept of whole blocks only; got {self.window}")

    @property
    def dense_until(self) -> int:
        return self.sinks + self.window + self.stages[-1][1]

    def for_layer(self, index: int, beyond: bool = False) -> StagedSearch | None:
        if index < self.dense_layers and not beyond:
            return None
        if index >= self.wide_layers or self.wide <= self.stages[-1][1]:
            return self
        chunk = self.stages[-1][0]
        stages = tuple((size, max(keep, -(-self.wide // size) * size)) for size, keep in self.stages[:-1])
        return replace(self, stages=(*stages, (chunk, self.wide)), wide_layers=0)
