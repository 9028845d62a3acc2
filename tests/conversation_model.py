"""A plain model of a stream's conversation: what was told, what must be held, and a twin that is told the same in a plain way.

A :class:`Plain` keeps Python lists and sets only. Its *history* is what a fresh stream must be told to be in the same state:
forwards with the tokens of each row, pins, evictions, ends of turns. Whatever undoes something (a crop, a rewind) takes it out of
the history. What changes nothing (a fork, a session file, a call that was refused) leaves no trace in it. So a twin that replays
the history comes to the same state by another way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import kvsieve
import torch
from drive import pad_left
from kvsieve.policy.compose import Policy

Rows: TypeAlias = tuple[tuple[int, ...], ...]
"""The tokens of each row."""

FOREVER = 1 << 40

CODES = 5e-3
"""See `systems.System.tolerance`."""


@dataclass(frozen=True)
class Read:
    """Forwards of one call, one a piece; ``said`` where they read what was sampled greedily from the logits before them."""

    pieces: tuple[Rows, ...]
    said: bool = False


@dataclass(frozen=True)
class Pin:
    """``add`` or its opposite."""

    start: int
    stop: int
    rows: tuple[int, ...] | None
    add: bool


@dataclass(frozen=True)
class Evict:
    """By position."""

    start: int
    stop: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Select:
    """Row ``i`` becomes what row ``rows[i]`` was."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class EndTurn:
    """Scores decay, and the budget holds."""


@dataclass(frozen=True)
class Reload:
    """Through a session file, in which no selection is; or as if, for tokens were forgotten that selections were made by."""


@dataclass(frozen=True)
class Died:
    """A forward over one token died: what it found due to be compressed is compressed, and nothing else has changed."""


@dataclass(frozen=True)
class Reset:
    """A new session, with the bank of the old one."""


Event: TypeAlias = Read | Pin | Evict | Select | EndTurn | Reload | Died | Reset


def cut(rows: Sequence[Sequence[int]], chunk: int) -> tuple[Rows, ...]:
    """How a left-padded batch is read in pieces of ``chunk`` columns."""
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    bounds = range(0, width, chunk)
    return tuple(tuple(tuple(r[max(lo - p, 0) : max(lo + chunk - p, 0)]) for r, p in zip(rows, pads)) for lo in bounds)


def joined(pieces: Sequence[Rows]) -> Rows:
    """The tokens of each row in all ``pieces``."""
    return tuple(tuple(t for piece in pieces for t in piece[row]) for row in range(len(pieces[0])))


@dataclass(frozen=True)
class Kind:
    """What is known of a policy in closed form.

    Attributes:
        make: the policy of a batch of so many rows.
        window: sinks and window, where nothing else is held; ``(0, FOREVER)`` where all is; None if scores or heads decide.
        budget: most tokens a row holds once it was settled by force; None if there is no bound.
        selects: whether what a token reads may depend on the others of its forward.
        searches: whether what was chosen stands for some steps, and is chosen anew after tokens were forgotten.
        stores: whether tokens are compressed.
        banks: whether evicted tokens go to a bank.
        stock: whether it is the stock model.
        codes: whether keys are stored in codes, which are coded again where an eviction moves them.
        tolerance: of logits.
    """

    make: Callable[[int], Policy]
    window: tuple[int, int] | None
    budget: int | None
    selects: bool
    searches: bool
    stores: bool
    banks: bool
    stock: bool
    codes: bool
    tolerance: float


