"""Sliding layers: the keys and values of each row's last tokens, which every query of a window reads.

    state     for every layer keys and values [B, Hkv, n, D], right-aligned; for every window how many of the n a row holds
    attend    once per sliding layer: what is held and what is new (:mod:`.sliding_attention`)
    commit    each row keeps what its next query sees

A state is immutable: every change makes a new one, so forks, marks and dead forwards share or drop states and nothing is undone.
All integers are known on the host; no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.errors import CacheMismatchError, SessionError, ShapeError, StateError, UnsupportedError
from kvsieve.runtime.cropping import GO_BACK
from kvsieve.runtime.part import Apply, Crop, Forward, Join, LayerInput, Saved, Setting, StreamPart, unchanged
from kvsieve.runtime.saved import of_kind
from kvsieve.runtime.sliding_attention import Piece, plan, windowed

if TYPE_CHECKING:
    from kvsieve.runtime.blocks import Blocks

__all__ = ["SlidingLayers", "SlidingState"]

SPARE = 64
"""A buffer that is this many tokens larger than what is kept of it is copied, so that the rest is given back."""

Positions = npt.NDArray[np.int64]
Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SlidingState:
    """What all sliding layers hold at one moment.

    Attributes:
        tensors: keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]`` by layer index, each row's tokens right-aligned.
        counts: tokens that each row holds, by window size; a row of fewer than ``n`` has unused places on the left.
    """

    tensors: dict[int, Tensors] = field(default_factory=dict)
    counts: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(eq=False)
class _Step:
    """A planned forward, the pieces of each window once they are needed, and what the layers that have attended hold then."""

    forward: Forward
    pieces: dict[tuple[int, torch.device], list[Piece]] = field(default_factory=dict)
    new: dict[int, Tensors] = field(default_factory=dict)


class SlidingLayers(StreamPart):
    """The sliding layers of one stream.

    Args:
        windows: window size of each sliding layer, by its index in the model.
    """

    name = "sliding"

    def __init__(self, windows: dict[int, int], blocks: Blocks) -> None:
        self.windows, self._blocks = windows, blocks
        self.now = SlidingState()
        self._step: _Step | None = None

    @classmethod
    def of(cls, setting: Setting) -> SlidingLayers | None:
        """None if the model has no sliding layers."""
        facts = setting.facts
        kinds = enumerate(zip(facts.layer_types, facts.layer_kwargs))
        windows = {index: int(kwargs["sliding_window"]) for index, (kind, kwargs) in kinds if kind == "sliding_attention"}
        return cls(windows, setting.blocks) if windows else None

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that the allocator holds."""
        return sum(t.untyped_storage().nbytes() for pair in self.now.tensors.values() for t in pair)

    # ------------------------------------------------------------------------------------------------------------- one forward

    def begin(self, forward: Forward) -> None:
        self._step = _Step(forward)

    def rollback(self) -> None:
        self._step = None

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        """``[B, q, H, Dv]`` in the dtype of ``v``, of a sliding layer; the queries of pads get finite numbers of no meaning.

        Raises:
            StateError: without a planned forward of ``q`` columns.
            ShapeError: if keys or values differ in shape from what the layer holds.
        """
        size = self.windows.get(layer.index)
        if size is None:
            return None
        step, q = self._step, layer.q
        if step is None or step.forward.width != q.shape[2]:
            raise StateError(f"sliding layer {layer.index} ran out of order: its stream has no open step of {q.shape[2]} tokens")
        held = self.now.tensors.get(layer.index)
        keys, values = (layer.k, layer.v) if held is None else (_joined(held[0], layer.k), _joined(held[1], layer.v))
        step.new[layer.index] = keys, values
        outs = [windowed(q, keys, values, piece, layer.call) for piece in self._pieces(step, size, q.device)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).to(layer.v.dtype)

    def _pieces(self, step: _Step, size: int, device: torch.device) -> list[Piece]:
        """How a forward is computed in layers whose window has ``size`` tokens."""
        key = size, device
        if key not in step.pieces:
            counts = self.now.counts.get(size, (0,) * len(step.forward.lens))
            step.pieces[key] = plan(step.forward, counts, size, device)
        return step.pieces[key]

    def commit(self, forward: Forward) -> Apply:
        state = self._after(forward)

        def apply() -> None:
            self.now, self._step = state, None

        return apply

    def _after(self, forward: Forward) -> SlidingState:
        """What is held once the forward counts: what each row's next query sees and, while candidates are verified, what it
        would see if any of its tokens were taken back.

        Raises:
            StateError: if a sliding layer did not attend.
        """
        step = self._step
        if step is None or not self.windows:
            return self.now
        missing = sorted(set(self.windows) - set(step.new))
        if missing:
            raise StateError(f"sliding layers {missing} took no part in this forward, so they would not hold what the others do")
        moves: dict[int, _Move] = {}
        for size in set(self.windows.values()):
            held = self.now.counts.get(size, (0,) * len(forward.lens))
            kept = [
                min(had + new, min(seen, size - 1) + new if forward.verifying else min(seen + new, size - 1))
                for had, new, seen in zip(held, forward.lens, forward.seen)
            ]
            moves[size] = _Move.after(max(held, default=0), forward.width, forward.lens, kept)
        return self._moved(step.new, moves)

    # -------------------------------------------------------------------------------------------------------------- going back

    def check_evict(self, row: int, start: int, stop: int) -> None:
        widest, seen = max(self.windows.values()), self._blocks.planner.seen(row)
        if stop > seen - widest + 1:
            raise UnsupportedError(
                f"row {row}: tokens {max(start, seen - widest + 1)} to {stop} are still within the window of {widest} tokens of "
                "the model's sliding layers, which would go on seeing them; evict them once the window has moved on, or go back to "
                "a mark taken before them"
            )

    def check_crop(self, crop: Crop) -> None:
        """Refuse to forget tokens if what a shorter text would hold has left a window."""
        for size, held in self.now.counts.items():
            for row, (had, all_seen, gone) in enumerate(zip(held, crop.seen, crop.counts)):
                left = all_seen - gone
                if gone and max(had - gone, 0) < min(left, size - 1):
                    # Going back by n is exact while had - n >= size - 1.
                    most = max(had - size + 1, 0)
                    raise CacheMismatchError(
                        f"row {row}: cannot forget {gone} tokens of {all_seen}: the model's sliding window of {size} tokens has "
                        f"moved on, and what a text of {left} tokens would still see is gone; at most {most} can be forgotten; "
                        f"{GO_BACK}"
                    )

    def crop(self, crop: Crop) -> Apply:
        counts = crop.counts
        if not any(counts):
            return unchanged
        moves = {}
        for size, held in self.now.counts.items():
            moves[size] = _Move.cut(max(held), counts, [max(had - gone, 0) for had, gone in zip(held, counts)])
        return partial(self.return_to, self._moved(self.now.tensors, moves))

    def select_rows(self, rows: Sequence[int]) -> Apply:
        """Row ``i`` becomes what row ``rows[i]`` was.

        Raises:
            CacheMismatchError: if ``rows`` are none, or not all rows of what is held.
        """
        for held in self.now.counts.values():
            if not rows or not all(0 <= row < len(held) for row in rows):
                raise CacheMismatchError(f"rows {list(rows)} were asked for, the stream holds rows 0 to {len(held) - 1}")
        counts = {size: tuple(held[row] for row in rows) for size, held in self.now.counts.items()}
        tensors = {}
        for index, (keys, values) in self.now.tensors.items():
            most, order = max(counts[self.windows[index]]), torch.tensor(rows, device=keys.device)
            kept = slice(keys.shape[2] - most, None)
            tensors[index] = keys[:, :, kept].index_select(0, order), values[:, :, kept].index_select(0, order)
        return partial(self.return_to, SlidingState(tensors, counts))

    def join(self, forks: Sequence[SlidingLayers], join: Join) -> Apply:
        raise UnsupportedError(
            f"this model's layers {sorted(self.windows)} slide over the newest tokens, and documents that were read side by side "
            "have no one end to slide from; feed the documents to one stream, one after the other"
        )

    def state(self) -> SlidingState:
        return self.now

    def return_to(self, state: SlidingState) -> None:
        self.now = state

    def reset(self) -> None:
        self.now, self._step = SlidingState(), None

    def release(self) -> None:
        self.reset()

    def _moved(self, tensors: dict[int, Tensors], moves: dict[int, _Move]) -> SlidingState:
        found = {}
        for index, (keys, values) in tensors.items():
            move = moves[self.windows[index]]
            found[index] = move.run(keys), move.run(values)
        return SlidingState(found, {size: tuple(move.counts) for size, move in moves.items()})

    # ------------------------------------------------------------------------------------------------------------ session files

    def save(self) -> Saved:
        counts = self.now.counts
        layers = [{"layer": i, "window": size, "counts": list(counts.get(size, ()))} for i, size in self.windows.items()]
        named = {}
        for index, pair in self.now.tensors.items():
            for name, tensor in zip(("keys", "values"), pair):
                named[f"{name}.{index}"] = tensor.contiguous()
        return Saved({"layers": layers}, named)

    def restore(self, saved: Saved) -> None:
        """Hold what a session file says.

        Raises:
            CacheMismatchError: if the file was written for other windows, or what it holds is not whole.
        """
        header = [Saved(of_kind(entry, dict, "layers"), seen=saved.seen) for entry in saved.get("layers", list)]
        theirs = {entry.count("layer"): entry.count("window") for entry in header}
        if len(theirs) != len(header):
            raise SessionError("it tells of one layer twice")
        if theirs != self.windows:
            raise CacheMismatchError(
                f"the stream was saved from a model with sliding windows {theirs} (by layer), this model has {self.windows}"
            )
        counts: dict[int, tuple[int, ...]] = {}
        for entry in header:
            told = tuple(entry.by_row("counts"))
            if told and counts.setdefault(entry.count("window"), told) != told:
                raise SessionError(f"layer {entry.count('layer')} holds other tokens than one with the same window")
        if saved.seen and set(counts) != set(self.windows.values()):
            raise SessionError(f"it has no tokens for the windows {sorted(set(self.windows.values()) - set(counts))}")
        tensors = {}
        for index, size in self.windows.items():
            if size not in counts:
                continue
            want = len(counts[size]), None, max(counts[size])
            keys, values = (saved.tensor(f"{name}.{index}", None, *want, None) for name in ("keys", "values"))
            if keys.shape[1] != values.shape[1] or keys.dtype != values.dtype:
                raise SessionError(f"its keys and values of layer {index} do not go together")
            tensors[index] = keys, values
        self.now = SlidingState(tensors, counts)


