"""What a stream was told: the one place where ids, pads, and tokens that were said but not read are kept.

A row's conversation is ``ids`` (what the model has read) and then ``unread`` (what was sampled and returned, but not yet fed to the
model). Every value here is immutable and shared: forks, marks and reordered rows copy references. Ids cost 4 bytes a token, in
chunks that are written once.

*Columns* are what transformers is told: the width of the left-padded batch over everything seen. Rows may have pads in other places
when a caller's own loop put them there; ``pads`` knows them as ranges of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvsieve.errors import CacheMismatchError, PaddingError, SessionError
from kvsieve.runtime.part import Apply, Crop, Forward, Join, Saved, Setting, StreamPart
from kvsieve.runtime.saved import of_kind, pair
from kvsieve.runtime.turn import Turn

__all__ = ["Ids", "Row", "Transcript", "TranscriptState"]

CHUNK = 8192
"""Ids in one chunk, 32 KB: each takes up to a page more, where it ends beside what is given back to the system."""

UNKNOWN = -1
"""The id of a token that was given as an embedding."""

MOST_ID = 1 << 31


class Ids:
    """An immutable sequence of token ids, held as int32. Appending shares what is there; the tail is copied only where another
    sequence has gone on from the same place."""

    __slots__ = ("_count", "_full", "_tail", "_written")

    def __init__(
        self,
        full: tuple[torch.Tensor, ...] = (),
        tail: torch.Tensor | None = None,
        count: int = 0,
        written: list[int] | None = None,
    ) -> None:
        self._full, self._tail, self._count = full, tail, count
        self._written = [count] if written is None else written

    def __len__(self) -> int:
        return len(self._full) * CHUNK + self._count

    def append(self, values: torch.Tensor) -> Ids:
        """This and then ``values`` ``[n]``."""
        full, tail, count, written = self._full, self._tail, self._count, self._written
        at, end = 0, values.shape[0]
        while at < end:
            if tail is None or count == CHUNK:
                full = full if tail is None else (*full, tail)
                tail, count, written = _buffer(values.device), 0, [0]
            elif written[0] != count:
                tail, written = _buffer(tail.device).copy_(tail), [count]
            take = min(end - at, CHUNK - count)
            tail[count : count + take] = values[at : at + take]
            count, at = count + take, at + take
            written[0] = count
        return Ids(full, tail, count, written)

    def crop(self, count: int) -> Ids:
        """Without the newest ``count``."""
        left = len(self) - count
        if left <= 0:
            return Ids()
        chunks = self._chunks()
        whole, rest = divmod(left - 1, CHUNK)
        same = whole == len(self._full)
        return Ids(tuple(chunks[:whole]), chunks[whole], rest + 1, self._written if same else [CHUNK])

    def last(self) -> torch.Tensor:
        """The newest id, int64 ``[1]``."""
        assert self._tail is not None
        return self._tail[self._count - 1 : self._count].long()

    def tensor(self) -> torch.Tensor:
        """The ids, int64 ``[n]``, copied."""
        chunks = [*self._full, *([] if self._tail is None else [self._tail[: self._count]])]
        return torch.cat(chunks).long() if chunks else torch.zeros(0, dtype=torch.int64)

    def _chunks(self) -> list[torch.Tensor]:
        return [*self._full, *([] if self._tail is None else [self._tail])]


def _buffer(device: torch.device) -> torch.Tensor:
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(CHUNK, dtype=torch.int32, device=device)


@dataclass(frozen=True, eq=False)
class Row:
    """One conversation.

    Attributes:
        ids: what the model has read, pads left out.
        unread: what was said and not yet read, int64 ``[k]``.
        pads: ranges of columns that are pads, ascending.
    """

    ids: Ids = field(default_factory=Ids)
    unread: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pads: tuple[tuple[int, int], ...] = ()

    @classmethod
    def unknown(cls, count: int, columns: int) -> Row:
        """A row of ``count`` tokens whose ids nobody knows, the last ones of ``columns``."""
        return cls(Ids().append(torch.full((count,), UNKNOWN)), pads=((0, columns - count),) if count < columns else ())


@dataclass(frozen=True, eq=False)
class TranscriptState:
    """What it takes to return to a moment."""

    columns: int
    rows: tuple[Row, ...]
    foreign: bool


class Transcript(StreamPart):
    """The rows of one stream, and how many columns transformers is told.

    Attributes:
        columns: columns seen, pads included.
        rows: the conversations; empty before the first forward.
        foreign: whether the last forward was part of a caller's ``model.generate``, whose newest token nobody here has seen.
        turn: the stream's own call that feeds the model now; None while a caller's own loop does.
    """

    name = "transcript"

    def __init__(self) -> None:
        self.columns = 0
        self.rows: tuple[Row, ...] = ()
        self.foreign = False
        self.turn: Turn | None = None

    @classmethod
    def of(cls, setting: Setting) -> Transcript:
        """Every stream has one."""
        return cls()

    # ----------------------------------------------------------------------------------------------------------------- reading

    def seen(self) -> list[int]:
        """Tokens that each row's model has read."""
        return [len(row.ids) for row in self.rows]

    def real_tokens(self, mask: torch.Tensor | None, batch: int, width: int, foreign: bool) -> list[int]:
        """Real tokens among the new columns of each row; they must be the last ones.

        Args:
            mask: bool-like ``[B, width]``, 0 for pads; None without any. A turn knows better.
            foreign: whether a caller's ``model.generate`` feeds the model.

        Raises:
            PaddingError: for a pad after a real token, or a token after pads only.
        """
        if self.turn is not None:
            return self.turn.lens(batch, width)
        lens = [width] * batch
        if mask is not None:
            rows = mask.to(torch.bool)
            if not bool(rows.all()):
                lens = rows.sum(1).tolist()
                if bool((rows[:, :-1] & ~rows[:, 1:]).any()):
                    row = int((rows[:, :-1] & ~rows[:, 1:]).any(1).nonzero()[0])
                    raise PaddingError(f"row {row} has a pad after a real token; pad on the left (tokenizer.padding_side = 'left')")
        for row, seen in enumerate(self.seen() if width == 1 and self.columns else ()):
            # A caller's own loop may begin a row late; `generate` would sample after pads.
            if not seen and (mask is None or foreign):
                raise PaddingError(f"row {row} has no real token: all of its {self.columns} columns are pads")
        return lens

    def commit(self, forward: Forward) -> Apply:
        """One of the stream's own calls feeds first what was unread."""
        ids, width, own = forward.ids, forward.width, self.turn is not None
        rows = self.rows or tuple(Row() for _ in forward.lens)
        read = tuple(
            self._read(row, None if ids is None else ids[at], count, width, own)
            for at, (row, count) in enumerate(zip(rows, forward.lens))
        )

        def apply() -> None:
            self.rows, self.foreign = read, forward.foreign
            self.columns += width
            if self.turn is not None:
                self.turn.committed(width)

        return apply

    def _read(self, row: Row, ids: torch.Tensor | None, count: int, width: int, own: bool) -> Row:
        pads = row.pads
        if count < width:
            start, stop = self.columns, self.columns + width - count
            pads = (*pads[:-1], (pads[-1][0], stop)) if pads and pads[-1][1] == start else (*pads, (start, stop))
        if count:
            new = torch.full((count,), UNKNOWN) if ids is None else ids[width - count :].detach()
            row = replace(row, ids=row.ids.append(new))
        # A caller's own loop feeds what it pleases: what it left out was not said.
        return replace(row, unread=row.unread[count:] if own else row.unread[:0], pads=pads)

    def check_mask(self, mask: torch.Tensor, width: int) -> None:
        """Refuse a mask over ``[B, columns + width]`` that hides tokens which were read, or shows pads.

        Raises:
            PaddingError: if the mask differs from what was read.
        """
        if self.turn is not None or not self.columns:
            return
        if mask.shape[1] != self.columns + width:
            raise PaddingError(
                f"the attention mask covers {mask.shape[1]} columns, the stream has seen {self.columns} and gets {width} new ones; "
                "pass a mask over all of them, or none"
            )
        old = mask[:, : self.columns] != 0
        shown = old.sum(1).tolist()
        for at, (row, count) in enumerate(zip(self.rows, shown)):
            if count != self.columns - sum(hi - lo for lo, hi in row.pads) or any(
                bool(old[at, lo:hi].any()) for lo, hi in row.pads
            ):
                raise PaddingError(
                    f"row {at}: the attention mask hides tokens that the stream has read, or shows pads; a stream's memory is what "
                    "was read: use stream.evict(start, stop) to forget a part, or mask tokens when they are first read"
                )

    # ----------------------------------------------------------------------------------------------------------------- changing

    def say(self, said: Sequence[torch.Tensor]) -> None:
        """What each row was heard to say and has not read: int64 ``[k]`` each."""
        self.rows = tuple(replace(row, unread=new.detach().clone()) for row, new in zip(self.rows, said))
        self.foreign = False

    def pad_left(self, extra: int) -> None:
        """The stream's own calls leave a left-padded batch, ``extra`` columns wider than its longest row."""
        seen = self.seen()
        self.columns = max(seen, default=0) + extra
        rows = []
        for row, count in zip(self.rows, seen):
            rows.append(replace(row, pads=((0, self.columns - count),) if count < self.columns else ()))
        self.rows = tuple(rows)

    @property
    def extra(self) -> int:
        """Columns beyond the longest row."""
        return self.columns - max(self.seen(), default=0)

    def tokens_in_last(self, columns: int) -> list[int]:
        """How many of each row's tokens lie in the newest ``columns``."""
        if columns > self.columns:
            raise CacheMismatchError(f"cannot forget {columns} tokens: the stream has seen only {self.columns}")
        first = self.columns - columns
        return [columns - sum(max(hi - max(lo, first), 0) for lo, hi in row.pads) for row in self.rows]

    def crop(self, crop: Crop) -> Apply:
        """What was said after forgotten tokens is forgotten as well."""

        def apply() -> None:
            if crop.columns is None:
                self.rows = tuple(replace(row, ids=row.ids.crop(n)) if n else row for row, n in zip(self.rows, crop.counts))
                return
            first = self.columns - crop.columns
            rows = []
            for row, count in zip(self.rows, crop.counts):
                pads = tuple((lo, min(hi, first)) for lo, hi in row.pads if lo < first)
                rows.append(replace(row, ids=row.ids.crop(count), pads=pads, unread=row.unread[:0]))
            self.rows, self.columns, self.foreign = tuple(rows), first, False

        return apply

    def cropped(self, columns: int) -> None:
        """A caller took ``columns`` back, whatever that took."""
        if self.turn is not None:
            self.turn.cropped(columns, max(self.seen(), default=0))

    def select_rows(self, rows: Sequence[int]) -> Apply:
        def apply() -> None:
            self.rows = tuple(self.rows[row] for row in rows)

        return apply

    def state(self) -> TranscriptState:
        return TranscriptState(self.columns, self.rows, self.foreign)

    def return_to(self, state: TranscriptState) -> None:
        self.columns, self.rows, self.foreign = state.columns, state.rows, state.foreign

    def join(self, forks: Sequence[Transcript], join: Join) -> Apply:
        rows = []
        for at, (past, order) in enumerate(zip(join.past, join.orders)):
            ids = self.rows[at].ids if self.rows else Ids()
            for fork in order:
                new = forks[fork].document(at, past)
                ids = ids.append(new) if len(new) else ids
            rows.append(Row(ids))

        def apply() -> None:
            extra = self.extra
            self.rows = tuple(rows)
            self.pad_left(extra)

        return apply

    def document(self, row: int, past: int) -> torch.Tensor:
        """What a row has read after its first ``past`` tokens, int64 ``[n]``."""
        return self.rows[row].ids.tensor()[past:] if self.rows else torch.zeros(0, dtype=torch.int64)

    def save(self) -> Saved:
        tensors = {}
        for at, row in enumerate(self.rows):
            tensors[f"ids.{at}"], tensors[f"unread.{at}"] = row.ids.tensor(), row.unread.contiguous()
        return Saved({"columns": self.columns, "pads": [row.pads for row in self.rows], "foreign": self.foreign}, tensors)

    def restore(self, saved: Saved) -> None:
        rows, columns = [], saved.count("columns")
        for at, pads in enumerate(saved.rows("pads")):
            ids = saved.tensor(f"ids.{at}", torch.int64, saved.seen[at])
            unread = saved.tensor(f"unread.{at}", torch.int64, None)
            for told, least in ((ids, UNKNOWN), (unread, 0)):
                if told.numel() and not least <= int(told.min()) <= int(told.max()) < (saved.vocabulary or MOST_ID):
                    raise SessionError(f"row {at} has token ids from {int(told.min())} to {int(told.max())}, which the model lacks")
            pairs = tuple(pair(x, columns, "pads") for x in of_kind(pads, list, "pads"))
            rows.append(Row(Ids().append(ids), unread, pairs))
        self.columns, self.rows, self.foreign = columns, tuple(rows), saved.get("foreign", bool)

    def begin_at(self, columns: int, seen: Sequence[int]) -> None:
        """Nobody knows the ids."""
        self.columns, self.rows, self.foreign = columns, tuple(Row.unknown(count, columns) for count in seen), False

    def reset(self) -> None:
        self.columns, self.rows, self.foreign = 0, (), False

    # ------------------------------------------------------------------------------------------------------------------ telling

    def ids(self) -> list[torch.Tensor]:
        """Each row's conversation, int64 ``[n]``: what was read, then what was said and not yet read."""
        return [
            torch.cat([row.ids.tensor().to(row.unread.device), row.unread]) if len(row.unread) else row.ids.tensor()
            for row in self.rows
        ]
