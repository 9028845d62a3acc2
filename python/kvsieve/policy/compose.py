"""The four roles of a memory, and the operators that combine them.

A *memory* answers four questions, one role each: which tokens stay (:class:`EvictionRule`), at which distance a query sees them
(:class:`PositionRule`), which of them it reads (:class:`SelectionRule`), and how they are stored (:class:`StorageRule`). A *policy*
is a chain of memories: what one evicts flows into the next, and their answers merge exactly, by log-sum-exp.

* ``a | b`` joins the roles of two parts in one memory; claiming a role twice is an error.
* ``a >> b`` chains: what ``a`` evicts, ``b`` keeps.

Python binds ``>>`` tighter than ``|``, so ``a | b >> c`` joins ``a`` to ``b`` and ``a >> b | c`` joins ``c`` to ``b``.

A rule of one's own is a small class: subclass :class:`EvictionRule` and write :meth:`EvictionRule.keep`, or
:class:`PerHeadEviction` and write :meth:`PerHeadEviction.scores`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from kvsieve.checks import told
from kvsieve.errors import PolicyError
from kvsieve.policy.bank import BankRule
from kvsieve.policy.compatible import NAMES, Roles, check_bank, check_chain, check_join, check_memory
from kvsieve.policy.evict import EvictionRule, KeepAll
from kvsieve.policy.position import Original, PositionRule
from kvsieve.policy.select import Dense, FetchedSelection, HeaviestValues, RecycledSelection, SelectionRule, SparseSelection
from kvsieve.policy.specs import MemorySpec, StoredKeys
from kvsieve.policy.storage import Plain, StorageRule, Tiered, join

__all__ = ["Banked", "Chain", "Memory", "Policy", "with_bank"]


class Policy:
    """A chain of one or more memories."""

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories of the chain, the first one first."""
        raise NotImplementedError

    @property
    def stored_keys(self) -> StoredKeys:
        """How every memory of the chain stores keys."""
        stored = {memory.stored_keys for memory in self.memories}
        return "pre_rope" if "pre_rope" in stored else "post_rope"

    @property
    def moves(self) -> bool:
        """Whether a token may be seen at another distance than its true one."""
        return any(memory.roles.position.moves for memory in self.memories)

    @property
    def is_full(self) -> bool:
        """Whether it is the full cache: every token is held as it came, where it stood, and read."""
        return self.bank is None and [memory.roles for memory in self.memories] == [Memory().roles]

    @property
    def compression(self) -> StorageRule | None:
        """How the policy stores tokens; None if it leaves them as they come."""
        rules = [memory.roles.storage for memory in self.memories]
        return None if len(rules) > 1 or rules[0].plain else rules[0]

    @property
    def tiers(self) -> Tiered | None:
        """Which tokens are in memory and which in a file; None if all are in memory."""
        storage = self.memories[0].storage
        return storage if isinstance(storage, Tiered) else None

    @property
    def selection(self) -> SparseSelection | None:
        """What decides for each layer and KV head what queries read; None if there is no such rule."""
        select = self.memories[0].select
        return select if isinstance(select, SparseSelection) else None

    @property
    def recycling(self) -> RecycledSelection | None:
        """What lets heads read again what they chose at an earlier step; None if there is no such rule."""
        select = self.memories[0].select
        return select if isinstance(select, RecycledSelection) else None

    @property
    def heaviest_values(self) -> HeaviestValues | None:
        """What decides which values a query adds up; None if it adds up all that it reads."""
        select = self.memories[0].select
        return select if isinstance(select, HeaviestValues) else None

    @property
    def fetching(self) -> FetchedSelection | None:
        """What fetches blocks of the text; None if there is no such rule."""
        select = self.memories[0].select
        return select if isinstance(select, FetchedSelection) else None

    @property
    def bank(self) -> BankRule | None:
        """What the last memory's evicted tokens flow into, if they are not lost."""
        return None

    @property
    def needs_surprisal(self) -> bool:
        """Whether the policy scores tokens by the model's own logits."""
        return any(memory.roles.evict.needs_surprisal for memory in self.memories)

    def specs(self, bytes_per_token: int) -> list[MemorySpec]:
        """What the planner is told of each memory; byte budgets become tokens."""
        return [memory.spec(bytes_per_token) for memory in self.memories]

    def __or__(self, other: object) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        if self.bank is not None or other.bank is not None:
            raise PolicyError(f"cannot join {self} and {other}: a bank is the end of a chain; join first, then chain with >>")
        left, right = self.memories, other.memories
        if len(left) > 1 and len(right) > 1:
            raise PolicyError(f"cannot join two chains, {self} and {other}; join the memories first, then chain with >>")
        joined = _join(left[-1], right[0])
        return _chain((*left[:-1], joined, *right[1:]))

    def __rshift__(self, other: object) -> Policy:
        if isinstance(other, BankRule | Policy) and self.bank is not None:
            raise PolicyError(f"{self!r} ends with a bank, which evicts nothing that could flow into {other!r}")
        if isinstance(other, BankRule):
            return Banked(self, other)
        if isinstance(other, Banked):
            return Banked(self >> other.before, other.end)
        if not isinstance(other, Policy):
            return NotImplemented
        return _chain((*self.memories, *other.memories))


