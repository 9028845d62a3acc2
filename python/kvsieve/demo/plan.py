"""How much of the text the demo reads, through which memories: what fits into the time it has, by the speed measured here.

Every memory reads the same text to the same end. Attention of the full cache grows with the square of the text, so it is what a
slow machine cannot afford; what is given up first costs the claim least.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import kvsieve
from kvsieve.model.support import cache_name

__all__ = ["BUCKET", "COMPARED", "Pace", "Plan", "make_plan", "measure_pace"]

BUCKET = 512
"""Tokens whose negative log-likelihoods are averaged for one point of the curves."""

COMPARED = 1024
"""Tokens at the end of the text over which the memories are compared."""

_PAST_TRAINED = 3072
"""SmolLM2's full cache falls apart some 2,300 tokens beyond its trained length, so the last 1,024 of these lie behind that."""

_MARGIN = 1.15
"""What a prediction may be wrong by: the machine is shared, caches warm up."""

_TRY = 1.25
"""The cheapest plan that shows what becomes of the full cache is tried although it seems to take so many times the seconds left."""


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, now: for a token without attention, and for one query and one key over all layers."""

    token: float
    pair: float

    def full(self, stop: int) -> float:
        """Seconds of a full cache for the first `stop` tokens."""
        return self.token * stop + self.pair * stop**2 / 2

    def bounded(self, count: int, width: int) -> float:
        """Seconds of a bounded memory for `count` tokens, each of which reads at most `width` keys."""
        return count * (self.token + self.pair * width)


@dataclass(frozen=True)
class Plan:
    """What is read.

    Attributes:
        memories: by name, the full cache first.
        start: the token at which the bounded memories begin; the full cache begins at 0.
        stop: where all memories end, if the clock does not stop them before.
        expected: the token that they will have reached by then, all of them.
        seconds: expected, for reading alone.
        needed: seconds of reading that would show what becomes of the full cache; 0 where the text is too short for that.
    """

    memories: tuple[str, ...]
    start: int
    stop: int
    expected: int
    seconds: float
    needed: float


def measure_pace(model: Any, ids: torch.Tensor, chunk: int, backend: str | None = None) -> Pace:
    """Reads a chunk of `ids [1, n]` four times, and runs one layer's attention over 4,096 keys; a few seconds."""
    ids = ids[:, :chunk]
    with kvsieve.stream(model, kvsieve.Full(), backend=backend) as stream, torch.no_grad():
        chunks = []
        for _ in range(4):
            began = time.perf_counter()
            model(ids, **{cache_name(model): stream.cache})
            chunks.append((time.perf_counter() - began) / ids.shape[1])
    config = model.config.get_text_config(decoder=True)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = 256, 4096
    q, k = torch.randn(1, heads, queries, dim, device=model.device), torch.randn(1, heads, keys, dim, device=model.device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k)
        times.append(time.perf_counter() - began)
    pair = sorted(times)[1] / (queries * keys) * layers
    # The first chunk warms up; of the others the median, less its own attention.
    return Pace(max(sorted(chunks[1:])[1] - pair * 2.5 * ids.shape[1], 1e-9), pair)


def make_plan(
    pace: Pace, seconds: float, memories: tuple[str, ...], *, available: int, trained: int, width: int, step: int
) -> Plan:
    """The best plan that fits.

    Args:
        pace: what was measured.
        seconds: for reading.
        memories: by name, the full cache first and the one that is given up first second.
        available: tokens of the text.
        trained: the model's trained length.
        width: keys that a token reads under a bounded memory, at most.
        step: tokens a round; `start` and `stop` are multiples of it, except where the text ends.
    """
    goal = min(trained + _PAST_TRAINED, available)
    fewer = (memories[0], *memories[2:])
    every = math.lcm(step, BUCKET)
    late = max(0, min(goal, trained) - 2 * COMPARED) // every * every

    def cost(names: tuple[str, ...], start: int, stop: int) -> float:
        return pace.full(stop) + (len(names) - 1) * pace.bounded(stop - start, width)

    needed = cost(fewer, late, goal) * _MARGIN if available >= trained + _PAST_TRAINED else 0.0
    further = min(goal + COMPARED, available)
    for names, start, stop in ((memories, 0, further), (memories, 0, goal), (fewer, 0, goal)):
        if cost(names, start, stop) * _MARGIN <= seconds:
            return Plan(names, start, stop, stop, cost(names, start, stop), needed)
    if needed and cost(fewer, late, goal) <= seconds * _TRY:
        return Plan(fewer, late, goal, goal, cost(fewer, late, goal), needed)
    expected = max((n for n in range(step, goal, step) if cost(fewer, 0, n) <= seconds), default=min(step, goal))
    return Plan(fewer, 0, goal, expected, cost(fewer, 0, expected), needed)
