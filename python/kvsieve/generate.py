"""One turn of a conversation: what is read, in which pieces, what was said, and what of it was read.

The stream's own calls (`feed`, `generate`) give the model only the tokens that it has not read: the unread end of the last
answer, then the new ones, as a left-padded batch ``[B, n]`` with explicit positions. Transformers is told a number of columns that
fits what it is given: none before these where nothing looks back, else the width of the whole conversation. A :class:`Turn` keeps
that apart from what is really read, decides which columns of a forward are real, and cuts long prompts into pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import told
from kvsieve.errors import ArgumentError, CacheMismatchError, PaddingError, StateError, UnsupportedError
from kvsieve.model.generation import Settings, StreamerProxy, Watch, stopping_list
from kvsieve.model.ids import check_device, check_ids, check_known, check_mask, is_known
from kvsieve.model.reread import without_last
from kvsieve.model.support import cache_name
from kvsieve.runtime.batch import Batch, positions_of
from kvsieve.runtime.surprisal import SurprisalScores
from kvsieve.runtime.turn import Turn

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from kvsieve.model.cache import StreamCache
    from kvsieve.runtime.engine import Engine
    from kvsieve.runtime.transcript import Transcript

__all__ = ["Call", "Reader", "accept", "feed", "generate", "unpack", "waiting"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A stream as its own calls use it.

    Attributes:
        chunk: most tokens of a prompt that are read at a time.
        fork: opens a second stream that shares its past, closed when the block is left.
    """

    model: PreTrainedModel
    cache: StreamCache
    engine: Engine
    chunk: int
    fork: Callable[[], AbstractContextManager[Reader]]


# ------------------------------------------------------------------------------------------------------------------------ input


def accept(stream: Reader, ids: Any, mask: Any, name: str = "input_ids") -> list[torch.Tensor]:
    """The new tokens of each row, without pads.

    Raises:
        ShapeError, PaddingError, CacheMismatchError: for input that cannot be a batch of new tokens; nothing has changed then.
    """
    engine = stream.engine
    engine.check_owner()
    if engine.transcript.turn is not None:
        raise StateError("a turn of this stream is under way; what it says must be over before more is read")
    ids = check_ids(ids, name)
    check_device(stream.model, ids, name)
    if engine.positions.several_axes:
        raise UnsupportedError(
            "this conversation holds an image whose positions have three axes, and only the model knows where its text goes on; "
            "pass the whole conversation to model.generate with this stream's cache"
        )
    if engine.num_rows and engine.num_rows != ids.shape[0]:
        raise CacheMismatchError(f"the stream holds {engine.num_rows} sequences, the input has {ids.shape[0]}")
    rows = list(ids) if mask is None else _real(ids, mask, name)
    check_known(stream.model, ids if mask is None else torch.cat(rows), name)
    return rows


def _real(ids: torch.Tensor, mask: Any, name: str) -> list[torch.Tensor]:
    """The tokens of each row that are no pads."""
    real = check_mask(mask, ids, name).to(ids.device) != 0
    empty = (~real).all(1).nonzero().flatten().tolist()
    if empty:
        raise PaddingError(f"rows {empty} of the input have pads only")
    right = (real[:, :-1] & ~real[:, 1:]).any(1).nonzero().flatten().tolist()
    if right:
        raise PaddingError(f"rows {right} have a pad after a real token; pad on the left (tokenizer.padding_side = 'left')")
    return [row[keep] for row, keep in zip(ids, real)]


