"""Many conversations on one model: each forward reads the newest token of all of them, and the weights once (continuous batching,
Yu et al., OSDI 2022).

A conversation is a stream. It joins once its prompt was read, in pieces between the others' tokens, and leaves when its answer
ends; nobody waits for the longest. Attention is each stream's own, so rows may be of any length and under any policy, and a row's
answer is that of :meth:`kvsieve.Stream.generate` alone, up to the rounding of matrix products of another width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvsieve import generate as turns
from kvsieve.checks import check_flag, integer, told
from kvsieve.errors import ArgumentError, CacheMismatchError, StateError, UnsupportedError
from kvsieve.model.cache import StreamCache
from kvsieve.model.generation import Settings
from kvsieve.model.support import cache_name
from kvsieve.runtime.batch import positions_of
from kvsieve.runtime.together import Together
from kvsieve.streams import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Answer", "Batch"]

_REFUSED = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate", "negative_prompt_ids"),
    *("prefix_allowed_tokens_fn", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "max_time", "position_ids", "inputs_embeds", "synced_gpus"),
)
"""Arguments of `generate` that answers of a batch do not know."""


class Answer:
    """What one conversation of a :class:`Batch` says.

    Attributes:
        stream: the conversation. Until the answer is over it is the batch's: other calls that read are refused.
        ids: the tokens that it has said so far, int64 ``[m]``, the one that ended it among them.
        done: whether it is over: ended, cancelled, or failed.
        error: why it failed; None if it did not. The stream then holds what was said before.
    """

    def __init__(
        self, stream: Stream, new: torch.Tensor, before: torch.Tensor, kwargs: dict[str, Any], settings: Settings, end_turn: bool
    ) -> None:
        self.stream, self.done = stream, False
        self.error: BaseException | None = None
        self._engine, self._end_turn, self._streamer = stream._engine, end_turn, kwargs.pop("streamer", None)
        seed = kwargs.pop("seed", None)
        self._random = None if seed is None else torch.Generator(new.device).manual_seed(integer("seed", seed, 0))
        self._call = turns.Call(stream._reader(), [new], [before], new[None], kwargs, settings)
        self._shown = self._call.given.ids
        self._sampler = _Sampler(stream.model, self._call, kwargs, settings)
        self._read = 0

    @property
    def ids(self) -> torch.Tensor:
        return self._shown[0, self._call.width :]

    @property
    def waits(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return not self.done and self._read < self._call.batch.width

    # ---------------------------------------------------------------------------------------------- what a batch does with it

    def _begin(self) -> None:
        self._call.begin()
        if self._streamer is not None:
            self._streamer.put(self._call.prompt.cpu())

    def _piece(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """The next piece of the prompt, int64 ``[1, n]``, and its positions."""
        batch, lo = self._call.batch, self._read
        piece = slice(lo, lo + self._call.stream.chunk)
        if not lo:
            self._positions = positions_of(self._engine, batch)
        return batch.ids[:, piece], self._positions[:, piece]

    def _position(self) -> int:
        """That of the newest token, which is read next."""
        return self._engine.transcript.seen()[0] + self._engine.positions.of_rows(1)[0]

    def _heard(self, logits: torch.Tensor) -> None:
        """The model answers with logits ``[1, V]`` for the next token: sample it, and see whether the answer is over."""
        token, scores = self._sampler.next(self._shown, logits, self._random)
        self._shown = torch.cat([self._shown, token[:, None]], 1)
        self._call.turn.said = self._shown
        if self._streamer is not None:
            self._streamer.put(token.cpu())
        if self._sampler.over(self._shown, scores):
            self._end()

    def _end(self, error: BaseException | None = None) -> None:
        """The answer is over; what was said stays, and the newest token is not read."""
        if self.done:
            return
        self.done, self.error = True, error
        try:
            if error is None:
                self._call.finish([self.ids])
            else:
                self._call.interrupted()
            if self._end_turn:
                self.stream.end_turn()
        finally:
            if self._streamer is not None:
                self._streamer.end()

    def result(self) -> torch.Tensor:
        """:attr:`ids`, once the answer is over.

        Raises:
            StateError: if it is not over. What ended it, if it failed.
        """
        if not self.done:
            raise StateError("this answer is not over; call run() or step() of its batch")
        if self.error is not None:
            raise self.error
        return self.ids


class _Sampler:
    """The next token, by what `generate` would be asked for."""

    def __init__(self, model: PreTrainedModel, call: Any, kwargs: dict[str, Any], settings: Settings) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        known = {
            name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria", "tokenizer")
        }
        config, left = model._prepare_generation_config(known.pop("generation_config", None), **known)
        left = {name: value for name, value in left.items() if name in known}
        if left:
            raise UnsupportedError(f"an answer of a batch does not know {', '.join(sorted(left))}")
        most = settings.get("max_new_tokens")
        if most is None and settings.get("max_length") is not None:
            config.max_length = integer("max_length", settings.get("max_length"), 1)
        else:
            config.max_length = call.width + integer("max_new_tokens", 20 if most is None else most, 1)
        model._prepare_special_tokens(config, True, device=call.given.ids.device)
        self._sample = bool(config.do_sample)
        self._processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=call.width,
            logits_processor=LogitsProcessorList(kwargs.get("logits_processor") or ()),
            device=str(call.given.ids.device),
            model_kwargs={},
        )
        self._criteria = model._get_stopping_criteria(
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(kwargs.get("stopping_criteria") or ()),
            tokenizer=kwargs.get("tokenizer"),
        )

    def next(self, ids: torch.Tensor, logits: torch.Tensor, random: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The token ``[1]`` after ``ids`` ``[1, n]``, and the scores ``[1, V]`` that it was chosen by."""
        scores = self._processors(ids, logits.to(torch.float32, copy=True))
        if not self._sample:
            return scores.argmax(-1), scores
        return torch.multinomial(scores.softmax(-1), 1, generator=random)[:, 0], scores

    def over(self, ids: torch.Tensor, scores: torch.Tensor) -> bool:
        """Whether ``ids`` are the end of the answer."""
        return bool(self._criteria(ids, scores).all())


