"""The life cycle that everything with a state of its own shares.

A stream holds tokens (:class:`kvsieve.runtime.blocks.Blocks`: a planner and one store per layer), and whatever a policy or a model
needs to know besides is a *part*: scores, what each head chose, what waits to be compressed, the sliding layers' own keys. The
engine holds a list of parts and calls each of them in turn; it knows none of them.

    one forward     begin       it is planned; the planner has not planned it yet
                    attend      once per layer: the first part that answers answers for all, or else the store does
                    commit      the model is through (in two halves, see below)
                    evict       tokens may be evicted
                    evicted     they are, and what they left behind is not written over yet
                    settled     evictions are over: what is resident stays until the next forward
                    rollback    instead of all that: the forward died
    tokens go       must_read_again, check_crop, crop, force_crop, check_evict, evict_range
    rows move       select_rows
    moments         state, return_to: marks, forks, and candidates that are taken back
    forks join      join
    a session file  save, restore
    the end         reset: everything is forgotten; release: the stream is closed

`commit`, `crop`, `select_rows` and `join` come in two halves, so that an error leaves everything as it was. The method itself works
out what will change, and may raise. What it returns makes the change, once the planner has made its own, and cannot fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from kvsieve.errors import UnsupportedError
from kvsieve.runtime.saved import Saved

if TYPE_CHECKING:
    from kvsieve._core import Planner, Step
    from kvsieve.backends.base import AttendCall, Backend, Store
    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.blocks import Blocks

__all__ = ["Apply", "Crop", "Forward", "Join", "LayerInput", "Saved", "Setting", "State", "StreamPart", "Watcher", "unchanged"]

Apply: TypeAlias = Callable[[], None]
"""The second half of a change."""


def unchanged() -> None:
    """The second half of a change that is none."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a stream was opened with.

    Attributes:
        stored_keys: ``"post_rope"`` or ``"pre_rope"``.
        blocks: the tokens that it holds, which all parts share.
    """

    policy: Policy
    facts: ModelFacts
    backend: Backend
    stored_keys: str
    blocks: Blocks


@dataclass(eq=False)
class Forward:
    """A forward from its first layer until it is committed.

    Attributes:
        lens: real new tokens of each row, its last columns.
        width: columns.
        seen: tokens that each row had seen before.
        verifying: whether some of them may be candidates, which a crop may take back.
        foreign: whether a caller's ``model.generate`` drives it.
        ids: int64 ``[B, width]``; None if the model was given embeddings.
        hidden: what the decoder returned, ``[B, width, hidden]``.
        logits: what the causal LM returned, ``[B, r, V]`` of its last ``r`` columns.
        longer: for each row whether its tokens, even a single one, belong to a prompt of several; empty where nobody said so.
        answered: whether an answer follows; not while `stream.feed` reads.
        step: the planner's plan; none before `begin` is over.
        owner: the thread that runs it.
    """

    lens: list[int]
    width: int
    seen: list[int]
    verifying: bool = False
    foreign: bool = False
    ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    longer: Sequence[bool] = ()
    answered: bool = True
    step: Step | None = None
    owner: threading.Thread = field(default_factory=threading.current_thread)


@dataclass(frozen=True, eq=False)
class LayerInput:
    """Attention of one layer: ``q`` ``[B, H, q, D]`` over what it holds and the new ``k``, ``v`` ``[B, Hkv, q, D]``.

    ``store`` is None of a layer whose tokens are no policy's to decide on, a sliding one; `forward.step` is there.
    """

    index: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    call: AttendCall
    forward: Forward
    store: Store | None = None


@dataclass(frozen=True)
class Crop:
    """The newest tokens are forgotten.

    Attributes:
        seen: tokens that each row has seen.
        counts: how many of them it forgets.
        columns: columns that go with them; None if these stay, as pads: then the tokens were never part of the conversation.
        keeps_pins: whether their positions stay pinned, because others will come to them.
        read_again: how many of the tokens before them are forgotten as well when the next one comes, and read again.
    """

    seen: Sequence[int]
    counts: Sequence[int]
    columns: int | None
    keeps_pins: bool
    read_again: int = 0


@dataclass(frozen=True, eq=False)
class Join:
    """A stream goes on from several forks of it at once, which have read one document each.

    Attributes:
        past: tokens that each row of the stream has seen: what all have in common.
        seen: for each fork, tokens that each of its rows has seen.
        orders: for each row, the order of the forks.
    """

    past: list[int]
    seen: list[list[int]]
    orders: list[list[int]]

    @property
    def totals(self) -> list[int]:
        """Tokens that each row holds then."""
        return [past + sum(seen[row] - past for seen in self.seen) for row, past in enumerate(self.past)]


@dataclass(frozen=True, eq=False)
class State:
    """What it takes to return to a moment. Blocks are shared with the present until the present writes to them."""

    planner: Planner
    parts: tuple[Any, ...]

    @property
    def seen(self) -> int:
        """Tokens of the row that had seen most."""
        return max((self.planner.seen(row) for row in range(self.planner.num_rows)), default=0)


class Watcher(Protocol):
    """Who is told of a stream's steps, and changes nothing: it is no part of what the stream is."""

    def begins(self, forward: Forward) -> None:
        """A forward is about to be planned."""

    def settled(self) -> None:
        """A forward, or a turn, is over, and evictions are."""


