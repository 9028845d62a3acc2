"""What a service counts. The model thread writes; a snapshot is of one moment as far as each number goes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvsieve.serve.jobs import Histogram, Reason, Snapshot

if TYPE_CHECKING:
    from kvsieve.serve.conversations import Conversations

__all__ = ["Meters", "Times"]

STEPS = (0.001, 0.0025, 0.005, *(round(0.01 * 2 ** (at / 2), 3) for at in range(21)), 20.0)
WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds in seconds. Those of steps are a factor of 1.41 apart, so that quantiles can be told from them."""


class Times:
    """Seconds that something took, by bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        """It took so long once more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def histogram(self) -> Histogram:
        """All of them."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass
class Meters:
    """Counts of a service, by their names in :class:`~kvsieve.serve.jobs.Snapshot`."""

    jobs: int = 0
    refused: int = 0
    failed: int = 0
    errors: int = 0
    rereads: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    tokens_said: int = 0
    ends: dict[Reason, int] = field(default_factory=dict)
    steps: Times = field(default_factory=lambda: Times(STEPS))
    waits: Times = field(default_factory=lambda: Times(WAITS))
    reading: int = 0
    answering: int = 0
    states: int = 0
    stored: int = 0
    bytes_held: int = 0
    bytes_stored: int = 0

    def now(self, reading: int, answering: int, states: Conversations) -> None:
        """What is held now; called on the model thread, which alone may look at streams."""
        self.reading, self.answering, self.bytes_held = reading, answering, states.holdings.bytes_held
        if states.changed:
            states.changed = False
            self.states, self.stored, self.bytes_stored = states.sizes()

    def snapshot(self, queued: int, states: Conversations) -> Snapshot:
        """As plain data; on any thread."""
        counts = states.counts
        return Snapshot(
            queued=queued,
            reading=self.reading,
            answering=self.answering,
            states=self.states,
            stored=self.stored,
            bytes_held=self.bytes_held,
            memory=states.memory,
            bytes_stored=self.bytes_stored,
            jobs=self.jobs,
            refused=self.refused,
            failed=self.failed,
            ends=dict(self.ends),
            tokens_read=self.tokens_read,
            tokens_cached=self.tokens_cached,
            tokens_said=self.tokens_said,
            steps=self.steps.histogram(),
            waits=self.waits.histogram(),
            evictions=counts.evictions,
            dropped=counts.dropped,
            saves=counts.saves,
            loads=counts.loads,
            rereads=self.rereads,
            unusable=counts.unusable,
            errors=self.errors,
        )
