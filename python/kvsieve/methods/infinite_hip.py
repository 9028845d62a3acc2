"""InfiniteHiP (Lee et al., 2025, arXiv 2502.08910): a selection in stages, each narrowing the tokens down.

It departs from the paper and the published code as :mod:`kvsieve.methods.hip` does, and in this:

* A chunk is judged by the best key met on the way, never by a mean of queries.

The definition, and further points that the paper leaves open: :mod:`kvsieve.backends.reference.definition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from kvsieve.budget import BLOCK, check_count
from kvsieve.checks import as_plain, check_flag, plain_fields, told
from kvsieve.errors import PolicyError
from kvsieve.methods.hip import changed, memory_of
from kvsieve.policy.compose import Memory
from kvsieve.policy.select import Parameter, SparseSelection

__all__ = ["PRESETS", "STAGES", "InfiniteHiP", "InfiniteHiPSelection"]

STAGES = ((256, 32768), (32, 8192), (8, 2048))
"""InfiniteHiP's stages: tokens of a chunk, and tokens that stay."""

PRESETS: dict[str, dict[str, Any]] = {
    "3k": {"stages": STAGES, "refresh": (16, 8, 4)},
    "fast": {"stages": STAGES, "refresh": (32, 16, 8)},
    "flash": {"stages": STAGES, "refresh": (96, 24, 8)},
    "5k": {"stages": ((64, 32768), (32, 16384), (16, 4096)), "refresh": (16, 8, 4)},
}
"""InfiniteHiP's published settings."""


