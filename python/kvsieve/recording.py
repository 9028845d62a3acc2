"""A recording of a stream: what it holds, reads and weighs after every step, as changes, for `kvsieve view`.

The recorder is told when a forward begins and when it is over, looks at what the stream knows of itself, and writes nothing until
the recording ends. What was taken back (a rewind, a crop, rejected candidates) is taken out of the recording as well, so that its
tokens are always those of one text. The file is described in :mod:`kvsieve.files.recording_file`.
"""

from __future__ import annotations

import array
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvsieve.checks import check_path, integer, told
from kvsieve.errors import ArgumentError, RangeError
from kvsieve.files.recording_file import COLUMNS, pack, write
from kvsieve.files.replace import target_of
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.head_eviction import HeadEviction
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.trace import ranges, trace

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from kvsieve.runtime.engine import Engine
    from kvsieve.runtime.part import Forward

__all__ = ["Recorder", "pieces", "record"]

Ints: TypeAlias = "npt.NDArray[np.int64]"


@contextlib.contextmanager
def record(engine: Engine, model: object, path: str | PathLike[str], tokenizer: Any, row: int) -> Iterator[None]:
    """See :meth:`kvsieve.Stream.record`."""
    check_path("path", path)
    target_of(path, "recording")
    if not _decodes(tokenizer):
        raise ArgumentError(f"a recording holds the text, so it needs the tokenizer that made the ids, got {told(tokenizer)}")
    row = integer("row", row, 0, error=RangeError)
    if engine.num_rows and row >= engine.num_rows:
        raise RangeError(f"the stream has rows 0 to {engine.num_rows - 1}, not {row}")
    recorder = Recorder(engine, row)
    engine.watchers.append(recorder)

    def end() -> None:
        engine.watchers.remove(recorder)
        recorder.settled()
        write(path, {"model": type(model).__name__, **recorder.document(tokenizer)})

    try:
        yield
    except BaseException:
        # What broke the block is told, and not what is missing in the file because of it.
        with contextlib.suppress(Exception):
            end()
        raise
    end()
    if recorder.failed is not None:
        raise recorder.failed


def _decodes(tokenizer: Any) -> bool:
    """Whether ids become text by it: better asked now than when the run is over."""
    try:
        return isinstance(tokenizer.decode([0]), str)
    except Exception:
        return False


