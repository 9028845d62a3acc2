"""Fetching: queries read blocks of the text by their summaries, at the distances where the policy's rule places them.

Every token is stored, pre-RoPE. A block of queries

    chooses     among the blocks that were summed up before it, by the sum over query heads of <query, summary>
    fetches     what it is about to read (:meth:`Fetching._fetch`)
    reads       the pieces of the text that the rule makes of its choice
    sums up     the blocks that are complete after it

and the next one begins, so that one choice may depend on what the one before has read. Tokens of a row are numbered by their
positions, because none ever goes. A layer's state is never changed, only replaced: forks, marks and beams share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch

from kvsieve._core import Residents
from kvsieve.backends.ranking import best, suitability
from kvsieve.errors import PolicyError, SessionError, StateError, UnsupportedError, UnsupportedModelError
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.part import Apply, Crop, Forward, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.saved import MOST, in_range, of_kind
from kvsieve.runtime.summaries import News, Summed, Table, summary_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvsieve.backends.base import Runs, Store
    from kvsieve.backends.tiers import HoldsTiers
    from kvsieve.policy.select import FetchedSelection, Piece

__all__ = ["Choice", "Fetched", "Fetching"]

Rows: TypeAlias = "list[Mapping[int, Summed]]"
"""Of each row what its layers know, by layer."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a block of queries reads.

    Attributes:
        compared: summaries that each KV head compared them with.
        blocks: ascending, of each KV head, or one list for all of them.
        pieces: what they read, these blocks included.
    """

    compared: int
    blocks: list[list[int]]
    pieces: list[Piece]


@dataclass(frozen=True, eq=False)
class Fetched:
    """What a row read last in one layer: by the query of number ``query``, or by the block of queries that it ends."""

    query: int
    choice: Choice

    def read(self, head: int) -> list[tuple[int, int]]:
        """Tokens that its last query reads for a KV head: ranges ``lo..hi``, ascending."""
        found = []
        for piece in self.choice.pieces:
            if piece.head in (None, head):
                lo = piece.lo if piece.within is None else max(piece.lo, self.query - piece.within + 1)
                hi = min(piece.hi, self.query - piece.nearest + 1)
                if lo < hi:
                    found.append((lo, hi))
        return sorted(found)

    def blocks(self, rule: FetchedSelection, head: int) -> npt.NDArray[np.int64]:
        """The blocks that a KV head chose, int64 ``[n, 2]``: ranges of tokens."""
        numbers = np.array(self.choice.blocks[min(head, len(self.choice.blocks) - 1)], np.int64)
        lo = rule.start + numbers * rule.block
        return np.stack([lo, lo + rule.block], 1)


State: TypeAlias = "tuple[Rows, dict[int, list[Fetched | None]]]"


def by_run(runs: Runs, mass: torch.Tensor) -> list[tuple[int, float]]:
    """The block of each run, and how much attention its tokens got, of what each token of ``runs`` in turn did, float32 ``[n]``."""
    lens = np.array([hi - lo for _, lo, hi in runs], np.int64)
    sums = np.add.reduceat(mass.double().cpu().numpy(), np.cumsum(lens) - lens) if runs else np.zeros(0)
    return [(block, float(total)) for (block, _, _), total in zip(runs, sums)]


def added_up(masses: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Each block once, and all that it got."""
    total: dict[int, float] = {}
    for block, mass in masses:
        total[block] = total.get(block, 0.0) + mass
    return list(total), list(total.values())


