"""What a server tells Prometheus: the model thread's snapshot, and requests as they were answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as Times
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvsieve.serve.jobs import Histogram, Snapshot

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES: Mapping[str, tuple[str, str]] = {
    "queued": ("jobs_queued", "jobs that wait"),
    "reading": ("jobs_reading", "jobs whose prompts are being read"),
    "answering": ("answers_active", "answers that are being said"),
    "states": ("states", "states of conversations in memory"),
    "stored": ("states_stored", "states of conversations in files"),
    "bytes_held": ("held_bytes", "bytes of keys and values in memory, shared ones once"),
    "memory": ("memory_limit_bytes", "most bytes of keys and values in memory"),
    "bytes_stored": ("stored_bytes", "bytes of the session files"),
}
"""Fields of a snapshot that go up and down: name and meaning."""

COUNTERS: Mapping[str, tuple[str, str]] = {
    "jobs": ("jobs", "jobs that were taken"),
    "refused": ("jobs_refused", "jobs for which there was no room"),
    "failed": ("jobs_failed", "jobs that ended with an error"),
    "tokens_read": ("prompt_tokens_read", "tokens of prompts that were read"),
    "tokens_cached": ("prompt_tokens_cached", "tokens of prompts that were remembered"),
    "tokens_said": ("answer_tokens", "tokens of answers"),
    "evictions": ("states_evicted", "states that left the memory for a file"),
    "dropped": ("states_dropped", "states that left the memory altogether"),
    "saves": ("session_saves", "session files written"),
    "loads": ("session_loads", "session files read"),
    "rereads": ("conversations_reread", "known conversations that were read from their beginning"),
    "unusable": ("session_files_unusable", "files that were no states"),
    "errors": ("loop_errors", "errors of the model thread's loop itself"),
}
"""Fields of a snapshot that only grow."""

HISTOGRAMS: Mapping[str, tuple[str, str]] = {
    "steps": ("step_seconds", "seconds of the joint forwards in which every answer gets a token"),
    "waits": ("prompt_seconds", "seconds from a job's submission until its prompt was read"),
}


class Metrics:
    """The metrics of one server.

    Args:
        snapshot: the model thread's.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshots(snapshot))
        told: dict[str, Any] = {"registry": self._registry, "namespace": "kvsieve"}
        self.requests = Counter("http_requests", "requests by path and status", ["path", "status"], **told)
        self.seconds = Times("request_seconds", "seconds of requests for answers that were answered", buckets=SECONDS, **told)
        self.first_token = Times("first_token_seconds", "seconds until the first token of an answer", buckets=SECONDS, **told)
        self.gone = Counter("clients_gone", "requests whose client did not wait for the answer", **told)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Snapshots(Collector):
    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the model thread when it is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        for field, (name, meaning) in GAUGES.items():
            yield GaugeMetricFamily(f"kvsieve_{name}", meaning, value=getattr(now, field))
        for field, (name, meaning) in COUNTERS.items():
            yield CounterMetricFamily(f"kvsieve_{name}", meaning, value=getattr(now, field))
        ends = CounterMetricFamily("kvsieve_answers", "answers by why they ended", labels=["reason"])
        for reason, count in now.ends.items():
            ends.add_metric([reason], count)
        yield ends
        for field, (name, meaning) in HISTOGRAMS.items():
            values = getattr(now, field)
            yield HistogramMetricFamily(f"kvsieve_{name}", meaning, buckets=_buckets(values), sum_value=values.total)


def _buckets(values: Histogram) -> list[tuple[str, float]]:
    """Prometheus counts what is at most a bound, smaller ones among them."""
    made, below = [], 0
    for bound, count in zip((*(str(float(bound)) for bound in values.bounds), "+Inf"), values.counts):
        below += count
        made.append((bound, float(below)))
    return made
