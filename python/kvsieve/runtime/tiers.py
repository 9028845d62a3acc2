"""Tiers: which blocks of a stream are in memory, and which only in its file (:class:`kvsieve.policy.storage.Tiered`).

    begin     the newest tokens of each row are in memory, also after a crop
    attend    a layer whose rule does not fetch what it reads fetches all that it holds; one that adds up the heaviest values, and
              whose keys stay in memory, fetches those itself
    settled   blocks leave memory until no more than the budget are there

The stores know where each block is, and load what is written or moved. What is known here is which blocks hold the newest tokens
of a row of any fork: a policy reads those without fetching them, so they stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvsieve.backends.heap import trim_heap
from kvsieve.backends.tiers import HoldsTiers, TierCounts
from kvsieve.budget import BLOCK
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.runtime.part import Forward, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.shared_tiers import SharedTiers
from kvsieve.runtime.value_selection import thinned
from kvsieve.stats import TierStats

if TYPE_CHECKING:
    import torch

    from kvsieve.backends.base import Runs, Store
    from kvsieve.facts import ModelFacts
    from kvsieve.policy.storage import Tiered

__all__ = ["Tiers", "capacity"]

TIDY = 8192
"""Tokens that are read between two times at which the heap is trimmed: what a prompt needs on its way leaves holes in it, and a
text that lies in a file is to take no memory."""


def capacity(rule: Tiered, facts: ModelFacts) -> int:
    """Full blocks of each layer that are in memory, or whose values are.

    Raises:
        BudgetError: if the budget does not hold the newest tokens of one row, and a block to fetch.
    """
    alone = rule.values_alone
    block = sum(BLOCK * x.num_kv_heads * (x.value_dim + (not alone) * x.key_dim) * x.dtype.itemsize for x in facts.layers)
    blocks, least = rule.budget_bytes // block, -(-rule.keep // BLOCK) + 2
    if blocks < least:
        raise BudgetError(
            f"a memory budget of {rule.budget_bytes} bytes holds {blocks} blocks of {BLOCK} tokens in each of {len(facts.layers)} "
            f"layers; with keep={rule.keep} it must hold {least}, so give it at least {least * block} bytes"
        )
    return blocks


class Tiers(StreamPart):
    """Where the blocks of one stream are.

    Attributes:
        capacity: full blocks of each layer that are in memory between two forwards.
    """

    name = "tiers"

    def __init__(self, rule: Tiered, setting: Setting) -> None:
        self.capacity = capacity(rule, setting.facts)
        self._rule, self._blocks = rule, setting.blocks
        self._fetches = setting.policy.memories[0].roles.select.fetches
        self._heaviest = setting.policy.heaviest_values
        if self._blocks.tiers is None:
            self._blocks.tiers = SharedTiers(setting.backend.make_tier(None if rule.disk is None else str(rule.disk)))
        self._shared: SharedTiers | None = self._blocks.tiers
        self._all: Runs = []
        self._read = 0

    @classmethod
    def of(cls, setting: Setting) -> Tiers | None:
        """None if all tokens are in memory.

        Raises:
            PolicyError: if blocks shall leave by scores, and the policy fetches none, so that nobody tells any.
            BudgetError: if the budget is too small for this model.
            TierError: if there can be no file in the folder. BackendError: if the backend knows none.
        """
        rule, select = setting.policy.tiers, setting.policy.memories[0].roles.select
        if rule is not None and rule.by_scores and not select.fetches:
            raise PolicyError(
                f"order='scores' is the attention that blocks got when they were fetched, and {select!r} fetches none; choose "
                "order='recency', or a policy that fetches blocks, such as kvsieve.InfLLM(...)"
            )
        return None if rule is None else cls(rule, setting)

    def new_store(self, index: int, store: Store) -> None:
        if self._shared is not None:
            decay = self._rule.decay if self._rule.by_scores else None
            _tiered(store).set_tier(self._shared.file, self.capacity, decay, self._rule.values_alone)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        planner = self._blocks.planner
        self._read += sum(forward.lens)
        self._keep_newest()
        if not self._fetches and not self._chosen_alone(forward):
            self._all = [run for row in range(planner.num_rows) for run in planner.runs(0, row)]

    def _chosen_alone(self, forward: Forward) -> bool:
        """Whether every row adds up the heaviest values alone, which are fetched once they are chosen."""
        rule = self._heaviest if self._rule.values_alone else None
        if rule is None:
            return False
        return all(one or not count for one, count in zip(thinned(rule, forward, self._blocks.planner), forward.lens))

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        if layer.store is not None and self._all:
            layer.store.fetch(self._all)
        return None

    def rollback(self) -> None:
        self._all = []

    def settled(self, turn_ended: bool) -> None:
        """Blocks leave memory.

        Raises:
            TierFullError, TierError: if one cannot be written; nothing is lost, and the stream goes on.
        """
        self._all = []
        if self._shared is not None:
            self._keep_newest()
            kept = self._shared.kept
            for store in self._blocks.stores.values():
                _tiered(store).trim(kept, self._rule.background)
        if self._read >= TIDY:
            self._read = 0
            trim_heap()

    def _keep_newest(self) -> None:
        """The newest tokens of each row are in memory, and stay there."""
        planner, shared = self._blocks.planner, self._shared
        if shared is None:
            return
        window = frozenset(block for row in range(planner.num_rows) for block in planner.newest_blocks(0, row, self._rule.keep))
        new = window - shared.windows.get(self, frozenset())
        if new:
            for store in self._blocks.stores.values():
                _tiered(store).hold(sorted(new))
        shared.windows[self] = window

    def stats(self) -> TierStats:
        """What all layers did."""
        stores = [_tiered(store) for store in self._blocks.stores.values()]
        counts = TierCounts(*(sum(column) for column in zip(TierCounts(), *(store.tier_counts() for store in stores))))
        held = [store.held() for store in stores]
        in_memory = sum(x.plain_keys + x.plain_values for x in held)
        file_bytes = 0 if self._shared is None else self._shared.file.bytes()[1]
        return TierStats(
            bytes_in_memory=in_memory,
            bytes_in_file=counts.bytes_in_file,
            file_bytes=file_bytes,
            hits=counts.hits,
            loads=counts.loads,
            spills=counts.spills,
            bytes_read=counts.bytes_read,
            bytes_written=counts.bytes_written,
        )

    # ----------------------------------------------------------------------------------------------------------------- moments

    def restore(self, saved: Saved) -> None:
        """A session file was read into memory."""
        self.settled(turn_ended=False)

    def reset(self) -> None:
        self._all = []
        if self._shared is not None:
            self._shared.windows.pop(self, None)

    def release(self) -> None:
        """The file goes with the last fork."""
        self.reset()
        self._shared = self._blocks.tiers = None


def _tiered(store: Store) -> HoldsTiers:
    """A backend that says that it can hold tiers makes such stores."""
    return cast("HoldsTiers", store)
