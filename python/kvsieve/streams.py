"""What a user holds: a stream is a model with a memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvsieve import backends, banks, reading, recording, session
from kvsieve import generate as turns
from kvsieve import trace as tracing
from kvsieve.checks import check_flag, integer, told
from kvsieve.errors import PolicyError, ShapeError, StateError, UnsupportedError
from kvsieve.policy.bank import BankRule
from kvsieve.policy.compose import Policy, with_bank
from kvsieve.runtime import by_position, chunks, joining
from kvsieve.runtime.report import stats_of
from kvsieve.stats import Kept, LayerTrace, Stats

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from kvsieve.model.cache import StreamCache
    from kvsieve.model.hooks import Attachment
    from kvsieve.runtime.engine import Engine
    from kvsieve.runtime.part import State

__all__ = ["Mark", "Stream", "load", "stream"]


@dataclass(frozen=True, eq=False, repr=False)
class Mark:
    """A moment of one stream; see :meth:`Stream.mark`."""

    stream: weakref.ref[Stream] = field(repr=False)
    state: State = field(repr=False)

    @property
    def seen(self) -> int:
        """Tokens of the row that had seen most."""
        return self.state.seen

    def __repr__(self) -> str:
        return f"Mark(seen={self.seen})"


def stream(model: PreTrainedModel, policy: Policy, backend: str | None = None) -> Stream:
    """Open a stream: give ``model`` a memory with a budget.

    Everything a user may get wrong fails here, not after four thousand tokens. Opening runs a few tokens through the model, to see
    what it does with positions. Leaving the ``with`` block (or ``close()``) restores the model exactly.

    Args:
        model: a decoder-only causal LM whose attention goes through transformers' ``AttentionInterface``.
        policy: for example ``kvsieve.SirLLM(budget=1024)``.
        backend: ``"cpu"``, ``"cuda"`` or ``"reference"``; by default the fastest for the model's device and dtype.

    Raises:
        UnsupportedModelError: if the model cannot be served with this policy; the message names the reason.
        PolicyError: if a budget cannot be met on this model.
        BackendError: if the backend cannot run here.

    >>> with kvsieve.stream(model, kvsieve.StreamingLLM(1024)) as stream:  # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=stream.cache, max_new_tokens=200)
    """
    return Stream(model, policy, backend)


def load(
    path: str | PathLike[str],
    model: PreTrainedModel,
    backend: str | None = None,
    *,
    tokenizer: Any = None,
    bank: BankRule | None = None,
) -> Stream:
    """Open the stream saved at ``path`` on ``model``; it goes on where it was.

    Args:
        path: a file written by :meth:`Stream.save`.
        model: the same model; its layers, heads, dtype, weights and positions are compared with the file's.
        backend: as for :func:`kvsieve.stream`.
        tokenizer: compared with the one that was given to :meth:`Stream.save`, if both were.
        bank: of a stream that had one, the bank as it was then, where it is open already or has no file: a session's file says how
            far the bank had come, and not what it holds.

    Raises:
        CacheMismatchError: for a file of another model, weights or tokenizer, or if the bank is not as it was then.
        SessionError: if the file is damaged, is no kvsieve stream, or of another format; `SessionNotFoundError` if there is none.
    """
    with session.opened(path) as saved:
        found = Stream(model, saved.policy if bank is None else with_bank(saved.policy, bank), backend)
        try:
            saved.check(found._engine, found.model, tokenizer)
            saved.restore(found._engine, found.model)
        except BaseException:
            found.close()
            raise
    return found


class Stream:
    """A model with a memory. Open one with :func:`stream`; use it as a context manager, or :meth:`close` it."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, backend: str | None = None, *, _parent: Stream | None = None
    ) -> None:
        from kvsieve.model.cache import StreamCache
        from kvsieve.model.hooks import attach
        from kvsieve.model.parallel import check_same
        from kvsieve.model.support import look_through, stored_keys
        from kvsieve.runtime.engine import Engine

        if not isinstance(policy, Policy):
            raise PolicyError(f"a stream needs a policy such as kvsieve.SirLLM(budget=1024) second, got {told(policy)}")
        chosen = None if backend is None else backends.get(backend)
        self.model, self.policy = look_through(model), policy
        self._attachment: Attachment | None = attach(self.model)
        self._leave = weakref.finalize(self, self._attachment.release)
        try:
            if _parent is None:
                facts = self._attachment.facts
                chosen = chosen or backends.get(backends.choose(facts.layers[0].device, facts.layers[0].dtype))
                self._engine = Engine(policy, facts, chosen, stored_keys(type(self.model).__name__, policy, facts))
                check_same(facts, f"{policy!r} on {chosen.name}")
                banks.lead(self._engine, self.model)
            else:
                self._engine = _parent._engine.fork()
            self._cache = StreamCache(self._engine, weakref.ref(self))
        except BaseException:
            self.close()
            raise

    # --------------------------------------------------------------------------------------------------------------- lifetime

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model. The last stream on it restores it exactly; closing twice is fine."""
        if self._attachment is not None and hasattr(self, "_engine"):
            self._engine.release()
        self._attachment = None
        self._leave()

    def _check_open(self) -> Engine:
        if self._attachment is None:
            raise StateError("this stream is closed; open another with kvsieve.stream(model, policy)")
        return self._engine

    # ------------------------------------------------------------------------------------------------------------------ facts

    @property
    def cache(self) -> StreamCache:
        """The cache to pass to any forward or generate loop, as ``past_key_values``."""
        self._check_open()
        return self._cache

    @property
    def seen(self) -> int:
        """Tokens of the row that saw most."""
        return max(self._engine.blocks.seen, default=0)

    def stats(self) -> Stats:
        """What this stream has seen and holds."""
        return stats_of(self._engine)

    def kept(self, layer: int | None = None, head: int | None = None) -> list[Kept]:
        """The resident tokens of each row and their scores, in text order.

        Under a rule per head (SnapKV, H2O) the heads of a layer hold different tokens: name one by its ``layer`` and key-value
        ``head``. Without ``head`` the result is what any head of the layer holds, without both what any head of any layer
        holds, and no scores. Under every other policy all heads of all layers hold the same.

        Args:
            layer: index of a full-attention layer of the model.
            head: number of one of its key-value heads; needs ``layer``.

        Raises:
            StateError: for a layer or head that the stream does not have, or a head without its layer.
        """
        engine = self._engine
        layer, head = tracing.check_head(engine, layer, head)
        return [Kept(*engine.parts.eviction.kept(row, layer, head)) for row in range(engine.num_rows)]

    def trace(self) -> tuple[LayerTrace, ...]:
        """What each layer and key-value head read at the last step, under a policy that searches (HiP, InfiniteHiP).

        Raises:
            StateError: for a policy that reads all it holds, or before the first token.
        """
        return tracing.trace(self._check_open())

    def record(self, path: str | PathLike[str], tokenizer: Any, *, row: int = 0) -> contextlib.AbstractContextManager[None]:
        """Inside the block, what ``row`` holds and reads is recorded; at its end ``path`` is written, for ``kvsieve view``.

        Raises:
            ArgumentError, RangeError, SaveError: without a tokenizer, for a row that is none, or a path that cannot be written.
        """
        return recording.record(self._check_open(), self.model, path, tokenizer, row)

    # ---------------------------------------------------------------------------------------------------------------- feeding

    def feed(
        self,
        input_ids: torch.Tensor | Mapping[str, Any],
        attention_mask: torch.Tensor | None = None,
        chunk: int | None = None,
        *,
        unread: torch.Tensor | None = None,
        pin: bool = False,
        **others: Any,
    ) -> None:
        """Read new tokens without generating.

        Args:
            input_ids: int64 ``[B, n]``, the new tokens only; or what a tokenizer returned, a mapping with ``input_ids``.
            attention_mask: bool-like ``[B, n]``; zeros may only stand before a row's first real token.
            chunk: tokens per forward; chosen from the budget by default.
            unread: int64 ``[B, k]``, after a turn by ``model.generate``: the tokens that it sampled and its cache has not read.
            pin: the new tokens are pinned as they come; see :meth:`pin`.
            others: what else a tokenizer returns; types of tokens, where all of them are text.

        Raises:
            ShapeError: for ids that are not two-dimensional integers, or empty, or on another device than the model.
            RangeError: for ids that the model does not know.
            PaddingError: for padding that is not on the left.
            CacheMismatchError: if the batch is not the stream's.
            StateError: after ``model.generate``, without ``unread``.
            BudgetError: with ``pin``, if the budget cannot hold what is pinned.

        An interrupted call leaves what was read until then: :attr:`ids` tells it, :meth:`rewind` undoes it.
        """
        input_ids, rest = turns.unpack(
            input_ids, others if attention_mask is None else {**others, "attention_mask": attention_mask}
        )
        new = turns.accept(self._reader(), input_ids, rest.pop("attention_mask", None))
        turns.refuse_others(rest)
        chunk = chunks.chunk_of(self._check_open()) if chunk is None else integer("chunk", chunk, 1, error=ShapeError)
        pin = check_flag("pin", pin)
        with turns.waiting(self._reader(), new, unread) as before, self._pinning(pin, new, before):
            turns.feed(self._reader(), [torch.cat(both) for both in zip(before, new)], chunk)

    def generate(
        self,
        input_ids: torch.Tensor | Mapping[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        end_turn: bool = True,
        unread: torch.Tensor | None = None,
        pin: bool = False,
        **kwargs: Any,
    ) -> Any:
        """One turn: read the *new* tokens and answer. What was said before is in the memory.

        Prompts longer than a chunk are read in chunks, so a prompt may be longer than the budget and than the trained length.
        Logits processors, stopping criteria, ``max_length`` and beams see the whole conversation, as they do with a stock cache.

        Args:
            input_ids: int64 ``[B, n]``, this turn's new tokens only; or what a tokenizer returned, a mapping with ``input_ids``.
            attention_mask: bool-like ``[B, n]``; zeros may only stand before a row's first real token.
            end_turn: call :meth:`end_turn` when done.
            unread: int64 ``[B, k]``, after a turn by ``model.generate``: the tokens that it sampled and its cache has not read.
            pin: this turn's new tokens, not its answer, are pinned as they come; see :meth:`pin`.
            kwargs: passed to ``model.generate``, a ``generation_config`` among them. With several beams or return sequences the
                stream stays a single sequence per row: they run on a fork, and the stream then reads the best one.

        Returns:
            int64 ``[B * num_return_sequences, n + new]``: the new prompt and the answer, or as ``return_dict_in_generate`` asks.

        Raises:
            ShapeError, RangeError, PaddingError, CacheMismatchError: as :meth:`feed`.
            StateError: after ``model.generate``, without ``unread``.
            UnsupportedError: for inputs beside ids that belong to tokens (images, embeddings) after the first turn.

        A call that fails before the model ran changes nothing. One that is interrupted leaves the conversation at the last token
        that was delivered; :meth:`rewind` goes back to a mark taken before.
        """
        input_ids, kwargs = turns.unpack(input_ids, kwargs)
        input_ids = kwargs.pop("inputs") if input_ids is None and "inputs" in kwargs else input_ids
        mask = kwargs.pop("attention_mask", None) if attention_mask is None else attention_mask
        for name in ("past_key_values", "cache"):
            if name in kwargs:
                raise StateError(f"stream.generate uses the stream's own cache; pass {name} to model.generate instead")
        end_turn, pin = check_flag("end_turn", end_turn), check_flag("pin", pin)
        new = turns.accept(self._reader(), input_ids, mask)
        with torch.no_grad(), turns.waiting(self._reader(), new, unread) as before, self._pinning(pin, new, before):
            result = turns.generate(self._reader(), new, before, torch.as_tensor(input_ids), kwargs)
        if end_turn:
            self.end_turn()
        return result

    def end_turn(self) -> None:
        """A turn ends: scores decay, residents come down to the budget, unused memory is given back."""
        engine = self._check_open()
        if engine.num_rows:
            engine.end_turn()

    def reset(self) -> None:
        """Forget everything, give all memory back, and start a new session. A bank keeps what it holds."""
        self.cache.reset()

    def remember(self) -> None:
        """What the stream still holds goes to its bank, as if it had been evicted, and the stream starts a new session: a text ends
        that is to be found later. A token that was said and not read yet is not among them. See :class:`kvsieve.MemoryBank`.

        Raises:
            StateError: without a bank, for one that is read-only, or in a fork.
        """
        banks.remember(self._check_open())
        self.reset()

    @property
    def ids(self) -> list[torch.Tensor]:
        """Of each row, the ids of its conversation, int64 ``[n]``: all that was read, evicted tokens among them, and what was said
        and is not read yet. -1 stands for a token that was given as an embedding."""
        return self._engine.transcript.ids()

    def pin(self, start: int, stop: int, rows: int | Sequence[int] | None = None) -> None:
        """The tokens ``start`` to ``stop - 1`` are never evicted, by any policy, until :meth:`unpin` or :meth:`evict`.

        Tokens are counted in each row, pads left out: those of ``stream.ids[row][start:stop]``. Tokens that were not read yet are
        pinned as they come; a pin holds before the first token too. Pinned tokens take places within the budget: those of the
        oldest tokens of a window, or of the highest scores. A window shows and keeps its sinks, what is pinned, and the newest of
        the rest; at LM-Infinite pinned tokens beyond the window are seen at its ceiling, as sinks are. What the first memory of a
        chain had passed on comes back to it.

        Forks, marks and reordered rows keep their pins; ``crop`` forgets those of the tokens that it forgets, :meth:`reset` all.

        Args:
            start, stop: numbers of tokens, ``0 <= start < stop``.
            rows: one row or several; all by default.

        Raises:
            BudgetError: if the budget cannot hold the sinks, all that is pinned, the recent tokens and one more.
            StateError: if some of the tokens are evicted already.
            RangeError: for a range or a row that is none. After each of these, nothing has changed.
        """
        by_position.pin(self._check_open(), start, stop, rows)

    def unpin(self, start: int, stop: int, rows: int | Sequence[int] | None = None) -> None:
        """The tokens ``start`` to ``stop - 1`` may be evicted again, as the policy says; those that were not pinned are left alone.

        Raises:
            RangeError: for a range or a row that is none.
        """
        by_position.unpin(self._check_open(), start, stop, rows)

    def evict(self, start: int, stop: int, rows: int | Sequence[int] | None = None) -> None:
        """Remove a message from the memory: the tokens ``start`` to ``stop - 1`` are evicted now, pinned or not.

        They leave every memory of a chain and never come back. The positions of the others stay, and so does ``seen``; where a
        policy shows tokens side by side, those after the gap move up. Evicting again, or what a policy evicted before, changes
        nothing.

        The keys and values of later tokens were computed while the evicted ones were there, and stay as they are: the result is
        that of the same forwards, and then these tokens masked.

        Under a rule per head (SnapKV, H2O) heads may hold different numbers of the tokens that are left; each then keeps as many as
        the head that has fewest, its best ones.

        Args:
            start, stop: numbers of tokens, as for :meth:`pin`; all of them must have been read.
            rows: one row or several; all by default.

        Raises:
            RangeError: for a range or a row that is none, or tokens that were not read yet.
            UnsupportedError: under a policy that sums up blocks of the text (InfLLM, LongHeads), and for tokens that the model's
                own sliding layers still see.
            BackendError: under Quest on the backend ``cuda``, whose page bounds are of whole blocks of an unbroken text. After each
                of these, nothing has changed.
        """
        by_position.evict(self._check_open(), start, stop, rows)

    @property
    def pins(self) -> list[list[tuple[int, int]]]:
        """Of each row the pinned tokens, as ranges ``(start, stop)`` that ascend and do not touch; empty before the first token."""
        return self._check_open().pinning.pins()

    def fork(self) -> Stream:
        """A second stream that shares this one's past. Blocks are shared until one of the two writes; neither changes the other."""
        self._check_open()
        return Stream(self.model, self.policy, _parent=self)

    def join(self, streams: Sequence[Stream], *, canonical: bool = False) -> Stream:
        """A stream that goes on from several documents, each read by a fork of this stream (set-based prompting, arXiv 2406.06581).

        It holds what this stream has read and then each document as its fork computed it: none has seen another, and all begin at
        one position. What follows comes behind the longest and sees all. Blocks are shared, not copied; see docs/guides/join.md.

        Args:
            streams: forks of this stream, which may be empty; this one has not gone on since. Row by row in a batch.
            canonical: order the documents by a hash of their ids: the order of ``streams`` changes nothing, to the last bit.

        Raises:
            UnsupportedError: for policies that evict or move tokens, RefreshKV, models with sliding layers, images.
            BackendError: under Quest on the backend ``cuda``, whose page bounds are of whole blocks of an unbroken text.
            CacheMismatchError: for a stream that is no fork of this one, or does not begin as this one.
            StateError: for tokens that were said and not read, or a document that is compressed already.
        """
        forks: list[Any] = list(streams) if isinstance(streams, list | tuple) else [streams]
        wrong = [type(one).__name__ for one in forks if not isinstance(one, Stream)]
        if wrong:
            raise StateError(f"join takes streams, forks of this one that have read a document each, got {', '.join(wrong[:5])}")
        canonical = check_flag("canonical", canonical)
        joined = self.fork()
        try:
            joining.join(joined._engine, [one._check_open() for one in forks], canonical)
        except BaseException:
            joined.close()
            raise
        return joined

    def read_twice(
        self,
        context: torch.Tensor | Mapping[str, Any],
        question: torch.Tensor | Mapping[str, Any],
        *,
        keep: Literal["both", "second"] = "both",
    ) -> None:
        """Read question, context, context, question (JRT-Prompt, arXiv 2407.05483), for memories with a budget: when the context
        comes again, the stream has seen what will be asked.

        Args:
            context, question: int64 ``[B, n]``, or what a tokenizer returned; as for :meth:`feed`.
            keep: ``"second"`` evicts the first copy of the context once all is read; see :meth:`evict`.

        Raises:
            UnsupportedError, BackendError: with ``keep="second"``, where :meth:`evict` refuses; the stream is then as it was.
                Others as :meth:`feed`.
        """
        reading.read_twice(self._reader(), context, question, keep)

    def mark(self) -> Mark:
        """This moment, to go back to with :meth:`rewind`: to regenerate an answer, to edit the last turn, to undo a call that was
        interrupted. Blocks are shared with the present until the present writes to them; a mark that is dropped gives its own back.
        """
        engine = self._check_open()
        engine.idle()
        return Mark(weakref.ref(self), engine.state())

    def rewind(self, mark: Mark) -> None:
        """Go back to ``mark``: everything is as it was then, for every policy and kind of layer. A mark can be used again.

        Raises:
            StateError: for what is not a mark of this stream, or if a change of all layers failed in their midst.
        """
        engine = self._check_open()
        if not isinstance(mark, Mark) or mark.stream() is not self:
            raise StateError("rewind needs a mark that this stream's mark() returned")
        engine.rewind(mark.state)

    def __copy__(self) -> Stream:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self.fork()

    def __reduce__(self) -> Any:
        raise UnsupportedError("a stream cannot be pickled; stream.save(path) writes it, kvsieve.load(path, model) reads it")

    def save(self, path: str | PathLike[str], *, tokenizer: Any = None) -> None:
        """Write this stream's memory to one ``.safetensors`` file; see :func:`kvsieve.load`.

        Args:
            path: the file to write; one that exists is replaced once the new one is complete and on the disk. A link is followed.
            tokenizer: if given, its fingerprint is written, and compared when the file is loaded with a tokenizer.

        Raises:
            SaveError: if ``path`` cannot be written; the old file is as it was.
            UnsupportedError: for a policy with rules of your own, which cannot be written as text.
        """
        session.save(self._check_open(), self.model, path, tokenizer)

    # --------------------------------------------------------------------------------------------------------------- internals

    def _reader(self) -> turns.Reader:
        return turns.Reader(self.model, self._cache, self._check_open(), chunks.chunk_of(self._engine), self._forked)

    @contextlib.contextmanager
    def _forked(self) -> Iterator[turns.Reader]:
        with self.fork() as child:
            yield child._reader()

    def _pinning(
        self, pin: bool, new: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        if not pin:
            return contextlib.nullcontext()
        return by_position.coming(self._engine, [len(row) for row in new], [len(row) for row in before])