@dataclass
class Plain:
    """One stream's conversation, as it should be."""

    kind: Kind
    history: list[Event] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    unread: list[list[int]] = field(default_factory=list)
    pending: list[int] | None = None
    """What a caller's own generate sampled last, which the stream was not told."""
    pins: list[set[int]] = field(default_factory=list)
    early: set[int] = field(default_factory=set)
    gone: list[set[int]] = field(default_factory=list)
    held: list[set[int]] = field(default_factory=list)
    exact: bool = True
    """Whether a twin that replays the history gives the same logits."""
    remade: bool = False
    """Whether a twin computes the same in other shapes: a code may then round to its neighbour."""
    forced: bool = True
    """Whether the budget holds to the token."""

    def copy(self) -> Plain:
        """The same, apart."""
        deep = {name: [type(x)(x) for x in getattr(self, name)] for name in ("read", "unread", "pins", "gone", "held")}
        pending = None if self.pending is None else list(self.pending)
        return dataclasses.replace(self, history=list(self.history), pending=pending, early=set(self.early), **deep)

    @property
    def ids(self) -> list[list[int]]:
        """What `stream.ids` must be."""
        return [a + b for a, b in zip(self.read, self.unread)]

    @property
    def waiting(self) -> list[list[int]]:
        """What each row said and has not read, a caller's newest token included."""
        return [row + ([] if self.pending is None else [self.pending[at]]) for at, row in enumerate(self.unread)]

    def begin(self, rows: int) -> None:
        """The first forward makes the rows."""
        if not self.read:
            self.read, self.unread, self.gone, self.held = ([make() for _ in range(rows)] for make in (list, list, set, set))  # type: ignore[assignment, misc]
            self.pins, self.early = [set(self.early) for _ in range(rows)], set()

    def settle(self) -> None:
        """What a window leaves."""
        if self.kind.window is None:
            return
        sinks, window = self.kind.window
        for read, pins, held in zip(self.read, self.pins, self.held):
            edge = len(read) - max(window - sum(p >= sinks for p in pins), 0)
            held -= {p for p in held if sinks <= p < edge and p not in pins}

    def reads(self, pieces: Sequence[Rows], *, said: bool = False, group: bool = True) -> None:
        """Forwards over ``pieces`` are through; with ``group`` they belong to one call."""
        self.begin(len(pieces[0]))
        for piece in pieces:
            for read, held, new in zip(self.read, self.held, piece):
                held |= set(range(len(read), len(read) + len(new)))
                read += new
            self.settle()
            self.forced = max(map(len, piece)) > 1 or (self.forced and self.kind.window is not None)
        self.history += [Read(tuple(pieces), said)] if group else [Read((piece,), said) for piece in pieces]

    def died(self, width: int) -> None:
        """A forward over so many columns died."""
        if width == 1 and self.kind.stores:
            self.history.append(Died())

    def ends_turn(self) -> None:
        """The budget holds to the token."""
        self.forced = True
        self.history.append(EndTurn())

    def pinned(self, start: int, stop: int, rows: tuple[int, ...] | None, add: bool) -> None:
        """Tokens are pinned, or not any more."""
        which = [self.early] if not self.read else [self.pins[row] for row in (range(len(self.read)) if rows is None else rows)]
        for pins in which:
            pins -= set(range(start, stop))
            if add:
                pins |= set(range(start, stop))
        self.history.append(Pin(start, stop, rows, add))
        self.settle()
        self.forced = False

    def evicted(self, start: int, stop: int, rows: tuple[int, ...]) -> None:
        """Tokens are evicted by name."""
        for row in rows:
            for tokens in (self.pins[row], self.held[row]):
                tokens -= set(range(start, stop))
            self.gone[row] |= set(range(start, stop))
        self.history.append(Evict(start, stop, rows))
        self.settle()
        self.forced = False

    def selected(self, rows: tuple[int, ...]) -> None:
        """Rows move."""
        for name in ("read", "unread", "pins", "gone", "held"):
            values = getattr(self, name)
            setattr(self, name, [type(values[row])(values[row]) for row in rows])
        if self.pending is not None:
            self.pending = [self.pending[row] for row in rows]
        self.remade = True
        fixed = any(isinstance(event, (Select, Reload, Reset)) for event in self.history)
        moved = [] if fixed else [_moved(event, rows) for event in self.history]
        if fixed or None in moved:
            self.history.append(Select(rows))
        else:
            self.history = [event for event in moved if event is not None]

    def takes_back(self) -> None:
        """Each row's last token is forgotten, to be read again at once with what it said after it: pins and turns stay."""
        pins, unread, pending = [set(row) for row in self.pins], self.unread, self.pending
        last = [row[-1:] for row in self.read]
        self.cropped(1, again=True)
        self.pins, self.pending = pins, pending
        self.unread = [old + said for old, said in zip(last, unread)]

    def cropped(self, count: int, *, again: bool = False) -> None:
        """The newest ``count`` tokens of each row are forgotten, and what was said after them; or they come ``again`` at once."""
        self.remade = True
        left = [min(count, len(row)) for row in self.read]
        after: list[Event] = []
        kept = list(self.history)
        for row in self.read:
            del row[len(row) - min(count, len(row)) :]
        now = [len(row) for row in self.read]
        while any(left) and kept:
            event = kept.pop()
            if isinstance(event, Read):
                pieces, inside = [], False
                for piece in reversed(event.pieces):
                    less = [min(n, len(tokens)) for n, tokens in zip(left, piece)]
                    inside |= any(less) and any(len(tokens) > n for n, tokens in zip(less, piece))
                    left = [n - gone for n, gone in zip(left, less)]
                    rest = tuple(tokens[: len(tokens) - gone] for tokens, gone in zip(piece, less))
                    pieces += [rest] if any(rest) else []
                # Queries of one forward share what they read, and a rule per head looks at all of them.
                self.exact &= not (inside and (self.kind.selects or (self.kind.window is None and self.kind.budget is not None)))
                after += [dataclasses.replace(event, pieces=tuple(reversed(pieces)))] if pieces else []
            elif isinstance(event, Pin) and again:
                after.append(event)
            elif isinstance(event, (Pin, Evict)):
                after += list(_clipped(event, now))[::-1]
            elif isinstance(event, (Select, Reload, Reset)):
                self.exact = False
                break
            elif isinstance(event, EndTurn) and (again or not all(left)):
                # A turn ended after some rows' tokens that stay, and before others' that go; or for tokens that come again.
                self.exact &= self.kind.budget is None and not self.kind.stores
                after += [event] if again else []
        self.history = [*kept, *reversed(after)]
        self.unread, self.pending = [[] for _ in self.read], None
        for row, seen in enumerate(now):
            for tokens in (self.pins[row], self.gone[row], self.held[row]):
                tokens -= {p for p in tokens if p >= seen}
            if not again:
                self.history.append(Pin(seen, FOREVER, (row,), False))
        if self.kind.searches and not again:
            self.history.append(Reload())
        self.forced = False

    def fresh(self) -> None:
        """Everything is forgotten; a bank keeps what it holds."""
        history: list[Event] = [*self.history, Reset()] if self.kind.banks else []
        self.__init__(self.kind, history, exact=self.exact or not self.kind.banks)  # type: ignore[misc]

    @property
    def tolerance(self) -> float:
        """Of logits."""
        return max(self.kind.tolerance, CODES if self.kind.codes and (self.remade or any(self.gone)) else 0.0)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first forward."""
        return len(self.read)


def _moved(event: Event, rows: tuple[int, ...]) -> Event | None:
    """``event`` of the rows that are left; None if they would be read in other pieces without the others."""
    if isinstance(event, Read):
        pieces = tuple(tuple(piece[row] for row in rows) for piece in event.pieces)
        same = all(max(map(len, new)) == max(map(len, old)) for new, old in zip(pieces, event.pieces))
        return dataclasses.replace(event, pieces=pieces) if same else None
    if isinstance(event, (Pin, Evict)):
        if event.rows is None:
            return event
        mine = tuple(at for at, row in enumerate(rows) if row in event.rows)
        # No row is named by an event that nobody is left of: an empty range of positions far away stands for it.
        return dataclasses.replace(event, rows=mine) if mine else Pin(FOREVER, FOREVER + 1, None, False)
    return event


def _clipped(event: Pin | Evict, seen: list[int]) -> Iterator[Event]:
    """``event``, without tokens that are forgotten."""
    for row in range(len(seen)) if event.rows is None else event.rows:
        if event.start < seen[row]:
            yield dataclasses.replace(event, stop=min(event.stop, seen[row]), rows=(row,))


# -------------------------------------------------------------------------------------------------------------------- the twin


@contextmanager
def heard(model: Any) -> Iterator[list[torch.Tensor]]:
    """The last logits ``[B, V]`` of every forward inside."""
    found: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda module, args, out: found.append(out.logits[:, -1].detach().clone()))
    try:
        yield found
    finally:
        handle.remove()


class Stop(BaseException):
    """As Ctrl-C: no error of anybody's."""


