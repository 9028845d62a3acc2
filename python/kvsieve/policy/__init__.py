"""What a policy is made of: a rule for each of four roles, and operators that combine them; see :mod:`kvsieve.policy.compose`."""

from __future__ import annotations

from kvsieve.policy.compose import Chain, Memory, Policy
from kvsieve.policy.evict import EvictionRule, HeadObservation, KeepAll, PerHeadEviction, Residents
from kvsieve.policy.position import Capped, FixedDistance, InCache, Original, PositionRule, Rebased
from kvsieve.policy.select import Dense, RecycledSelection, SelectionRule, SparseSelection, TopKTokens
from kvsieve.policy.storage import (
    Channels,
    LayerShape,
    Packing,
    Plain,
    PrunedAndQuantized,
    StorageObservation,
    StorageRule,
    Tiered,
)

__all__ = [
    "Capped",
    "Chain",
    "Channels",
    "Dense",
    "EvictionRule",
    "FixedDistance",
    "HeadObservation",
    "InCache",
    "KeepAll",
    "LayerShape",
    "Memory",
    "Original",
    "Packing",
    "PerHeadEviction",
    "Plain",
    "Policy",
    "PositionRule",
    "PrunedAndQuantized",
    "Rebased",
    "RecycledSelection",
    "Residents",
    "SelectionRule",
    "SparseSelection",
    "StorageObservation",
    "StorageRule",
    "Tiered",
    "TopKTokens",
]
