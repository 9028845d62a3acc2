"""One request at work: what of its prompt is left to read, and what its answers have said."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import check_flag, integer, real, told
from kvsieve.errors import ArgumentError, KvsieveError, UnsupportedError
from kvsieve.model.generation import Settings
from kvsieve.model.sampling import Sampler
from kvsieve.serve.detokenize import Pieces, Stops
from kvsieve.serve.jobs import Job, Reason, Token, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.batching import Answer
    from kvsieve.serve.conversations import State
    from kvsieve.serve.jobs import Sink
    from kvsieve.serve.texts import Kind, Segment
    from kvsieve.streams import Stream

__all__ = ["Choice", "Work", "check_job"]

MOST_LOGPROBS = 64

_OURS = (
    *("streamer", "stopping_criteria", "logits_processor", "stop_strings", "tokenizer", "prefix_allowed_tokens_fn", "input_ids"),
    *("attention_mask", "unread", "end_turn", "logprobs", "generation_config", "past_key_values", "cache", "assistant_model"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states", "max_time"),
    *("prompt_lookup_num_tokens", "custom_generate", "negative_prompt_ids", "position_ids", "inputs_embeds", "synced_gpus"),
    *("max_length", "num_return_sequences", "num_beams"),
)
"""Arguments of `generate` that a job does not have."""


def check_job(job: Job, model: PreTrainedModel, most: int) -> int:
    """The most tokens of an answer to a job.

    Args:
        most: answers at a time.

    Raises:
        ArgumentError, UnsupportedError: for what cannot be served, before anything was done.
    """
    if not isinstance(job, Job):
        raise ArgumentError(f"submit takes a Job, got {told(job)}")
    for name, text in (("owner", job.owner), ("text", job.text), *(("stop", one) for one in job.stop)):
        if not isinstance(text, str) or not (text or name == "owner"):
            raise ArgumentError(f"{name} must be a text that is not empty, got {told(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ArgumentError(f"{name} holds half of a character (a lone surrogate)") from None
    integer("n", job.n, 1, most)
    check_flag("shorter", job.shorter)
    if job.logprobs is not None:
        integer("logprobs", job.logprobs, 0, MOST_LOGPROBS)
    if job.seconds is not None and not (real(job.seconds) or 0) > 0:
        raise ArgumentError(f"seconds must be above 0, got {told(job.seconds)}")
    last = 0
    for end in job.boundaries:
        last = integer("boundaries", end, last + 1, len(job.text), what="ascending offsets in the text, each ")
    integer("answered", job.answered, 0, len(job.text))
    return _check_options(job.options, model)


def _check_options(options: Mapping[str, Any], model: PreTrainedModel) -> int:
    wrong = sorted(str(name) for name in options if name in _OURS or not isinstance(name, str))
    if wrong:
        raise UnsupportedError(f"a request does not take {', '.join(wrong)}")
    given = {name: value for name, value in options.items() if name != "seed"}
    if options.get("seed") is not None:
        integer("seed", options["seed"], 0, 2**63 - 1)
    settings = Settings(model, given)
    if settings.copies > 1:
        raise UnsupportedError("the model's own settings ask for beams or several sequences, which are not served")
    try:
        Sampler(model, 1, model.device, dict(given), settings)
    except KvsieveError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as err:
        raise ArgumentError(f"these settings cannot be: {' '.join(str(err).split())[:300]}") from err
    longest = settings.get("max_new_tokens")
    return 20 if longest is None else integer("max_new_tokens", longest, 1)


@dataclass(eq=False)
class Choice:
    """One answer to a job.

    Attributes:
        number: among the job's answers.
        ids: its tokens; ended: why it is over; usage: as it was then.
    """

    number: int
    stream: Stream
    answer: Answer
    pieces: Pieces | None
    stops: Stops
    ids: list[int] = field(default_factory=list)
    ended: Reason | None = None

    def new(self) -> list[Token]:
        """The tokens that it got since the last call; up to the one that completes a stop string."""
        found = []
        for at in range(len(self.ids), len(self.answer.ids)):
            if self.stops.hit is not None:
                break
            number = int(self.answer.ids[at])
            known = self.answer.logprobs[at] if at < len(self.answer.logprobs) else None
            found.append(Token(number) if known is None else Token(number, known.token, known.top))
            self.ids.append(number)
            if self.pieces is not None:
                self.stops.push(self.pieces.push(number))
        return found


class Work:
    """A job that was taken.

    Attributes:
        job, sink: what was submitted; number: of its ticket; began: when, of the monotonic clock.
        longest: most tokens of an answer.
        until: when it is cut, of the monotonic clock; None: never.
        state: what it goes on from, once it was opened; parent: the newest state that it left.
        stream: what reads its prompt; None before that, and once there are answers.
        choices: its answers.
        remembered: tokens that were not read for it.
        estimate: tokens that are left to read, before it was opened.
        over: whether its streams were given back; deserted: whether nobody listens any more.
    """

    def __init__(self, number: int, job: Job, sink: Sink, longest: int) -> None:
        self.number, self.job, self.sink, self.longest = number, job, sink, longest
        self.began = time.monotonic()
        self.until = None if job.seconds is None else self.began + job.seconds
        self.state: State | None = None
        self.parent: State | None = None
        self.stream: Stream | None = None
        self.choices: list[Choice] = []
        self.remembered, self.estimate, self.over, self.deserted = 0, len(job.text), False, False
        self._segments: list[Segment] = []
        self._at = 0
        self.tail: tuple[int, ...] = ()
        """The newest tokens of the prompt."""

    def opened(self, stream: Stream, state: State | None, segments: Sequence[Segment]) -> None:
        """Its stream has read what is remembered, and is to read these segments, all of which have tokens."""
        self.stream, self.state, self.parent, self._segments = stream, state, state, list(segments)
        self.remembered = stream.seen
        self.tail = tuple(token for segment in segments for token in segment.ids)[-8:]

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read, the last one aside."""
        if self.stream is None:
            return self.estimate
        return sum(len(segment.ids) for segment in self._segments) - self._at - 1

    @property
    def last(self) -> int:
        """The last token of the prompt, which is read with the others' tokens."""
        return self._segments[-1].ids[-1]

    def piece(self, chunk: int) -> torch.Tensor:
        """What is read next, int64 ``[1, n]``: at most ``chunk`` tokens of one segment."""
        ids = self._segments[0].ids
        stop = min(self._at + chunk, len(ids) - (len(self._segments) == 1))
        return torch.tensor([ids[self._at : stop]])

    def was_read(self, count: int) -> tuple[int, Kind | None] | None:
        """``count`` tokens were; the end of the segment that this completes, and what it is remembered as. None: it goes on."""
        self._at += count
        segment = self._segments[0]
        if len(self._segments) == 1 or self._at < len(segment.ids):
            return None
        self._segments.pop(0)
        self._at = 0
        return segment.end, segment.kind

    def usage(self, choice: Choice | None = None) -> Usage:
        """So far."""
        stream = self.stream if choice is None else choice.stream
        said = 0 if choice is None else len(choice.ids)
        if stream is None or stream._attachment is None:
            return Usage(0, 0, said)
        blocks, state = stream._engine.blocks, self.state
        seen = max(blocks.seen, default=0)
        prompt = self._prompt if choice is not None else seen + (not self.left)
        again = self.job.answered > 0 and (state is None or state.length <= self.job.answered)
        resident = blocks.resident
        return Usage(prompt, prompt - self.remembered, said, resident, max(seen - resident, 0), again)

    def answered_by(self, choices: list[Choice]) -> None:
        """The prompt was read, but for its last token."""
        assert self.stream is not None
        self._prompt = self.stream.seen + 1
        self.choices, self.stream = choices, None
