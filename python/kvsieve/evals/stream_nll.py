"""Negative log-likelihood of a text as it streams through a cache: the price of forgetting, by position."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from kvsieve import backends
from kvsieve.model.support import cache_name

__all__ = ["Holding", "Progress", "Reading", "dynamic_cache_meter", "read", "stream_meter"]

_ROWS = 128  # rows of logits that are cast to float32 at a time: 128 x 49,152 x 4 B = 25 MB


@dataclass(frozen=True)
class Holding:
    """What a cache holds: tokens resident in a layer, and the bytes of keys and values over all layers."""

    resident: int
    bytes_held: int


@dataclass(frozen=True)
class Progress:
    """The state after one chunk: tokens read, mean nll of the chunk and of all so far (nats a token), seconds."""

    seen: int
    chunk_nll: float
    mean_nll: float
    holding: Holding
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Average speed so far."""
        return self.seen / self.seconds


@dataclass
class Reading:
    """One text through one cache.

    `nll[i]` is the mean over the positions `first + i * bucket` up to `first + (i + 1) * bucket` (the last bucket may be
    shorter), in nats a token; the first token is not predicted. `steps` holds the progress after each chunk. `first` is where
    in the text the reading began.
    """

    name: str
    bucket: int
    first: int = 0
    nll: list[float] = field(default_factory=list)
    steps: list[Progress] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time spent in forward passes, eviction and scoring."""
        return self.steps[-1].seconds if self.steps else 0.0

    @property
    def stop(self) -> int:
        """The position in the text after the last token that was read."""
        return self.first + (self.steps[-1].seen if self.steps else 0)

    def nll_between(self, start: int, stop: int) -> float:
        """Mean nll of the whole buckets within positions `start` to `stop` of the text, nan where there are none."""
        edges = (self.first + i * self.bucket for i in range(len(self.nll)))
        inside = [x for x, edge in zip(self.nll, edges) if start <= edge and edge + self.bucket <= stop]
        return sum(inside) / len(inside) if inside else math.nan


def stream_meter(stream: Any) -> Callable[[], Holding]:
    """Reads `Holding` off an open kvsieve stream."""

    def measure() -> Holding:
        stats = stream.stats()
        return Holding(int(stats.resident), int(stats.bytes_held))

    return measure


def dynamic_cache_meter(cache: Any) -> Callable[[], Holding]:
    """Reads `Holding` off a stock transformers `DynamicCache`."""

    def measure() -> Holding:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
        return Holding(int(cache.get_seq_length()), held)

    return measure


def read(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    measure: Callable[[], Holding],
    reading: Reading,
    *,
    chunk: int = 512,
    seconds: float = math.inf,
) -> Iterator[Progress]:
    """Reads `ids [1, n]` chunk by chunk into `cache`, fills `reading`, and yields after every chunk.

    Stops early, at the end of a chunk, once `seconds` have passed. Never holds more logits than `[chunk, vocab]` in
    the model's dtype and 128 rows of them in float32. Raises `ValueError` when `ids` is not one row.
    """
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids must have shape [1, n], got {tuple(ids.shape)}")
    num_tokens = ids.shape[1]
    losses = torch.zeros(num_tokens)
    carried: torch.Tensor | None = None  # the last row of logits [1, V]: it predicts the next chunk's first token
    spent = 0.0
    for start in range(0, num_tokens, chunk):
        began = time.perf_counter()
        stop = min(start + chunk, num_tokens)
        with torch.no_grad():
            logits = model(ids[:, start:stop], **{cache_name(model): cache}).logits[0]
            if carried is not None:
                losses[start] = F.cross_entropy(carried, ids[0, start : start + 1])
            losses[start + 1 : stop] = _losses(logits[:-1], ids[0, start + 1 : stop])
            carried = logits[-1:].float()
        spent += time.perf_counter() - began
        reading.nll = _bucket_means(losses[:stop], reading.bucket)
        step = Progress(
            seen=stop,
            chunk_nll=float(losses[max(start, 1) : stop].mean()),
            mean_nll=float(losses[1:stop].mean()),
            holding=measure(),
            seconds=spent,
        )
        reading.steps.append(step)
        yield step
        if spent >= seconds:
            return


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """nll [n] of `targets [n]` under `logits [n, V]`, in float32: a surprisal is a negative log-likelihood."""
    if len(logits) and backends.choose(logits.device, logits.dtype) == "cpu":
        return backends.get("cpu").surprisal(logits, targets)
    blocks = zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True)
    parts = [F.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in blocks]
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def _bucket_means(losses: torch.Tensor, bucket: int) -> list[float]:
    """Means of `losses [n]` by bucket; position 0 has no prediction and is left out of the first."""
    return [
        float(part[1:].mean() if i == 0 and len(part) > 1 else part.mean()) for i, part in enumerate(torch.split(losses, bucket))
    ]