# ------------------------------------------------------------------------------------------------------------------ moving tokens


@dataclass(frozen=True, eq=False)
class _Move:
    """Which columns of a buffer become a state's buffer: its last ``counts`` tokens of each row, right-aligned.

    ``start .. stop`` is a range of columns for all rows, or ``index`` ``[B, n]`` has a column for each place of each row.
    """

    counts: list[int]
    start: int
    stop: int
    index: Positions | None = None

    @classmethod
    def after(cls, held: int, width: int, lens: Sequence[int], counts: list[int]) -> _Move:
        """Behind ``held`` columns come ``width`` new ones, of which the last ``lens[row]`` are tokens."""
        end, most = held + width, max(counts, default=0)
        if all(new == width for new in lens):
            return cls(counts, end - most, end)
        back = np.arange(most, 0, -1)[None]
        # The tokens of a row are its held columns and, behind a gap of pads, the last new ones.
        index = end - back - np.where(back > np.asarray(lens)[:, None], width - np.asarray(lens)[:, None], 0)
        return cls(counts, 0, end, index.clip(min=0))

    @classmethod
    def cut(cls, held: int, gone: Sequence[int], counts: list[int]) -> _Move:
        """The newest ``gone[row]`` of ``held`` columns are left out."""
        most = max(counts)
        if len(set(gone)) == 1:
            end = max(held - gone[0], 0)
            return cls(counts, end - most, end)
        index = held - np.arange(most, 0, -1)[None] - np.asarray(gone)[:, None]
        return cls(counts, 0, held, index.clip(min=0))

    def run(self, buffer: torch.Tensor) -> torch.Tensor:
        """The new buffer of ``buffer`` ``[B, Hkv, columns, D]``; it never keeps a graph."""
        buffer = buffer.detach()
        if self.index is not None:
            batch, heads, columns, dim = buffer.shape
            # Whole vectors by one index: several times faster than a gather of their elements.
            starts = np.arange(batch * heads).reshape(batch, heads, 1) * columns
            places = torch.from_numpy((starts + self.index[:, None]).reshape(-1)).to(buffer.device)
            return buffer.reshape(-1, dim).index_select(0, places).view(batch, heads, self.index.shape[1], dim)
        kept = buffer[:, :, self.start : self.stop]
        token = buffer.element_size() * buffer.shape[0] * buffer.shape[1] * buffer.shape[3]
        return kept.clone() if buffer.untyped_storage().nbytes() > (kept.shape[2] + SPARE) * token else kept


def _joined(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``held`` and then ``new``, ``[B, Hkv, n, D]``; of two dtypes the wider one."""
    if (held.shape[0], held.shape[1], held.shape[3]) != (new.shape[0], new.shape[1], new.shape[3]):
        raise ShapeError(
            f"a sliding layer holds keys or values of shape {tuple(held.shape)} and got new ones of shape {tuple(new.shape)}; "
            "open a new stream"
        )
    return torch.cat([held if held.device == new.device else held.to(new.device), new], 2)
