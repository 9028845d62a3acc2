"""When a stream's tokens are compressed, and what is remembered until then.

A prompt is compressed when the first single token follows it, or its turn ends, so that its own attention, and with it the first
generated token, is exact. A rule may ask for it after each piece of the prompt instead (``when="prefill"``): then no more than one
piece is ever held as it came. A sequence chooses its channels once; what is compressed later keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from kvsieve._core import PACKED
from kvsieve.backends.heap import trim_heap
from kvsieve.errors import SessionError, StateError
from kvsieve.policy.storage import Channels, LayerShape, StorageObservation
from kvsieve.runtime.cropping import GO_BACK, SPARE
from kvsieve.runtime.part import Apply, Crop, Forward, Join, LayerInput, Saved, Setting, StreamPart
from kvsieve.runtime.process import defer_sigint

if TYPE_CHECKING:
    from kvsieve._core import Moves
    from kvsieve.backends.base import Store
    from kvsieve.facts import AttentionLayer
    from kvsieve.policy.storage import StorageRule
    from kvsieve.runtime.blocks import Blocks

__all__ = ["Compression", "shape_of"]

Rings: TypeAlias = "dict[int, list[torch.Tensor]]"
"""Of each layer and row, its newest queries ``[H, m, D]``."""

Choice: TypeAlias = "Mapping[int, Channels] | int"
"""A row's channels in each layer, or the block of the row that has them already."""

MAX_CANDIDATES = 16
"""Where candidates are verified, a forward over more tokens than this reads a prompt as well."""


def shape_of(layer: AttentionLayer) -> LayerShape:
    """What a storage rule needs to know of a layer."""
    return LayerShape(layer.index, layer.num_kv_heads, layer.key_dim, layer.value_dim)


