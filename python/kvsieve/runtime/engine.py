"""The order of one forward: it is planned once, runs once per layer, is committed, and then tokens may be evicted.

    expect(ids)            the causal LM begins; the ids are remembered
    prepare()              its decoder begins; a forward that died half-way is undone here
    attend(index, ...)     once per layer; the first one makes the plan
    complete(logits)       the causal LM returns; the forward is committed, and the policy evicts

What a policy or a model needs beside the tokens are parts (:mod:`.part`); here they are only called, in their order. Until `commit`
nothing was decided, by the planner or by any part, so an exception anywhere loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvsieve.backends.base import AttendCall, Backend, Store
from kvsieve.errors import CacheMismatchError, ShapeError, StateError
from kvsieve.runtime.exclusive import exclusive
from kvsieve.runtime.held import Held
from kvsieve.runtime.part import Apply, Forward, LayerInput, StreamPart
from kvsieve.runtime.process import defer_sigint

if TYPE_CHECKING:
    from kvsieve.facts import AttentionLayer, ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.blocks import Blocks
    from kvsieve.runtime.candidates import Pieces

__all__ = ["Engine"]

FEW = 16
"""A forward over no more tokens than these stores all of them: some may be taken back."""


class _Expected(NamedTuple):
    """What the causal LM was given, before its decoder begins."""

    ids: torch.Tensor | None
    foreign: bool


class Engine(Held):
    """One stream at work.

    Attributes:
        reads_top_k: whether some memory shows a query only the tokens with the highest logits.
        replaying: whether a captured graph runs, which is planned and committed outside; the forward itself then only computes.
    """

    def __init__(self, policy: Policy, facts: ModelFacts, backend: Backend, stored_keys: str, blocks: Blocks | None = None) -> None:
        super().__init__(policy, facts, backend, stored_keys, blocks)
        self.replaying = False
        self._layers = {layer.index: layer for layer in facts.layers}
        self._moves = policy.moves
        self._answering = [part for part in self.parts if type(part).attend is not StreamPart.attend]
        self._calls: dict[int, AttendCall] = {}
        self._first = next(i for i, kind in enumerate(facts.layer_types) if i in self._layers or kind == "sliding_attention")
        selects = [memory.roles.select for memory in policy.memories]
        self.reads_top_k = any(select.top_k for select in selects)
        self._top_k_from = max(select.from_layer if select.top_k else 0 for select in selects)
        self._with_parts = backend.capabilities.needs_parts or self.reads_top_k
        self._stores_all = len(policy.memories) > 1 or any(part.stores_all for part in self.parts)
        self._only_residents = backend.capabilities.residents_suffice and any(part.tells_reads for part in self.parts)
        self._expected: _Expected | None = None

    # -------------------------------------------------------------------------------------------------------------- one forward

    def expect(self, ids: torch.Tensor | None, *, foreign: bool = False) -> None:
        """The causal LM begins a forward over ``ids`` (integers ``[B, q]``; None when it was given embeddings).

        ``foreign`` says that a caller's `model.generate` drives it.
        """
        if self.replaying:
            return
        for part in self.parts:
            part.check_input(True, ids)
        if ids is not None and ids.dtype is torch.int32:
            ids = ids.long()  # embeddings take them as well
        self._expected = _Expected(ids, foreign and self.transcript.turn is None)

    def check_mask(self, mask: torch.Tensor, width: int) -> None:
        """A caller's mask over everything seen and ``width`` new columns must show what was read, and only that."""
        if not self.replaying:
            self.transcript.check_mask(mask, width)

    def cut(self, width: int, kept_logits: Any) -> Pieces | None:
        """How a forward over ``width`` columns is cut, whose last ``kept_logits`` logits are wanted; None if it stays whole."""
        return None if self.replaying else self.candidates.cut(self.transcript.turn, width, kept_logits)

    def prepare(self) -> None:
        """The decoder begins. Undo a forward that died; evict what the last one left because it was being verified."""
        if self.replaying:
            return
        self.blocks.check_whole()
        self.check_owner()
        if self._expected is None:
            for part in self.parts:
                part.check_input(False, None)
        if self.forward is not None:
            expected = self._expected
            self.rollback()
            self._expected = expected
        if not self.candidates.stepping:
            self.candidates.marks.clear()
            if self.candidates.verifying and self.num_rows:
                self.evict(force=False)

    def attend(
        self,
        index: int,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer: ``q`` ``[B, H, q, D]`` over the memory and the new ``k``, ``v`` ``[B, Hkv, q, D]``.

        ``mask`` is bool-like ``[B, q]`` (the padding of the new columns) or None. Returns ``[B, q, H, Dv]``.
        """
        if index == self._first and not self.replaying:
            self._open(q, mask, position_ids)
        forward = self.forward
        if forward is None or forward.step is None or forward.width != q.shape[2]:
            raise StateError(f"layer {index} ran out of order: its stream has no open step of {q.shape[2]} tokens")
        facts = self._layers.get(index)
        store = None if facts is None else self._store_of(facts, module, k, v)
        call = self._calls.get(index)
        if call is None or call.scale != scale or call.softcap != softcap or call.sink_logits is not sinks:
            call = self._call(index, scale, softcap, sinks)
        if self._answering:
            layer = LayerInput(index, q, k, v, call, forward, store)
            for part in self._answering:
                out = part.attend(layer)
                if out is not None:
                    return out
        assert store is not None
        return store.run(q, k, v, forward.step, call)

    def _call(self, index: int, scale: float, softcap: float | None, sinks: torch.Tensor | None) -> AttendCall:
        """What is the layer's own, kept for its next token."""
        facts = self._layers.get(index)
        rope = facts.rope if facts is not None and self._moves else None
        made = self._calls[index] = AttendCall(scale, softcap, sinks, rope, self.reads_top_k and index >= self._top_k_from)
        return made

    def _store_of(self, facts: AttentionLayer, module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor) -> Store:
        if module is not facts.module:
            raise CacheMismatchError(f"layer {facts.index} of this cache was handed to another model's attention")
        store = self.stores.get(facts.index)
        if store is None:
            _check_like(facts, k, v)
            with self.lock:  # another thread may read on a fork
                store = self.stores.get(facts.index) or self.make_store(facts.index, k, v)
        return store

    def make_store(self, index: int, k: torch.Tensor, v: torch.Tensor) -> Store:
        """An empty store for layer ``index``, for keys and values like these (``[B, Hkv, q, D]``); its own once all parts know."""
        store = self.backend.make_store(k, v)
        for part in self.parts:
            part.new_store(index, store)
        self.stores[index] = store
        return store

    def _open(self, q: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
        batch, width = q.shape[0], q.shape[2]
        if self.num_rows and batch != self.num_rows:
            raise CacheMismatchError(
                f"the stream holds {self.num_rows} sequences, the input has {batch}; open a stream for each batch size"
            )
        foreign = self._expected is not None and self._expected.foreign
        forward = self._planned(self.transcript.real_tokens(mask, batch, width, foreign), width)
        if self.transcript.turn is not None:
            self.positions.start(batch, anew=not self.num_rows)
        else:
            self.positions.check(position_ids, forward, first=not self.columns)
        self._begin(forward)

    def open(self, lens: list[int], width: int) -> Forward:
        """Plan a forward over ``width`` columns, of which the last ``lens[row]`` of each row are real tokens."""
        return self._begin(self._planned(lens, width))

    def _planned(self, lens: list[int], width: int) -> Forward:
        ids, foreign = self._expected or (None, False)
        seen = self.blocks.seen or [0] * len(lens)
        turn = self.transcript.turn
        longer = () if turn is None else turn.longer(len(lens))
        answered = turn is None or turn.answers
        return Forward(lens, width, seen, self.candidates.verifying, foreign, ids, longer=longer, answered=answered)

    @exclusive
    def _begin(self, forward: Forward) -> Forward:
        for watcher in self.watchers:
            watcher.begins(forward)
        for part in self.parts:
            part.begin(forward)
        store_all = self._stores_all or forward.width <= FEW or forward.verifying
        if self._only_residents:
            forward.step = self.planner.begin_residents(forward.lens, forward.width)
        else:
            forward.step = self.planner.begin(forward.lens, forward.width, store_all, self._with_parts)
        self.forward = forward
        return forward

    def decoded(self, hidden: torch.Tensor) -> None:
        """The decoder returned ``hidden`` ``[B, q, hidden]``. Without a causal LM around it, the forward ends here."""
        if self.replaying or self.forward is None:
            return
        self.forward.hidden = hidden
        if self._expected is None:
            self._finish(self.forward)

    def complete(self, logits: torch.Tensor) -> None:
        """The causal LM returned ``logits`` ``[B, r, V]`` of its last ``r`` columns."""
        if self.replaying:
            return
        self._expected = None
        if self.forward is not None:
            self.forward.logits = logits
            self._finish(self.forward)

    def _finish(self, forward: Forward) -> None:
        """The model is through: its tokens count, and the policy may evict."""
        self._commit(forward, [part.commit(forward) for part in self.parts])

    @exclusive
    def _commit(self, forward: Forward, changes: list[Apply]) -> None:
        with defer_sigint():
            self.planner.commit()
            self.forward = None
            for change in changes:
                change()
            if self.candidates.stepping or not self.candidates.verifying:
                self.evict(force=forward.width > 1)
            if not self.candidates.verifying:
                self.settled()

    @exclusive
    def close(self, ids: torch.Tensor | None = None) -> None:
        """A forward over ``ids`` that was opened by :meth:`open` is over; the caller scores its tokens, and evicts."""
        forward, self._expected = self.forward, None
        assert forward is not None
        forward.ids = ids
        changes = [part.commit(forward) for part in self.parts]
        self.planner.commit()
        self.forward = None
        for change in changes:
            change()

    def rollback(self) -> None:
        self._expected = None
        super().rollback()


def _check_like(facts: AttentionLayer, k: torch.Tensor, v: torch.Tensor) -> None:
    want = (facts.num_kv_heads, facts.key_dim, facts.value_dim, facts.dtype, facts.device)
    got = (k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
    if want != got:
        raise ShapeError(
            f"when the stream opened, layer {facts.index} had keys and values of {want[0]} heads of sizes {want[1]} and {want[2]} "
            f"in {want[3]} on {want[4]}; now {got[0]} heads of sizes {got[1]} and {got[2]} in {got[3]} on {got[4]}; "
            "open a new stream"
        )
