"""Which combinations of roles are refused, and why: one row each, judged by what the roles declare.

A row's sentence is filled in with the memory and its roles. Rows are asked from the top, so the first that applies is what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvsieve.errors import PolicyError
from kvsieve.policy.bank import BankRule
from kvsieve.policy.evict import EvictionRule
from kvsieve.policy.position import PositionRule
from kvsieve.policy.select import SelectionRule
from kvsieve.policy.storage import StorageRule, join

__all__ = ["BANK", "CHAIN", "MEMORY", "NAMES", "Refusal", "Roles", "check_bank", "check_chain", "check_join", "check_memory"]


NAMES = ("evict", "position", "select", "storage")
"""The roles of a memory."""


@dataclass(frozen=True)
class Roles:
    """One rule for each role of a memory; what it left open is filled in."""

    evict: EvictionRule
    position: PositionRule
    select: SelectionRule
    storage: StorageRule


class HasRoles(Protocol):
    """A memory, as this table sees it: what was claimed, and all roles."""

    @property
    def evict(self) -> EvictionRule | None: ...
    @property
    def position(self) -> PositionRule | None: ...
    @property
    def select(self) -> SelectionRule | None: ...
    @property
    def storage(self) -> StorageRule | None: ...
    @property
    def roles(self) -> Roles: ...


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be right.

    Attributes:
        refused: whether these roles are such a combination.
        why: the sentence; in it ``{memory}`` and the roles ``{evict}``, ``{position}``, ``{select}``, ``{storage}`` are filled in.
        where: of a chain, which memories it is about.
    """

    refused: Callable[[Roles], bool]
    why: str
    where: Literal["any", "all but the last", "all but the first"] = "any"


MEMORY: tuple[Refusal, ...] = (
    Refusal(
        lambda r: r.evict.per_head and r.position.moves,
        "{evict} keeps other tokens for each head, so their positions differ per head; it goes with Original, not with {position}",
    ),
    Refusal(
        lambda r: r.evict.per_head and not r.select.reads_all,
        "{evict} keeps other tokens for each head, so there is no one token to read for all of them; it goes with Dense, "
        "not with {select}",
    ),
    Refusal(
        lambda r: r.select.recycles and r.evict.evicts,
        "{memory}: heads read tokens again that they chose before, and {evict} evicts some of them; keep everything",
    ),
    Refusal(
        lambda r: r.select.recycles and r.position.moves,
        "{memory}: heads choose by attention as the model has it, and read tokens where they stand; that goes with Original, not "
        "with {position}",
    ),
    Refusal(
        lambda r: r.position.places_fetched and not r.select.fetches,
        "{position} shows blocks where the selection that fetches them says; it goes with a FetchedSelection, not with {select}",
    ),
    Refusal(
        lambda r: r.select.fetches and not r.position.places_fetched,
        "{memory}: blocks are read where {select} places them; it goes with the position rule Fetched, not with {position}",
    ),
    Refusal(
        lambda r: r.position.renumbers and not r.select.sparse,
        "{position} renumbers what a sparse selection found; it goes with a SparseSelection, not with {select}",
    ),
    Refusal(
        lambda r: r.select.sparse and r.evict.evicts and r.evict.contiguous,
        "{memory}: {evict} evicts the text between its sinks and its window, which is what the selection would read; keep "
        "everything, or what scores highest",
    ),
    Refusal(
        lambda r: r.select.sparse and r.position.collapses,
        "{memory}: the selection reads tokens at their own distances; it does not go with {position}",
    ),
    Refusal(
        lambda r: r.select.needs_all_tokens and r.evict.evicts,
        "{memory}: the selection judges whole blocks of the text, of which {evict} evicts some; one that reads keys goes with it",
    ),
    Refusal(
        lambda r: r.storage.tiered and r.evict.evicts,
        "{memory}: {storage} is for streams that keep every token, and {evict} evicts some: its budget bounds memory already",
    ),
    Refusal(
        lambda r: r.position.moves and not r.storage.keeps_pairs,
        "{position} shows tokens at other distances, which rotates their keys again, and keys whose channels were dropped one by "
        "one cannot be rotated; drop whole rotary pairs: channels='pairs'",
    ),
)
"""Roles that cannot be one memory."""

