"""What retention per head looks at, layer by layer: true positions, the newest queries, the attention that each token was given.

The planner knows how many tokens a row holds and in which slots. Where each head chose its own, a slot holds another token for each
head of each layer, and which one is known only here:

    positions[layer][head] = chosen[layer][head]     what was left of older tokens by the last choice
                             since .. seen           everything after it, the same for every head

A row's state is never changed, only replaced: forks, marks and beams share it, and a forward that dies leaves the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.attention_scores import attention_scores
from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError, StateError
from kvsieve.policy.evict import PerHeadEviction
from kvsieve.runtime.cropping import GO_BACK, SPARE

if TYPE_CHECKING:
    from kvsieve._core import Planner, Step
    from kvsieve.backends.base import AttendCall, Store
    from kvsieve.policy.compose import Policy
    from kvsieve.policy.specs import EvictionSpec

__all__ = ["LayerState", "Observation", "Observer", "RowState", "choose"]

Scores: TypeAlias = "Mapping[int, torch.Tensor]"
"""Of each layer, float ``[Hkv, n]``."""

Runs: TypeAlias = "list[tuple[int, int, int]]"
"""Slots in text order: block, first, one past the last."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer of one row.

    Attributes:
        chosen: int64 ``[Hkv, count]``, on the CPU: true positions of the tokens that each head kept at the last choice, ascending.
        queries: pieces ``[H, m, D]`` of the newest queries, as the model rotated them, the oldest first.
        mass: ``[Hkv, n]``, the attention that every resident was given so far; None if the rule does not ask.
    """

    chosen: torch.Tensor
    queries: tuple[torch.Tensor, ...] = ()
    mass: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowState:
    """One row.

    Attributes:
        since: every head of every layer holds all tokens from this position on.
        layers: the state of each layer, by its index.
    """

    since: int = 0
    layers: Mapping[int, LayerState] = field(default_factory=dict)


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


class Observer:
    """Watches the attention of one stream, and lets its heads choose."""

    def __init__(self, rule: PerHeadEviction, spec: EvictionSpec) -> None:
        self.rule = rule
        self.budget, self.sinks, self.recent = spec.budget, spec.sinks, spec.recent
        if isinstance(rule.observe, bool) or not isinstance(rule.observe, int) or rule.observe < 0:
            raise PolicyError(f"{type(rule).__name__}.observe must be an int of at least 0, got {rule.observe!r}")
        self.rows: list[RowState] = []
        self.calls: dict[int, AttendCall] = {}
        self._pending: dict[int, list[LayerState]] = {}
        self.all_layers: Callable[[str], AbstractContextManager[object]] = nullcontext
        """Entered around a change that all layers must make together."""

    @classmethod
    def of(cls, policy: Policy, bytes_per_token: int) -> Observer | None:
        """The observer that ``policy`` needs; None if all heads keep the same tokens."""
        rules = [m.evict for m in policy.memories if isinstance(m.evict, PerHeadEviction)]
        if not rules:
            return None
        if len(policy.memories) > 1:
            raise PolicyError(f"{policy!r}: what is chosen per head cannot be part of a chain")
        return cls(rules[0], policy.specs(bytes_per_token)[0].evict)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def run(
        self, layer: int, store: Store, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> torch.Tensor:
        """Attention of one layer, watched: as :meth:`Store.run`. What was seen counts from :meth:`commit` on."""
        masses: list[torch.Tensor | None] = [None] * q.shape[0]
        if self.rule.accumulates:
            out, masses = store.run_with_scores(q, k, v, step, call)
        else:
            out = store.run(q, k, v, step, call)
        none = torch.zeros(k.shape[1], 0, dtype=torch.int64)
        states = []
        for row, count in enumerate(step.new_lens):
            old = self.rows[row].layers.get(layer) if self.rows else None
            old = LayerState(none) if old is None else old
            states.append(LayerState(old.chosen, self._observed(old.queries, q[row], count), _plus(old.mass, masses[row])))
        self._pending[layer], self.calls[layer] = states, call
        return out

    def _observed(self, held: tuple[torch.Tensor, ...], q: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """The pieces that hold the newest queries, after the last ``count`` of ``q`` ``[H, q, D]``."""
        most = self.rule.observe
        if not most or not count:
            return held
        pieces = [*held, q[:, -min(count, most + SPARE) :].detach().clone()]
        while sum(piece.shape[1] for piece in pieces[1:]) >= most + SPARE:
            pieces.pop(0)
        return tuple(pieces)

    def commit(self) -> None:
        """The forward is over: what was seen counts."""
        if self._pending:
            rows = self.rows or [RowState() for _ in next(iter(self._pending.values()))]
            pending = self._pending.items()
            self.rows = [RowState(row.since, {layer: states[at] for layer, states in pending}) for at, row in enumerate(rows)]
        self._pending = {}

    def rollback(self) -> None:
        """Forget what an unfinished forward saw."""
        self._pending = {}

    # --------------------------------------------------------------------------------------------------------------- letting go

    def settle(self, planner: Planner, stores: Mapping[int, Store], force: bool) -> None:
        """Bring every row that is over budget down to it; without ``force`` only those that are a whole block over it."""
        for row in range(planner.num_rows):
            count = planner.resident(0, row)
            if count > self.budget and (force or count >= self.budget + BLOCK):
                scores = {layer: self._scores(planner, store, row, layer) for layer, store in stores.items()}
                # Where newest tokens were evicted by name, fewer of them are held by all heads alike.
                recent = min(self.recent, planner.seen(row) - self.rows[row].since)
                self._settle(planner, stores, row, scores, self.budget - recent, recent)

    def _settle(
        self,
        planner: Planner,
        stores: Mapping[int, Store],
        row: int,
        scores: Scores,
        count: int,
        recent: int,
        gone: tuple[int, int] = (0, 0),
    ) -> None:
        """Each head keeps its best ``count`` by ``scores``, and the newest ``recent``."""
        keeps = self._chosen(planner, row, scores, count, recent, gone)
        self._sieve(planner, stores, row, keeps, recent, lambda: planner.sieve(0, row, count, recent))

    def _scores(self, planner: Planner, store: Store, row: int, layer: int, gone: int = 0) -> torch.Tensor:
        """The rule's scores of a row's residents, float ``[Hkv, n]``; the newest ``gone`` queries do not vote."""
        state, last = self.rows[row].layers[layer], planner.seen(row) - gone
        pieces = _without(state.queries, gone)
        queries = torch.cat(pieces, 1)[:, -self.rule.observe :] if pieces else torch.zeros(state.chosen.shape[0], 0, 0)
        found = Observation(
            positions=self.positions(planner, row, layer),
            queries=queries,
            query_positions=torch.arange(last - queries.shape[1], last),
            accumulated_scores=state.mass,
            call=self.calls[layer],
            store=store,
            runs=planner.runs(0, row),
        )
        scores = self.rule.scores(found)
        if not isinstance(scores, torch.Tensor) or scores.shape != found.positions.shape or not scores.is_floating_point():
            got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise PolicyError(
                f"{type(self.rule).__name__}.scores must return floats of shape {tuple(found.positions.shape)}, got {got}"
            )
        return scores

    def _chosen(
        self, planner: Planner, row: int, scores: Scores, count: int, recent: int, gone: tuple[int, int] = (0, 0)
    ) -> dict[int, torch.Tensor]:
        """Of each layer, which of a row's residents but the newest ``recent`` each head keeps, its best ``count`` by ``scores``:
        int64 ``[Hkv, count]``. Sinks, recent and pinned tokens come first; those at positions ``gone[0]`` to ``gone[1] - 1`` last.
        """
        pins, last = planner.pins(row), planner.seen(row) - self.recent
        keeps = {}
        for layer, values in scores.items():
            others = values.shape[1] - recent
            at = self.positions(planner, row, layer)[:, :others]
            classes = None
            # In most rows the first residents are the sinks, and nothing else stays.
            if pins or gone[0] < gone[1] or bool((at[:, : self.sinks] >= self.sinks).any()) or bool((at >= last).any()):
                classes = ((at < self.sinks) | (at >= last)).to(torch.int8)
                for start, stop in pins:
                    classes |= ((at >= start) & (at < stop)).to(torch.int8)
                classes[(at >= gone[0]) & (at < gone[1])] = -1
            keeps[layer] = choose(values[:, :others], count, self.sinks, classes)
        return keeps

    def _sieve(
        self,
        planner: Planner,
        stores: Mapping[int, Store],
        row: int,
        keeps: Mapping[int, torch.Tensor],
        recent: int,
        sieve: Callable[[], tuple[Runs, Runs]],
    ) -> None:
        """Each head keeps the residents ``keeps`` and the newest ``recent``; ``sieve`` makes room in the planner."""
        state, others = self.rows[row], planner.resident(0, row) - recent
        was = {layer: self.positions(planner, row, layer)[:, :others] for layer in keeps}
        with self.all_layers("letting go"):
            source, to = sieve()
            layers = {}
            for layer, keep in keeps.items():
                stores[layer].permute(source, keep, to)
                old = state.layers[layer]
                kept = (
                    None if old.mass is None else torch.cat([old.mass.gather(1, keep.to(old.mass.device)), old.mass[:, others:]], 1)
                )
                layers[layer] = LayerState(was[layer].gather(1, keep.cpu()), old.queries, kept)
            self.rows[row] = RowState(planner.seen(row) - recent, layers)

    def check_held(self, planner: Planner, row: int, start: int, stop: int) -> None:
        """Refuse to pin what some head has evicted.

        Raises:
            StateError: naming how many of the tokens ``start`` to ``stop - 1`` are gone.
        """
        state = self.rows[row] if row < len(self.rows) else RowState()
        end = min(stop, state.since)
        gone = 0
        for layer in state.layers if start < end else ():
            at = self.positions(planner, row, layer)
            gone = max(gone, end - start - int(((at >= start) & (at < end)).sum(1).min()))
        if gone:
            raise StateError(
                f"row {row}: {gone} of the tokens {start} to {stop} are no longer held by every head; "
                "pin tokens before they are evicted"
            )

    def evict(self, planner: Planner, stores: Mapping[int, Store], row: int, start: int, stop: int) -> None:
        """The tokens ``start`` to ``stop - 1`` go. Where heads then hold different numbers of older ones, each keeps as many as the
        head that has fewest, its best ones."""
        state, seen = self.rows[row], planner.seen(row)
        since = max(state.since, min(stop, seen))
        older = {layer: self.positions(planner, row, layer) for layer in state.layers}
        older = {layer: at[:, : at.shape[1] - (seen - since)] for layer, at in older.items()}
        left = {layer: ((at < start) | (at >= stop)).sum(1) for layer, at in older.items()}
        if all(int(n.min()) == older[layer].shape[1] for layer, n in left.items()):
            planner.unpin([row], start, stop)
            return
        count = min(int(n.min()) for n in left.values())
        if all(int(n.max()) == count for n in left.values()):
            scores = {layer: torch.zeros(at.shape[0], at.shape[1] + seen - since) for layer, at in older.items()}
        else:
            scores = {layer: self._scores(planner, stores[layer], row, layer) for layer in older}
        keeps = self._chosen(planner, row, scores, count, seen - since, (start, stop))
        self._sieve(
            planner, stores, row, keeps, seen - since, lambda: planner.evict_per_head(row, start, stop, count, seen - since)
        )

    # ------------------------------------------------------------------------------------------------------------- what callers do

    def positions(self, planner: Planner, row: int, layer: int) -> torch.Tensor:
        """True positions of a row's residents, int64 ``[Hkv, n]``, on the CPU."""
        state = self.rows[row]
        chosen = state.layers[layer].chosen
        return torch.cat([chosen, torch.arange(state.since, planner.seen(row)).expand(chosen.shape[0], -1)], 1)

    def kept(
        self, planner: Planner, row: int, layer: int | None, head: int | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Positions of one row's residents and their scores; of all heads or layers together where those are None."""
        layers = list(self.rows[row].layers) if layer is None else [layer]
        if head is not None:
            at, found = layers[0], self.rows[row].layers
            if at not in found:
                return np.zeros(0, np.int64), np.zeros(0, np.float32)
            positions, given = self.positions(planner, row, at)[head], found[at].mass
            scores = torch.full(positions.shape, torch.nan) if given is None else given[head].float().cpu()
            return positions.numpy(), scores.numpy()
        held = [self.positions(planner, row, at).flatten() for at in layers if at in self.rows[row].layers]
        union = np.unique(torch.cat(held).numpy()) if held else np.zeros(0, np.int64)
        return union, np.full(len(union), np.nan, np.float32)

    def check_crop(self, planner: Planner, counts: Sequence[int]) -> None:
        """Refuse to go back to where heads hold different tokens, or to before attention that cannot be taken back.

        Raises:
            StateError: if what a shorter text would have left behind is not known any more.
        """
        for row, (state, count) in enumerate(zip(self.rows, counts)):
            left = planner.seen(row) - count
            if not count or left <= 0:
                continue
            if left < state.since:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: each head chose for itself among those before token {state.since}, "
                    f"and what it evicted cannot come back; {GO_BACK}"
                )
            if self.rule.accumulates:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: the attention that they gave to others is part of the sums that "
                    f"{type(self.rule).__name__} keeps; {GO_BACK}"
                )
            for held in state.layers.values():
                spare = sum(piece.shape[1] for piece in held.queries) - min(self.rule.observe, left)
                if count > spare:
                    raise StateError(
                        f"row {row}: cannot forget {count} tokens: of the queries before them too few are kept to choose by; "
                        f"at most {max(spare, 0)} can be forgotten; {GO_BACK}"
                    )

    def crop(self, planner: Planner, counts: Sequence[int]) -> None:
        """The planner forgot the newest ``counts[row]`` tokens of each row. Attention that they gave stays counted."""
        self.rows = [_cropped(state, planner.seen(row), counts[row]) for row, state in enumerate(self.rows)]

    def crop_rows(self, planner: Planner, stores: Mapping[int, Store], counts: Sequence[int]) -> None:
        """Forget the newest ``counts[row]`` tokens of each row, even where heads hold different ones: then every head keeps as many
        of those that are left as the head that has fewest, its best ones."""
        known = len(counts) == len(self.rows) and all(c <= planner.seen(row) for row, c in enumerate(counts))
        uneven: dict[int, tuple[Scores, int]] = {}
        for row, state in enumerate(self.rows if known else []):
            left = planner.seen(row) - counts[row]
            if 0 < left < state.since:
                scores = {layer: self._scores(planner, store, row, layer, counts[row]) for layer, store in stores.items()}
                held = {layer: self.positions(planner, row, layer) < left for layer in scores}
                uneven[row] = scores, min(int(h.sum(1).min()) for h in held.values())
        for row, (scored, count) in uneven.items():
            seen = planner.seen(row)
            self._settle(planner, stores, row, scored, count, 0, (seen - counts[row], seen))
        planner.crop_rows(list(counts))
        self.crop(planner, counts)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        self.rows = [self.rows[row] for row in rows]

    def copy_from(self, other: Observer) -> None:
        """Start where ``other`` is."""
        self.rows, self.calls = list(other.rows), dict(other.calls)

    def reset(self) -> None:
        """Forget everything."""
        self.rows, self._pending = [], {}


def _plus(held: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """What tokens were given before (``[Hkv, n]``), and what the newest queries gave them and the new ones (``[Hkv, n + m]``)."""
    if held is None or new is None:
        return held if new is None else new
    total = new.clone()
    total[:, : held.shape[1]] += held
    return total


def _without(pieces: tuple[torch.Tensor, ...], gone: int) -> tuple[torch.Tensor, ...]:
    """Queries ``[H, m, D]`` without the newest ``gone`` of them."""
    left = list(pieces)
    while gone and left:
        last = left.pop()
        if last.shape[1] > gone:
            left.append(last[:, : last.shape[1] - gone])
        gone = max(gone - last.shape[1], 0)
    return tuple(left)


def _cropped(state: RowState, left: int, gone: int) -> RowState:
    """A row that has seen ``left`` tokens, after the newest ``gone`` were forgotten."""
    if left == 0:
        return RowState()
    layers = {}
    for layer, old in state.layers.items():
        held = old.chosen.shape[1] + max(left - state.since, 0)
        layers[layer] = LayerState(old.chosen, _without(old.queries, gone), None if old.mass is None else old.mass[:, :held])
    return RowState(min(state.since, left), layers)