class Batch:
    """Conversations that are answered together.

    Args:
        model: that of all streams that join.
        most: most conversations that are answered at a time; others wait until one is over.

    >>> with kvsieve.stream(model, policy) as one, kvsieve.stream(model, policy) as two:  # doctest: +SKIP
    ...     batch = kvsieve.Batch(model)
    ...     answers = [batch.add(one, ids, max_new_tokens=50), batch.add(two, other_ids, max_new_tokens=80)]
    ...     batch.run()
    ...     answers[0].ids
    """

    def __init__(self, model: PreTrainedModel, *, most: int = 256) -> None:
        from kvsieve.model.support import look_through

        self.model: PreTrainedModel = look_through(model)
        self.most = integer("most", most, 1)
        self._waiting: list[Answer] = []
        self._active: list[Answer] = []
        self._lock = threading.RLock()

    @property
    def answers(self) -> list[Answer]:
        """Those that are not over, in the order in which they came; the first ones are being said."""
        return [*self._active, *self._waiting]

    def add(
        self,
        stream: Stream,
        input_ids: torch.Tensor | Mapping[str, Any],
        *,
        end_turn: bool = True,
        unread: torch.Tensor | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Answer:
        """One turn of ``stream`` joins; nothing is read yet.

        Args:
            stream: of one sequence, or that has read nothing. Nobody else uses it until the answer is over.
            input_ids: int64 ``[1, n]``, this turn's new tokens only; or what a tokenizer returned.
            end_turn: call its :meth:`~kvsieve.Stream.end_turn` when the answer is over.
            unread: as for :meth:`kvsieve.Stream.generate`.
            seed: of the sampling of this answer; without one the tokens depend on torch's own numbers, which all answers share.
            kwargs: as for `generate`: ``max_new_tokens``, ``do_sample``, ``temperature``, ``eos_token_id``, ``stop_strings`` with
                ``tokenizer``, ``logits_processor``, ``stopping_criteria``, ``streamer``, ``generation_config`` and others.

        Raises:
            ArgumentError, ShapeError, RangeError, StateError: for what :meth:`kvsieve.Stream.generate` refuses.
            CacheMismatchError: for a stream on another model, or of several sequences.
            UnsupportedError: for beams, several sequences, assistants, and other arguments of `generate` that are not served here.
        """
        if not isinstance(stream, Stream):
            raise ArgumentError(f"a batch takes streams, got {told(stream)}")
        engine = stream._check_open()
        if stream.model is not self.model:
            raise CacheMismatchError("this stream is on another model than the batch")
        if any(one.stream is stream for one in self.answers):
            raise StateError("this stream is in the batch already; wait until its answer is over")
        ids, kwargs = turns.unpack(input_ids, kwargs)
        kwargs.pop("token_type_ids", None)
        mask = kwargs.pop("attention_mask", None)
        wrong = sorted(name for name in _REFUSED if kwargs.get(name))
        if wrong:
            raise UnsupportedError(f"an answer of a batch does not know {', '.join(wrong)}; use stream.generate")
        new = turns.accept(stream._reader(), ids, mask)
        if len(new) != 1 or engine.num_rows > 1:
            raise CacheMismatchError(f"a batch takes streams of one sequence, this input has {len(new)}")
        if kwargs.get("streamer") is not None and not hasattr(kwargs["streamer"], "put"):
            raise ArgumentError(f"streamer must have put() and end(), got {told(kwargs['streamer'])}")
        settings = Settings(stream.model, {name: value for name, value in kwargs.items() if name not in ("seed", "streamer")})
        if settings.copies > 1:
            raise UnsupportedError("an answer of a batch has neither beams nor several sequences; use stream.generate")
        with self._lock, turns.waiting(stream._reader(), new, unread) as before:
            answer = Answer(stream, new[0], before[0], {**kwargs, "seed": seed}, settings, check_flag("end_turn", end_turn))
            self._waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """The answer is over; what was said stays, and what was read of a prompt. One that is over already stays as it is.

        Raises:
            StateError: for an answer of another batch.
        """
        with self._lock:
            if answer.done:
                return
            if answer not in self.answers:
                raise StateError("this answer is not of this batch")
            self._drop(answer)
            answer._end(None if len(answer.ids) else StateError("this answer was cancelled before its first token"))

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Every answer that is being said gets one more token, and the first that waits reads one more piece of its prompt.

        Returns:
            the answers that are over since the last step.

        A conversation that fails leaves the batch with its ``error``; the others get their token with the next step. An interrupt
        leaves all of them at the last token that they have read. Other threads may add and cancel meanwhile.
        """
        with self._lock:
            return self._step()

    def _step(self) -> list[Answer]:
        over: list[Answer] = []
        self._active = [answer for answer in self._active if not answer.done]  # an interrupt may have left some
        for stored in dict.fromkeys(answer._engine.stored_keys for answer in self._active):
            self._next_tokens([answer for answer in self._active if answer._engine.stored_keys == stored], over)
        if self._waiting and len(self._active) < self.most:
            self._read(self._waiting[0], over)
        self._active = [answer for answer in self._active if not answer.done]
        return over

    def run(self) -> None:
        """Steps until all answers are over."""
        while self.answers:
            self.step()

    def __iter__(self) -> Iterator[list[Answer]]:
        """Step by step, the answers that are over, until all are."""
        while self.answers:
            yield self.step()

    def _next_tokens(self, rows: Sequence[Answer], over: list[Answer]) -> None:
        ids = torch.cat([answer._shown[:, -1:] for answer in rows])
        positions = torch.tensor([[answer._position()] for answer in rows], device=ids.device)
        together = Together([answer._engine for answer in rows])
        try:
            self._forward(StreamCache(together), ids, positions)  # type: ignore[arg-type]
        except BaseException as error:
            together.rollback()
            if not isinstance(error, Exception) or not together.failed:
                raise
        finally:
            # A token that counts was read, whatever became of the others: what follows it is known only now.
            failed = {id(engine): error for engine, error in together.failed}
            read = {id(engine) for engine in together.completed}
            for at, answer in enumerate(rows):
                if id(answer._engine) in failed:
                    self._failed(answer, failed[id(answer._engine)], over)
                elif id(answer._engine) in read and together.logits is not None:
                    self._hear(answer, together.logits[at : at + 1, -1], over)

    def _read(self, answer: Answer, over: list[Answer]) -> None:
        """The next piece of a prompt; with the last one its first token."""
        try:
            if not answer._read:
                answer._begin()
            ids, positions = answer._piece(self.model)
            logits = self._forward(answer.stream.cache, ids, positions)
        except Exception as error:
            self._drop(answer)
            self._failed(answer, error, over)
            return
        except BaseException:
            answer._engine.rollback()
            raise
        answer._read += ids.shape[1]
        if not answer.waits:
            self._drop(answer)
            self._active.append(answer)
            self._hear(answer, logits[:, -1], over)

    def _forward(self, cache: StreamCache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        least = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        named = {cache_name(self.model): cache}
        logits: torch.Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=True, **named, **least).logits
        return logits

    def _hear(self, answer: Answer, logits: torch.Tensor, over: list[Answer]) -> None:
        try:
            answer._heard(logits)
        except Exception as error:
            self._failed(answer, error, over)
            return
        if answer.done:
            over.append(answer)

    def _failed(self, answer: Answer, error: BaseException, over: list[Answer]) -> None:
        answer._end(error)
        over.append(answer)

    def _drop(self, answer: Answer) -> None:
        for there in (self._waiting, self._active):
            if answer in there:
                there.remove(answer)
