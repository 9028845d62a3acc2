"""Many conversations on one model: each forward reads the newest token of all of them, and the weights once (continuous batching,
Yu et al., OSDI 2022).

A conversation is a stream. It joins once its prompt was read, in pieces between the others' tokens, and leaves when its answer
ends; nobody waits for the longest. A last piece of one token is read with the others' tokens. Attention is each stream's own, so
rows may be of any length and under any policy, and a row's answer is that of :meth:`kvsieve.Stream.generate` alone, up to the
rounding of matrix products of another width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsieve import generate as turns
from kvsieve.checks import check_flag, integer, told
from kvsieve.errors import ArgumentError, CacheMismatchError, StateError, UnsupportedError
from kvsieve.locks import shared_lock
from kvsieve.model.cache import StreamCache
from kvsieve.model.generation import Settings
from kvsieve.model.linears import FewRows
from kvsieve.model.sampling import Sampler
from kvsieve.model.support import cache_name
from kvsieve.runtime.batch import positions_of
from kvsieve.runtime.chunks import MAX_CHUNK
from kvsieve.runtime.process import defer_sigint
from kvsieve.runtime.together import Together
from kvsieve.streams import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Answer", "Batch", "LogProbs"]

_REFUSED = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate", "negative_prompt_ids"),
    *("prefix_allowed_tokens_fn", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "max_time", "position_ids", "inputs_embeds", "synced_gpus"),
)
"""Arguments of `generate` that answers of a batch do not know."""


@dataclass(frozen=True)
class LogProbs:
    """What the model thought of one token: natural logarithms of its probabilities, before temperature and other processors.

    Attributes:
        token: of the token that was said.
        top: the most probable ids and their logarithms, the best first.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor, token: torch.Tensor, most: int) -> LogProbs:
        """Of a token ``[1]``, and the ``most`` best ones, by ``logits`` ``[1, V]``."""
        logs = logits[0].float().log_softmax(-1)
        best = logs.topk(min(most, len(logs)))
        return cls(float(logs[token]), tuple(zip(best.indices.tolist(), best.values.tolist())))


