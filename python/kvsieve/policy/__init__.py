"""What a policy is made of: a rule for each of four roles, and operators that combine them; see :mod:`kvsieve.policy.compose`."""

from __future__ import annotations

from kvsieve.policy.compose import Chain, Memory, Policy
from kvsieve.policy.evict import All, Observation, PerHead, Residents, Retain
from kvsieve.policy.position import AsRotated, Ceiling, Consecutive, Fixed, Place, Slots
from kvsieve.policy.select import Everything, Search, Select, TopKTokens
from kvsieve.policy.storage import Channels, LayerShape, Observed, Pack, Packing, Plain, ThinCodes

__all__ = [
    "All",
    "AsRotated",
    "Ceiling",
    "Chain",
    "Channels",
    "Consecutive",
    "Everything",
    "Fixed",
    "LayerShape",
    "Memory",
    "Observation",
    "Observed",
    "Pack",
    "Packing",
    "PerHead",
    "Place",
    "Plain",
    "Policy",
    "Residents",
    "Retain",
    "Search",
    "Select",
    "Slots",
    "ThinCodes",
    "TopKTokens",
]
