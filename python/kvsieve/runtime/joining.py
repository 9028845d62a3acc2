"""A stream goes on from several forks of it at once (set-based prompting as the composition of caches).

Every fork has read a document of its own after the common past, so no document has seen another. Joined, they are the first tokens
of one stream: blocks are shared, keys stay as the model rotated them, and what follows sees all of them. Tokens are numbered in the
order of the documents; where the model's positions go on is for :mod:`.told_positions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvsieve.errors import CacheMismatchError, StateError, UnsupportedError
from kvsieve.runtime.exclusive import exclusive
from kvsieve.runtime.part import Join

if TYPE_CHECKING:
    from kvsieve.runtime.held import Held

__all__ = ["check_policy", "join"]

USE = "use kvsieve.Full(), or kvsieve.ThinK(...) or kvsieve.Quantized(...) to store tokens in less"


@exclusive
def join(stream: Held, forks: Sequence[Held], canonical: bool) -> None:
    """``stream`` goes on from all of ``forks``, in their order, or in an order that depends on their ids only.

    Raises:
        UnsupportedError, CacheMismatchError, StateError: before anything is changed.
    """
    for one in (stream, *forks):
        one.idle()
    check_policy(stream)
    _check_family(stream, forks)
    num_rows = stream.num_rows or max((fork.num_rows for fork in forks), default=0)
    for at, fork in enumerate(forks):
        _check_fork(stream, fork, at, num_rows)
    past = stream.blocks.seen or [0] * num_rows
    seen = [fork.blocks.seen or [0] * num_rows for fork in forks]
    orders = [_order(forks, row, count) if canonical else list(range(len(forks))) for row, count in enumerate(past)]
    plan = Join(past, seen, orders)
    changes = [part.join([fork.parts[at] for fork in forks], plan) for at, part in enumerate(stream.parts)]
    stream.blocks.planner = stream.planner.join([fork.planner for fork in forks], orders)
    for change in changes:
        change()


def check_policy(stream: Held) -> None:
    """Refuse policies under which documents that were read side by side have no meaning.

    Raises:
        UnsupportedError: saying what to use.
    """
    policy = stream.policy
    if any(memory.roles.evict.evicts for memory in policy.memories):
        raise UnsupportedError(
            f"{policy!r} evicts by what came last or scored highest in one text, and documents read side by side are several; {USE}"
        )
    if policy.moves or stream.stored_keys != "post_rope":
        raise UnsupportedError(
            f"{policy!r} shows tokens at other distances than their own, and documents read side by side share positions; {USE}"
        )


def _check_family(stream: Held, forks: Sequence[Held]) -> None:
    if len({id(fork.parts) for fork in forks}) < len(forks):
        raise StateError("a stream was given twice; its document would count twice: give each stream once")
    for at, fork in enumerate(forks):
        if fork.facts.layers[0].module is not stream.facts.layers[0].module:
            raise CacheMismatchError(f"stream {at} is of another model; join forks of this stream")
        for name, mine, theirs in (
            ("policy", repr(stream.policy), repr(fork.policy)),
            ("backend", stream.backend.name, fork.backend.name),
        ):
            if mine != theirs:
                raise CacheMismatchError(f"stream {at} has the {name} {theirs}, this one {mine}; join forks of this stream")
        if fork.blocks.stores is not stream.blocks.stores:
            raise CacheMismatchError(
                f"stream {at} is no fork of this one, so they share no memory; take fork() of this stream, even of an empty one, "
                "and feed the document to that"
            )


def _check_fork(stream: Held, fork: Held, at: int, num_rows: int) -> None:
    if fork.num_rows != num_rows and (fork.num_rows or stream.num_rows):
        raise CacheMismatchError(
            f"stream {at} holds {fork.num_rows} sequences, the others {num_rows}; join streams of one batch size"
        )
    for name, one in ((f"stream {at}", fork), ("this stream", stream)):
        if one.transcript.foreign or any(len(row.unread) for row in one.transcript.rows):
            raise StateError(f"{name} has said tokens that the model has not read; feed it what comes next, or go back to a mark")
    for row, (mine, theirs) in enumerate(zip(stream.transcript.rows, fork.transcript.rows)):
        past = mine.ids.tensor()
        if bool((past < 0).any()):
            raise UnsupportedError(f"row {row}: a part of the common past was given as embeddings, which cannot be compared")
        if not torch.equal(past, theirs.ids.tensor()[: len(past)]) or not _shares(stream, fork, row):
            raise CacheMismatchError(
                f"row {row}: stream {at} does not begin with the {len(past)} tokens that this stream has read; let forks of it "
                "read the documents, and join them before it goes on"
            )


def _shares(stream: Held, fork: Held, row: int) -> bool:
    """Whether the first blocks are the same: all but the last one, of which a fork has a copy. Compressed ones differ."""
    mine, theirs = stream.planner.runs(0, row), fork.planner.runs(0, row)
    packed = stream.planner.num_packed(row) or fork.planner.num_packed(row)
    return bool(packed) or mine[:-1] == theirs[: max(len(mine) - 1, 0)]


def _order(forks: Sequence[Held], row: int, past: int) -> list[int]:
    """The forks by a hash of what each has read."""

    def key(at: int) -> bytes:
        return hashlib.sha256(forks[at].transcript.document(row, past).cpu().numpy().tobytes()).digest()

    return sorted(range(len(forks)), key=key)
