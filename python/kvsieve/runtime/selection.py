"""Selection: which residents a query reads where a rule searches for them, layer by layer.

The policy's rule says what each layer does, the backend finds and keeps the choices of a layer's rows. While few tokens are
resident everything is read. Which tokens were resident when the last forward read is kept for a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kvsieve.policy.position import Rebased
from kvsieve.runtime.part import Apply, Forward, Join, LayerInput, Setting, StreamPart

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kvsieve.backends.base import SelectionState
    from kvsieve.policy.select import SparseSelection

__all__ = ["Selection"]


class _State(NamedTuple):
    choices: dict[int, Any]
    searching: bool
    past_trained_length: bool
    read: list[npt.NDArray[np.int64]]


class Selection(StreamPart):
    """What the rows of a stream have chosen to read.

    Attributes:
        rule: the policy's.
        searches: of each layer that has searched, what its rows have chosen.
        searching: whether the last forward searched, in the layers that do.
        past_trained_length: whether what it read was renumbered, because the text is longer than the model was trained for.
    """

    name = "selection"
    stores_all = True

    def __init__(self, rule: SparseSelection, setting: Setting) -> None:
        self.rule, self._backend, self._blocks = rule, setting.backend, setting.blocks
        self._policy = setting.policy
        (memory,) = setting.policy.memories
        self._pre_rope = setting.stored_keys == "pre_rope"
        self._evicts = memory.roles.evict.evicts
        self._rebased = isinstance(memory.position, Rebased)
        self._trained_length = setting.facts.trained_length
        if isinstance(memory.position, Rebased) and memory.position.after is not None:
            self._trained_length = memory.position.after
        self.searches: dict[int, SelectionState] = {}
        self.searching = self.past_trained_length = False
        self._read: list[npt.NDArray[np.int64]] = []
        self._searched: set[int] = set()
        self._rules: dict[tuple[int, bool], SparseSelection | None] = {}

    @classmethod
    def of(cls, setting: Setting) -> Selection | None:
        """None if queries read everything, or a fixed number of tokens.

        Raises:
            BackendError: if blocks are judged by page bounds, and the backend has none where the policy evicts.
        """
        rule = setting.policy.selection
        if rule is None:
            return None
        made = cls(rule, setting)
        if made._evicts:
            made._check_pages(f"{setting.policy!r} evicts")
        return made

    def _check_pages(self, what: str) -> None:
        if self.rule.page_bounds:
            self._backend.capabilities.check_split_pages(what)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        planner = self._blocks.planner
        held = [planner.resident(0, row) if planner.num_rows else 0 for row in range(len(forward.lens))]
        self.searching = max(old + new for old, new in zip(held, forward.lens)) > self.rule.dense_until
        if self._rebased and self._trained_length is not None:
            self.past_trained_length = max(old + new for old, new in zip(forward.seen, forward.lens)) > self._trained_length

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        store, step = layer.store, layer.forward.step
        if store is None or step is None or not self.searching:
            return None
        search = self._search(layer.index)
        if search is None:
            return None
        call = layer.call
        if self._pre_rope:
            past = self.past_trained_length
            call = replace(call, relative=past or not self._rebased, consecutive=past)
        out = store.run_selected(layer.q, layer.k, layer.v, step, call, search)
        # Only now is there something to undo.
        self._searched.add(layer.index)
        return out

    def rule_of(self, index: int) -> SparseSelection | None:
        """The rule that layer ``index`` follows now; None if it reads everything."""
        which = index, self.past_trained_length
        if which not in self._rules:
            self._rules[which] = self.rule.for_layer(*which)
        return self._rules[which]

    def _search(self, index: int) -> SelectionState | None:
        rule = self.rule_of(index)
        if rule is None:
            return None
        if index not in self.searches:
            self.searches[index] = self._backend.make_selection(rule)
        return self.searches[index]

    def commit(self, forward: Forward) -> Apply:
        return self._commit

    def _commit(self) -> None:
        # What is evicted next was read all the same.
        self._read = self._positions() if self._evicts else []
        self._searched.clear()

    def rollback(self) -> None:
        for index in self._searched:
            self.searches[index].undo()
        self._searched.clear()

    def must_step(self, width: int, has_prompt: bool) -> bool:
        return self._blocks.resident + width > self.rule.dense_until

    # -------------------------------------------------------------------------------------------------------------- tokens, rows

    def check_evict(self, row: int, start: int, stop: int) -> None:
        self._check_pages("tokens would be taken out of it")

    def evict_range(self, rows: Sequence[int], start: int, stop: int) -> None:
        """What was chosen names residents by number, so it is chosen anew."""
        self._read = self._positions()
        for search in self.searches.values():
            search.reset()

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            for search in self.searches.values():
                search.select_rows(rows)

        return apply

    def read_positions(self, row: int) -> npt.NDArray[np.int64]:
        """Positions of the tokens that a row held when the last forward read them."""
        return self._read[row] if row < len(self._read) else self._blocks.planner.positions(0, row)

    def _positions(self) -> list[npt.NDArray[np.int64]]:
        return [self._blocks.planner.positions(0, row).copy() for row in range(self._blocks.num_rows)]

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> _State:
        choices = {index: search.state() for index, search in self.searches.items()}
        return _State(choices, self.searching, self.past_trained_length, list(self._read))

    def return_to(self, state: _State) -> None:
        """Layers that had not chosen choose anew."""
        self.searching, self.past_trained_length, self._read = state.searching, state.past_trained_length, list(state.read)
        for index, search in self.searches.items():
            if index not in state.choices:
                search.reset()
        for index, choice in state.choices.items():
            found = self._search(index)
            if found is not None:
                found.return_to(choice)

    def join(self, forks: Sequence[Selection], join: Join) -> Apply:
        """What was chosen names residents by number, so it is chosen anew."""
        self._check_pages("joined ones are not that")

        def apply() -> None:
            self._read = []
            for search in self.searches.values():
                search.reset()

        return apply

    def reset(self) -> None:
        self.searches.clear()
        self._searched.clear()
        self._read = []
