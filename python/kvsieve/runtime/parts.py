"""The parts that there are, in the order in which a stream calls them. A new feature with a state of its own is one more row."""

from __future__ import annotations

from typing import TypeVar

from kvsieve.backends.base import check_stream
from kvsieve.runtime.bank import Banking
from kvsieve.runtime.compression import Compression
from kvsieve.runtime.eviction import Eviction
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.head_eviction import HeadEviction
from kvsieve.runtime.part import Setting, StreamPart
from kvsieve.runtime.pinning import Pinning
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.runtime.sliding import SlidingLayers
from kvsieve.runtime.surprisal import SurprisalScores
from kvsieve.runtime.tiers import Tiers
from kvsieve.runtime.told_positions import ToldPositions
from kvsieve.runtime.transcript import Transcript
from kvsieve.runtime.value_selection import ValueSelection

__all__ = ["KINDS", "Parts", "check_backend"]

KINDS = (
    Transcript,
    ToldPositions,
    SlidingLayers,
    Tiers,  # before what attends: it fetches what layers read
    Compression,  # before what attends: it looks at each layer's queries
    SurprisalScores,
    Banking,  # before what evicts: it looks at what is held until then
    HeadEviction,
    Eviction,
    Selection,
    Recycling,
    ValueSelection,
    Fetching,
    Pinning,  # the last one to be restored: it asks whether what is pinned is there
)

P = TypeVar("P", bound=StreamPart)


class Parts(tuple[StreamPart, ...]):
    """The parts of one stream: of every kind at most one, and none that it does not need."""

    @classmethod
    def of(cls, setting: Setting) -> Parts:
        """What a stream opened with ``setting`` needs.

        Raises:
            PolicyError, UnsupportedModelError: if a part cannot do what the policy asks of it on this model.
        """
        made = (kind.of(setting) for kind in KINDS)
        return cls(part for part in made if part is not None)

    def find(self, kind: type[P]) -> P | None:
        """The part of this kind, if the stream has one."""
        return next((part for part in self if isinstance(part, kind)), None)

    @property
    def eviction(self) -> Eviction | HeadEviction:
        """What evicts: for all heads alike, or for each."""
        return self.find(HeadEviction) or self.the(Eviction)

    def the(self, kind: type[P]) -> P:
        """The part of a kind that every stream has."""
        found = self.find(kind)
        assert found is not None
        return found


def check_backend(setting: Setting, parts: Parts) -> None:
    """Ask a backend whether it can hold every layer and do what the policy asks.

    Raises:
        BackendError: if it cannot.
    """
    compression = parts.find(Compression)
    packings = () if compression is None else compression.packing.values()
    policy = setting.policy
    recycles = policy.recycling is not None
    check_stream(setting.backend, setting.facts.layers, setting.stored_keys, packings, policy.selection, recycles)
    if policy.fetching is not None:
        setting.backend.capabilities.check_fetching(bool(packings))
    if policy.heaviest_values is not None:
        setting.backend.capabilities.check_heaviest_values()
    if policy.bank is not None:
        setting.backend.capabilities.check_lse()
    if policy.tiers is not None:
        setting.backend.capabilities.check_tiers(policy.tiers.values_alone)
