"""One stream's memory at work: plans once per forward, runs once per layer, lets go after attention.

The order of one forward (the seam in :mod:`kvsieve.model` calls these):

    expect(ids)            the causal LM begins; the ids are remembered for scoring
    prepare()              its decoder begins; a forward that died half-way is undone here
    attend(layer, ...)     once per layer; the first one makes the plan. Sliding layers read :mod:`.sliding`
    complete(logits)       the causal LM returns; tokens are scored, the step is committed, the policy lets go

The control plane (`_core.Planner`) is two-phase: until `commit` nothing was decided, so an exception anywhere loses nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.backends.base import AttendCall, Backend, SelectionState, Store, check_stream
from kvsieve.backends.heap import trim_heap
from kvsieve.budget import BLOCK
from kvsieve.errors import CacheMismatchError, PaddingError, PolicyError, ShapeError, StateError
from kvsieve.policy.evict import Residents
from kvsieve.policy.position import Rebased
from kvsieve.policy.specs import make_planner
from kvsieve.runtime import pinning
from kvsieve.runtime.compression import make_packer
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.exclusive import exclusive
from kvsieve.runtime.head_eviction import Observer, RowState
from kvsieve.runtime.process import defer_sigint
from kvsieve.runtime.sliding import SlidingLayers, SlidingState
from kvsieve.runtime.surprisal import Scorer
from kvsieve.runtime.transcript import Row, Transcript, TranscriptState
from kvsieve.runtime.turn import Pieces, Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvsieve._core import Moves, Planner, Step
    from kvsieve.facts import ModelFacts
    from kvsieve.model.cache import StreamLayer
    from kvsieve.policy.compose import Policy
    from kvsieve.policy.select import SparseSelection
    from kvsieve.policy.specs import EvictionSpec
    from kvsieve.policy.storage import Channels
    from kvsieve.runtime.pinning import Rows

__all__ = ["Engine", "EngineState"]


@dataclass(frozen=True, eq=False)
class EngineState:
    """What it takes to return to a moment. Blocks are shared with the present until the present writes to them."""

    planner: Planner
    transcript: TranscriptState
    tail: torch.Tensor | None
    observed: list[RowState]
    calls: dict[int, AttendCall]
    sliding: SlidingState
    packed: Any
    chosen: dict[int, Any]
    offsets: list[int | None] | None
    searched: tuple[bool, bool]
    evicted_at: list[int]
    axes: bool


MAX_CANDIDATES = 16
"""Where candidates are verified, a forward over more tokens than this reads a prompt as well."""


class Engine:
    """The memory of one stream: a planner, one store per layer, and a scorer if the policy needs one."""

    def __init__(
        self, policy: Policy, facts: ModelFacts, backend: Backend, stored_keys: str, planner: Planner | None = None
    ) -> None:
        self.policy, self.facts, self.backend, self.stored_keys = policy, facts, backend, stored_keys
        self.planner = planner or make_planner(policy.specs(facts.bytes_per_token), stored_keys)
        self.lock = threading.RLock()
        self.stores: dict[int, Store] = {}
        self.scorer = Scorer(policy, facts, backend) if policy.needs_surprisal else None
        self.packer = make_packer(policy.compression, facts.layers, raw=stored_keys == "pre_rope")
        self.observer = Observer.of(policy, facts.bytes_per_token)
        if self.observer is not None:
            self.observer.all_layers = self._all_layers
        self.search = policy.selection
        self.searches: dict[int, SelectionState] = {}
        """Of each layer that has searched, what its rows have chosen."""
        self.searching = False
        """Whether the last forward searched, in the layers that do."""
        self.beyond = False
        """Whether what it read stood side by side, because the text is longer than the model was trained for."""
        self._read: list[npt.NDArray[np.int64]] = []
        self._searched: set[int] = set()
        self._rules: dict[tuple[int, bool], SparseSelection | None] = {}
        self.recording = False
        self.replaying = False
        """Whether :mod:`kvsieve.graphs` plans and commits; the forward itself then only computes."""
        self.transcript = Transcript()
        self.evicted_at: list[int] = []
        """Tokens that each row had seen when it last evicted some: a crop to before that moment would not be exact."""
        self.axes = False
        """Whether an image was read whose positions have several axes: where text goes on then, only the model knows."""
        self._bounded = any(memory.roles.evict.evicts for memory in policy.memories)
        self.turn: Turn | None = None
        """The stream's own call that feeds the model now; None while a caller's own loop does."""
        self.inner = False
        """Whether a piece of a forward is being read."""
        self.stepping = False
        """Whether the pieces are candidates, verified one by one."""
        self._pieces: list[Any] | None = None
        self._marks: list[EngineState] = []
        self.hidden: torch.Tensor | None = None
        self.broken: str | None = None
        """What went wrong half-way through a change that all layers must make together; the stream is then of no use."""
        self._layers = {layer.index: layer for layer in facts.layers}
        if planner is None:
            packings = () if self.packer is None else self.packer.packing.values()
            check_stream(backend, facts.layers, stored_keys, packings, self.search)
        self.sliding = SlidingLayers.of(facts)
        self._first = min([facts.layers[0].index, *self.sliding.windows])
        self._step: Step | None = None
        self._step_owner: threading.Thread | None = None
        self._ids: torch.Tensor | None = None
        self._whole_model = self._foreign = False
        self._offsets: list[int | None] | None = None
        self._top_k_from = [m.roles.select.from_layer if m.roles.select.top_k else 0 for m in policy.memories]
        self._selects = any(m.roles.select.top_k for m in policy.memories)

    # ------------------------------------------------------------------------------------------------------------ what is held

    @property
    def columns(self) -> int:
        """Columns seen, pads included: what `generate` must be told."""
        return self.transcript.columns

    @property
    def num_rows(self) -> int:
        """Sequences in the batch; 0 before the first forward."""
        return self.planner.num_rows

    @property
    def resident(self) -> int:
        """Tokens held by the fullest row, over all memories of the chain."""
        memories = range(len(self.policy.memories))
        return max((sum(self.planner.resident(m, row) for m in memories) for row in range(self.num_rows)), default=0)

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that the allocator holds, the sliding layers' included."""
        return sum(store.bytes_held for store in self.stores.values()) + self.sliding.bytes_held

    def read_positions(self, row: int) -> npt.NDArray[np.int64]:
        """Positions of the tokens that a row held when the last forward read them."""
        return self._read[row] if row < len(self._read) else self.planner.positions(0, row)

    # -------------------------------------------------------------------------------------------------------------- one forward

    def expect(self, ids: torch.Tensor | None, *, foreign: bool = False) -> None:
        """The causal LM begins a forward over ``ids`` (int64 ``[B, q]``; None when it was given embeddings).

        ``foreign`` says that a caller's `model.generate` drives it.
        """
        if self.replaying:
            return
        if self.scorer is not None and ids is None:
            raise StateError(f"{self.policy!r} scores tokens by their ids: pass input_ids, not inputs_embeds")
        self._ids, self._whole_model, self._foreign = ids, True, foreign and self.turn is None

    def check_mask(self, mask: torch.Tensor, width: int) -> None:
        """A caller's mask over everything seen and ``width`` new columns must show what was read, and only that."""
        if self.turn is None and not self.replaying:
            self.transcript.check_mask(mask, width)

    def pieces(self, batch: int, width: int, keep: Any) -> Pieces | None:
        """How a forward over ``width`` columns, of whose last ``keep`` the logits are wanted, is cut; None if it stays whole."""
        if self.inner or self.replaying:
            return None
        self.end_pieces()
        if self.steps_through(width, keep):
            ends = list(range(width - keep + 1, width + 1))
            return Pieces(tuple(zip([0, *ends[:-1]], ends)), verifying=True)
        turn = self.turn
        if turn is None or turn.left != turn.width:
            return None
        last = width - 1 if turn.copies > 1 else width - max(keep if isinstance(keep, int) else 1, 1)
        cuts = [*range(0, last, turn.chunk), last, width] if turn.copies > 1 else [*range(0, last + 1, turn.chunk), width]
        cuts = sorted(set(cuts))
        if turn.copies == 1 and len(cuts) == 2:
            return None
        return Pieces(tuple(pairwise(cuts)), copies=turn.copies)

    def begin_pieces(self, verifying: bool) -> None:
        """The forward under way is read in pieces; their outputs are kept."""
        self.inner, self.stepping, self._pieces = True, verifying, []

    def piece_read(self, output: Any) -> None:
        """A piece was read."""
        assert self._pieces is not None
        self._pieces.append((output.logits[:, -1:] if self.stepping else None, output.hidden_states))
        if self.stepping:
            self._marks.append(self.state())

    def end_pieces(self) -> None:
        """Nothing is read in pieces any more."""
        self.inner, self.stepping, self._pieces = False, False, None

    def whole(self, output: Any) -> None:
        """The last piece's ``output`` becomes that of the whole forward."""
        if self.inner or self._pieces is None:
            return
        pieces = self._pieces
        if self.stepping:
            output.logits = torch.cat([*(logits for logits, _ in pieces), output.logits], 1)
        if output.hidden_states is not None and all(states is not None for _, states in pieces):
            every = [*(states for _, states in pieces), output.hidden_states]
            copies = output.hidden_states[0].shape[0]
            output.hidden_states = tuple(
                torch.cat([x.repeat_interleave(copies // x.shape[0], 0) for x in layer], 1) for layer in zip(*every)
            )
        self.stepping, self._pieces = False, None

    def steps_through(self, width: int, kept_logits: Any) -> bool:
        """Whether a forward over ``width`` tokens, of which the last ``kept_logits - 1`` are candidates, must go one by one.

        Only while candidates are verified, and only where what they see may depend on how many came before: a score-based rule that
        could act among them, or a chain, whose later memories receive between forwards. What heads observe depends on it always.
        """
        if not self.recording or self.stepping or not isinstance(kept_logits, int) or not 1 <= kept_logits <= width:
            return False
        if self.observer is not None or (self.search is not None and self.resident + width > self.search.dense_until):
            return True
        if self.packer is not None and self.packer.may_act(self.planner, width, width > kept_logits):
            return True
        resident = self.resident + width
        specs = self.policy.specs(self.facts.bytes_per_token)
        if len(specs) > 1:
            return resident > (specs[0].evict.window or specs[0].evict.budget) - pinning.most(self)
        limits = [spec.evict.budget for spec in specs if spec.evict.budget]
        slack = 0 if width > kept_logits else BLOCK - 1
        return bool(limits) and resident > min(limits) + slack

    @exclusive
    def state(self) -> EngineState:
        """What it takes to return to this moment."""
        observer = self.observer
        return EngineState(
            planner=self.planner.fork(),
            transcript=self.transcript.state(),
            tail=None if self.scorer is None else self.scorer.tail,
            observed=[] if observer is None else list(observer.rows),
            calls={} if observer is None else dict(observer.calls),
            sliding=self.sliding.now,
            packed=None if self.packer is None else self.packer.state(),
            chosen=self._chosen(),
            offsets=None if self._offsets is None else list(self._offsets),
            searched=(self.searching, self.beyond),
            evicted_at=list(self.evicted_at),
            axes=self.axes,
        )

    @exclusive
    def return_to(self, state: EngineState) -> None:
        """Make ``state``, of this engine or of a fork of it, the present; it can be returned to again."""
        self.planner = state.planner.fork()
        self.transcript.return_to(state.transcript)
        if self.scorer is not None:
            self.scorer.tail = state.tail
        if self.observer is not None:
            self.observer.rows, self.observer.calls = list(state.observed), dict(state.calls)
        if self.packer is not None:
            self.packer.return_to(state.packed)
        self._offsets = None if state.offsets is None else list(state.offsets)
        self.searching, self.beyond = state.searched
        self.evicted_at = list(state.evicted_at)
        self.axes = state.axes
        self._choose_again(state.chosen)
        self.sliding.now = state.sliding

    def _chosen(self) -> dict[int, Any]:
        return {index: search.state() for index, search in self.searches.items()}

    def _choose_again(self, chosen: dict[int, Any]) -> None:
        """Return to what was chosen then; layers that had not chosen choose anew."""
        for search in [search for index, search in self.searches.items() if index not in chosen]:
            search.reset()
        for index, choice in chosen.items():
            found = self._search_of(index)
            if found is not None:
                found.return_to(choice)

    def prepare(self) -> None:
        """The decoder begins. Undo a forward that died; let go of what the last one left because it was being verified."""
        if self.replaying:
            return
        self._check_whole()
        self.check_owner()
        if self.scorer is not None and not self._whole_model:
            raise StateError(f"{self.policy!r} scores tokens by the model's logits: call the causal LM, not its base model")
        if self._step is not None:
            whole, ids, foreign = self._whole_model, self._ids, self._foreign
            self.rollback()
            self._whole_model, self._ids, self._foreign = whole, ids, foreign
        if not self.stepping:
            self._marks.clear()
            if self.recording and self.num_rows:
                self.settle(force=False)

    @exclusive
    def rollback(self) -> None:
        """Undo an unfinished forward, in every layer; without one, do nothing."""
        self.hidden, self._whole_model = None, False
        if self.observer is not None:
            self.observer.rollback()
        if self.packer is not None:
            self.packer.rollback()
        if self._step is not None:
            self._step = None
            self.planner.rollback()
        for index in self._searched:
            self.searches[index].undo()
        self._searched.clear()
        self.sliding.rollback()

    def attend(
        self,
        layer: StreamLayer,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer: ``q`` ``[B, H, q, D]`` over the memory and the new ``k``, ``v`` ``[B, Hkv, q, D]``.

        ``mask`` is bool-like ``[B, q]`` (the padding of the new columns) or None. Returns ``[B, q, H, Dv]``.
        """
        if layer.index == self._first and not self.replaying:
            self._open(q, mask, position_ids)
        step = self._step
        if step is None or step.num_queries != q.shape[2]:
            raise StateError(f"layer {layer.index} ran out of order: its stream has no open step of {q.shape[2]} tokens")
        if layer.is_sliding:
            return self.sliding.attend(layer.index, q, k, v, AttendCall(scale, softcap, sinks))
        facts = self._layers[layer.index]
        if module is not facts.module:
            raise CacheMismatchError(f"layer {layer.index} of this cache was handed to another model's attention")
        store = self.stores.get(layer.index)
        if store is None:
            _check_like(facts, k, v)
            with self.lock:
                store = self.stores.get(layer.index) or self.make_store(layer.index, k, v)
        if self.packer is not None:
            self.packer.observe(layer.index, q, step.new_lens, self.planner)
        top_k = self._selects and layer.index >= max(self._top_k_from)
        rope = facts.rope if self.policy.moves else None
        by_content = self.stored_keys == "pre_rope" and (self.beyond or not isinstance(self.policy.memories[0].position, Rebased))
        call = AttendCall(scale, softcap, sinks, rope, top_k, by_content, self.beyond)
        if self.observer is not None:
            return self.observer.run(layer.index, store, q, k, v, step, call)
        if self.searching and (search := self._search_of(layer.index)) is not None:
            out = store.run_selected(q, k, v, step, call, search)
            # Only now is there something to undo.
            self._searched.add(layer.index)
            return out
        return store.run(q, k, v, step, call)

    def _search_of(self, index: int) -> SelectionState | None:
        """The choices of layer ``index``; None if it reads everything."""
        if self.search is None:
            return None
        which = index, self.beyond
        if which not in self._rules:
            self._rules[which] = self.search.for_layer(*which)
        rule = self._rules[which]
        if rule is None:
            return None
        if index not in self.searches:
            self.searches[index] = self.backend.make_selection(rule)
        return self.searches[index]

    def make_store(self, index: int, k: torch.Tensor, v: torch.Tensor) -> Store:
        """An empty store for layer ``index``, for keys and values like these (``[B, Hkv, q, D]``)."""
        store = self.backend.make_store(k, v)
        if self.packer is not None:
            store.set_packing(self.packer.packing[index])
        self.stores[index] = store
        return store

    def decoded(self, hidden: torch.Tensor) -> None:
        """The decoder returned ``hidden`` ``[B, q, hidden]``. Without a causal LM around it, the forward ends here."""
        if self.replaying:
            return
        self.hidden = hidden
        if not self._whole_model and self._step is not None:
            with defer_sigint():
                self._commit()

    def complete(self, logits: torch.Tensor) -> None:
        """The causal LM returned ``logits`` ``[B, r, V]`` of its last ``r`` columns."""
        if self.replaying:
            return
        self._whole_model = False
        hidden, self.hidden = self.hidden, None
        if self._step is None:
            return
        if self.scorer is None or self._ids is None or hidden is None:
            with defer_sigint():
                self._commit()
            return
        scores, tail = self.scorer.score(self._ids, hidden, logits, self._step.new_lens, keep_rows=self.recording)
        with defer_sigint():
            self._commit(scores)
            self.scorer.tail = tail

    def _open(self, q: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
        batch, width = q.shape[0], q.shape[2]
        if self.num_rows and batch != self.num_rows:
            raise CacheMismatchError(
                f"the stream holds {self.num_rows} sequences, the input has {batch}; open a stream for each batch size"
            )
        if self.turn is not None:
            lens = self.turn.lens(batch, width)
            self._offsets = [0] * batch if self._offsets is None or not self.num_rows else self._offsets
        else:
            lens = self._valid(mask, batch, width)
            self._check_positions(position_ids, lens)
        self.open(lens, width)

    @exclusive
    def open(self, lens: list[int], width: int) -> Step:
        """Plan a forward over ``width`` columns, of which the last ``lens[row]`` of each row are real tokens."""
        if self.packer is not None and (width == 1 or self.recording):
            self.pack(prompt_ended=self.packer.reading)
        parts = self.backend.capabilities.needs_parts or self._selects
        store_all = self.scorer is not None or width <= 16 or len(self.policy.memories) > 1 or self.recording
        if self.search is not None:
            store_all = True
            held = [self.planner.resident(0, row) if self.num_rows else 0 for row in range(len(lens))]
            longest = max(old + new for old, new in zip(held, lens))
            self.searching = longest > self.search.dense_until
            place = self.policy.memories[0].position
            if isinstance(place, Rebased):
                after = self.facts.trained_length if place.after is None else place.after
                seen = [self.planner.seen(row) if self.num_rows else 0 for row in range(len(lens))]
                self.beyond = after is not None and max(old + new for old, new in zip(seen, lens)) > after
        seen = [self.planner.seen(row) if self.num_rows else 0 for row in range(len(lens))]
        self._step = self.planner.begin(lens, width, store_all, parts)
        self._step_owner = threading.current_thread()
        self.sliding.begin(seen, lens, width)
        return self._step

    @exclusive
    def close(self, ids: torch.Tensor | None = None) -> None:
        """The planned forward over ``ids`` is over and its tokens are seen; the caller scores them and lets go."""
        sliding = self.sliding.after_step(self.recording)
        self._record(ids)
        self.planner.commit()
        self.sliding.commit(sliding)
        self._step = None
        self._searched.clear()
        self._whole_model, self._ids = False, None
        if self.packer is not None:
            self.packer.commit(reading=False)

    def _valid(self, mask: torch.Tensor | None, batch: int, width: int) -> list[int]:
        """Real tokens among the new columns of each row; they must be the last ones."""
        lens = [width] * batch
        if mask is not None:
            rows = mask.to(torch.bool)
            if not bool(rows.all()):
                lens = rows.sum(1).tolist()
                if bool((rows[:, :-1] & ~rows[:, 1:]).any()):
                    row = int((rows[:, :-1] & ~rows[:, 1:]).any(1).nonzero()[0])
                    raise PaddingError(f"row {row} has a pad after a real token; pad on the left (tokenizer.padding_side = 'left')")
        for row in range(batch if width == 1 and self.columns else 0):
            # A caller's own loop may begin a row late; `generate` would sample after pads.
            if not self.planner.seen(row) and (mask is None or self._foreign):
                raise PaddingError(f"row {row} has no real token: all of its {self.columns} columns are pads")
        return lens

    def _check_positions(self, position_ids: torch.Tensor | None, lens: list[int]) -> None:
        """The model must be told positions that go on where the stream stands, or rotated keys would lie."""
        if position_ids is None or position_ids.dim() != 2 or position_ids.device.type != "cpu":
            return
        last = position_ids[:, -1].tolist()
        last = last * len(lens) if len(last) == 1 else last
        seen = [self.planner.seen(row) if self.num_rows else 0 for row in range(len(lens))]
        offsets = [at - (s + n - 1) if s + n else None for at, s, n in zip(last, seen, lens)]
        known = self._offsets if self._offsets is not None and self.columns else [None] * len(lens)
        self._offsets = [now if before is None else before for now, before in zip(offsets, known)]
        if self.stored_keys == "pre_rope":
            self._check_each_position(position_ids, lens, seen)
        for row, (now, before) in enumerate(zip(offsets, self._offsets)):
            if now != before:
                raise CacheMismatchError(
                    f"row {row}: the model was told that these tokens end at position {last[row]}, "
                    f"but the stream has seen {seen[row]} and got {lens[row]}; "
                    "use stream.generate(), or an attention mask over everything seen"
                )

    def _check_each_position(self, position_ids: torch.Tensor, lens: list[int], seen: list[int]) -> None:
        """Where keys are rotated when they are read, positions with gaps or in another order cannot be followed."""
        told, width = position_ids.expand(len(lens), -1), position_ids.shape[1]
        for row, count in enumerate(lens):
            mine = told[row, width - count :]
            if count > 1 and not torch.equal(mine, torch.arange(int(mine[-1]) - count + 1, int(mine[-1]) + 1)):
                raise CacheMismatchError(
                    f"row {row}: the model was told positions {mine[:3].tolist()}... to {int(mine[-1])} for {count} tokens from "
                    f"number {seen[row]} on: {self.policy!r} counts tokens itself; leave position_ids out"
                )

    def _record(self, ids: torch.Tensor | None) -> None:
        """Note what the open step reads."""
        step, turn = self._step, self.turn
        if step is None:
            return
        width = step.num_queries
        self.transcript.commit(ids, step.new_lens, width, own=turn is not None, foreign=self._foreign)
        if turn is not None:
            turn.committed(width)

    def offsets(self, batch: int) -> list[int]:
        """What the model's positions are ahead of the tokens that each row has seen; 0 unless a caller began elsewhere."""
        known = self._offsets or []
        return [offset or 0 for offset in known] if len(known) == batch else [0] * batch

    @exclusive
    def _commit(self, scores: list[npt.NDArray[np.float32]] | None = None) -> None:
        """The forward is over: its tokens are seen, and the policy may let go."""
        sliding = self.sliding.after_step(self.recording)
        self._record(self._ids)
        self.planner.commit()
        self.sliding.commit(sliding)
        if self.search is not None:
            # What is let go below was read all the same.
            evicts = self.policy.memories[0].roles.evict.evicts
            self._read = [self.planner.positions(0, row).copy() for row in range(self.num_rows if evicts else 0)]
        if self.observer is not None:
            self.observer.commit()
        for row, values in enumerate(scores or []):
            if len(values):
                self.planner.set_scores(row, values)
        step, self._step = self._step, None
        self._searched.clear()
        if self._bounded and step is not None and not self.evicted_at:
            self.evicted_at = [0] * self.num_rows
        if self.packer is not None and step is not None:
            self.packer.commit(reading=step.num_queries > (MAX_CANDIDATES if self.recording else 1))
        if self.stepping or not self.recording:
            self.settle(force=step is not None and step.num_queries > 1)
        # Among candidates some may still be taken back, so what is verified is packed when the next forward opens.
        if self.packer is not None and self.packer.reading and self.packer.role.when == "prefill" and not self.recording:
            self.pack(prompt_ended=True)

    # ---------------------------------------------------------------------------------------------------------------- letting go

    @exclusive
    def settle(self, force: bool, turn_ended: bool = False) -> None:
        """Let the policy let go. Without ``force`` a score-based rule waits until it is a whole block over budget."""
        before = self._residents()
        self._evict(force, turn_ended)
        self._note_evictions(before)
        if force:
            self.free_unused()

    def _residents(self) -> list[list[int]]:
        """Tokens that each memory of each row holds."""
        if not self._bounded:
            return []
        memories = range(len(self.policy.memories))
        return [[self.planner.resident(m, row) for m in memories] for row in range(self.num_rows)]

    def _note_evictions(self, before: list[list[int]]) -> None:
        for row, (old, new) in enumerate(zip(before, self._residents())):
            # A window may leave out what it would evict at once: then it holds less than it was given.
            if old != new or (sum(new) < self.planner.seen(row) and not self.evicted_at[row]):
                self.evicted_at[row] = self.planner.seen(row)

    def _evict(self, force: bool, turn_ended: bool) -> None:
        self._apply(self.planner.settle(force))
        if self.observer is not None:
            self.observer.settle(self.planner, self.stores, force)
        for index, memory in enumerate(self.policy.memories):
            spec = memory.roles.evict.spec(self.facts.bytes_per_token)
            if spec.rule == "own" and self.observer is None:
                self._settle_own(index, spec, force, turn_ended)

    def _settle_own(self, index: int, spec: EvictionSpec, force: bool, turn_ended: bool) -> None:
        rule, budget = self.policy.memories[index].roles.evict, spec.budget
        for row in range(self.num_rows):
            count = self.planner.resident(index, row)
            if count <= budget or (not force and count < budget + BLOCK):
                continue
            positions, first = self.planner.positions(index, row), index == 0
            pinned = pinning.pinned(self.planner.pins(row) if first else [], positions)
            residents = Residents(positions, self.planner.scores(index, row), self.planner.seen(row), turn_ended, pinned)
            kept = [int(i) for i in rule.keep(residents)]
            if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < count):
                raise PolicyError(f"{type(rule).__name__}.keep must return ascending indices below {count}, got {kept[:4]}...")
            # Of the first memory the sinks are positions: some may have been evicted by name.
            sinks = int((positions < spec.sinks).sum()) if first else spec.sinks
            must = {*range(sinks), *range(count - spec.recent, count)}
            if len(kept) > budget or not must <= set(kept):
                raise PolicyError(
                    f"{type(rule).__name__}.keep returned {len(kept)} of {count} residents; it must return at most {budget}, "
                    f"the first {sinks} and the last {spec.recent} among them"
                )
            self._apply(self.planner.keep(index, row, pinning.with_pinned(kept, must, pinned, budget)))

    @exclusive
    def pack(self, prompt_ended: bool) -> None:
        """Pack what has settled. A layer's plain blocks are given back before the next layer's are packed; after a prompt the
        system gets back what is free."""
        packer, planner = self.packer, self.planner
        if packer is None:
            return
        due = [(row, packer.due(planner, row, prompt_ended)) for row in range(self.num_rows)]
        due = [(row, upto) for row, upto in due if upto > planner.num_packed(row)]
        if due:
            self._pack(due, [packer.choose(planner, self.stores, row, upto) for row, upto in due], prompt_ended)
        packer.reading = packer.reading and not prompt_ended

    @exclusive
    def restore_packed(self, packed: list[int], reading: bool, saved: dict[str, torch.Tensor]) -> None:
        """Pack again what was packed when the stream was saved: the first ``packed[row]`` tokens of each row."""
        if self.packer is None:
            return
        due = [(row, count) for row, count in enumerate(packed) if count]
        self._pack(due, [self.packer.restored(row, saved) for row, _ in due], prompt_ended=True)
        self.packer.restore(len(packed), reading, saved)

    def _pack(self, due: list[tuple[int, int]], chosen: list[dict[int, Channels] | int], prompt_ended: bool) -> None:
        packer, planner = self.packer, self.planner
        if packer is None:
            return
        before, stores = planner.fork(), list(self.stores.items())
        with defer_sigint():
            try:
                done = [(planner.pack(row, upto, packer.role.align, copies=1), mine) for (row, upto), mine in zip(due, chosen)]
                packer.run(*stores[0], done)
            except BaseException:
                # Nothing was taken from anywhere yet. The first layer is the one that may not find room: each gives back more than
                # the next one needs.
                self.planner = before
                raise
            # Only now may plain blocks go.
            del before
            for row, _ in due:
                packer.packed(row, planner)
            with self._all_layers("packing"):
                # What was freed is given back before tokens are moved there: a tail then takes the memory that it fills.
                packed = planner.blocks_in_use(), planner.packed_in_use()
                moves = planner.tidy()
                tidied = planner.blocks_in_use(), planner.packed_in_use()
                for index, store in stores:
                    if index != stores[0][0]:
                        packer.run(index, store, done)
                    store.free_unused(*packed)
                    if len(moves):
                        store.apply(moves)
                        store.free_unused(*tidied)
        if prompt_ended:
            trim_heap()

    @contextmanager
    def _all_layers(self, what: str) -> Iterator[None]:
        """A change that all layers must make. Ctrl-C waits until it is made; after any other error the stream is of no use."""
        with defer_sigint():
            try:
                yield
            except BaseException as error:
                self.broken = f"{what} failed in the midst of the layers ({type(error).__name__}: {error})"
                raise

    def _check_whole(self) -> None:
        if self.broken is not None:
            raise StateError(f"{self.broken}, so they no longer hold the same tokens; reset this stream, or open another")

    def _apply(self, moves: Moves) -> None:
        if len(moves):
            with self._all_layers("letting go"):
                for store in self.stores.values():
                    store.apply(moves)

    @exclusive
    def free_unused(self) -> None:
        """Give memory that no block uses back to the allocator."""
        self._free()
        moves = self.planner.tidy()
        if len(moves):
            self._apply(moves)
            self._free()

    def _free(self) -> None:
        in_use, packed = self.planner.blocks_in_use(), self.planner.packed_in_use()
        for store in self.stores.values():
            store.free_unused(in_use, packed)

    @exclusive
    def end_turn(self) -> None:
        """Scores decay, the budget holds exactly, memory is given back."""
        self._check_whole()
        self.planner.decay([getattr(m.roles.evict, "decay", 1.0) for m in self.policy.memories])
        self.settle(force=True, turn_ended=True)
        if self.packer is not None:
            self.pack(prompt_ended=self.packer.reading)

    # ------------------------------------------------------------------------------------------------------------- what callers do

    def check_crop(self, count: int, *, to_read_again: bool = False) -> None:
        """Refuse, before anything changes, to forget ``count`` columns if that cannot be exact.

        ``to_read_again`` says that they are read again at once.

        Raises:
            CacheMismatchError, StateError: if there are not so many, or what came before them is gone.
        """
        self._check_whole()
        if 0 < count <= len(self._marks):
            return
        counts = self.transcript.tokens_in_last(count)
        self.sliding.check_crop(self.transcript.seen(), counts)
        if self.observer is not None:
            self.observer.check_crop(self.planner, counts)
        # The score of the token that comes next needs the logits of the last one that stays: it is read again where they are gone.
        again = 0 if to_read_again or self.scorer is None or self.scorer.covers(count) else 1
        if self.packer is not None:
            self.packer.check_crop(self.planner, [gone + again if gone else 0 for gone in counts])
        for row, (gone, settled) in enumerate(zip(counts, self.evicted_at)):
            seen = self.planner.seen(row)
            if gone and 0 < seen - gone < settled + again:
                most = max(seen - settled - again, 0)
                raise CacheMismatchError(
                    f"row {row}: cannot forget {gone} tokens: {self.policy!r} evicted others when the row had seen {settled}, "
                    f"which a text of {seen - gone} tokens would still hold; at most {most} can be forgotten; {GO_BACK}"
                )

    @exclusive
    def crop(self, count: int, *, to_read_again: bool = False) -> None:
        """Forget the newest ``count`` columns, and what was said after them."""
        self.idle()
        self.check_crop(count, to_read_again=to_read_again)
        if 0 < count <= len(self._marks):
            self.return_to(self._marks[-count])
        elif count:
            with pinning.keep_pins(self, keep=self.recording):
                self._crop(self.transcript.tokens_in_last(count))
            if self.scorer is not None:
                self.scorer.crop(count)
            self.transcript.crop(count)
        self._marks = []
        if self.turn is not None:
            self.turn.cropped(count, max(self.transcript.seen(), default=0))
        if self.recording and self.num_rows:
            self.settle(force=False)

    def _crop(self, counts: list[int]) -> None:
        sliding = self.sliding.cropped(counts)
        self.planner.crop_rows(counts)
        self.sliding.now = sliding
        self.evicted_at = [min(at, self.planner.seen(row)) for row, at in enumerate(self.evicted_at)]
        if self.observer is not None:
            self.observer.crop(self.planner, counts)
        if self.packer is not None:
            self.packer.crop(self.planner, counts)

    @exclusive
    def crop_rows(self, counts: list[int]) -> None:
        """Forget the newest ``counts[row]`` tokens of each row, which it did not say."""
        self.idle()
        self.sliding.check_crop(self.transcript.seen(), counts)
        sliding = self.sliding.cropped(counts)
        with pinning.keep_pins(self):
            if self.observer is not None:
                self.observer.crop_rows(self.planner, self.stores, counts)
            else:
                self.planner.crop_rows(counts)
        self.sliding.now = sliding
        if self.packer is not None:
            self.packer.crop(self.planner, counts)
        if self.scorer is not None:
            self.scorer.forget_rows([row for row, count in enumerate(counts) if count])
        self.transcript.forget(counts)

    @exclusive
    def stop_recording(self) -> None:
        """No candidates are verified any more: what had to stay because of them may go."""
        if self.recording:
            self.recording = False
            self._marks.clear()
            if self.num_rows and self._step is None:
                self.settle(force=False)

    @exclusive
    def select_rows(self, rows: list[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        if not self.num_rows:
            return
        self.idle()
        sliding = self.sliding.selected(rows)
        self.planner.select_rows(rows)
        self.sliding.now = sliding
        self.transcript.select_rows(rows)
        if self.observer is not None:
            self.observer.select_rows(rows)
        if self.packer is not None:
            self.packer.select_rows(rows)
        for search in self.searches.values():
            search.select_rows(rows)
        if self.scorer is not None:
            self.scorer.select_rows(rows)
        if self._offsets is not None:
            self._offsets = [self._offsets[row] for row in rows]
        self.evicted_at = [self.evicted_at[row] for row in rows] if self.evicted_at else []

    @exclusive
    def restore(self, columns: int, rows: list[Any], told: TranscriptState | None = None) -> None:
        """Make places for what a row held; the caller then writes keys and values to :meth:`Planner.runs`.

        Args:
            columns: columns seen.
            rows: for each row the tokens seen, and for each memory positions and scores.
            told: the conversations; without them the ids are unknown.
        """
        self.planner.restore(columns, rows)
        if told is None:
            told = TranscriptState(columns, tuple(Row.unknown(seen, columns) for seen, _ in rows), False)
        self.transcript.return_to(told)
        self.evicted_at = [seen for seen, _ in rows] if self._bounded else []

    @exclusive
    def reset(self) -> None:
        """Forget everything and give all memory back."""
        self._step = None
        self.planner.reset()
        self.broken = None
        self.free_unused()
        if not self.planner.used_blocks:
            self.stores.clear()
        self._offsets = None
        self.evicted_at = []
        self.axes = False
        self.transcript.reset()
        self.recording = False
        self._marks.clear()
        self.end_pieces()
        if self.observer is not None:
            self.observer.reset()
        self.sliding.reset()
        self.searches.clear()
        self._searched.clear()
        self._read = []
        if self.packer is not None:
            self.packer.reset()
        if self.scorer is not None:
            self.scorer.reset()

    @exclusive
    def fork(self) -> Engine:
        """A second engine over the same blocks, which are copied when one of the two writes."""
        self.idle()
        child = Engine(self.policy, self.facts, self.backend, self.stored_keys, planner=self.planner.fork())
        child.stores, child.lock = self.stores, self.lock
        child.return_to(self.state())
        child._read = list(self._read)
        return child

    @exclusive
    def rewind(self, state: EngineState) -> None:
        """Go back to ``state``; what was held only since then is given back."""
        self.idle()
        self.stop_recording()
        self.turn = None
        self._marks.clear()
        self.return_to(state)
        self.free_unused()

    @exclusive
    def release(self) -> None:
        """Give all memory back: the stream is closed. Forks and marks keep what they share."""
        self.rollback()
        self._marks.clear()
        self.planner.reset()
        if self.planner.used_blocks:
            self.free_unused()
        else:
            self.stores.clear()
        self.sliding.reset()
        trim_heap()

    def pins(self) -> list[list[tuple[int, int]]]:
        """Of each row the pinned positions, as ranges that ascend and do not touch."""
        return pinning.pins(self)

    @exclusive
    def pin(self, start: int, stop: int, rows: Rows = None) -> None:
        """As :meth:`kvsieve.Stream.pin`."""
        pinning.pin(self, start, stop, rows)

    @exclusive
    def unpin(self, start: int, stop: int, rows: Rows = None) -> None:
        """As :meth:`kvsieve.Stream.unpin`."""
        pinning.unpin(self, start, stop, rows)

    @exclusive
    def evict(self, start: int, stop: int, rows: Rows = None) -> None:
        """As :meth:`kvsieve.Stream.evict`."""
        pinning.evict(self, start, stop, rows)

    def check_owner(self) -> None:
        """Refuse another thread while a forward or a turn is under way.

        Raises:
            StateError: if the thread that began it lives.
        """
        owner = self._step_owner if self._step is not None else None if self.turn is None else self.turn.owner
        if owner is not None and owner is not threading.current_thread() and owner.is_alive():
            raise StateError(f"this stream is in use by thread {owner.name!r}; wait for it, or give each thread a stream.fork()")

    def idle(self) -> None:
        self._check_whole()
        self.check_owner()
        if self._step is not None:
            self.rollback()


def _check_like(facts: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    want = (facts.num_kv_heads, facts.key_dim, facts.value_dim, facts.dtype, facts.device)
    got = (k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
    if want != got:
        raise ShapeError(
            f"when the stream opened, layer {facts.index} had keys and values of {want[0]} heads of sizes {want[1]} and {want[2]} "
            f"in {want[3]} on {want[4]}; now {got[0]} heads of sizes {got[1]} and {got[2]} in {got[3]} on {got[4]}; "
            "open a new stream"
        )