class Compression(StreamPart):
    """What a storage rule of one stream has seen, and the order in which it acts.

    Attributes:
        packing: the format of each layer.
        reading: whether the latest forward read part of a prompt.
        compressed_at: tokens that each row had seen when some of it was last compressed.
    """

    name = "compression"

    def __init__(self, rule: StorageRule, layers: tuple[AttentionLayer, ...], pre_rope: bool, blocks: Blocks) -> None:
        self.rule, self._pre_rope, self._blocks = rule, pre_rope, blocks
        self._layers = {layer.index: layer for layer in layers}
        self.packing = {layer.index: rule.packing(shape_of(layer)) for layer in layers}
        self.reading = False
        self.compressed_at: list[int] = []
        self._rings: Rings = {}
        self._pending: Rings = {}

    @classmethod
    def of(cls, setting: Setting) -> Compression | None:
        """None if there is nothing to compress, so that what would be left as it is costs nothing.

        Raises:
            PolicyError: if a layer cannot be stored so.
        """
        rule, layers = setting.policy.compression, setting.facts.layers
        if rule is None:
            return None
        part = cls(rule, layers, setting.stored_keys == "pre_rope", setting.blocks)
        return None if all(rule.idle(shape_of(layer)) for layer in layers) else part

    def new_store(self, index: int, store: Store) -> None:
        store.set_packing(self.packing[index])

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        if forward.width == 1 or forward.verifying:
            self.compress(prompt_ended=self.reading)

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        if layer.store is not None:
            self.observe(layer.index, layer.q, layer.forward.lens)
        return None

    def observe(self, index: int, q: torch.Tensor, lens: Sequence[int]) -> None:
        """Remember the newest queries ``q`` ``[B, H, q, D]`` of a forward, of which the last ``lens[row]`` are real tokens.

        They count once the forward does. Rows that have chosen their channels are passed over.
        """
        if not self.rule.observe:
            return
        rings = self._rings.get(index) or [q.new_zeros(q.shape[1], 0, q.shape[3])] * q.shape[0]
        new = []
        for row, (ring, count) in enumerate(zip(rings, lens)):
            if self._blocks.planner.num_packed(row):
                new.append(ring[:, :0])
                continue
            most = self.rule.observe + SPARE
            fresh = q[row, :, q.shape[2] - min(count, most) :]
            new.append(torch.cat([ring, fresh.detach()], 1)[:, -most:])
        self._pending[index] = new

    def commit(self, forward: Forward) -> Apply:
        def apply() -> None:
            self._rings.update(self._pending)
            self._pending, self.reading = {}, forward.width > (MAX_CANDIDATES if forward.verifying else 1)

        return apply

    def settled(self, turn_ended: bool) -> None:
        """A prompt's pieces, where the rule asks for it; everything that is due at the end of a turn.

        Among candidates some may still be taken back, so what is verified is compressed when the next forward begins.
        """
        if turn_ended:
            self.compress(prompt_ended=self.reading)
        elif self.reading and self.rule.when == "prefill":
            self.compress(prompt_ended=True)

    def rollback(self) -> None:
        self._pending = {}

    def must_step(self, width: int, has_prompt: bool) -> bool:
        """Something would be compressed between the tokens of a forward over ``width`` of them."""
        rule, planner = self.rule, self._blocks.planner
        rows = range(planner.num_rows)
        waiting = max((planner.resident(0, row) - planner.num_packed(row) for row in rows), default=0) + width - rule.recent
        if has_prompt or self.reading:
            return waiting > 0
        return rule.flush_every is not None and waiting >= rule.flush_every

    # ------------------------------------------------------------------------------------------------------------- compressing

    def compress(self, prompt_ended: bool) -> None:
        """Compress what is due. A layer's plain blocks are given back before the next layer's are compressed; after a prompt the
        system gets back what is free."""
        planner = self._blocks.planner
        due = [(row, self._due(row, prompt_ended)) for row in range(planner.num_rows)]
        due = [(row, upto) for row, upto in due if upto > planner.num_packed(row)]
        if due:
            self._compress(due, [self._choose(row, upto) for row, upto in due], prompt_ended)
        self.reading = self.reading and not prompt_ended

    def _due(self, row: int, prompt_ended: bool) -> int:
        """Up to which resident the row is to be compressed now; what is compressed already if nothing is due."""
        rule, planner = self.rule, self._blocks.planner
        packed = planner.num_packed(row)
        count = planner.resident(0, row) - rule.recent - packed
        if not prompt_ended:
            if rule.flush_every is None or count < rule.flush_every:
                return packed
            count -= count % rule.flush_every
        if count <= 0 or not self._has_seen_enough(row):
            return packed
        return packed + count - count % rule.align

    def _has_seen_enough(self, row: int) -> bool:
        if self._blocks.planner.num_packed(row) or not self.rule.observe:
            return True
        return all(rings[row].shape[1] >= self.rule.observe for rings in self._rings.values())

    def _choose(self, row: int, upto: int) -> Choice:
        runs = self._blocks.planner.runs(0, row)
        if runs[0][0] >= PACKED:
            return runs[0][0]
        return {index: self._channels(index, store, runs, row, upto) for index, store in self._blocks.stores.items()}

    def _channels(self, index: int, store: Store, runs: list[tuple[int, int, int]], row: int, upto: int) -> Channels:
        layer, rings = self._layers[index], self._rings.get(index)
        keys, _ = store.read(runs)
        queries = keys.new_zeros(0, 0, keys.shape[2]) if rings is None else rings[row][:, -self.rule.observe :]
        seen = StorageObservation(shape_of(layer), queries.float(), keys, upto, layer.rope, self._pre_rope)
        return self.rule.choose_channels(seen)

    def _compress(self, due: list[tuple[int, int]], chosen: list[Choice], prompt_ended: bool) -> None:
        blocks = self._blocks
        before, stores = blocks.planner.fork(), list(blocks.stores.items())
        with defer_sigint():
            try:
                done = [(blocks.planner.pack(row, upto, self.rule.align, copies=1), mine) for (row, upto), mine in zip(due, chosen)]
                _pack(*stores[0], done)
            except BaseException:
                # Nothing was taken from anywhere yet. The first layer is the one that may not find room: each gives back more than
                # the next one needs.
                blocks.planner = before
                raise
            # Only now may plain blocks go.
            del before
            self.compressed_at += [0] * (blocks.num_rows - len(self.compressed_at))
            for row, _ in due:
                self.compressed_at[row] = blocks.planner.seen(row)
            with blocks.all_layers("compressing"):
                self._go_on(stores, done)
        if prompt_ended:
            trim_heap()

    def _go_on(self, stores: list[tuple[int, Store]], done: list[tuple[Moves, Choice]]) -> None:
        """The first layer is compressed: the others follow, and each gives back what it needs no longer."""
        planner = self._blocks.planner
        # What was freed is given back before tokens are moved there: a tail then takes the memory that it fills.
        packed = planner.blocks_in_use(), planner.packed_in_use()
        moves = planner.tidy()
        tidied = planner.blocks_in_use(), planner.packed_in_use()
        for index, store in stores:
            if index != stores[0][0]:
                _pack(index, store, done)
            store.free_unused(*packed)
            if len(moves):
                store.apply(moves)
                store.free_unused(*tidied)

    # -------------------------------------------------------------------------------------------------------------- going back

    def check_crop(self, crop: Crop) -> None:
        """Refuse to go back to before tokens were compressed: a shorter text would have chosen other channels, or fewer tokens."""
        counts = [gone + crop.read_again if gone else 0 for gone in crop.counts]
        for row, (seen, count) in enumerate(zip(crop.seen, counts if crop.columns is not None else ())):
            at, left = self.compressed_at[row] if self.compressed_at else 0, seen - count
            if not count or left <= 0:
                continue
            if left <= at:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: some were compressed when the row had seen {at}; "
                    f"at most {max(seen - at - 1, 0)} can be forgotten; {GO_BACK}"
                )
            spare = min((rings[row].shape[1] for rings in self._rings.values()), default=0) - min(self.rule.observe, left)
            if not at and self.rule.observe and count > spare:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: of the queries before them too few are kept to choose channels by; "
                    f"at most {max(spare, 0)} can be forgotten; {GO_BACK}"
                )

    def crop(self, crop: Crop) -> Apply:
        def apply() -> None:
            seen = self._blocks.seen
            self.compressed_at = [min(at, seen[row]) for row, at in enumerate(self.compressed_at)]
            self._rings = {
                index: [ring[:, : max(ring.shape[1] - count, 0)] for ring, count in zip(rings, crop.counts)]
                for index, rings in self._rings.items()
            }

        return apply

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self._rings = {index: [rings[row] for row in rows] for index, rings in self._rings.items()}
            self.compressed_at = [self.compressed_at[row] for row in rows] if self.compressed_at else []

        return apply

    def state(self) -> tuple[Rings, bool, list[int]]:
        return dict(self._rings), self.reading, list(self.compressed_at)

    def return_to(self, state: tuple[Rings, bool, list[int]]) -> None:
        self._rings, self.reading, self.compressed_at = dict(state[0]), state[1], list(state[2])

    def join(self, forks: Sequence[Compression], join: Join) -> Apply:
        """What is compressed lies before all else, so only the common past may be. Channels are chosen by later queries."""
        for at, fork in enumerate(forks):
            planner = fork._blocks.planner
            for row, past in enumerate(join.past if planner.num_rows else ()):
                packed = planner.num_packed(row)
                if packed and int(planner.positions(0, row)[packed - 1]) >= past:
                    raise StateError(
                        f"stream {at} has compressed a part of its document, and what is compressed must come before all else; "
                        "join streams that were only fed, before their turn ends, under a rule that waits for the end of a prompt"
                    )
        reading = any(part.reading for part in (self, *forks))
        queries = next((part._rings for part in (*forks, self) if part._rings), {})

        def apply() -> None:
            self.reading = reading
            self._rings = {index: [ring[:, :0] for ring in rings] for index, rings in queries.items()}

        return apply

    def save(self) -> Saved:
        """The channels of each row and layer, and the queries remembered."""
        planner, found = self._blocks.planner, {}
        for row in range(planner.num_rows):
            for index, store in self._blocks.stores.items() if planner.num_packed(row) else ():
                channels = store.channels(planner.runs(0, row)[0][0])
                found[f"channels.{index}.{row}"] = channels.index.clone()
                found[f"pairs.{index}.{row}"] = torch.tensor(channels.pairs)
        for index, rings in self._rings.items():
            found.update({f"queries.{index}.{row}": ring.contiguous() for row, ring in enumerate(rings) if ring.numel()})
        counts = [planner.num_packed(row) for row in range(planner.num_rows)]
        return Saved({"compressed": counts, "compressed_at": self.compressed_at, "reading": self.reading}, found)

    def restore(self, saved: Saved) -> None:
        """Compress again the first ``saved.data["compressed"][row]`` tokens of each row."""
        counts = saved.by_row("compressed")
        due = [(row, count) for row, count in enumerate(counts) if count]
        if due:
            self._compress(due, [self._saved_channels(row, saved) for row, _ in due], prompt_ended=True)
        self.reading, self.compressed_at = saved.get("reading", bool), saved.by_row("compressed_at")
        for index, layer in self._layers.items():
            names = {row: f"queries.{index}.{row}" for row in range(len(counts))}
            known = {
                row: saved.tensor(name, None, None, None, layer.key_dim).to(layer.device)
                for row, name in names.items()
                if name in saved.tensors
            }
            if known:
                empty = next(iter(known.values()))[:, :0]
                self._rings[index] = [known.get(row, empty) for row in names]

    def _saved_channels(self, row: int, saved: Saved) -> dict[int, Channels]:
        found = {}
        for index, layer in self._layers.items():
            heads, size = layer.num_kv_heads, layer.key_dim
            channels = saved.tensor(f"channels.{index}.{row}", torch.int64, heads, None)
            pairs = saved.indices(f"pairs.{index}.{row}", size // 2 + 1, heads)
            # Channel c that is stored as zero is -1 - c.
            if channels.shape[1] > size or not bool(((channels >= -size) & (channels < size)).all()):
                raise SessionError(f"it keeps channels that layer {index} does not have, of which a key has {size}")
            found[index] = Channels(channels, tuple(pairs.tolist()))
        return found

    def reset(self) -> None:
        self._rings, self._pending, self.reading, self.compressed_at = {}, {}, False, []


def _pack(index: int, store: Store, done: list[tuple[Moves, Choice]]) -> None:
    """Compress in one layer what was planned for each row."""
    for moves, channels in done:
        store.pack(moves, channels if isinstance(channels, int) else channels[index])
