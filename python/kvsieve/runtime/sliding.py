"""Sliding layers: attention over a row's last tokens, and the keys and values that this takes.

A query at position ``p`` of its row sees the positions ``p - size + 1`` to ``p`` (transformers' convention: a window of ``size``
tokens, the query's own among them). Positions count a row's own tokens, so the pads of a batch take no room in any window:

    state        for every layer keys and values [B, Hkv, n, D], right-aligned; for every window how many of the n a row holds
    begin        a step is planned: how many new tokens each row gets in its last columns
    attend       once per sliding layer: what is held and what is new, under a mask made of positions
    after_step   each row keeps what its next query sees; becomes `now` when the step counts

A state is immutable: every change makes a new one, so forks, marks and steps that died share or drop states and nothing is undone.
All integers are known on the host; no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.errors import CacheMismatchError, ShapeError, StateError
from kvsieve.runtime.cropping import GO_BACK

if TYPE_CHECKING:
    from kvsieve.backends.base import AttendCall
    from kvsieve.facts import ModelFacts

__all__ = ["SlidingLayers", "SlidingState", "windowed"]

QUERIES = 512
"""Queries of one piece of a prompt: each piece reads only the keys within its windows, and its mask stays small."""

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


@dataclass(frozen=True, eq=False)
class _Piece:
    """Queries ``first .. last`` of a step, the columns ``low .. high`` of held and new keys that they read, and who sees what.

    ``mask`` is bool ``[B or 1, 1, queries, keys]``; None where everything is seen, or (``causal``) everything up to the query.
    """

    first: int
    last: int
    low: int
    high: int
    mask: torch.Tensor | None = None
    causal: bool = False


@dataclass
class _Step:
    """A planned step: tokens that each row had seen, its new ones, columns; and the pieces of each window, once they are needed."""

    seen: list[int]
    lens: list[int]
    width: int
    pieces: dict[tuple[int, torch.device], list[_Piece]] = field(default_factory=dict)
    new: dict[int, Tensors] = field(default_factory=dict)
    """Held and new keys and values of the layers that have attended."""


class SlidingLayers:
    """The sliding layers of one stream.

    Args:
        windows: window size of each sliding layer, by its index in the model.
    """

    def __init__(self, windows: dict[int, int]) -> None:
        self.windows = windows
        self.now = SlidingState()
        self._step: _Step | None = None

    @classmethod
    def of(cls, facts: ModelFacts) -> SlidingLayers:
        """The sliding layers of a model."""
        kinds = enumerate(zip(facts.layer_types, facts.layer_kwargs))
        return cls({index: int(kwargs["sliding_window"]) for index, (kind, kwargs) in kinds if kind == "sliding_attention"})

    def __bool__(self) -> bool:
        return bool(self.windows)

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that the allocator holds."""
        return sum(t.untyped_storage().nbytes() for pair in self.now.tensors.values() for t in pair)

    # --------------------------------------------------------------------------------------------------------------- one step

    def begin(self, seen: Sequence[int], lens: Sequence[int], width: int) -> None:
        """A step over ``width`` columns is planned, of which the last ``lens[row]`` are tokens; ``seen[row]`` came before."""
        self._step = _Step(list(seen), list(lens), width)

    def rollback(self) -> None:
        """The planned step does not count."""
        self._step = None

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttendCall) -> torch.Tensor:
        """Attention of layer ``index``: ``q`` ``[B, H, q, D]`` over what it holds and the new ``k``, ``v`` ``[B, Hkv, q, D]``.

        Returns ``[B, q, H, Dv]`` in the dtype of ``v``; the queries of pads get finite numbers of no meaning.

        Raises:
            StateError: without a planned step of ``q`` columns.
            ShapeError: if keys or values differ in shape from what the layer holds.
        """
        step, size = self._step, self.windows[index]
        if step is None or step.width != q.shape[2]:
            raise StateError(f"sliding layer {index} ran out of order: its stream has no open step of {q.shape[2]} tokens")
        held = self.now.tensors.get(index)
        keys, values = (k, v) if held is None else (_joined(held[0], k), _joined(held[1], v))
        step.new[index] = keys, values
        outs = [windowed(q, keys, values, piece, call) for piece in self._pieces(size, q.device)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).to(v.dtype)

    def _pieces(self, size: int, device: torch.device) -> list[_Piece]:
        """How the open step is computed in layers whose window has ``size`` tokens."""
        step = self._step
        assert step is not None
        key = size, device
        if key not in step.pieces:
            counts = self.now.counts.get(size, (0,) * len(step.lens))
            step.pieces[key] = _plan(step, counts, size, device)
        return step.pieces[key]

    def after_step(self, recording: bool) -> SlidingState:
        """What is held once the planned step counts: what each row's next query sees and, while candidates are verified, what it
        would see if any of the step's tokens were taken back.

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
            held = self.now.counts.get(size, (0,) * len(step.lens))
            kept = [
                min(had + new, min(seen, size - 1) + new if recording else min(seen + new, size - 1))
                for had, new, seen in zip(held, step.lens, step.seen)
            ]
            moves[size] = _Move.after(max(held, default=0), step.width, step.lens, kept)
        return self._moved(step.new, moves)

    def commit(self, state: SlidingState) -> None:
        """The step counts: ``state`` is what :meth:`after_step` returned."""
        self.now, self._step = state, None

    # -------------------------------------------------------------------------------------------------------------- going back

    def check_crop(self, seen: Sequence[int], counts: Sequence[int]) -> None:
        """Refuse to forget the newest ``counts[row]`` of ``seen[row]`` tokens if what a shorter text would hold has left a window.

        Raises:
            CacheMismatchError: naming the row and the window.
        """
        for size, held in self.now.counts.items():
            for row, (had, all_seen, gone) in enumerate(zip(held, seen, counts)):
                left = all_seen - gone
                if gone and max(had - gone, 0) < min(left, size - 1):
                    # Going back by n is exact while had - n >= size - 1.
                    most = max(had - size + 1, 0)
                    raise CacheMismatchError(
                        f"row {row}: cannot forget {gone} tokens of {all_seen}: the model's sliding window of {size} tokens has "
                        f"moved on, and what a text of {left} tokens would still see is gone; at most {most} can be forgotten; "
                        f"{GO_BACK}"
                    )

    def cropped(self, counts: Sequence[int]) -> SlidingState:
        """What is held without the newest ``counts[row]`` tokens of each row."""
        if not any(counts):
            return self.now
        moves = {}
        for size, held in self.now.counts.items():
            moves[size] = _Move.cut(max(held), counts, [max(had - gone, 0) for had, gone in zip(held, counts)])
        return self._moved(self.now.tensors, moves)

    def selected(self, rows: Sequence[int]) -> SlidingState:
        """What is held when row ``i`` is what row ``rows[i]`` was.

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
        return SlidingState(tensors, counts)

    def reset(self) -> None:
        """Forget everything."""
        self.now, self._step = SlidingState(), None

    def _moved(self, tensors: dict[int, Tensors], moves: dict[int, _Move]) -> SlidingState:
        found = {}
        for index, (keys, values) in tensors.items():
            move = moves[self.windows[index]]
            found[index] = move.run(keys), move.run(values)
        return SlidingState(found, {size: tuple(move.counts) for size, move in moves.items()})

    # ------------------------------------------------------------------------------------------------------------ session files

    def header(self) -> list[dict[str, Any]]:
        """What a session file says of each layer, as plain data."""
        counts = self.now.counts
        return [{"layer": i, "window": size, "counts": list(counts.get(size, ()))} for i, size in self.windows.items()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, by name, for a session file."""
        named = {}
        for index, pair in self.now.tensors.items():
            for name, tensor in zip(("keys", "values"), pair):
                named[f"sliding.{name}.{index}"] = tensor.contiguous()
        return named

    def restore(self, header: list[dict[str, Any]], get: Callable[[str], torch.Tensor]) -> None:
        """Hold what a session file says; ``get`` returns a tensor of :meth:`tensors` by its name.

        Raises:
            CacheMismatchError: if the file was written for other windows, or what it holds is not whole.
        """
        theirs = {entry["layer"]: entry["window"] for entry in header}
        if theirs != self.windows:
            raise CacheMismatchError(
                f"the stream was saved from a model with sliding windows {theirs} (by layer), this model has {self.windows}"
            )
        counts = {entry["window"]: tuple(entry["counts"]) for entry in header if entry["counts"]}
        tensors = {}
        for index, size in self.windows.items():
            if size not in counts:
                continue
            pair = get(f"sliding.keys.{index}"), get(f"sliding.values.{index}")
            want = len(counts[size]), max(counts[size])
            if any((t.shape[0], t.shape[2]) != want for t in pair):
                raise CacheMismatchError(
                    f"the file's sliding layer {index} has {pair[0].shape[0]} rows of {pair[0].shape[2]} tokens, its header says "
                    f"{want[0]} rows of {want[1]}"
                )
            tensors[index] = pair
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


# ------------------------------------------------------------------------------------------------------------------------- masks


def _plan(step: _Step, counts: Sequence[int], size: int, device: torch.device) -> list[_Piece]:
    """The pieces of a step in layers with a window of ``size``, where row ``r`` holds ``counts[r]`` tokens."""
    held, width, whole = max(counts, default=0), step.width, all(new == step.width for new in step.lens)
    if whole and width == 1:
        sees = [min(seen, size - 1) for seen in step.seen]
        if len(set(sees)) == 1:
            return [_Piece(0, 1, held - sees[0], held + 1)]
    if whole and not held and width <= size:
        return [_Piece(0, width, 0, width, causal=True)]
    seen, lens, had = (np.asarray(x, np.int64)[:, None] for x in (step.seen, step.lens, counts))
    if len({*zip(step.seen, step.lens, counts)}) == 1:
        seen, lens, had = seen[:1], lens[:1], had[:1]
    old = np.arange(held)[None]
    old = np.where(held - old <= had, seen - (held - old), -1)
    new = np.arange(width)[None]
    # A pad has a position that nothing else has, and sees itself only: no row of a mask is empty.
    new = np.where(new < width - lens, -2 - new, seen + new - (width - lens))
    keys = np.concatenate([old, new], 1)
    pieces, known = [], {}
    for first in range(0, width, QUERIES):
        last = min(first + QUERIES, width)
        queries = new[:, first:last]
        low = _first_column(keys[:, : held + last], queries, size)
        near = keys[:, low : held + last]
        # Inside a long prompt all pieces look alike from where they stand.
        origin = seen * 0 if (near < 0).any() or (queries < 0).any() else queries[:, :1]
        alike = (queries - origin).tobytes(), (near - origin).tobytes(), bool(origin.any())
        if alike not in known:
            known[alike] = torch.from_numpy(_visible(queries, near, size))[:, None].to(device)
        pieces.append(_Piece(first, last, low, held + last, known[alike]))
    return pieces


def _visible(queries: Positions, keys: Positions, size: int) -> npt.NDArray[np.bool_]:
    """Who sees what, bool ``[B, q, k]``, from positions ``[B, q]`` and ``[B, k]``; negative ones are pads or unused places."""
    q, k = queries[:, :, None], keys[:, None, :]
    seen: npt.NDArray[np.bool_] = ((k <= q) & (k > np.maximum(q - size, -1))) | (k == q)
    return seen


def _first_column(keys: Positions, queries: Positions, size: int) -> int:
    """The first column of ``keys`` that any of the last columns' ``queries`` sees."""
    real = np.where(queries >= 0, queries, np.iinfo(np.int64).max).min(1, keepdims=True)
    columns = np.flatnonzero(((keys >= 0) & (keys > real - size)).any(0))
    own: int = keys.shape[1] - queries.shape[1]
    return min(own, int(columns[0])) if len(columns) else own


# --------------------------------------------------------------------------------------------------------------------- attention


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: _Piece, call: AttendCall) -> torch.Tensor:
    """Attention of one piece of a step.

    Args:
        q: ``[B, H, q, D]``, all queries of the step; k, v: ``[B, Hkv, n, D]``, what is held and what is new.
        piece: which queries and keys.
        call: scale, cap and sink logits of the layer.

    Returns:
        ``[B, queries of the piece, H, Dv]``, in the widest dtype of the three.
    """
    if q.shape[2] != piece.last - piece.first:
        q = q[:, :, piece.first : piece.last]
    if k.shape[2] != piece.high - piece.low:
        k, v = k[:, :, piece.low : piece.high], v[:, :, piece.low : piece.high]
    if not q.dtype == k.dtype == v.dtype:
        common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(common), k.to(common), v.to(common)
    plain = call.softcap is None and call.sink_logits is None
    out = _fused(q, k, v, piece, call.scale) if plain else _explicit(q, k, v, piece, call)
    return out.transpose(1, 2).contiguous()


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: _Piece, scale: float) -> torch.Tensor:
    """torch's own attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    batch, heads, count, dim = q.shape
    group = heads // k.shape[1]
    if piece.causal:
        return attention(q, k, v, is_causal=count > 1, scale=scale, enable_gqa=group > 1)
    # The queries of one key-value head stand side by side, so that no key is repeated.
    mask = piece.mask if piece.mask is None or count == 1 else piece.mask.repeat(1, 1, group, 1)
    out = attention(q.reshape(batch, -1, group * count, dim), k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, -1)


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: _Piece, call: AttendCall) -> torch.Tensor:
    """Attention with capped logits, with learned logits that join the softmax without a value, or with both."""
    batch, heads, count, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    logits = q.reshape(batch, kv_heads, group * count, dim) @ k.transpose(2, 3)
    logits = logits.view(batch, kv_heads, group, count, -1).float() * call.scale
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    mask = piece.mask
    if piece.causal:
        mask = torch.ones(count, k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    weights = logits.softmax(-1)
    if call.sink_logits is not None:
        # exp(sink) joins the denominator: every weight shrinks by what the sink takes.
        sinks = call.sink_logits.float().view(1, kv_heads, group, 1, 1)
        weights = weights * torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks)
    out = weights.to(v.dtype).view(batch, kv_heads, group * count, -1) @ v
    return out.view(batch, heads, count, -1)
