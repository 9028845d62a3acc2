"""When a stream's tokens are packed, and what is remembered until then.

A prompt is packed when the first single token follows it, or its turn ends, so that its own attention, and with it the first
generated token, is exact. A role may ask for it after each piece of the prompt instead (``when="prefill"``): then no more than one
piece is ever held as it came. A sequence chooses its channels once; what is packed later keeps the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvsieve._core import PACKED
from kvsieve.errors import StateError
from kvsieve.policy.storage import Channels, LayerShape, StorageObservation
from kvsieve.runtime.cropping import GO_BACK, SPARE

if TYPE_CHECKING:
    from kvsieve._core import Moves, Planner
    from kvsieve.backends.base import Store
    from kvsieve.facts import AttentionLayer
    from kvsieve.policy.storage import StorageRule

__all__ = ["Packer", "make_packer", "shape_of"]

Rings = dict[int, list[torch.Tensor]]


def shape_of(layer: AttentionLayer) -> LayerShape:
    """What a pack role needs to know of a layer."""
    return LayerShape(layer.index, layer.num_kv_heads, layer.key_dim, layer.value_dim)


def make_packer(role: StorageRule | None, layers: tuple[AttentionLayer, ...], *, raw: bool) -> Packer | None:
    """The packer of a stream; None if there is nothing to pack, so that what would be left as it is costs nothing.

    Raises:
        PolicyError: if a layer cannot be packed so.
    """
    if role is None:
        return None
    packer = Packer(role, layers, raw)
    return None if all(role.idle(shape_of(layer)) for layer in layers) else packer


class Packer:
    """What a pack role of one stream has seen, and the order in which it acts."""

    def __init__(self, role: StorageRule, layers: tuple[AttentionLayer, ...], raw: bool) -> None:
        self.role, self.raw = role, raw
        self._layers = {layer.index: layer for layer in layers}
        self.packing = {layer.index: role.packing(shape_of(layer)) for layer in layers}
        self.reading = False
        """Whether the latest forward read part of a prompt."""
        self.packed_at: list[int] = []
        """Tokens that each row had seen when some of it was last packed."""
        self._rings: Rings = {}
        self._pending: Rings = {}

    # --------------------------------------------------------------------------------------------------------------- the queries

    def observe(self, index: int, q: torch.Tensor, lens: list[int], planner: Planner) -> None:
        """Remember the newest queries ``q`` ``[B, H, q, D]`` of a forward, of which the last ``lens[row]`` are real tokens.

        They count once :meth:`commit` is called. Rows that have chosen their channels are passed over.
        """
        if not self.role.observe:
            return
        rings = self._rings.get(index) or [q.new_zeros(q.shape[1], 0, q.shape[3])] * q.shape[0]
        new = []
        for row, (ring, count) in enumerate(zip(rings, lens)):
            if planner.num_packed(row):
                new.append(ring[:, :0])
                continue
            most = self.role.observe + SPARE
            fresh = q[row, :, q.shape[2] - min(count, most) :]
            new.append(torch.cat([ring, fresh.detach()], 1)[:, -most:])
        self._pending[index] = new

    def commit(self, reading: bool) -> None:
        """The forward counts."""
        self._rings.update(self._pending)
        self._pending, self.reading = {}, reading

    def rollback(self) -> None:
        """The forward never was."""
        self._pending = {}

    def check_crop(self, planner: Planner, counts: list[int]) -> None:
        """Refuse to go back to before tokens were packed: a shorter text would have chosen other channels, or packed fewer tokens.

        Raises:
            StateError: if that is asked of a row.
        """
        for row, count in enumerate(counts):
            seen, at = planner.seen(row), self.packed_at[row] if self.packed_at else 0
            left = seen - count
            if not count or left <= 0:
                continue
            if left <= at:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: some were packed when the row had seen {at}; "
                    f"at most {max(seen - at - 1, 0)} can be forgotten; {GO_BACK}"
                )
            spare = min((rings[row].shape[1] for rings in self._rings.values()), default=0) - min(self.role.observe, left)
            if not at and self.role.observe and count > spare:
                raise StateError(
                    f"row {row}: cannot forget {count} tokens: of the queries before them too few are kept to choose channels by; "
                    f"at most {max(spare, 0)} can be forgotten; {GO_BACK}"
                )

    def packed(self, row: int, planner: Planner) -> None:
        """Some of a row was packed."""
        self.packed_at += [0] * (planner.num_rows - len(self.packed_at))
        self.packed_at[row] = planner.seen(row)

    def crop(self, planner: Planner, counts: list[int]) -> None:
        """The planner forgot the newest ``counts[row]`` tokens; so their queries are."""
        self.packed_at = [min(at, planner.seen(row)) for row, at in enumerate(self.packed_at)]
        self._rings = {
            index: [ring[:, : max(ring.shape[1] - count, 0)] for ring, count in zip(rings, counts)]
            for index, rings in self._rings.items()
        }

    def select_rows(self, rows: list[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        self._rings = {index: [rings[row] for row in rows] for index, rings in self._rings.items()}
        self.packed_at = [self.packed_at[row] for row in rows] if self.packed_at else []

    def reset(self) -> None:
        """Forget everything."""
        self._rings, self._pending, self.reading, self.packed_at = {}, {}, False, []

    def state(self) -> tuple[Rings, bool, list[int]]:
        """What it takes to return here."""
        return dict(self._rings), self.reading, list(self.packed_at)

    def return_to(self, state: tuple[Rings, bool, list[int]]) -> None:
        """Make ``state`` the present."""
        self._rings, self.reading, self.packed_at = dict(state[0]), state[1], list(state[2])

    # ------------------------------------------------------------------------------------------------------------------- on disk

    def tensors(self, planner: Planner, stores: dict[int, Store]) -> dict[str, torch.Tensor]:
        """The channels of each row and layer, and the queries remembered, by name."""
        found = {}
        for row in range(planner.num_rows):
            for index, store in stores.items() if planner.num_packed(row) else ():
                channels = store.channels(planner.runs(0, row)[0][0])
                found[f"channels.{index}.{row}"] = channels.index.clone()
                found[f"pairs.{index}.{row}"] = torch.tensor(channels.pairs)
        for index, rings in self._rings.items():
            found.update({f"watched.{index}.{row}": ring.contiguous() for row, ring in enumerate(rings) if ring.numel()})
        return found

    def restored(self, row: int, saved: dict[str, torch.Tensor]) -> dict[int, Channels]:
        """A row's channels out of :meth:`tensors`."""
        return {
            index: Channels(saved[f"channels.{index}.{row}"], tuple(saved[f"pairs.{index}.{row}"].tolist()))
            for index in self._layers
        }

    def restore(self, num_rows: int, reading: bool, saved: dict[str, torch.Tensor]) -> None:
        """The queries out of :meth:`tensors`."""
        self.reading = reading
        for index, layer in self._layers.items():
            known = {row: saved[name].to(layer.device) for row in range(num_rows) if (name := f"watched.{index}.{row}") in saved}
            if known:
                empty = next(iter(known.values()))[:, :0]
                self._rings[index] = [known.get(row, empty) for row in range(num_rows)]

    # ----------------------------------------------------------------------------------------------------------------- the packing

    def due(self, planner: Planner, row: int, prompt_ended: bool) -> int:
        """Up to which resident the row is to be packed now; what is packed already if nothing is due."""
        role, packed = self.role, planner.num_packed(row)
        count = planner.resident(0, row) - role.recent - packed
        if not prompt_ended:
            if role.flush_every is None or count < role.flush_every:
                return packed
            count -= count % role.flush_every
        if count <= 0 or not self._has_seen_enough(planner, row):
            return packed
        return packed + count - count % role.align

    def may_act(self, planner: Planner, width: int, has_prompt: bool) -> bool:
        """Whether something would be packed between the tokens of a forward over ``width`` of them."""
        role, rows = self.role, range(planner.num_rows)
        waiting = max((planner.resident(0, row) - planner.num_packed(row) for row in rows), default=0) + width - role.recent
        if has_prompt or self.reading:
            return waiting > 0
        return role.flush_every is not None and waiting >= role.flush_every

    def _has_seen_enough(self, planner: Planner, row: int) -> bool:
        if planner.num_packed(row) or not self.role.observe:
            return True
        return all(rings[row].shape[1] >= self.role.observe for rings in self._rings.values())

    def choose(self, planner: Planner, stores: dict[int, Store], row: int, upto: int) -> dict[int, Channels] | int:
        """The channels of each layer, or the packed block of the row that has them already."""
        runs = planner.runs(0, row)
        if runs[0][0] >= PACKED:
            return runs[0][0]
        return {index: self._choose(index, store, runs, row, upto) for index, store in stores.items()}

    def _choose(self, index: int, store: Store, runs: list[tuple[int, int, int]], row: int, upto: int) -> Channels:
        layer, rings = self._layers[index], self._rings.get(index)
        keys, _ = store.read(runs)
        queries = keys.new_zeros(0, 0, keys.shape[2]) if rings is None else rings[row][:, -self.role.observe :]
        return self.role.choose_channels(StorageObservation(shape_of(layer), queries.float(), keys, upto, layer.rope, self.raw))

    def run(self, index: int, store: Store, done: list[tuple[Moves, dict[int, Channels] | int]]) -> None:
        """Pack in one layer what was planned for each row."""
        for moves, channels in done:
            store.pack(moves, channels if isinstance(channels, int) else channels[index])
