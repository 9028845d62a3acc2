"""What eviction per head remembers of each layer and row, what its rule sees of it, and how heads choose.

The planner knows how many tokens a row holds and in which slots. Where each head chose its own, a slot holds another token for each
head of each layer, and which one is known only here:

    positions[layer][head] = chosen[layer][head]     what was left of older tokens by the last choice
                             since .. seen           everything after it, the same for every head

A row's state is never changed, only replaced: forks, marks and beams share it, and a forward that dies leaves the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kvsieve.backends.attention_scores import attention_scores
from kvsieve.runtime.cropping import SPARE

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall, Store

__all__ = ["LayerState", "Observation", "RowState", "choose", "newest", "without"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer of one row.

    Attributes:
        chosen: int64 ``[Hkv, count]``, on the CPU: true positions of the tokens that each head kept at the last choice, ascending.
        queries: pieces ``[H, m, D]`` of the newest queries, as the model rotated them, the oldest first.
        accumulated: ``[Hkv, n]``, the attention that every resident was given so far; None if the rule does not ask.
    """

    chosen: torch.Tensor
    queries: tuple[torch.Tensor, ...] = ()
    accumulated: torch.Tensor | None = None

    def then(self, queries: tuple[torch.Tensor, ...], given: torch.Tensor | None) -> LayerState:
        """After a forward with these newest queries, which gave each resident and new token the attention ``given``."""
        return LayerState(self.chosen, queries, _plus(self.accumulated, given))

    def kept(self, chosen: torch.Tensor, keep: torch.Tensor, recent: int) -> LayerState:
        """After each head chose the tokens ``chosen``, its residents ``keep`` but the newest ``recent``, which stay."""
        if (old := self.accumulated) is None:
            return LayerState(chosen, self.queries)
        others = old.shape[1] - recent
        return LayerState(chosen, self.queries, torch.cat([old.gather(1, keep.to(old.device)), old[:, others:]], 1))


@dataclass(frozen=True, eq=False)
class RowState:
    """One row.

    Attributes:
        since: every head of every layer holds all tokens from this position on.
        layers: the state of each layer, by its index.
        evicted_at: tokens that it had seen when heads last chose; 0 before.
    """

    since: int = 0
    layers: Mapping[int, LayerState] = field(default_factory=dict)
    evicted_at: int = 0

    def positions(self, layer: int, seen: int) -> torch.Tensor:
        """True positions of its residents in a layer, once it has seen ``seen`` tokens: int64 ``[Hkv, n]``, on the CPU."""
        chosen = self.layers[layer].chosen
        return torch.cat([chosen, torch.arange(self.since, seen).expand(chosen.shape[0], -1)], 1)

    def cropped(self, left: int, gone: int) -> RowState:
        """After the newest ``gone`` tokens were forgotten, of which ``left`` are left."""
        if left == 0:
            return RowState()
        layers = {}
        for layer, old in self.layers.items():
            held = old.chosen.shape[1] + max(left - self.since, 0)
            scores = None if old.accumulated is None else old.accumulated[:, :held]
            layers[layer] = LayerState(old.chosen, without(old.queries, gone), scores)
        return RowState(min(self.since, left), layers, min(self.evicted_at, left))


@dataclass(frozen=True, eq=False)
class Observation:
    """What a rule per head sees of one layer of one sequence when its heads must choose.

    Attributes:
        positions: int64 ``[Hkv, n]``, the true position of each resident of each head, ascending.
        queries: ``[H, m, D]``, the newest queries, as the model rotated them: as many as the rule observes, or as there are.
        query_positions: int64 ``[m]``.
        accumulated_scores: float32 ``[Hkv, n]``, the probability that each resident was given by every query since it came, summed
            over queries and over the query heads of a group; None unless the rule accumulates.
        call: the numbers that this layer's attention adds: scale, cap of the logits, learned sinks.
    """

    positions: torch.Tensor
    queries: torch.Tensor
    query_positions: torch.Tensor
    accumulated_scores: torch.Tensor | None
    call: AttendCall
    store: Store = field(repr=False)
    runs: list[tuple[int, int, int]] = field(repr=False)

    @cached_property
    def keys(self) -> torch.Tensor:
        """Keys ``[Hkv, n, D]`` of the residents, as the model rotated them; copied at first use."""
        return self.store.read(self.runs)[0]

    def attention_scores(self) -> torch.Tensor:
        """The probability that the newest queries give to each resident now, summed as those accumulated: float32 ``[Hkv, n]``."""
        return attention_scores(self.queries, self.keys, self.query_positions, self.positions, self.call)


def choose(scores: torch.Tensor, count: int, sinks: int, classes: torch.Tensor | None = None) -> torch.Tensor:
    """The first ``sinks`` and each head's best others, ``count`` in all: int64 ``[Hkv, count]``, ascending, from ``[Hkv, n]``.

    Equal scores prefer the earlier token; nan comes last. Where ``classes`` are given, int8 ``[Hkv, n]``, they say instead of
    ``sinks`` what comes first: a token of a higher class comes before all of a lower one, whatever its score.
    """
    ranked = torch.where(scores.isnan(), -torch.inf, scores)
    if classes is None:
        ranked[:, :sinks] = torch.inf
        return ranked.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    by_class = classes.to(order.device).gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, by_class)[:, :count].sort(dim=1).values


def _plus(held: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """What tokens were given before (``[Hkv, n]``), and what the newest queries gave them and the new ones (``[Hkv, n + m]``)."""
    if held is None or new is None:
        return held if new is None else new
    total = new.clone()
    total[:, : held.shape[1]] += held
    return total


def without(pieces: tuple[torch.Tensor, ...], gone: int) -> tuple[torch.Tensor, ...]:
    """Queries ``[H, m, D]`` without the newest ``gone`` of them."""
    left = list(pieces)
    while gone and left:
        last = left.pop()
        if last.shape[1] > gone:
            left.append(last[:, : last.shape[1] - gone])
        gone = max(gone - last.shape[1], 0)
    return tuple(left)


def newest(held: tuple[torch.Tensor, ...], q: torch.Tensor, count: int, most: int) -> tuple[torch.Tensor, ...]:
    """The pieces that hold the newest ``most`` queries, and as many more as a crop may forget.

    Args:
        held: the pieces until now, ``[H, m, D]`` each; q: ``[H, q, D]``, of which the last ``count`` are new.
    """
    if not most or not count:
        return held
    pieces = [*held, q[:, -min(count, most + SPARE) :].detach().clone()]
    while sum(piece.shape[1] for piece in pieces[1:]) >= most + SPARE:
        pieces.pop(0)
    return tuple(pieces)
