"""The four roles of a memory, and the operators that combine them.

A *memory* answers four questions, one role each: which tokens stay (:class:`Retain`), at which distance a query sees them
(:class:`Place`), which of them it reads (:class:`Select`), and how they are stored (:class:`Pack`). A *policy* is a chain of
memories: what one lets go flows into the next, and their answers merge exactly, by log-sum-exp.

* ``a | b`` joins the roles of two parts in one memory; claiming a role twice is an error.
* ``a >> b`` chains: what ``a`` lets go, ``b`` keeps.

Python binds ``>>`` tighter than ``|``, so ``a | b >> c`` joins ``a`` to ``b`` and ``a >> b | c`` joins ``c`` to ``b``.

A role of one's own is a small class: subclass :class:`Retain` and write :meth:`Retain.keep`, or :class:`PerHead` and write
:meth:`PerHead.scores`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvsieve.errors import PolicyError
from kvsieve.policy.compatible import Roles, check_chain, check_join, check_memory
from kvsieve.policy.evict import All, Retain
from kvsieve.policy.position import AsRotated, Frame, Place
from kvsieve.policy.select import Everything, Search, Select
from kvsieve.policy.storage import Pack, Plain, join

__all__ = ["Chain", "Memory", "Policy"]


class Policy:
    """A chain of one or more memories."""

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories of the chain, the first one first."""
        raise NotImplementedError

    @property
    def frame(self) -> Frame:
        """The frame in which every memory of the chain stores keys."""
        frames = {memory.frame for memory in self.memories}
        return "raw" if "raw" in frames else "rotated"

    @property
    def moves(self) -> bool:
        """Whether a token may be seen at another distance than its true one."""
        return any(memory.place_or_default.moves for memory in self.memories)

    @property
    def packs(self) -> Pack | None:
        """How the policy packs tokens; None if it leaves them as they come."""
        roles = [memory.pack_or_default for memory in self.memories]
        return None if len(roles) > 1 or roles[0].plain else roles[0]

    @property
    def searches(self) -> Search | None:
        """The search that decides what queries read; None if there is none."""
        select = self.memories[0].select
        return select if isinstance(select, Search) else None

    @property
    def needs_surprisal(self) -> bool:
        """Whether the policy scores tokens by the model's own logits."""
        return any(memory.retain_or_default.needs_surprisal for memory in self.memories)

    def specs(self, bytes_per_token: int) -> list[dict[str, Any]]:
        """Each memory in the control plane's terms; byte budgets become tokens."""
        return [memory.spec(bytes_per_token) for memory in self.memories]

    def __or__(self, other: object) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        left, right = self.memories, other.memories
        if len(left) > 1 and len(right) > 1:
            raise PolicyError(f"cannot join two chains, {self} and {other}; join the memories first, then chain with >>")
        joined = _join(left[-1], right[0])
        return _chain((*left[:-1], joined, *right[1:]))

    def __rshift__(self, other: object) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        return _chain((*self.memories, *other.memories))


@dataclass(frozen=True, repr=False)
class Memory(Policy):
    """One choice for each role; None leaves a role unclaimed, and open to ``|``.

    Unclaimed roles default to: everything stays, as rotated, everything is read, plain.

    Raises:
        PolicyError: for a part in the wrong role.
    """

    retain: Retain | None = None
    place: Place | None = None
    select: Select | None = None
    pack: Pack | None = None
    text: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("retain", Retain), ("place", Place), ("select", Select), ("pack", Pack)):
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise PolicyError(f"{name} must be a {kind.__name__}, got {part!r}")
        check_memory(self)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (self,)

    @property
    def retain_or_default(self) -> Retain:
        """The retain role, or :class:`All`."""
        return self.retain or All()

    @property
    def place_or_default(self) -> Place:
        """The place role, or :class:`AsRotated`."""
        return self.place or AsRotated()

    @property
    def pack_or_default(self) -> Pack:
        """The pack role, or :class:`Plain`."""
        return self.pack or Plain()

    @property
    def roles(self) -> Roles:
        """A rule for each role; those that were left open are filled in."""
        return Roles(self.retain_or_default, self.place_or_default, self.select or Everything(), self.pack_or_default)

    @property
    def frame(self) -> Frame:
        return self.place_or_default.frame(self.retain_or_default)

    def spec(self, bytes_per_token: int) -> dict[str, Any]:
        """This memory in the control plane's terms."""
        select = self.select or Everything()
        return {**self.retain_or_default.spec(bytes_per_token), **self.place_or_default.spec(), **select.spec()}

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        parts = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[:4] if getattr(self, f.name) is not None)
        return f"Memory({parts})"


@dataclass(frozen=True, repr=False)
class Chain(Policy):
    """Two or more memories; what one lets go flows into the next."""

    parts: tuple[Memory, ...]
    text: str | None = field(default=None, compare=False)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.parts

    def __repr__(self) -> str:
        if self.text is not None:
            return self.text
        return " >> ".join(f"({m!r})" if " | " in repr(m) else repr(m) for m in self.parts)


def _chain(memories: tuple[Memory, ...]) -> Policy:
    if len(memories) == 1:
        return memories[0]
    check_chain(memories)
    return Chain(memories)


def _join(left: Memory, right: Memory) -> Memory:
    check_join(left, right)
    roles: dict[str, Any] = {}
    for name in ("retain", "place", "select", "pack"):
        mine, theirs = getattr(left, name), getattr(right, name)
        roles[name] = theirs if mine is None else mine
    if left.pack is not None and right.pack is not None:
        roles["pack"] = join(left.pack, right.pack)
    return Memory(**roles, text=f"{left!r} | {right!r}")