@dataclass(frozen=True)
class InfiniteHiPSelection(SparseSelection):
    """Stages that narrow the tokens down, each judging chunks on their own; see :func:`kvsieve.InfiniteHiP`.

    If ``page_bounds`` the first one judges blocks by page bounds; see :func:`kvsieve.Quest`.
    """

    stages: tuple[tuple[int, int], ...] = STAGES
    sinks: int = 256
    window: int = 1024
    refresh: tuple[int, ...] = (16, 8, 4)
    representative: Literal["first", "middle"] = "first"
    dense_layers: int = 0
    wide_layers: int = 3
    wide: int = 4096
    query_block: int = 64
    query_stride: int = 8
    page_bounds: bool = False
    kind: ClassVar[str] = "infinite"

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("window", "wide", "query_block", "query_stride"):
            check_count(name, getattr(self, name), least=1)
        for name in ("sinks", "dense_layers", "wide_layers"):
            check_count(name, getattr(self, name))
        for name in ("stages", "refresh"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not value:
                raise PolicyError(f"{name} must be a tuple with one entry for each stage, got {told(value)}")
        stages = []
        for stage in self.stages:
            if not isinstance(stage, (tuple, list)) or len(stage) != 2:
                raise PolicyError(f"a stage is a pair of the tokens of a chunk and the tokens that stay, got {told(stage)}")
            for count in stage:
                check_count("stages", count, least=1)
            stages.append((stage[0], stage[1]))
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "refresh", tuple(self.refresh))
        for steps in self.refresh:
            check_count("refresh", steps, least=1)
        if len(self.refresh) != len(stages):
            raise PolicyError(f"refresh must name a pace for each of the {len(stages)} stages, got {self.refresh!r}")
        for (chunk, keep), finer in zip(stages, [*stages[1:], (1, 1)]):
            if keep % chunk or chunk % finer[0]:
                raise PolicyError(
                    f"each stage must keep a multiple of its chunk, and its chunk be a multiple of the next one's: {self.stages!r}"
                )
        if self.wide_layers and self.wide % stages[-1][0]:
            raise PolicyError(f"wide must be a multiple of the last stage's chunk of {stages[-1][0]}, got {self.wide}")
        if not isinstance(self.representative, str) or self.representative not in ("first", "middle"):
            raise PolicyError(f"representative must be first or middle, got {told(self.representative)}")
        check_flag("page_bounds", self.page_bounds, PolicyError)
        if self.page_bounds:
            if stages[0][0] != BLOCK:
                raise PolicyError(
                    f"bounds are kept of {BLOCK} tokens, so the first stage's chunk must be {BLOCK}, got {stages[0][0]}"
                )
            if self.sinks % BLOCK:
                raise PolicyError(f"sinks must be whole blocks of {BLOCK}, of which bounds are kept, got {self.sinks}")
            if self.window < BLOCK:
                raise PolicyError(f"window must be at least {BLOCK}: bounds are kept of whole blocks only; got {self.window}")

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return {"stages": self.stages, "representative": self.representative, "page_bounds": self.page_bounds}

    @property
    def paces(self) -> tuple[int, ...]:
        return self.refresh

    @property
    def dense_until(self) -> int:
        return self.sinks + self.window + self.stages[-1][1]

    def for_layer(self, index: int, past_trained_length: bool = False) -> InfiniteHiPSelection | None:
        if index < self.dense_layers and not past_trained_length:
            return None
        if index >= self.wide_layers or self.wide <= self.stages[-1][1]:
            return self
        chunk = self.stages[-1][0]
        stages = tuple((size, max(keep, -(-self.wide // size) * size)) for size, keep in self.stages[:-1])
        return replace(self, stages=(*stages, (chunk, self.wide)), wide_layers=0)


@as_plain
def InfiniteHiP(
    preset: Literal["3k", "fast", "flash", "5k"] = "3k",
    stages: Sequence[tuple[int, int]] | None = None,
    refresh: Sequence[int] | None = None,
    sinks: int = 256,
    window: int = 1024,
    representative: Literal["first", "middle"] = "first",
    dense_layers: int = 0,
    wide_layers: int = 3,
    wide: int = 4096,
    query_block: int = 64,
    query_stride: int = 8,
    extend: bool | int = False,
) -> Memory:
    """As :func:`HiP`, with a selection in stages: each cuts what is left into chunks and keeps the best of them.

    Args:
        preset: published stages and paces: about 3,000 tokens read (``"3k"``), the same with rarer selections (``"fast"``,
            ``"flash"``), or about 5,000 (``"5k"``).
        stages: (tokens of a chunk, tokens that stay) of each stage, instead of the preset's. A stage keeps a multiple of its
            chunk, and its chunk is a multiple of the next one's.
        refresh: compute each stage anew, and all later ones, every so many generated tokens; instead of the preset's.
        sinks, window, dense_layers, query_block, query_stride, extend: as of :func:`HiP`.
        representative: whether the first or the middle key of each half of a chunk is compared.
        wide_layers: the first so many layers keep ``wide`` tokens in the last stage.
        wide: what they keep.

    Raises:
        PolicyError: for an unknown preset, or stages that do not fit together.

    >>> InfiniteHiP("fast", window=512)
    InfiniteHiP(preset='fast', window=512)
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise PolicyError(f"preset must be one of {', '.join(PRESETS)}, got {told(preset)}")
    if isinstance(stages, tuple | list) and refresh is None and len(stages) != len(PRESETS[preset]["refresh"]):
        raise PolicyError(f"give a refresh for each of the {len(stages)} stages")
    if not isinstance(stages, tuple | list | None) or not isinstance(refresh, tuple | list | None):
        raise PolicyError(f"stages and refresh are tuples with one entry for each stage, got {told(stages)} and {told(refresh)}")
    stages = PRESETS[preset]["stages"] if stages is None else stages
    refresh = PRESETS[preset]["refresh"] if refresh is None else refresh
    select = InfiniteHiPSelection(
        stages,  # type: ignore[arg-type]
        sinks,
        window,
        refresh,  # type: ignore[arg-type]
        representative,
        dense_layers=dense_layers,
        wide_layers=wide_layers,
        wide=wide,
        query_block=query_block,
        query_stride=query_stride,
    )
    return memory_of("InfiniteHiP", changed(select, {"preset": preset}, **PRESETS[preset]), select, extend)