class StreamPart:
    """One feature of a stream that has a state. What a part does not need it leaves out."""

    name: ClassVar[str]
    """Its name in a session file."""
    stores_all: ClassVar[bool] = False
    """Whether every token of a forward is stored, even one that the policy will evict at once."""
    tells_reads: ClassVar[bool] = False
    """Whether it answers for every layer, and tells itself what queries read: a step then need not."""

    # ------------------------------------------------------------------------------------------------------------ one forward

    def check_input(self, causal_lm: bool, ids: torch.Tensor | None) -> None:
        """Refuse a forward of the causal LM over ``ids``, or of its decoder alone.

        Raises:
            StateError: if the part needs ids, or logits.
        """

    def begin(self, forward: Forward) -> None:
        """A forward is planned; the planner has not planned it yet."""

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        """``[B, q, H, Dv]``, or None to leave the answer to the parts that follow and the store."""
        return None

    def commit(self, forward: Forward) -> Apply:
        """The model is through. The second half: the planner has seen the tokens, and no rule has evicted any of them."""
        return unchanged

    def rollback(self) -> None:
        """The forward never was, or an eviction failed: what was kept for its end goes. Without either, do nothing."""

    def evict(self, force: bool, turn_ended: bool) -> None:
        """Evict what the policy would. Without ``force`` a rule that ranks tokens waits until it is a whole block over budget."""

    def evicted(self) -> None:
        """All parts have evicted; slots that are free now have not been given back, or written to."""

    def settled(self, turn_ended: bool) -> None:
        """Evictions are over, and no resident is a candidate."""

    def must_step(self, width: int, has_prompt: bool) -> bool:
        """Whether candidates in a forward over ``width`` tokens must be read one by one, because what they see may depend on how
        many came before. ``has_prompt``: a part of a prompt comes before them.
        """
        return False

    # -------------------------------------------------------------------------------------------------------------- tokens, rows

    def new_store(self, index: int, store: Store) -> None:
        """Layer ``index`` has got its store."""

    def check_held(self, row: int, start: int, stop: int) -> None:
        """Refuse to pin tokens that are not held any more.

        Raises:
            StateError: naming how many of the tokens ``start`` to ``stop - 1`` are gone.
        """

    def check_evict(self, row: int, start: int, stop: int) -> None:
        """Refuse, before anything changes, to evict the tokens ``start`` to ``stop - 1`` of a row by their positions.

        Raises:
            UnsupportedError: if they could not go.
        """

    def evict_range(self, rows: Sequence[int], start: int, stop: int) -> None:
        """The tokens ``start`` to ``stop - 1`` of ``rows`` go now."""

    def must_read_again(self, columns: int) -> int:
        """How many tokens the model must read again before the next one, once the newest ``columns`` are forgotten."""
        return 0

    def check_crop(self, crop: Crop) -> None:
        """Refuse, before anything changes, a crop that would not be exact.

        Raises:
            CacheMismatchError, StateError: if what a shorter text would hold is gone.
        """

    def crop(self, crop: Crop) -> Apply:
        """The newest tokens are forgotten."""
        return unchanged

    def force_crop(self, counts: Sequence[int]) -> None:
        """Tokens go that were never part of the conversation: see to it that the planner can forget them."""

    def select_rows(self, rows: Sequence[int]) -> Apply:
        """Row ``i`` becomes what row ``rows[i]`` was."""
        return unchanged

    # ----------------------------------------------------------------------------------------------------------------- moments

    def state(self) -> Any:
        """What it takes to return here. Nothing that happens later changes it."""

    def return_to(self, state: Any) -> None:
        """Make ``state``, of this part or of the same one in another stream, the present."""

    def join(self, forks: Sequence[Any], join: Join) -> Apply:
        """The stream goes on from several forks of it at once; ``forks`` are their parts of this kind. The second half: the planner
        holds the tokens of all.

        Raises:
            UnsupportedError, StateError: if what they hold cannot be put together.
        """
        if self.state() is not None:
            raise UnsupportedError(f"streams cannot be joined: what each knows for itself ({self.name}) cannot be put together")
        return unchanged

    def save(self) -> Saved:
        """The same for a session file."""
        return Saved()

    def restore(self, saved: Saved) -> None:
        """Go on from a session file; the tokens themselves are there already, and ``saved.seen`` says how many each row has seen.

        Raises:
            CacheMismatchError: if what was saved does not fit this model; as a `SessionError` if it fits none.
        """

    def begin_at(self, columns: int, seen: Sequence[int]) -> None:
        """The stream was given tokens that it has not read: ``seen[row]`` of them count as seen."""

    # ----------------------------------------------------------------------------------------------------------------- the end

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values that it holds beside the stores."""
        return 0

    @property
    def bytes_of_summaries(self) -> int:
        """Bytes of what it knows of blocks of the text."""
        return 0

    def reset(self) -> None:
        """Forget everything."""

    def release(self) -> None:
        """The stream is closed: give memory back."""
