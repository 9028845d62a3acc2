"""A selection as the schedule sees it: sinks, a window, and stages that each keep some of what the one before them kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.backends.cuda.ops.residents import STAGES
from kvsieve.budget import BLOCK
from kvsieve.errors import BackendError, PolicyError

__all__ = ["StagedRule", "at_least_one"]


@dataclass(frozen=True)
class StagedRule:
    """What a selection looks for, and how long a choice stands.

    Attributes:
        sinks, window: tokens that are always read.
        query_block: queries of equal ``position // query_block`` share a choice.
        query_stride: of these the last one is scored, and every so many before it.
        representative: what speaks for a range, see :mod:`kvsieve.backends.reference.definition`.
        chunks: tokens of a stage's ranges; HiP has one stage, its blocks.
        most: how many ranges a stage keeps.
        refresh: steps after which a stage is computed again.
        budget: tokens that a region may have to be read whole.
        page_bounds: whether the first stage judges its chunks, which are blocks of the text, by bounds of their keys.
    """

    sinks: int
    window: int
    query_block: int
    query_stride: int
    representative: str
    chunks: tuple[int, ...]
    most: tuple[int, ...]
    refresh: tuple[int, ...]
    budget: int
    page_bounds: bool = False

    @classmethod
    def of(
        cls, rule: Any, stages: Sequence[tuple[int, int]], refresh: tuple[int, ...], budget: int, representatives: Sequence[str]
    ) -> StagedRule:
        """The rule that a role describes, whose stages are pairs of the tokens of a range and the tokens that stay.

        Raises:
            PolicyError: numbers that cannot be right.
            BackendError: more than the kernels can follow.
        """
        if len(stages) > STAGES:
            raise BackendError(f"backend 'cuda' selects in at most {STAGES} stages, got {len(stages)}")
        chunks, most = tuple(chunk for chunk, _ in stages), tuple(kept // chunk for chunk, kept in stages)
        if rule.representative not in representatives:
            raise PolicyError(f"representative must be one of {', '.join(representatives)}, got {rule.representative!r}")
        if len(refresh) != len(chunks) or min(refresh) < 1:
            raise PolicyError(
                f"each stage is refreshed every so many steps, at least 1, got {list(refresh)} for {len(chunks)} stages"
            )
        sinks, window = int(rule.sinks), int(rule.window)
        query_block, query_stride = int(rule.query_block), int(rule.query_stride)
        if sinks < 0 or window < 0:
            raise PolicyError(f"sinks and window must be at least 0, got {sinks} and {window}")
        at_least_one(query_block=query_block, query_stride=query_stride)
        page_bounds = bool(getattr(rule, "page_bounds", False))
        if page_bounds and (chunks[0] != BLOCK or sinks % BLOCK or window < BLOCK):
            raise PolicyError(
                f"page bounds are of blocks of {BLOCK} tokens: the first chunk must be one, sinks whole ones and the window at "
                f"least one, got {chunks[0]}, {sinks} and {window}"
            )
        numbers = (sinks, window, query_block, query_stride, rule.representative, chunks, most, refresh)
        return cls(*numbers, budget=budget, page_bounds=page_bounds)

    @property
    def stages(self) -> int:
        """How many stages the selection has."""
        return len(self.chunks)

    def region(self, first: int, count: int) -> tuple[int, int]:
        """What queries at ``first .. first + count`` choose from."""
        hi = max(0, first + count - self.window)
        return min(self.sinks, hi), hi

    def whole(self, lo: int, hi: int) -> bool:
        """Whether a region is read whole, without a selection: all of it fits in what the last stage keeps."""
        return hi - lo <= self.chunks[-1] * self.most[-1]

    def due(self, step: int) -> int | None:
        """The first stage that a row computes again at ``step`` steps since it chose from all; None when the choice stands."""
        return next((stage for stage, every in enumerate(self.refresh) if step % every == 0), None)


def at_least_one(**counts: int) -> None:
    """Raise PolicyError for a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise PolicyError(f"{name} must be at least 1, got {value}")