class Fetching(StreamPart):
    """Summaries of the blocks of a stream's rows, and what they fetched.

    Attributes:
        rule: the policy's.
        rows: what each row's layers know; empty before the first forward.
        read: by layer, what each row read in the last forward; None for a row without new tokens.
    """

    name = "fetching"
    stores_all = True
    tells_reads = True

    def __init__(self, rule: FetchedSelection, setting: Setting) -> None:
        self.rule, self.summary = rule, summary_of(rule)
        self._policy, self._blocks = setting.policy, setting.blocks
        tiers = setting.policy.tiers
        self._tiered, self._scored, self._ranks = tiers is not None, tiers is not None and tiers.by_scores, setting.facts.ranks
        self._layers = {layer.index: layer for layer in setting.facts.layers}
        self.rows: Rows = []
        self.read: dict[int, list[Fetched | None]] = {}
        self._residents: dict[int, Residents] = {}
        self._new: dict[int, list[Summed | None]] = {}
        self._reads: dict[int, list[Fetched | None]] = {}

    @classmethod
    def of(cls, setting: Setting) -> Fetching | None:
        """None if no rule fetches blocks.

        Raises:
            PolicyError: for a rule that shows more tokens side by side than the model was trained for.
            UnsupportedModelError: if the model's values cannot be compared with its keys, where the rule does so.
        """
        rule, facts = setting.policy.fetching, setting.facts
        if rule is None:
            return None
        if facts.trained_length is not None and rule.longest > facts.trained_length:
            raise PolicyError(
                f"{setting.policy!r} shows up to {rule.longest} tokens side by side, and this model was trained for "
                f"{facts.trained_length}; choose fewer, such as {facts.trained_length // 2}"
            )
        if rule.summary == "chunk_attention" and any(layer.key_dim != layer.value_dim for layer in facts.layers):
            raise UnsupportedModelError(
                f"{setting.policy!r} compares keys with values, which are of other sizes in this model; choose another summary, or "
                "kvsieve.InfLLM(...)"
            )
        return cls(rule, setting)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        self._residents, self._new, self._reads = {}, {}, {}
        known = self.rows or [{}] * len(forward.lens)
        for row, (seen, new) in enumerate(zip(forward.seen, forward.lens)):
            if seen and new and not known[row]:
                raise StateError(
                    f"row {row}: the model has not read the {seen} tokens that the stream holds through it, so {self._policy!r} "
                    "knows no summaries of them; feed it the text"
                )

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        store, step, q = layer.store, layer.forward.step, layer.q
        if store is None or step is None:
            return None
        store.append(layer.k, layer.v, step)
        states: list[Summed | None] = [None] * q.shape[0]
        reads: list[Fetched | None] = [None] * q.shape[0]
        blocks: list[list[tuple[int, int]]] = [[] for _ in step.new_lens]
        for row, count in enumerate(step.new_lens):
            if not count:
                continue
            if row not in self._residents:
                self._residents[row] = Residents(step, row)
            first = len(self._residents[row]) - count
            states[row] = self.rows[row].get(layer.index) if self.rows else None
            blocks[row] = self.rule.query_blocks(first, count)
        self._new[layer.index], self._reads[layer.index] = states, reads
        if list(step.new_lens) == [q.shape[2]] and len(blocks[0]) == 1:
            return self._lookup(layer, {0: blocks[0][0]}, states, reads)[0].transpose(0, 1)[None]
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], layer.v.shape[3])
        # Rows choose at the same time: what they will read is known before any of them reads, and is one lookup of the layer.
        for turn in range(max(map(len, blocks))):
            asking = {row: mine[turn] for row, mine in enumerate(blocks) if turn < len(mine)}
            for row, answer in self._lookup(layer, asking, states, reads).items():
                lo, hi = (at - len(self._residents[row]) for at in asking[row])
                out[row, lo : hi or None] = answer.transpose(0, 1)
        return out

    def _lookup(
        self,
        layer: LayerInput,
        asking: Mapping[int, tuple[int, int]],
        states: list[Summed | None],
        reads: list[Fetched | None],
    ) -> dict[int, torch.Tensor]:
        """The queries ``lo..hi`` of each row of ``asking`` choose, and then read: ``[H, m, Dv]`` of each row."""
        tier = cast("HoldsTiers", layer.store)
        queries, chosen, answers = {}, {}, {}
        for row, (lo, hi) in asking.items():
            end = len(self._residents[row])
            queries[row] = layer.q[row] if hi - lo == layer.q.shape[2] else layer.q[row, :, lo - end : hi - end or None]
            chosen[row] = self._choose(tier, lo, queries[row], states[row])
        if self._tiered and len(chosen) > 1:
            # A row's own fetch begins all of its reads; those of the next rows begin now, and go on while this one attends.
            tier.prefetch([run for row, choice in chosen.items() for run in self._runs(row, choice.pieces)])
        masses: list[tuple[int, float]] = []
        for row, (lo, hi) in asking.items():
            answers[row], states[row], mass = self._read(layer, row, lo, queries[row], states[row], chosen[row])
            reads[row] = Fetched(hi - 1, chosen[row])
            masses += mass
        if self._scored:
            tier.score(*added_up(masses))
        return answers

    def _read(
        self, layer: LayerInput, row: int, first: int, q: torch.Tensor, state: Summed | None, choice: Choice
    ) -> tuple[torch.Tensor, Summed, list[tuple[int, float]]]:
        """Queries ``q`` ``[H, m, D]`` of tokens from ``first`` on: ``[H, m, Dv]``, what is known then, and the attention that
        blocks got, if that is asked for."""
        store, residents = layer.store, self._residents[row]
        assert store is not None
        if self._tiered:
            store.fetch(self._runs(row, choice.pieces))
        scored = self.summary.needs_scores
        found = store.attend_pieces(q, first, residents, choice.pieces, layer.call, scored, self._scored)
        news = News(
            first + q.shape[1],
            q,
            layer.k,
            lambda lo, hi: store.read(residents.runs(lo, hi)),
            layer.call,
            found.scores,
            choice.pieces[0].lo,
        )
        mass = [] if found.mass is None else by_run(self._runs(row, choice.pieces[1:]), found.mass)
        return found.out, self.summary.after(state, news), mass

    def _choose(self, store: Store, first: int, q: torch.Tensor, state: Summed | None) -> Choice:
        """What queries ``q`` ``[H, m, D]`` from token ``first`` on read."""
        among, most = self.rule.candidates(first), self.rule.limit(first)
        compared = 0
        if len(among) <= most:
            blocks = [list(among)]
        else:
            assert state is not None
            blocks, compared = self._best(store, q, state.table, among, most), len(among)
        return Choice(compared, blocks, self.rule.pieces(first, q.shape[1], blocks))

    def _best(self, store: Store, q: torch.Tensor, table: Table, among: range, most: int) -> list[list[int]]:
        """The ``most`` of the blocks ``among`` that suit queries ``q`` ``[H, m, D]`` best: of each KV head, or of all."""
        pieces = list(table.pieces(among.start, among.stop))
        asked = self.summary.asked(q, pieces[0].shape[1])
        if self._ranks is None or self.rule.per_head:
            found = store.best_summaries(pieces, asked, most, self.rule.per_head)
        else:
            found = best(self._ranks.sum(suitability(pieces, asked, False)), most)
        return [[number + among.start for number in row] for row in found] if among.start else found

    def _runs(self, row: int, pieces: Sequence[Piece]) -> Runs:
        """Where the tokens of these pieces lie, piece by piece."""
        return [run for piece in pieces for run in self._residents[row].runs(piece.lo, piece.hi)]

    def commit(self, forward: Forward) -> Apply:
        old = self.rows or [{}] * len(forward.lens)
        rows = []
        for row, layers in enumerate(old):
            new = {index: state for index, states in self._new.items() if (state := states[row]) is not None}
            rows.append({**layers, **new} if new else layers)

        def apply() -> None:
            self.rows, self.read = rows, self._reads
            self.rollback()

        return apply

    def rollback(self) -> None:
        self._residents, self._new, self._reads = {}, {}, {}

    def must_step(self, width: int, has_prompt: bool) -> bool:
        """What a rejected candidate has read must not count, nor be what others choose by."""
        return True

    # -------------------------------------------------------------------------------------------------------------- tokens, rows

    def check_evict(self, row: int, start: int, stop: int) -> None:
        raise UnsupportedError(
            f"{self._policy!r} sums up blocks of an unbroken text, so no tokens can be taken out of it; go back to a mark taken "
            "before these tokens"
        )

    def check_crop(self, crop: Crop) -> None:
        """Refuse to go back to where blocks could not be summed up as if the forgotten tokens had never been there.

        Raises:
            StateError: naming the row.
        """
        for row, gone in enumerate(crop.counts if crop.columns is not None else ()):
            left, states = crop.seen[row] - gone, self.rows[row].values() if self.rows else ()
            if gone and left > 0 and not all(self.summary.can_forget(state, left) for state in states):
                raise StateError(
                    f"row {row}: cannot forget {gone} tokens: what they have read is part of what {self._policy!r} knows of the "
                    f"blocks before them; {GO_BACK}"
                )

    def crop(self, crop: Crop) -> Apply:
        left = [seen - gone for seen, gone in zip(crop.seen, crop.counts)]
        rows = [
            {} if not count else {index: self.summary.cropped(state, count) for index, state in layers.items()} if gone else layers
            for layers, count, gone in zip(self.rows, left, crop.counts)
        ]

        def apply() -> None:
            self.read, self.rows = {}, rows

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.read = {}
            self.rows = [self.rows[row] for row in rows] if self.rows else []

        return apply

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> State:
        return list(self.rows), dict(self.read)

    def return_to(self, state: State) -> None:
        self.rows, self.read = list(state[0]), dict(state[1])

    def save(self) -> Saved:
        tensors = {
            f"{name}.{index}.{row}": tensor
            for row, layers in enumerate(self.rows)
            for index, state in layers.items()
            for name, tensor in state.tensors.items()
        }
        return Saved({"layers": [list(layers) for layers in self.rows]}, tensors)

    def restore(self, saved: Saved) -> None:
        """Every token is there still, or what summaries are of could not be found."""
        for row, seen in enumerate(saved.seen):
            held = self._blocks.planner.resident(0, row)
            if held != seen:
                raise SessionError(f"row {row} holds {held} of the {seen} tokens that it has seen, and {self._policy!r} holds all")
        self.rows = []
        for row, layers in enumerate(saved.rows("layers")):
            indices = [in_range(of_kind(index, int, "layers"), 0, MOST, "layers") for index in of_kind(layers, list, "layers")]
            if indices and sorted(indices) != sorted(self._layers):
                raise SessionError(f"row {row} has summaries in layers {indices}, not in {sorted(self._layers)}")
            self.rows.append({index: self._restored(saved, row, index) for index in indices})

    def _restored(self, saved: Saved, row: int, index: int) -> Summed:
        layer, end = self._layers[index], f".{index}.{row}"
        table = saved.tensor(f"table{end}", torch.float32, layer.num_kv_heads, None, self.summary.rows * layer.key_dim)
        most, heads = saved.seen[row], layer.num_kv_heads
        tensors = {"table": table, "scores": saved.tensor(f"scores{end}", torch.float32, heads, None)}
        if f"queries{end}" in saved.tensors:
            tensors["queries"] = saved.tensor(f"queries{end}", None, None, None, layer.key_dim)
        if table.shape[1] * self.rule.block > most or tensors["scores"].shape[1] > most:
            raise SessionError(f"row {row} has summaries of more tokens than it has seen")
        return Summed.of(tensors, self._layers[index].device)

    @property
    def bytes_of_summaries(self) -> int:
        states = [state for layers in self.rows for state in layers.values()]
        shared = {number: size for state in states for number, size in state.table.memory.items()}
        own = {id(state): state.nbytes for state in states}
        return sum(shared.values()) + sum(own.values())

    def reset(self) -> None:
        self.rows, self.read = [], {}
        self.rollback()