@contextmanager
def interrupts(model: Any, at: int, layer: int) -> Iterator[None]:
    """The ``at``-th forward of a layer dies inside, and with it the block."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise Stop

    layers = model.model.layers
    handle = layers[layer % len(layers)].register_forward_hook(hook)
    try:
        yield
    except Stop:
        return
    finally:
        handle.remove()
    raise AssertionError(f"no forward number {at}")


@torch.no_grad()
def forward(model: Any, stream: kvsieve.Stream, rows: Rows) -> None:
    """A plain forward of a caller's own loop, in which a row may get pads only."""
    told = stream._engine.transcript
    old = torch.ones(len(rows), told.columns, dtype=torch.long)
    for at, row in enumerate(told.rows):
        for lo, hi in row.pads:
            old[at, lo:hi] = 0
    new, mask = pad_left([torch.tensor(row, dtype=torch.long) for row in rows])
    mask = torch.cat([old, mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
    model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=stream.cache, use_cache=True)


def read(model: Any, stream: kvsieve.Stream, event: Read) -> None:
    """Tell a stream, by `feed` where that cuts the text in the same pieces."""
    rows, width = joined(event.pieces), max(map(len, event.pieces[0]))
    if all(rows) and cut(rows, width) == event.pieces:
        stream.feed(*pad_left([torch.tensor(row) for row in rows]), chunk=width)
    else:
        for piece in event.pieces:
            forward(model, stream, piece)


def replay(model: Any, plain: Plain, rows: int, backend: str, path: Path) -> kvsieve.Stream:
    """A fresh stream that was told the history of ``plain``. What was said greedily must be what its logits say."""
    stream = kvsieve.stream(model, plain.kind.make(rows), backend)
    last: torch.Tensor | None = None
    for event in plain.history:
        if isinstance(event, Read):
            before = None if last is None else last.clone()
            if event.said and before is not None:
                for row, tokens in enumerate(event.pieces[0]):
                    if tokens:
                        assert is_best(plain.tolerance, before[row], tokens[0]), f"row {row} said {tokens[0]}"
            with heard(model) as logits:
                read(model, stream, event)
            for piece, new in zip(event.pieces, logits):
                real = torch.tensor([bool(tokens) for tokens in piece])
                last = new if last is None or len(last) != len(new) else torch.where(real[:, None], new, last)
        elif isinstance(event, Pin):
            (stream.pin if event.add else stream.unpin)(event.start, event.stop, None if event.rows is None else list(event.rows))
        elif isinstance(event, Evict):
            stream.evict(event.start, event.stop, list(event.rows))
        elif isinstance(event, Select):
            stream.cache.reorder_cache(torch.tensor(event.rows))
            last = None if last is None else last[list(event.rows)]
        elif isinstance(event, EndTurn):
            stream.end_turn()
        elif isinstance(event, Died):
            with interrupts(model, 1, 0):
                stream.feed(torch.full((stream._engine.num_rows or len(plain.read), 1), 5))
        elif isinstance(event, Reset):
            stream.reset()
            last = None
        else:
            stream = reloaded(stream, path)
    return stream


def reloaded(stream: kvsieve.Stream, path: Path) -> kvsieve.Stream:
    """Through a session file."""
    stream.save(path)
    stream.close()
    return kvsieve.load(path, stream.model, stream._engine.backend.name, bank=stream.policy.bank)


def is_best(tolerance: float, logits: torch.Tensor, token: int) -> bool:
    """Whether a greedy choice among ``logits`` ``[V]`` may be ``token``."""
    return bool(logits[token] >= logits.max() - 2 * tolerance * logits.abs().max())