CHAIN: tuple[Refusal, ...] = (
    Refusal(
        lambda r: r.evict.per_head,
        "{memory} keeps other tokens for each head, so what it evicts has no one position; it cannot be part of a chain",
    ),
    Refusal(
        lambda r: r.select.sparse,
        "{memory} selects from all that a query may read, so it cannot be one part of a chain",
    ),
    Refusal(
        lambda r: r.select.thins_values,
        "{memory} adds up the heaviest of all values that a query may read, so it cannot be one part of a chain",
    ),
    Refusal(
        lambda r: not r.evict.evicts,
        "{memory} evicts nothing, so nothing can flow into what follows it; put it last",
        where="all but the last",
    ),
    Refusal(
        lambda r: not r.storage.plain,
        "{memory} compresses its tokens; in a chain they would have to be decompressed to flow on, so it stands alone",
    ),
    Refusal(
        lambda r: r.storage.tiered,
        "{memory} holds tokens in a file; a chain bounds memory by what it evicts, so it stands alone",
    ),
    Refusal(
        lambda r: r.position.needs_window,
        "{memory}: a cap on distances is relative to a window's edge and belongs to the first memory; use FixedDistance",
        where="all but the first",
    ),
)
"""Memories that cannot be in a chain, or not there."""

BANK: tuple[Refusal, ...] = (
    Refusal(
        lambda r: r.evict.per_head,
        "{memory} keeps other tokens for each head, so what it evicts is no one token that a bank could hold",
    ),
    Refusal(
        lambda r: not r.storage.plain,
        "{memory} compresses its tokens; a bank holds keys and values as they came, so leave the storage rule out before it",
    ),
    Refusal(
        lambda r: not r.select.reads_all,
        "{memory} lets a query read a selection, and a bank's answer is joined to attention over all that is held",
    ),
)
"""Memories that no bank can follow."""


def check_memory(memory: HasRoles) -> None:
    """Refuse what cannot be one memory.

    Raises:
        PolicyError: with the sentence of the row.
    """
    for row in MEMORY:
        _ask(row, memory)


def check_chain(memories: Sequence[HasRoles]) -> None:
    """Refuse memories that cannot follow each other.

    Raises:
        PolicyError: with the sentence of the row.
    """
    span = {"any": memories, "all but the last": memories[:-1], "all but the first": memories[1:]}
    for row in CHAIN:
        for memory in span[row.where]:
            _ask(row, memory)


def check_bank(memories: Sequence[HasRoles], bank: BankRule) -> None:
    """Refuse memories that ``bank`` cannot follow.

    Raises:
        PolicyError: with the sentence of the row, or if nothing says at which distance the bank's tokens are seen.
    """
    for row in BANK:
        for memory in memories:
            _ask(row, memory)
    if bank.distance is None:
        for memory in memories:
            if not memory.roles.evict.evicts:
                raise PolicyError(
                    f"{memory!r} keeps every token, so nothing says at which distance those of the bank are seen; give the bank a "
                    "distance, such as MemoryBank(distance=1023)"
                )


def check_join(left: HasRoles, right: HasRoles) -> None:
    """Refuse two memories that decide the same role, unless it is how tokens are stored and both can be done.

    Raises:
        PolicyError: naming the role.
    """
    for name in NAMES:
        mine, theirs = getattr(left, name), getattr(right, name)
        both = mine is not None and theirs is not None
        if both and not (isinstance(mine, StorageRule) and join(mine, theirs) is not None):
            raise PolicyError(
                f"both {left!r} and {right!r} decide {name}; a memory has one {name} role: chain them with >> instead"
            )


def _ask(row: Refusal, memory: HasRoles) -> None:
    if row.refused(memory.roles):
        raise PolicyError(row.why.format(memory=repr(memory), **{name: repr(role) for name, role in vars(memory.roles).items()}))