class Recorder:
    """Looks at one row of a stream after each step.

    Attributes:
        failed: what went wrong while it looked; the stream went on, and nothing was recorded after that.
    """

    def __init__(self, engine: Engine, row: int) -> None:
        self._engine, self._row = engine, row
        self._began: float | None = None
        self._forward: Forward | None = None
        self._ids = np.zeros(0, np.int64)
        self._steps: dict[str, list[float]] = {name: [] for name in COLUMNS}
        self._holds: dict[int | None, _Held] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._reads: dict[tuple[int, int], _Reads] = {}
        self.failed: Exception | None = None
        self.settled()

    def begins(self, forward: Forward) -> None:
        """The clock starts."""
        self._forward, self._began = forward, time.perf_counter() if self._began is None else self._began

    def settled(self) -> None:
        """A step is over. An error here is not the stream's: it is kept, and ends the recording."""
        seconds = float("nan") if self._began is None else time.perf_counter() - self._began
        forward, self._forward, self._began = self._forward, None, None
        if self.failed is not None:
            return
        if self._row >= self._engine.num_rows:
            self._take_back(self._ids[:0], 0)
            self._ids = self._ids[:0]
            return
        try:
            self._look(forward, seconds)
        except Exception as error:
            self.failed = error

    def _look(self, forward: Forward | None, seconds: float) -> None:
        engine, row = self._engine, self._row
        ids = engine.transcript.rows[row].ids.tensor().cpu().numpy()
        seen = len(ids)
        self._take_back(ids, seen if forward is None else forward.seen[row])
        step, before = len(self._steps["seen"]), self._seen
        self._ids = ids
        changed = self._look_at_residents(step, seen)
        bytes_held = float(engine.bytes_held)
        if forward is None and before == seen and not changed and step and self._steps["bytes"][-1] == bytes_held:
            return
        new = seen - before
        full = float(seen * engine.facts.bytes_per_token)
        now = (seen, self._num_held(), bytes_held, full, seconds / new if new else float("nan"))
        for name, value in zip(COLUMNS, now):
            self._steps[name].append(value)
        self._look_at_reads(step)

    @property
    def _seen(self) -> int:
        return int(self._steps["seen"][-1]) if self._steps["seen"] else 0

    def _take_back(self, ids: Ints, most: int) -> None:
        """Forget the steps after which the text went on otherwise than now, or had more than ``most`` tokens."""
        count = min(len(ids), len(self._ids))
        other = np.flatnonzero(ids[:count] != self._ids[:count])
        same = min(int(other[0]) if len(other) else count, most)
        if same >= self._seen:
            return
        steps = sum(seen <= same for seen in self._steps["seen"])
        for column in self._steps.values():
            del column[steps:]
        for held in self._holds.values():
            held.cut(steps)
        for reads in self._reads.values():
            reads.cut(steps)
        self._chosen.clear()

    # ---------------------------------------------------------------------------------------------------------------- residents

    def _look_at_residents(self, step: int, seen: int) -> bool:
        part = self._engine.parts.eviction
        if not isinstance(part, HeadEviction):
            positions, scores = part.kept(self._row, None, None)
            held = self._holds.setdefault(None, _Held(1))
            now = np.zeros((1, seen), bool)
            now[0, positions] = True
            changed = held.update(step, now)
            return held.scores.update(step, np.zeros(len(positions), np.int64), positions, scores) or changed
        changed = False
        for layer, state in part.rows[self._row].layers.items():
            held = self._holds.setdefault(layer, _Held(state.chosen.shape[0]))
            if self._chosen.get(layer) is not state.chosen:
                # Until heads choose again, they hold all that comes.
                self._chosen[layer] = state.chosen
                now = np.zeros((held.heads, seen), bool)
                np.put_along_axis(now, part.positions(self._row, layer).numpy(), True, 1)
                changed |= held.update(step, now)
            held.grow(seen)
        return changed

    def _num_held(self) -> int:
        part = self._engine.parts.eviction
        if isinstance(part, HeadEviction):
            return self._engine.planner.resident(0, self._row)
        return len(part.kept(self._row, None, None)[0])

    def _last_scores(self) -> None:
        """Of heads that sum up attention: what each resident has in the end. Before that it changes with every token."""
        part = self._engine.parts.eviction
        if not isinstance(part, HeadEviction) or self._row >= self._engine.num_rows or not self._steps["seen"]:
            return
        for layer, held in self._holds.items():
            for head in range(held.heads):
                positions, scores = part.kept(self._row, layer, head)
                there = np.isfinite(scores) & (positions < self._seen)
                at = positions[there]
                held.scores.add(len(self._steps["seen"]) - 1, np.full(len(at), head), at, scores[there])

    # -------------------------------------------------------------------------------------------------------------------- reads

    def _look_at_reads(self, step: int) -> None:
        for layer, head, read in _selected(self._engine, self._row):
            self._reads.setdefault((layer, head), _Reads()).update(step, read)

    def _told_reads(self) -> dict[str, Any] | None:
        policy = self._engine.policy
        rule = policy.selection or policy.fetching
        if rule is None and policy.recycling is None:
            return None
        first, newest = rule.always_read if rule is not None else (None, None)
        lanes: list[dict[str, Any]] = []
        for layer in sorted({layer for layer, _ in self._reads}):
            packed = [self._reads[key].packed() for key in sorted(self._reads) if key[0] == layer]
            if all(one == packed[0] for one in packed):
                lanes.append({"layer": layer, "head": None, **packed[0]})
            else:
                lanes += [{"layer": layer, "head": head, **one} for head, one in enumerate(packed)]
        return {"first": first, "newest": newest, "of": lanes}

    # ---------------------------------------------------------------------------------------------------------------- the end

    def document(self, tokenizer: Any) -> dict[str, Any]:
        """All that was recorded, as `kvsieve.files.recording_file` describes it, but for the model's name."""
        per_head = isinstance(self._engine.parts.eviction, HeadEviction)
        self._last_scores()
        holds = [{"layer": layer, "heads": held.heads, **held.packed(self._seen)} for layer, held in self._holds.items()]
        return {
            "policy": repr(self._engine.policy),
            "backend": self._engine.backend.name,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "tokens": pieces(tokenizer, self._ids[: self._seen].tolist()),
            "steps": {name: pack(self._steps[name], dtype) for name, dtype in COLUMNS.items()},
            "holds": holds or [{"layer": None, "heads": 1, **_Held(1).packed(0)}],
            "scores_at": "end" if per_head else "step",
            "reads": self._told_reads(),
        }


