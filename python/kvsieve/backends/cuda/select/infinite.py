"""InfiniteHiP's search (Lee et al., 2025), and Quest's: stages that narrow the region, each judging chunks on their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvsieve.backends.cuda.ops.hip import REPRESENTATIVES
from kvsieve.backends.cuda.ops.narrow import Narrow
from kvsieve.backends.cuda.staged import StagedRule
from kvsieve.errors import PolicyError

if TYPE_CHECKING:
    import torch

    from kvsieve.backends.cuda.selection import StepSelection

__all__ = ["rule_of", "search"]


def rule_of(rule: Any) -> StagedRule:
    """The role's rule as stages.

    Raises:
        PolicyError: numbers that cannot be right.
        BackendError: more than the kernels can follow.
    """
    stages, refresh = [(int(chunk), int(kept)) for chunk, kept in rule.stages], tuple(int(n) for n in rule.refresh)
    _check_stages(stages)
    return StagedRule.of(rule, stages, refresh, stages[-1][1], ("first", "middle"))


def _check_stages(stages: Sequence[tuple[int, int]]) -> None:
    good = bool(stages) and all(chunk > 0 and kept > 0 and kept % chunk == 0 for chunk, kept in stages)
    if not good or any(a % b for (a, _), (b, _) in pairwise(stages)):
        raise PolicyError(f"a chunk must be a multiple of the next one, and what is kept of its chunk, got {list(stages)}")


def search(asked: StepSelection, stage: int) -> torch.Tensor:
    """Compute a stage; keys scored, int32 ``[n, Hkv]``."""
    rule = asked.rule
    by_bounds = rule.page_bounds and stage == 0
    return Narrow(
        q=asked.q,
        residents=asked.residents,
        queries=asked.table,
        most_queries=asked.schedule.most_queries,
        kv_heads=asked.kv_heads,
        window=rule.window,
        stride=rule.query_stride,
        stage=stage,
        chunk=rule.chunks[stage],
        most=rule.most[stage],
        candidates=asked.schedule.candidates[stage],
        representative=REPRESENTATIVES[rule.representative],
        from_chunk=rule.chunks[stage - 1] if stage else 0,
        from_most=rule.most[stage - 1] if stage else 0,
        from_held=asked.held[stage - 1] if stage else None,
        from_spare=asked.spares[stage - 1] if stage else None,
        held=asked.held[stage],
        spare=asked.spares[stage],
        arrivals=asked.arrivals(asked.schedule.num_blocks),
        by_bounds=by_bounds,
        # Keys are bounded as they are stored: before RoPE there is no distance at which all of a block's keys are.
        angles=asked.angles._replace(alone=True) if by_bounds else asked.angles,
    ).launch()