class Answer:
    """What one conversation of a :class:`Batch` says.

    Attributes:
        stream: the conversation. Until the answer is over it is the batch's: other calls that read are refused.
        ids: the tokens that it has said so far, int64 ``[m]``, the one that ended it among them.
        done: whether it is over: ended, cancelled, or failed.
        error: why it failed; None if it did not. The stream then holds what was said before.
        logprobs: one for each of ``ids``, if they were asked for; else empty.
    """

    def __init__(
        self, stream: Stream, new: torch.Tensor, before: torch.Tensor, kwargs: dict[str, Any], settings: Settings, end_turn: bool
    ) -> None:
        self.stream, self.done = stream, False
        self.error: BaseException | None = None
        self._engine, self._end_turn, self._streamer = stream._engine, end_turn, kwargs.pop("streamer", None)
        seed, most = kwargs.pop("seed", None), kwargs.pop("logprobs", None)
        self.logprobs: list[LogProbs] = []
        self._most = None if most is None else integer("logprobs", most, 0)
        self._random = None if seed is None else torch.Generator(new.device).manual_seed(integer("seed", seed, 0))
        self._call = turns.Call(stream._reader(), [new], [before], new[None], kwargs, settings)
        self._turn, self._shown, self._prompted = self._call.turn, self._call.given.ids, False
        self._sampler = Sampler(stream.model, self._call.width, self._shown.device, kwargs, settings)
        self._positions = positions_of(self._engine, self._call.batch)
        self._started_at = (self._engine.transcript.seen() or [0])[0]
        self._logits: torch.Tensor | None = None
        """For the next token, float ``[1, V]``: all before it was read, and it is not sampled yet."""
        self._sampled: tuple[torch.Tensor, torch.Tensor] | None = None
        """A token ``[1]`` that the streamer and the criteria do not know yet, and its scores ``[1, V]``."""
        self._call.begin()

    @property
    def ids(self) -> torch.Tensor:
        return self._shown[0, self._call.width :]

    @property
    def waits(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return not self.done and self._turn.left > 0

    # ---------------------------------------------------------------------------------------------- what a batch does with it

    def _check(self) -> None:
        """Nobody else has used the stream.

        Raises:
            StateError: if it was closed or changed since.
        """
        engine = self._engine
        read = self._turn.width - self._turn.left + self._turn.fed
        if self.stream._attachment is None:
            raise StateError("this stream was closed before its answer was over")
        if engine.transcript.turn is not self._turn or (engine.transcript.seen() or [0])[0] != self._started_at + read:
            raise StateError("this stream was changed before its answer was over: rewound, cropped or reset")

    def _next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read next and its positions, int64 ``[1, n]``: a piece of the prompt, or the newest token."""
        if not self.waits:
            at = self._engine.transcript.seen()[0] + self._engine.positions.of_rows(1)[0]
            return self._shown[:, -1:], torch.tensor([[at]], device=self._shown.device)
        lo = self._turn.width - self._turn.left
        # The others wait for it.
        piece = slice(lo, lo + min(self._call.stream.chunk, MAX_CHUNK))
        return self._call.batch.ids[:, piece], self._positions[:, piece]

    def _hear(self) -> None:
        """Sample the next token, if its logits are there, and see whether the answer is over. What is interrupted goes on here."""
        if self._streamer is not None and not self._prompted:
            self._prompted = True
            self._streamer.put(self._call.prompt.cpu())
        if self._logits is not None:
            token, scores = self._sampler.next(self._shown, self._logits, self._random)
            found = [] if self._most is None else [LogProbs.of(self._logits, token, self._most)]
            with defer_sigint():
                self.logprobs += found
                self._logits, self._sampled = None, (token, scores)
                self._turn.said = self._shown = torch.cat([self._shown, token[:, None]], 1)
            if self._streamer is not None:
                self._streamer.put(token.cpu())
        if self._sampled is not None:
            over = self._sampler.over(self._shown, self._sampled[1])
            self._sampled = None
            if over:
                self._end()

    def _end(self, error: BaseException | None = None) -> None:
        """The answer is over; what was said stays, and the newest token is not read. What goes wrong here is its error."""
        if self.done:
            return
        with defer_sigint():
            self.done, self.error = True, error
            try:
                self._check()
                if error is None:
                    self._call.finish([self.ids])
                else:
                    self._call.interrupted()
                if self._end_turn:
                    self.stream.end_turn()
            except Exception as failure:
                self.error = self.error or failure
            if self._engine.transcript.turn is self._turn:
                self._engine.transcript.turn = None
        try:
            if self._streamer is not None:
                self._streamer.end()
        except Exception as failure:
            self.error = self.error or failure

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
        self._lock = shared_lock()

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
        logprobs: int | None = None,
        **kwargs: Any,
    ) -> Answer:
        """One turn of ``stream`` joins; nothing is read yet.

        Args:
            stream: of one sequence, or that has read nothing. Nobody else uses it until the answer is over.
            input_ids: int64 ``[1, n]``, this turn's new tokens only; or what a tokenizer returned.
            end_turn: call its :meth:`~kvsieve.Stream.end_turn` when the answer is over.
            unread: as for :meth:`kvsieve.Stream.generate`.
            seed: of the sampling of this answer; without one the tokens depend on torch's own numbers, which all answers share.
            logprobs: fill :attr:`Answer.logprobs`, with so many of the most probable tokens each.
            kwargs: as for `generate`: ``max_new_tokens``, ``do_sample``, ``temperature``, ``eos_token_id``, ``stop_strings`` with
                ``tokenizer``, ``logits_processor``, ``stopping_criteria``, ``streamer``, ``generation_config`` and others.

        Raises:
            ArgumentError, ShapeError, RangeError, StateError: for what :meth:`kvsieve.Stream.generate` refuses.
            CacheMismatchError: for a stream on another model, or of several sequences.
            UnsupportedError: for beams, several sequences, assistants, and other arguments of `generate` that are not served here.
        """
        if not isinstance(stream, Stream):
            raise ArgumentError(f"a batch takes streams, got {told(stream)}")
        with self._lock:
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
            settings = Settings(stream.model, {name: value for name, value in kwargs.items() if name != "streamer"})
            if settings.copies > 1:
                raise UnsupportedError("an answer of a batch has neither beams nor several sequences; use stream.generate")
            end_turn = check_flag("end_turn", end_turn)
            with turns.waiting(stream._reader(), new, unread) as before:
                given = {**kwargs, "seed": seed, "logprobs": logprobs}
                answer = Answer(stream, new[0], before[0], given, settings, end_turn)
                self._waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """The answer is over; what was said stays, and what was read of a prompt. One that is over already stays as it is.

        Raises:
            StateError: for an answer of another batch. ArgumentError: for what is no answer.
        """
        if not isinstance(answer, Answer):
            raise ArgumentError(f"cancel takes what add() returned, got {told(answer)}")
        with self._lock:
            if answer.done:
                return
            if answer not in self.answers:
                raise StateError("this answer is not of this batch")
            self._drop(answer)
            answer._end(None if len(answer.ids) else StateError("this answer was cancelled before its first token"))

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Every answer that is being said gets one more token, and the first that waits reads one more piece of its prompt. Those
        whose prompts are read but for one token join at once.

        Returns:
            the answers that are over since the last step, those that were cancelled aside.

        A conversation that fails leaves the batch with its ``error``; the others get their token with the next step. After an
        interrupt the next step goes on where each was. Other threads may add and cancel meanwhile.
        """
        with self._lock:
            over: list[Answer] = []
            for answer in self.answers:
                answer._turn.owner = threading.current_thread()
            self._hear(self._active, over)  # an interrupt may have come before all were heard
            ready = [answer for answer in self._waiting if answer._turn.left == 1]
            rows = [*self._active, *ready[: max(self.most - len(self._active), 0)]]
            for stored in dict.fromkeys(answer._engine.stored_keys for answer in rows):
                self._read([answer for answer in rows if answer._engine.stored_keys == stored], over)
            longer = [answer for answer in self._waiting if answer._turn.left > 1]
            if longer and len(self._active) < self.most:
                self._read(longer[:1], over)
            self._hear(self._active, over)
            return over

    def run(self) -> None:
        """Steps until all answers are over."""
        while self.answers:
            self.step()

    def __iter__(self) -> Iterator[list[Answer]]:
        """Step by step, the answers that are over, until all are."""
        while self.answers:
            yield self.step()

    def _read(self, rows: Sequence[Answer], over: list[Answer]) -> None:
        """One forward over what these answers read next, which is equally long."""
        rows = [answer for answer in rows if self._goes_on(answer, over)]
        if not rows:
            return
        ids, positions = (torch.cat(parts) for parts in zip(*(answer._next() for answer in rows)))
        together = Together([answer._engine for answer in rows])
        before = [(answer._turn.left, answer._turn.fed) for answer in rows]
        try:
            self._forward(StreamCache(together), ids, positions)  # type: ignore[arg-type]
        except BaseException as error:
            together.rollback()
            if not isinstance(error, Exception) or not together.failed:
                raise
        finally:
            # What counts was read, whatever became of the others, and what follows it is known only now.
            with defer_sigint():
                for at, (answer, was) in enumerate(zip(rows, before)):
                    if (answer._turn.left, answer._turn.fed) == was or answer._turn.left or together.logits is None:
                        continue
                    answer._logits = together.logits[at : at + 1, -1]
                    if answer in self._waiting:
                        self._waiting.remove(answer)
                        self._active.append(answer)
        for engine, failure in together.failed:
            self._fail(next(answer for answer in rows if answer._engine is engine), failure, over)

    def _goes_on(self, answer: Answer, over: list[Answer]) -> bool:
        try:
            answer._check()
        except StateError as error:
            self._fail(answer, error, over)
        return not answer.done

    def _forward(self, cache: StreamCache, ids: torch.Tensor, positions: torch.Tensor) -> None:
        least = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        with FewRows.of(self.model):
            self.model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_name(self.model): cache}, **least)

    def _hear(self, answers: Sequence[Answer], over: list[Answer]) -> None:
        """Tokens are sampled from what was read. Streamers, processors and criteria are called here: they may do anything."""
        for answer in list(answers):
            try:
                if not answer.done:
                    answer._hear()
            except Exception as error:
                answer._end(error)
            if answer.done and answer in self._active:
                self._drop(answer)
                over.append(answer)

    def _fail(self, answer: Answer, error: BaseException, over: list[Answer]) -> None:
        self._drop(answer)
        answer._end(error)
        over.append(answer)

    def _drop(self, answer: Answer) -> None:
        for there in (self._waiting, self._active):
            if answer in there:
                there.remove(answer)