def _selected(engine: Engine, row: int) -> Iterator[tuple[int, int, Ints | None]]:
    """Layer, head, and what its newest query selected, as ranges ``[n, 2]`` of positions; None where it read everything."""
    selection, fetching = engine.parts.find(Selection), engine.parts.find(Fetching)
    layers = engine.facts.layers
    if fetching is not None:
        for layer in layers:
            last = fetching.read.get(layer.index, [None] * engine.num_rows)[row]
            whole = last is None or len(last.choice.pieces) == 1
            for head in range(layer.num_kv_heads):
                yield layer.index, head, None if last is None or whole else last.blocks(fetching.rule, head)
    elif selection is not None:
        positions = selection.read_positions(row)
        whole = not len(positions) or int(positions[-1]) == len(positions) - 1
        for layer in layers:
            search = selection.searches.get(layer.index) if selection.searching else None
            choices = [] if search is None or selection.rule_of(layer.index) is None else list(search.choice(row))
            for head in range(layer.num_kv_heads):
                if not choices:
                    yield layer.index, head, None
                elif whole:
                    yield layer.index, head, _merged(choices[head].ranges)
                else:
                    # Residents are counted without what was evicted.
                    parts = [positions[lo:hi] for lo, hi in choices[head].ranges]
                    yield layer.index, head, ranges(np.concatenate(parts) if parts else positions[:0])
    elif engine.parts.find(Recycling) is not None:
        for told_layer in trace(engine):
            for head, one in enumerate(told_layer.rows[row]):
                yield told_layer.index, head, None if told_layer.dense else one.read


def _merged(spans: Ints) -> Ints:
    """Ranges ``[n, 2]`` that ascend, those that touch as one."""
    apart = np.flatnonzero(spans[1:, 0] != spans[:-1, 1])
    first, last = np.concatenate([[0], apart + 1]), np.concatenate([apart, [len(spans) - 1]])
    return np.stack([spans[first, 0], spans[last, 1]], 1) if len(spans) else spans


class _Held:
    """Which tokens each of some heads holds, and the steps at which that changed. A new token is held until it is said to go."""

    def __init__(self, heads: int) -> None:
        self.heads, self.scores = heads, _Scores(heads)
        self._held, self._left = np.ones((heads, 0), bool), np.full((heads, 0), -1, np.int32)
        self._again: list[npt.NDArray[np.int32]] = []

    def grow(self, seen: int) -> None:
        more = seen - self._held.shape[1]
        if more > 0:
            more = max(more, self._held.shape[1])
            self._held = np.concatenate([self._held, np.ones((self.heads, more), bool)], 1)
            self._left = np.concatenate([self._left, np.full((self.heads, more), -1, np.int32)], 1)

    def update(self, step: int, now: npt.NDArray[np.bool_]) -> bool:
        """After ``step`` the heads hold ``now``, bool ``[H, seen]``. Returns whether that is a change."""
        seen = now.shape[1]
        self.grow(seen)
        was, left = self._held[:, :seen], self._left[:, :seen]
        changed = was != now
        if not changed.any():
            return False
        first = changed & was & (left < 0)
        left[first] = step
        heads, positions = np.nonzero(changed & ~first)
        if len(heads):
            columns = [heads, positions, np.full(len(heads), step), now[heads, positions]]
            self._again.append(np.stack(columns, 1).astype(np.int32))
        self._held[:, :seen] = now
        return True

    def cut(self, steps: int) -> None:
        """Only the first ``steps`` were."""
        self._left[self._left >= steps] = -1
        self._again = [part for part in self._again if part[0, 2] < steps]
        self._held[:] = self._left < 0
        for part in self._again:
            self._held[part[:, 0], part[:, 1]] = part[:, 3].astype(bool)
        self.scores.cut(steps)

    def packed(self, seen: int) -> dict[str, Any]:
        self.grow(seen)
        again = np.concatenate(self._again) if self._again else np.zeros((0, 4), np.int32)
        return {"left": pack(self._left[:, :seen], "<i4"), "again": pack(again, "<i4"), "scores": self.scores.packed()}


