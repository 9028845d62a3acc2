"""HiP's search (Lee et al., ICLR 2025): one stage, a beam over a binary tree of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvsieve.backends.cuda.ops.hip import REPRESENTATIVES, Hip
from kvsieve.backends.cuda.ops.residents import NODES
from kvsieve.backends.cuda.staged import StagedRule, at_least_one
from kvsieve.errors import BackendError

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
    budget, block = int(rule.budget), int(rule.block)
    at_least_one(budget=budget, block=block)
    blocks = -(-budget // block)
    if blocks > NODES:
        raise BackendError(
            f"backend 'cuda' follows at most {NODES} blocks of a tree search, and a budget of {budget} in blocks of {block} has "
            f"{blocks}; use larger blocks, or backend='reference'"
        )
    return StagedRule.of(rule, [(block, blocks * block)], (int(rule.refresh),), budget, tuple(REPRESENTATIVES))


def search(asked: StepSelection, stage: int) -> torch.Tensor:
    """Compute a stage; keys scored, int32 ``[n, Hkv]``."""
    rule = asked.rule
    return Hip(
        q=asked.q,
        residents=asked.residents,
        queries=asked.table,
        most_queries=asked.schedule.most_queries,
        kv_heads=asked.kv_heads,
        window=rule.window,
        stride=rule.query_stride,
        block=rule.chunks[stage],
        most=rule.most[stage],
        representative=REPRESENTATIVES[rule.representative],
        held=asked.held[stage],
        spare=asked.spares[stage],
        angles=asked.angles,
    ).launch()
