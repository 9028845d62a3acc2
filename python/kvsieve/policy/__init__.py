"""What a policy is made of: a rule for each of four roles, and operators that combine them; see :mod:`kvsieve.policy.compose`."""

from __future__ import annotations

from kvsieve.policy.bank import BankRule
from kvsieve.policy.compose import Banked, Chain, Memory, Policy
from kvsieve.policy.evict import EvictionRule, HeadObservation, KeepAll, PerHeadEviction, Residents
from kvsieve.policy.position import Capped, Fetched, FixedDistance, InCache, Original, PositionRule, Rebased
from kvsieve.policy.select import (
    Dense,
    FetchedSelection,
    HeaviestValues,
    Piece,
    RecycledSelection,
    SelectionRule,
    SparseSelection,
    TopKTokens,
)
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
    "BankRule",
    "Banked",
    "Capped",
    "Chain",
    "Channels",
    "Dense",
    "EvictionRule",
    "Fetched",
    "FetchedSelection",
    "FixedDistance",
    "HeadObservation",
    "HeaviestValues",
    "InCache",
    "KeepAll",
    "LayerShape",
    "Memory",
    "Original",
    "Packing",
    "PerHeadEviction",
    "Piece",
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
