"""Eviction per head: watches the attention of one stream, and lets each key-value head of each layer choose what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.base import AttendCall
from kvsieve.budget import BLOCK
from kvsieve.errors import PolicyError, SessionError, StateError
from kvsieve.policy.evict import PerHeadEviction
from kvsieve.runtime.cropping import GO_BACK, check_evicted
from kvsieve.runtime.observation import LayerState, Observation, RowState, choose, newest, without
from kvsieve.runtime.part import Apply, Crop, Forward, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.saved import in_range, layer_of, listed, of_kind

if TYPE_CHECKING:
    from kvsieve._core import Planner
    from kvsieve.backends.base import Store
    from kvsieve.policy.specs import EvictionSpec

__all__ = ["HeadEviction"]

Scores: TypeAlias = "Mapping[int, torch.Tensor]"
"""Of each layer, float ``[Hkv, n]``."""

Runs: TypeAlias = "list[tuple[int, int, int]]"
"""Slots in text order: block, first, one past the last."""

State: TypeAlias = "tuple[list[RowState], dict[int, AttendCall]]"


class HeadEviction(StreamPart):
    """What each head holds, and what it looked at.

    Attributes:
        rows: the state of each row; empty before the first forward.
        calls: the numbers that each layer's attention adds.
    """

    name = "head_eviction"

    def __init__(self, rule: PerHeadEviction, spec: EvictionSpec, setting: Setting) -> None:
        self.rule, self._policy, self._blocks = rule, setting.policy, setting.blocks
        self.budget, self.sinks, self.recent = spec.budget, spec.sinks, spec.recent
        if isinstance(rule.observe, bool) or not isinstance(rule.observe, int) or rule.observe < 0:
            raise PolicyError(f"{type(rule).__name__}.observe must be an int of at least 0, got {rule.observe!r}")
        self._layers = {layer.index: layer for layer in setting.facts.layers}
        self.rows: list[RowState] = []
        self.calls: dict[int, AttendCall] = {}
        self._pending: dict[int, list[LayerState]] = {}

    @classmethod
    def of(cls, setting: Setting) -> HeadEviction | None:
        """None if all heads keep the same tokens."""
        policy = setting.policy
        rules = [rule for m in policy.memories if isinstance(rule := m.roles.evict, PerHeadEviction)]
        if not rules:
            return None
        if len(policy.memories) > 1:
            raise PolicyError(f"{policy!r}: what is chosen per head cannot be part of a chain")
        return cls(rules[0], rules[0].spec(setting.facts.bytes_per_token), setting)

    @property
    def _planner(self) -> Planner:
        return self._blocks.planner

    @property
    def _stores(self) -> Mapping[int, Store]:
        return self._blocks.stores

    # ------------------------------------------------------------------------------------------------------------- one forward

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        """Attention of one layer, watched; what was seen counts once the forward does."""
        store, step, q = layer.store, layer.forward.step, layer.q
        if store is None or step is None:
            return None
        given: list[torch.Tensor | None] = [None] * q.shape[0]
        if self.rule.accumulates:
            out, given = store.run_with_scores(q, layer.k, layer.v, step, layer.call)
        else:
            out = store.run(q, layer.k, layer.v, step, layer.call)
        none = LayerState(torch.zeros(layer.k.shape[1], 0, dtype=torch.int64))
        states = []
        for row, count in enumerate(step.new_lens):
            old = self.rows[row].layers.get(layer.index, none) if self.rows else none
            states.append(old.then(newest(old.queries, q[row], count, self.rule.observe), given[row]))
        self._pending[layer.index], self.calls[layer.index] = states, layer.call
        return out

    def commit(self, forward: Forward) -> Apply:
        return self._commit

    def _commit(self) -> None:
        if self._pending:
            rows = self.rows or [RowState() for _ in next(iter(self._pending.values()))]
            pending = self._pending.items()
            self.rows = [replace(row, layers={layer: states[at] for layer, states in pending}) for at, row in enumerate(rows)]
        self._pending = {}

    def rollback(self) -> None:
        self._pending = {}

    def must_step(self, width: int, has_prompt: bool) -> bool:
        return True

    # ---------------------------------------------------------------------------------------------------------------- evicting

    def evict(self, force: bool, turn_ended: bool) -> None:
        planner = self._planner
        for row in range(planner.num_rows):
            count = planner.resident(0, row)
            if count > self.budget and (force or count >= self.budget + BLOCK):
                scores = {layer: self._scores(row, layer) for layer in self._stores}
                # Where newest tokens were evicted by name, fewer of them are held by all heads alike.
                recent = min(self.recent, planner.seen(row) - self.rows[row].since)
                self._keep_best(row, scores, self.budget - recent, recent)

    def _keep_best(self, row: int, scores: Scores, count: int, recent: int, gone: tuple[int, int] = (0, 0)) -> None:
        """Each head keeps its best ``count`` by ``scores``, and the newest ``recent``."""
        keeps = self._chosen(row, scores, count, recent, gone)
        self._compact(row, keeps, recent, lambda: self._planner.sieve(0, row, count, recent))

    def _scores(self, row: int, layer: int, gone: int = 0) -> torch.Tensor:
        """The rule's scores of a row's residents, float ``[Hkv, n]``; the newest ``gone`` queries are left out."""
        state, last = self.rows[row].layers[layer], self._planner.seen(row) - gone
        pieces = without(state.queries, gone)
        queries = torch.cat(pieces, 1)[:, -self.rule.observe :] if pieces else torch.zeros(state.chosen.shape[0], 0, 0)
        found = Observation(
            positions=self.positions(row, layer),
            queries=queries,
            query_positions=torch.arange(last - queries.shape[1], last),
            accumulated_scores=state.accumulated,
            call=self.calls[layer],
            store=self._stores[layer],
            runs=self._planner.runs(0, row),
        )
        scores = self.rule.scores(found)
        if not isinstance(scores, torch.Tensor) or scores.shape != found.positions.shape or not scores.is_floating_point():
            got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise PolicyError(
                f"{type(self.rule).__name__}.scores must return floats of shape {tuple(found.positions.shape)}, got {got}"
            )
        return scores

    def _chosen(self, row: int, scores: Scores, count: int, recent: int, gone: tuple[int, int] = (0, 0)) -> dict[int, torch.Tensor]:
        """Of each layer, which of a row's residents but the newest ``recent`` each head keeps, its best ``count`` by ``scores``:
        int64 ``[Hkv, count]``. Sinks, recent and pinned tokens come first; those at positions ``gone[0]`` to ``gone[1] - 1`` last.
        """
        pins, last = self._planner.pins(row), self._planner.seen(row) - self.recent
        keeps = {}
        for layer, values in scores.items():
            others = values.shape[1] - recent
            at = self.positions(row, layer)[:, :others]
            classes = None
            # In most rows the first residents are the sinks, and nothing else stays.
            if pins or gone[0] < gone[1] or bool((at[:, : self.sinks] >= self.sinks).any()) or bool((at >= last).any()):
                classes = ((at < self.sinks) | (at >= last)).to(torch.int8)
                for start, stop in pins:
                    classes |= ((at >= start) & (at < stop)).to(torch.int8)
                classes[(at >= gone[0]) & (at < gone[1])] = -1
            keeps[layer] = choose(values[:, :others], count, self.sinks, classes)
        return keeps

    def _compact(self, row: int, keeps: Mapping[int, torch.Tensor], recent: int, plan: Callable[[], tuple[Runs, Runs]]) -> None:
        """Each head keeps the residents ``keeps`` and the newest ``recent``; ``plan`` makes room in the planner."""
        state, others = self.rows[row], self._planner.resident(0, row) - recent
        was = {layer: self.positions(row, layer)[:, :others] for layer in keeps}
        with self._blocks.all_layers("evicting"):
            source, to = plan()
            layers = {}
            for layer, keep in keeps.items():
                self._stores[layer].permute(source, keep, to)
                layers[layer] = state.layers[layer].kept(was[layer].gather(1, keep.cpu()), keep, recent)
            seen = self._planner.seen(row)
            self.rows[row] = RowState(seen - recent, layers, seen)

    # ------------------------------------------------------------------------------------------------------ tokens by position

    def check_held(self, row: int, start: int, stop: int) -> None:
        state = self.rows[row] if row < len(self.rows) else RowState()
        end = min(stop, state.since)
        gone = 0
        for layer in state.layers if start < end else ():
            at = self.positions(row, layer)
            gone = max(gone, end - start - int(((at >= start) & (at < end)).sum(1).min()))
        if gone:
            raise StateError(
                f"row {row}: {gone} of the tokens {start} to {stop} are no longer held by every head; "
                "pin tokens before they are evicted"
            )

    def evict_range(self, rows: Sequence[int], start: int, stop: int) -> None:
        """Where heads then hold different numbers of older tokens, each keeps as many as the head that has fewest."""
        for row in rows:
            self._evict_range(row, start, stop)

    def _evict_range(self, row: int, start: int, stop: int) -> None:
        planner, state = self._planner, self.rows[row]
        seen = planner.seen(row)
        since = max(state.since, min(stop, seen))
        older = {layer: self.positions(row, layer) for layer in state.layers}
        older = {layer: at[:, : at.shape[1] - (seen - since)] for layer, at in older.items()}
        left = {layer: ((at < start) | (at >= stop)).sum(1) for layer, at in older.items()}
        if all(int(n.min()) == older[layer].shape[1] for layer, n in left.items()):
            planner.unpin([row], start, stop)
            return
        count = min(int(n.min()) for n in left.values())
        if all(int(n.max()) == count for n in left.values()):
            scores = {layer: torch.zeros(at.shape[0], at.shape[1] + seen - since) for layer, at in older.items()}
        else:
            scores = {layer: self._scores(row, layer) for layer in older}
        keeps = self._chosen(row, scores, count, seen - since, (start, stop))
        self._compact(row, keeps, seen - since, lambda: planner.evict_per_head(row, start, stop, count, seen - since))

    # -------------------------------------------------------------------------------------------------------------- going back

    def check_crop(self, crop: Crop) -> None:
        """Refuse to go back to where heads hold different tokens, or to before attention that cannot be taken back."""
        for row, (state, count) in enumerate(zip(self.rows, crop.counts if crop.columns is not None else ())):
            left = self._planner.seen(row) - count
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
            check_evicted(self._policy, crop, row, state.evicted_at)

    def crop(self, crop: Crop) -> Apply:
        """The attention that forgotten tokens gave stays counted."""

        def apply() -> None:
            self.rows = [state.cropped(self._planner.seen(row), crop.counts[row]) for row, state in enumerate(self.rows)]

        return apply

    def force_crop(self, counts: Sequence[int]) -> None:
        """Where heads hold different ones of the tokens that are left, every head keeps as many of those as the head that has
        fewest, its best ones."""
        planner = self._planner
        known = len(counts) == len(self.rows) and all(c <= planner.seen(row) for row, c in enumerate(counts))
        uneven: dict[int, tuple[Scores, int]] = {}
        for row, state in enumerate(self.rows if known else []):
            left = planner.seen(row) - counts[row]
            if 0 < left < state.since:
                scores = {layer: self._scores(row, layer, counts[row]) for layer in self._stores}
                held = {layer: self.positions(row, layer) < left for layer in scores}
                uneven[row] = scores, min(int(h.sum(1).min()) for h in held.values())
        for row, (scored, count) in uneven.items():
            seen = planner.seen(row)
            self._keep_best(row, scored, count, 0, (seen - counts[row], seen))

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.rows = [self.rows[row] for row in rows]

        return apply

    # ----------------------------------------------------------------------------------------------------------------- telling

    def positions(self, row: int, layer: int) -> torch.Tensor:
        """True positions of a row's residents, int64 ``[Hkv, n]``, on the CPU."""
        return self.rows[row].positions(layer, self._planner.seen(row))

    def kept(self, row: int, layer: int | None, head: int | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Positions of one row's residents and their scores; of all heads or layers together where those are None."""
        layers = list(self.rows[row].layers) if layer is None else [layer]
        if head is not None:
            at, found = layers[0], self.rows[row].layers
            if at not in found:
                return np.zeros(0, np.int64), np.zeros(0, np.float32)
            positions, given = self.positions(row, at)[head], found[at].accumulated
            scores = torch.full(positions.shape, torch.nan) if given is None else given[head].float().cpu()
            return positions.numpy(), scores.numpy()
        held = [self.positions(row, at).flatten() for at in layers if at in self.rows[row].layers]
        union = np.unique(torch.cat(held).numpy()) if held else np.zeros(0, np.int64)
        return union, np.full(len(union), np.nan, np.float32)

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> State:
        return list(self.rows), dict(self.calls)

    def return_to(self, state: State) -> None:
        self.rows, self.calls = list(state[0]), dict(state[1])

    def save(self) -> Saved:
        tensors: dict[str, torch.Tensor] = {}
        for row, state in enumerate(self.rows):
            for layer, held in state.layers.items():
                tensors[f"chosen.{layer}.{row}"] = held.chosen.clone()
                if held.queries:
                    tensors[f"queries.{layer}.{row}"] = torch.cat(held.queries, 1)
                if held.accumulated is not None:
                    tensors[f"accumulated.{layer}.{row}"] = held.accumulated.clone(memory_format=torch.contiguous_format)
        for layer, call in self.calls.items():
            if call.sink_logits is not None:
                tensors[f"sinks.{layer}"] = call.sink_logits.detach().clone()
        calls = {str(layer): [call.scale, call.softcap] for layer, call in self.calls.items()}
        return Saved({"rows": [(row.since, row.evicted_at) for row in self.rows], "calls": calls}, tensors)

    def restore(self, saved: Saved) -> None:
        calls = {layer_of(name, self._layers): numbers for name, numbers in saved.get("calls", dict).items()}
        for layer, numbers in calls.items():
            scale, softcap = listed(numbers, 2, "calls")
            softcap = of_kind(softcap, (float, int, type(None)), "calls")
            name = f"sinks.{layer}"
            sinks = saved.tensor(name, None, None).to(self._layers[layer].device) if name in saved.tensors else None
            self.calls[layer] = AttendCall(of_kind(scale, (float, int), "calls"), softcap, sinks)
        self.rows = []
        for at, told in enumerate(saved.rows("rows")):
            since, evicted_at = (of_kind(x, int, "rows") for x in listed(told, 2, "rows"))
            in_range(since, 0, saved.seen[at], "since"), in_range(evicted_at, 0, saved.seen[at], "evicted_at")
            names = {layer: f"chosen.{layer}.{at}" for layer in self.calls}
            layers = {layer: self._restored(saved, at, since, layer) for layer, name in names.items() if name in saved.tensors}
            self.rows.append(RowState(since, layers, evicted_at))

    def _restored(self, saved: Saved, row: int, since: int, layer: int) -> LayerState:
        facts, device, end = self._layers[layer], self._layers[layer].device, f".{layer}.{row}"
        heads, held = facts.num_kv_heads, self._planner.resident(0, row)
        chosen = saved.indices(f"chosen{end}", max(since, 1), heads, None)
        if chosen.shape[1] + saved.seen[row] - since != held or not bool((chosen[:, 1:] > chosen[:, :-1]).all()):
            raise SessionError(f"row {row} holds {held} tokens, and the heads of layer {layer} chose others")
        pieces: tuple[torch.Tensor, ...] = ()
        if f"queries{end}" in saved.tensors:
            pieces = (saved.tensor(f"queries{end}", None, None, None, facts.key_dim).to(device),)
        given = None
        if self.rule.accumulates and f"accumulated{end}" in saved.tensors:
            given = saved.tensor(f"accumulated{end}", torch.float32, heads, held).to(device)
        return LayerState(chosen, pieces, given)

    def reset(self) -> None:
        self.rows, self._pending = [], {}