@dataclass(frozen=True, repr=False)
class Memory(Policy):
    """One choice for each role; None leaves a role unclaimed, and open to ``|``.

    Unclaimed roles default to: every token stays, at its original position, everything is read, stored as it came.

    Raises:
        PolicyError: for a part in the wrong role.
    """

    evict: EvictionRule | None = None
    position: PositionRule | None = None
    select: SelectionRule | None = None
    storage: StorageRule | None = None
    text: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (
            ("evict", EvictionRule),
            ("position", PositionRule),
            ("select", SelectionRule),
            ("storage", StorageRule),
        ):
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise PolicyError(f"{name} must be a {kind.__name__}, got {told(part)}")
        _check_text(self.text)
        check_memory(self)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (self,)

    @cached_property
    def roles(self) -> Roles:
        """A rule for each role; those that were left open are filled in."""
        return Roles(self.evict or KeepAll(), self.position or Original(), self.select or Dense(), self.storage or Plain())

    @property
    def stored_keys(self) -> StoredKeys:
        return self.roles.position.stored_keys(self.roles.evict)

    def spec(self, bytes_per_token: int) -> MemorySpec:
        """What the planner is told of this memory."""
        roles = self.roles
        return MemorySpec(roles.evict.spec(bytes_per_token), roles.position.spec(), roles.select.top_k)

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        parts = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[:4] if getattr(self, f.name) is not None)
        return f"Memory({parts})"


@dataclass(frozen=True, repr=False)
class Chain(Policy):
    """Two or more memories; what one evicts flows into the next."""

    parts: tuple[Memory, ...]
    text: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        parts = tuple(self.parts) if isinstance(self.parts, tuple | list) else ()
        if len(parts) < 2 or not all(isinstance(part, Memory) for part in parts):
            raise PolicyError(
                f"a chain is made of two memories or more, such as StreamingLLM(512) >> SirLLM(512); got {told(parts)}"
            )
        _check_text(self.text)
        check_chain(parts)
        object.__setattr__(self, "parts", parts)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.parts

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        return " >> ".join(f"({m!r})" if " | " in repr(m) else repr(m) for m in self.parts)


@dataclass(frozen=True, repr=False)
class Banked(Policy):
    """A policy whose evicted tokens flow into a bank, and whose queries read there as well.

    Raises:
        PolicyError: for a policy that no bank goes with.
    """

    before: Policy
    end: BankRule

    def __post_init__(self) -> None:
        if not isinstance(self.before, Policy) or self.before.bank is not None:
            raise PolicyError(f"a bank stands behind a policy that has none yet, got {told(self.before)}")
        if not isinstance(self.end, BankRule):
            raise PolicyError(f"a chain ends in a bank such as MemoryBank(), got {told(self.end)}")
        check_bank(self.before.memories, self.end)

    @property
    def bank(self) -> BankRule:
        return self.end

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.before.memories

    @property
    def stored_keys(self) -> StoredKeys:
        return "pre_rope"

    @property
    def moves(self) -> bool:
        return True

    def distance(self, bytes_per_token: int) -> int:
        """At which distance a query sees every token of the bank: as far as the oldest token that the policy can show it."""
        if self.end.distance is not None:
            return self.end.distance
        specs = self.before.specs(bytes_per_token)
        budget = sum(spec.evict.budget or spec.evict.sinks + spec.evict.window for spec in specs)
        farthest = [spec.position.distance for spec in specs if spec.position.distance is not None]
        return min([budget - 1, *farthest])

    def __repr__(self) -> str:
        before = f"({self.before!r})" if " | " in repr(self.before) else repr(self.before)
        return f"{before} >> {self.end!r}"


def with_bank(policy: Policy, bank: BankRule) -> Policy:
    """``policy`` with ``bank`` in place of its own.

    Raises:
        PolicyError: if it has none.
    """
    if not isinstance(bank, BankRule):
        raise PolicyError(f"a bank such as MemoryBank() is needed, got {told(bank)}")
    if not isinstance(policy, Banked):
        raise PolicyError(f"{policy!r} has no bank that {bank!r} could take the place of")
    return Banked(policy.before, bank)


def _chain(memories: tuple[Memory, ...]) -> Policy:
    if len(memories) == 1:
        return memories[0]
    return Chain(memories)


def _check_text(text: object) -> None:
    if text is not None and not isinstance(text, str):
        raise PolicyError(f"text must be what repr() is to write, a str, or None, got {told(text)}")


def _join(left: Memory, right: Memory) -> Memory:
    check_join(left, right)
    roles: dict[str, Any] = {}
    for name in NAMES:
        mine, theirs = getattr(left, name), getattr(right, name)
        roles[name] = theirs if mine is None else mine
    if left.storage is not None and right.storage is not None:
        roles["storage"] = join(left.storage, right.storage)
    return Memory(**roles, text=f"{left!r} | {right!r}")