@contextmanager
def waiting(stream: Reader, new: Sequence[torch.Tensor], unread: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """What each row said and the model has not read; inside, the call that reads it.

    Where a crop took the logits away that the next token's score needs, each row's last token is among it, and is read again. A
    call that fails before the model read anything leaves that token where it was.

    Raises:
        StateError: if a caller's `model.generate` went before, and its newest tokens were not passed.
        ShapeError, CacheMismatchError: for ``unread`` that is no batch of tokens, or another one's.
    """
    engine, transcript = stream.engine, stream.engine.transcript
    with engine.claimed():
        given = _given(stream, new, unread)
        scores, before = engine.parts.find(SurprisalScores), None
        if scores is not None and scores.tail is None and engine.columns:
            before = engine.state()
            _take_back_last(engine)
        now = transcript.rows
        try:
            yield _unread_of(transcript, new, given)
        except BaseException:
            if before is not None and transcript.rows is now:
                engine.rewind(before)
            raise


def _given(stream: Reader, new: Sequence[torch.Tensor], unread: torch.Tensor | None) -> torch.Tensor | None:
    if unread is not None:
        unread = check_ids(unread, "unread", empty=True)
        if unread.shape[0] != len(new):
            raise CacheMismatchError(f"unread has {unread.shape[0]} rows, the input has {len(new)}")
        check_known(stream.model, unread, "unread")
    elif stream.engine.transcript.foreign:
        raise StateError(
            "model.generate read the last tokens of this stream, and the newest token that it sampled is not in the cache; pass "
            "unread=sequences[:, -1:] (of what model.generate returned), or unread=sequences[:, :0] if there is none"
        )
    return unread


def _unread_of(transcript: Transcript, new: Sequence[torch.Tensor], given: torch.Tensor | None) -> list[torch.Tensor]:
    if given is None:
        return [row.unread.to(mine.device) for row, mine in zip(transcript.rows, new)] or [row[:0] for row in new]
    again = [row.unread for row in transcript.rows] if transcript.foreign else []
    rows = [row.to(mine.device) for row, mine in zip(given, new)]
    return [torch.cat([old.to(row.device), row]) for old, row in zip(again, rows)] or rows


def _take_back_last(engine: Engine) -> None:
    transcript, foreign = engine.transcript, engine.transcript.foreign
    last = without_last(engine)
    if last:
        transcript.say([torch.cat([token, row.unread.to(token.device)]) for token, row in zip(last, transcript.rows)])
        transcript.foreign = foreign


# ----------------------------------------------------------------------------------------------------------------------- reading


def feed(stream: Reader, rows: Sequence[torch.Tensor], chunk: int) -> None:
    """Read ``rows`` (what was unread among them). A forward that fails leaves what was read before it."""
    engine, batch = stream.engine, Batch.of(rows)
    transcript = engine.transcript
    before, extra = transcript.state(), transcript.extra
    positions = positions_of(engine, batch)
    padded = min(batch.counts) < batch.width
    named = cache_name(stream.model)
    extra_arguments = {"logits_to_keep": 1} if stream.model._supports_logits_to_keep() else {}
    transcript.turn = turn = Turn(batch.width, batch.counts, chunk, answers=False)
    try:
        with torch.no_grad():
            for lo in range(0, batch.width, chunk):
                part = slice(lo, lo + chunk)
                stream.model(
                    input_ids=batch.ids[:, part],
                    attention_mask=batch.mask[:, part] if padded else None,
                    position_ids=positions[:, part],
                    use_cache=True,
                    **{named: stream.cache},
                    **extra_arguments,
                )
    except BaseException:
        # Or what is resident, and what is pinned, would be told with the tokens of the forward that died.
        engine.rollback()
        raise
    finally:
        transcript.turn = None
        if turn.started:
            transcript.pad_left(extra)
        else:
            transcript.return_to(before)


# -------------------------------------------------------------------------------------------------------------------- generating


def generate(
    stream: Reader, new: Sequence[torch.Tensor], unread: Sequence[torch.Tensor], prompt: torch.Tensor, kwargs: dict[str, Any]
) -> Any:
    """One call of ``model.generate`` after which the stream holds what was said.

    Args:
        new: each row's new tokens.
        unread: what each row said before and has not read.
        prompt: the new tokens as they were given, int64 ``[B, n]``.
        kwargs: arguments of `model.generate`.
    """
    inputs = _model_inputs(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _TOKEN_TYPES or name in inputs}
    settings = Settings(stream.model, {name: value for name, value in kwargs.items() if name not in inputs})
    if inputs and (stream.engine.transcript.rows or settings.copies > 1):
        raise UnsupportedError(
            f"{', '.join(inputs)}: stream.generate takes inputs beside ids in the first turn, and without beams or several "
            "sequences; pass the whole conversation to model.generate with past_key_values=stream.cache instead"
        )
    if settings.copies > 1:
        with _all_or_nothing(stream.engine):
            return _generate_copies(stream, new, unread, prompt, kwargs, settings)
    call = Call(stream, new, unread, prompt, kwargs, settings)
    try:
        result = call.run(stream.cache, whole=bool(inputs))
    except BaseException:
        call.interrupted()
        raise
    answer = _sequences(result)[:, call.width :]
    call.finish([row[: len(row) if stop is None else stop] for row, stop in zip(answer, call.turn.stops)])
    return _with_sequences(result, torch.cat([prompt, answer.to(prompt.device)], 1))


_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that say which tokens are not text."""

_SETTINGS = ("eos_token_id", "pad_token_id", "bos_token_id", "negative_prompt_ids", "negative_prompt_attention_mask")
"""Arguments of `generate` that may be tensors, and are not inputs of the model."""


def _model_inputs(kwargs: Mapping[str, Any]) -> list[str]:
    """The names of inputs of the model beside ids: images and the like.

    Raises:
        UnsupportedError: for positions and embeddings, which a stream cannot take.
    """
    found = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in _SETTINGS]
    for name in ("position_ids", "inputs_embeds"):
        if name in found:
            raise UnsupportedError(f"stream.generate knows where the conversation stands; call it with ids, without {name}")
    # Where all is text, the types say nothing.
    return [name for name in found if name not in _TOKEN_TYPES or _says(kwargs[name])]


class Call:
    """What one call of `model.generate` is given, and what it leaves."""

    def __init__(
        self,
        stream: Reader,
        new: Sequence[torch.Tensor],
        unread: Sequence[torch.Tensor],
        prompt: torch.Tensor,
        kwargs: dict[str, Any],
        settings: Settings,
    ) -> None:
        self.stream, self.engine, self.settings, self.kwargs = stream, stream.engine, settings, dict(kwargs)
        self.prompt = prompt
        transcript = self.engine.transcript
        self._before, self._extra, self._start = transcript.state(), transcript.extra, transcript.seen() or [0] * len(new)
        self._pad = _pad_of(stream.model, new, prompt, settings)
        self.batch = Batch.of([torch.cat([old, row]) for old, row in zip(unread, new)], self._pad)
        looks_back = settings.looks_back
        if settings.assisted and looks_back and transcript.columns:
            raise UnsupportedError(
                "assisted decoding with processors or criteria that look at the whole conversation, on a stream that has already "
                "seen tokens: transformers would feed it the history again; decode this turn without an assistant"
            )
        given = self._whole(new, unread) if looks_back or settings.copies > 1 else self.batch
        self.given, self.width = given, given.width
        self.turn = Turn(self.batch.width, self.batch.counts, stream.chunk, settings.copies, hidden=given.width)

    def _whole(self, new: Sequence[torch.Tensor], unread: Sequence[torch.Tensor]) -> Batch:
        """The whole conversations, for whoever looks back."""
        rows = self.engine.transcript.rows
        if not rows:
            return self.batch
        told = [row.ids.tensor().to(mine.device) for row, mine in zip(rows, new)]
        if any(bool((row < 0).any()) for row in told):
            raise UnsupportedError(
                "a processor, criterion or beam search looks at the tokens of the whole conversation, but a part of it was given "
                "as embeddings; leave that argument out"
            )
        return Batch.of([torch.cat(parts) for parts in zip(told, unread, new)], self._pad)

    def run(self, cache: StreamCache, *, whole: bool = False) -> Any:
        """The call itself. ``whole``: the prompt holds more than ids, so it is not cut, and the model finds its own positions."""
        engine, batch = self.engine, self.batch
        kwargs = self._arguments()
        if whole:
            self.turn.chunk = batch.width
        else:
            kwargs["position_ids"] = positions_of(engine, batch, self.given)
        self.begin()
        return self.stream.model.generate(
            input_ids=self.given.ids,
            attention_mask=self.given.mask,
            **{cache_name(self.stream.model): cache},
            **kwargs,
        )

    def begin(self) -> None:
        """The turn begins, on this thread.

        Raises:
            StateError: if the stream was used since the call was made.
        """
        transcript = self.engine.transcript
        if transcript.turn is not None or transcript.rows is not self._before.rows:
            raise StateError("this stream was used after its turn was asked for, and before it began")
        transcript.columns = self.given.width - self.batch.width
        transcript.turn, self.turn.owner = self.turn, threading.current_thread()

    def _arguments(self) -> dict[str, Any]:
        kwargs, turn = self.kwargs, self.turn
        watch = Watch(turn.heard, self.settings.stoppers() if len(turn.stops) > 1 else ())
        if not self.settings.beams:
            kwargs["stopping_criteria"] = stopping_list(kwargs.get("stopping_criteria"), watch, alone=len(turn.stops) == 1)
        if self.settings.get("cache_implementation") is not None:
            kwargs["cache_implementation"] = None  # the model's own: the stream is the cache
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = StreamerProxy(kwargs["streamer"], self.prompt, turn.delivered.append)
        if self.settings.looks_back and self.settings.get("max_new_tokens") is None and self.settings.get("max_length") is None:
            # Transformers' own default, which it would cut at the trained length of the model.
            kwargs["max_new_tokens"] = 20
        return kwargs

    def finish(self, said: Sequence[torch.Tensor]) -> None:
        """The turn is over: the rows have said ``said``, of which some was read."""
        engine, transcript = self.engine, self.engine.transcript
        transcript.turn = None
        engine.stop_verifying()
        read = [seen - start - count for seen, start, count in zip(transcript.seen(), self._start, self.batch.counts)]
        surplus = [max(mine - len(row), 0) for mine, row in zip(read, said)]
        if any(surplus):
            engine.crop_rows(surplus)
        transcript.pad_left(self._extra)
        if self.turn.started and not self.turn.left:
            transcript.say([row[max(mine, 0) :] for mine, row in zip(read, said)])

    def interrupted(self) -> None:
        """An exception ended the call: what was read and said until then stays; if nothing was read, nothing has changed."""
        engine, turn = self.engine, self.turn
        engine.transcript.turn = None
        engine.rollback()
        engine.candidates.end()
        if not turn.started:
            engine.transcript.return_to(self._before)
            engine.stop_verifying()
            return
        self.finish(self._said_so_far())

    def _said_so_far(self) -> list[torch.Tensor]:
        engine, turn = self.engine, self.turn
        seen = engine.transcript.seen()
        read = [max(now - start - count, 0) for now, start, count in zip(seen, self._start, self.batch.counts)]
        if self.settings.assisted:
            # Candidates after the last verified token were not said.
            verified = seen[0] if turn.verified is None else min(turn.verified, seen[0])
            count = max(verified - self._start[0] - self.batch.counts[0], 0)
            return [engine.transcript.rows[0].ids.tensor()[seen[0] - read[0] :][:count]]
        if turn.said is None:
            return [torch.zeros(0, dtype=torch.int64) for _ in seen]
        said = turn.said[:, turn.hidden :]
        streamed = [one.flatten() for one in turn.delivered]
        if len(seen) == 1 and len(streamed) > said.shape[1]:
            said = torch.cat([said, *(one[None].to(said.device) for one in streamed[said.shape[1] :])], 1)
        return [row[: len(row) if stop is None else stop] for row, stop in zip(said, turn.stops)]


@contextmanager
def _all_or_nothing(engine: Engine) -> Iterator[None]:
    """An exception leaves the stream as it was."""
    before = engine.state()
    try:
        yield
    except BaseException:
        engine.rewind(before)
        raise


def _generate_copies(
    stream: Reader,
    new: Sequence[torch.Tensor],
    unread: Sequence[torch.Tensor],
    prompt: torch.Tensor,
    kwargs: dict[str, Any],
    settings: Settings,
) -> Any:
    """Beams, or several sequences: they run on a fork that shares the prompt's reading; then the stream reads the best one."""
    with stream.fork() as child:
        call = Call(child, new, unread, prompt, kwargs, settings)
        result = call.run(child.cache)
        state = call.turn.prompt_state
        sequences = _sequences(result)
        each = sequences.shape[0] // len(new)
        answers = sequences[::each, call.width :]
        said = [row[: _length(row, settings, stop)] for row, stop in zip(answers, call.turn.stops[::each])]
        engine, transcript = stream.engine, stream.engine.transcript
        extra = transcript.extra
        if state is not None:
            engine.return_to(state)
            transcript.pad_left(extra)
    seen = transcript.seen() or [0] * len(new)
    rows = []
    for at, (old, row, answer) in enumerate(zip(unread, new, said)):
        whole = torch.cat([old, row, answer.to(row.device)])
        rows.append(whole[seen[at] - call._start[at] :])
    if transcript.rows:
        transcript.say([row[:0] for row in rows])
    feed(stream, rows, stream.chunk)
    heads = prompt.repeat_interleave(each, 0)
    return _with_sequences(result, torch.cat([heads, sequences[:, call.width :].to(prompt.device)], 1))


def _pad_of(model: PreTrainedModel, new: Sequence[torch.Tensor], prompt: torch.Tensor, settings: Settings) -> int:
    """What shorter rows begin with, for whoever looks at ids: what the caller's do, or the token that pads."""
    for row, given in zip(new, prompt):
        if len(given) > len(row) and is_known(model, int(given[0])):
            return int(given[0])
    pad = settings.get("pad_token_id")
    pad = settings.ends[0] if pad is None and settings.ends else pad
    return 0 if pad is None else int(pad)


def _length(row: torch.Tensor, settings: Settings, stop: int | None) -> int:
    """Tokens of ``row`` before what a shorter answer is filled with."""
    if stop is not None:
        return stop
    ends = settings.ends
    ended = torch.isin(row, torch.tensor(ends, dtype=row.dtype, device=row.device)).nonzero()
    if len(ended):
        return int(ended[0]) + 1
    if not settings.ends_rows:
        return len(row)
    fill = settings.get("pad_token_id")
    fill = ends[0] if fill is None and ends else fill
    kept = len(row)
    while fill is not None and kept > 1 and int(row[kept - 1]) == int(fill):
        kept -= 1
    return kept


def _sequences(result: Any) -> torch.Tensor:
    sequences: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
    return sequences


def _with_sequences(result: Any, sequences: torch.Tensor) -> Any:
    if isinstance(result, torch.Tensor):
        return sequences
    result.sequences = sequences
    return result


def refuse_others(given: Mapping[str, Any]) -> None:
    """Refuse what `feed` cannot read.

    Raises:
        UnsupportedError: for inputs beside ids, except for types of tokens that say that all is text.
    """
    types = [name for name, value in given.items() if name == "token_type_ids" or (name in _TOKEN_TYPES and not _says(value))]
    left = [str(name) for name in given if name not in types]
    if left:
        raise UnsupportedError(f"feed takes input_ids and attention_mask, not {', '.join(sorted(left))}")


def _says(types: Any) -> bool:
    """Whether types of tokens are anything but zeros: that some are not text."""
    dense = isinstance(types, torch.Tensor) and not types.is_nested and types.layout is torch.strided and not types.is_meta
    return not dense or bool(types.any())


def unpack(inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Ids and the other arguments, where a tokenizer's whole answer was passed in place of ids."""
    if isinstance(inputs, Mapping):
        wrong = [name for name in inputs if not isinstance(name, str)]
        if wrong:
            raise ArgumentError(f"what a tokenizer returns has names, such as input_ids, and not {told(wrong[0])}")
        both = sorted(set(inputs) & set(kwargs))
        if both:
            raise StateError(f"{', '.join(both)} were given twice, in the first argument and by keyword")
        kwargs = {**inputs, **kwargs}
        inputs = kwargs.pop("input_ids", None)
    return inputs, kwargs