@dataclass
class _Scores:
    """Scores of tokens, each from the step on at which it had another one before."""

    heads: int
    _last: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    _news: list[tuple[int, Ints, Ints, npt.NDArray[np.float32]]] = field(default_factory=list)

    def update(self, step: int, heads: Ints, positions: Ints, scores: npt.NDArray[np.float32]) -> bool:
        """After ``step`` the tokens at ``positions``, ascending, have these scores; nan stands for none. For one head."""
        if not len(positions):
            return False
        more = int(positions[-1]) + 1 - len(self._last)
        if more > 0:
            self._last = np.concatenate([self._last, np.full(max(more, len(self._last)), np.nan, np.float32)])
        new = (self._last[positions] != scores) & np.isfinite(scores)
        if not new.any():
            return False
        self._last[positions[new]] = scores[new]
        self.add(step, heads[new], positions[new], scores[new])
        return True

    def add(self, step: int, heads: Ints, positions: Ints, scores: npt.NDArray[np.float32]) -> None:
        if len(positions):
            self._news.append((step, heads, positions, scores.astype(np.float32)))

    def cut(self, steps: int) -> None:
        self._news = [one for one in self._news if one[0] < steps]
        self._last[:] = np.nan
        for _, _, positions, scores in self._news:
            self._last[positions] = scores

    def packed(self) -> dict[str, str] | None:
        if not self._news:
            return None
        steps = np.concatenate([np.full(len(at), step) for step, _, at, _ in self._news])
        heads, positions, scores = (np.concatenate([one[i] for one in self._news]) for i in (1, 2, 3))
        counts = {name: pack(column, "<i4") for name, column in (("head", heads), ("step", steps), ("position", positions))}
        return {**counts, "score": pack(scores, "<f4")}


class _Reads:
    """What one head of one layer selected, from each step on at which it selected something else."""

    def __init__(self) -> None:
        self._step, self._count, self._ranges = array.array("i"), array.array("i"), array.array("i")
        self._last: bytes | None = b"nothing yet"

    def update(self, step: int, read: Ints | None) -> None:
        """After ``step``: ranges ``[n, 2]``, or None for everything."""
        # Gaps and lengths are small numbers, and much alike.
        found = None if read is None else np.diff(np.asarray(read, np.intc).ravel(), prepend=np.intc(0)).tobytes()
        if found == self._last:
            return
        self._last = found
        self._step.append(step)
        self._count.append(-1 if read is None else len(read))
        if found is not None:
            self._ranges.frombytes(found)

    def cut(self, steps: int) -> None:
        while self._step and self._step[-1] >= steps:
            self._step.pop()
            gone = 2 * max(self._count.pop(), 0)
            del self._ranges[len(self._ranges) - gone :]
        self._last = b"nothing yet"

    def packed(self) -> dict[str, str]:
        columns = {"step": self._step, "count": self._count, "ranges": self._ranges}
        return {name: pack(np.frombuffer(column, np.intc) if column else [], "<i4") for name, column in columns.items()}


# ------------------------------------------------------------------------------------------------------------------------- text


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that all of them together are the text of ``ids``.

    A token that ends within a character is empty, and the one that completes it holds the character. -1, a token that was given as
    an embedding, is a square.

    >>> class Words:
    ...     def decode(self, ids):
    ...         return "".join(["sea", " ", "is"][i] for i in ids)
    >>> pieces(Words(), [0, 1, 2])
    ['sea', ' ', 'is']
    """
    known = {-1: "▢", **{i: str(tokenizer.decode([i])) for i in sorted(set(ids) - {-1})}}
    alone = [known[i] for i in ids]
    if -1 in ids or "".join(alone) == tokenizer.decode(list(ids)):
        return alone
    return _in_context(tokenizer, ids)


_WHOLE = 8
"""Most tokens of a character: after so many, what they decode to is no character that goes on."""


def _in_context(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The same where a token's text depends on those before it: bytes of a character, spaces between words."""
    found: list[str] = []
    start, told_to = 0, 0
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(list(ids[start:told_to])), tokenizer.decode(list(ids[start:end]))
        if now.endswith("\ufffd") and end < len(ids) and end - told_to < _WHOLE:
            found.append("")
            continue
        found.append(now[len(before) :] if now.startswith(before) else tokenizer.decode(list(ids[told_to:end])))
        start, told_to = told_to, end
    return found
