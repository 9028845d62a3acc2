"""All residents of each row, as a selection reads them: the last query's spans, or a prefill's residents and its new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvsieve._core import PACKED
from kvsieve.backends.cuda.buffers import upload
from kvsieve.backends.cuda.ops.launch import launcher_of
from kvsieve.backends.cuda.ops.residents import Residents
from kvsieve.budget import BLOCK
from kvsieve.errors import BackendError, UnsupportedError

if TYPE_CHECKING:
    from kvsieve._core import Step
    from kvsieve.backends.cuda.schedule import Schedule

__all__ = ["Shared", "StepResidents", "find_residents"]

DECODE_QUERIES = 64
"""Queries of a step, at most, whose chosen keys are shared out among thread blocks."""

Runs = npt.NDArray[np.int64]
"""Runs ``[n, 3]`` of one row: block, first slot, slot past the end."""

Spans = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
Upload = Callable[[npt.NDArray[np.int32]], torch.Tensor]

_MOVED = "a selection needs a memory that keeps every token where the model put it"


class Shared(NamedTuple):
    """What a plan has on its device: starts and spans of its items; its upload, once for equal tables."""

    device: torch.device
    starts: torch.Tensor
    spans: torch.Tensor
    upload: Upload


@dataclass
class StepResidents:
    """What a step's layers share.

    Attributes:
        residents: where they lie; runs: the same on the host, of each row; counts: how many it has.
        numbered: whether pre-RoPE keys are shown at their numbers among the residents.
        first: its first new position, or number where keys are pre-RoPE; lens: its new tokens.
        decode: whether queries are so few that their keys are shared out.
        schedules: those of this step so far; upload: a table to the device, once for equal ones.
        processors: of the device.
    """

    residents: Residents
    runs: list[Runs]
    counts: list[int]
    numbered: bool
    first: list[int]
    lens: list[int]
    decode: bool
    schedules: dict[Any, Schedule]
    upload: Upload
    processors: int
    _whole: npt.NDArray[np.int64] | None = None

    def unbroken(self) -> StepResidents:
        """Itself.

        Raises:
            UnsupportedError: for a row that does not keep every token: residents are then not numbered by their positions.
        """
        for held, first, new in zip(self.counts, self.first, self.lens):
            if new and held != first + new:
                raise UnsupportedError(_MOVED)
        return self

    def check_numbered(self) -> None:
        """Raise UnsupportedError where pre-RoPE keys are shown elsewhere than at their numbers among the residents."""
        if not self.numbered:
            raise UnsupportedError(
                "backend 'cuda' selects from pre-RoPE keys that stand side by side, and tokens of this text were taken out; "
                "use backend='reference'"
            )

    def whole_blocks(self) -> npt.NDArray[np.int64]:
        """The full blocks of all rows, in any order.

        Raises:
            UnsupportedError: for a row whose blocks, but for the last, are not full: they are then not those of the text.
        """
        if self._whole is None:
            for mine in self.runs:
                if (mine[:, 1] != 0).any() or (mine[:-1, 2] != BLOCK).any():
                    raise UnsupportedError(
                        "page bounds are of whole blocks of an unbroken text, and some blocks of a row are not whole"
                    )
            self._whole = np.concatenate([mine[mine[:, 2] == BLOCK, 0] for mine in self.runs])
        return self._whole


def find_residents(step: Step, spans: Spans | None, shared: Shared, shifts: npt.NDArray[np.int64]) -> StepResidents:
    """Those of ``step``; ``spans`` are those of its items, None of a prefill, and ``shifts`` what they turn queries by.

    Raises:
        BackendError: for compressed keys.
        UnsupportedError: for post-RoPE keys that are shown elsewhere than the model put them.
    """
    raw = step.stored_keys == "pre_rope"
    runs, numbered = _of_parts(step, raw) if spans is None else _of_spans(step, *spans, shifts if raw else None)
    for row, mine in enumerate(runs):
        if step.new_lens[row] and (mine[:, 0] >= PACKED).any():
            raise BackendError(
                "backend 'cuda' selects from keys as they came, and some of these are compressed; leave the storage rule out, "
                "or use backend='reference'"
            )
    if spans is not None:
        starts, table, items = shared.starts, shared.spans, step.num_queries
    else:
        ends = np.cumsum([0, *map(len, runs)]).astype(np.int32)
        table = upload(np.concatenate([_as_spans(mine) for mine in runs]).reshape(-1, 4), shared.device)
        starts, items = upload(ends, shared.device), 1
    processors = launcher_of(shared.device).processors(shared.device)
    decode = step.num_rows * step.num_queries <= DECODE_QUERIES
    blocks = starts.new_empty((0, 4), dtype=torch.int64)
    counts = [int((mine[:, 2] - mine[:, 1]).sum()) for mine in runs]
    return StepResidents(
        residents=Residents(blocks, starts, table, items),
        runs=runs,
        counts=counts,
        numbered=numbered,
        # Before RoPE a resident's number is all that counts.
        first=[n - new for n, new in zip(counts, step.new_lens)] if raw else [int(at) for at in step.first_new],
        lens=step.new_lens,
        decode=decode,
        schedules={},
        upload=shared.upload,
        processors=processors,
    )


def _of_spans(
    step: Step, starts: npt.NDArray[np.int32], spans: npt.NDArray[np.int32], shifts: npt.NDArray[np.int64] | None
) -> tuple[list[Runs], bool]:
    """Runs of each row, from what its last query reads, and whether pre-RoPE keys are shown at their numbers."""
    if shifts is None and ((spans[:, 3] != 0).any() or (spans[:, 1] >> 16 & 1).any()):
        raise UnsupportedError(_MOVED)
    columns, found, numbered = step.num_queries, [], True
    for row in range(step.num_rows):
        mine = spans[starts[(row + 1) * columns - 1] : starts[(row + 1) * columns]].astype(np.int64)
        lo, hi = mine[:, 1] & 255, mine[:, 1] >> 8 & 255
        found.append(np.stack([mine[:, 0], lo, hi], 1))
        if shifts is not None and len(mine):
            # The query, the last resident, is turned by its distance to where the block's first slot is shown.
            turned = np.concatenate([[0], shifts])[mine[:, 3]]
            numbered &= bool((turned == int((hi - lo).sum()) - 1 - (mine[:, 2] - lo)).all())
    return found, numbered


def _of_parts(step: Step, raw: bool) -> tuple[list[Runs], bool]:
    """Runs of each row, its residents and then its new tokens, and whether pre-RoPE keys are shown at their numbers."""
    appends, found, numbered = step.append_table().astype(np.int64), [], True
    parts = step.parts()
    for row, count in enumerate(step.new_lens):
        mine = [part for part in parts if part.row == row]
        if count and len(mine) != 1:
            raise UnsupportedError(_MOVED)
        held = np.zeros((0, 3), np.int64)
        for part in mine:
            keys, queries = part.key_positions(), part.query_positions()
            if raw:
                at = np.arange(len(keys))
                numbered &= np.array_equal(keys, at) and np.array_equal(queries, at[len(at) - len(queries) :])
            elif not (np.array_equal(part.key_true(), keys) and np.array_equal(part.query_true(), queries)):
                raise UnsupportedError(_MOVED)
            held = np.stack(part.runs(), 1).astype(np.int64)
        block, slot = appends[appends[:, 0] == row][:, 2:].T
        begins = np.flatnonzero(np.diff(block, prepend=-1))
        new = np.stack([block[begins], slot[begins], slot[begins] + np.diff(begins, append=len(block))], 1)
        # In a block that others share they go on in a copy of it, which this step makes.
        if len(held) and len(new) and held[-1, 2] == new[0, 1]:
            new[0, 1] = held[-1, 1]
            held = held[:-1]
        found.append(np.concatenate([held, new]))
    return found, numbered


def _as_spans(runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Runs ``[n, 3]`` of a row as its spans."""
    block, lo, hi = runs.T
    return np.stack([block, lo | hi << 8, np.cumsum(hi - lo) - (hi - lo), np.zeros_like(lo)], 1).astype(np.int32)
