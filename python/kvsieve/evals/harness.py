"""Runs a task on any model under any policies: the same cases for each policy, a stream for each case.

A case's context is read in chunks, its turns ended, and each of its questions answered greedily from where it comes: afterwards the
stream goes back to there, and the context is read once. What is written is scored by the task. Every finished case is in the
file of results before the next one begins.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import kvsieve
from kvsieve.errors import KvsieveError
from kvsieve.evals.peak import forget_peak, peak_bytes
from kvsieve.evals.results import (
    CaseResult,
    Guess,
    ResultsError,
    as_json,
    check_resume,
    check_writable,
    guesses_table,
    interrupted,
    read_cases,
    summaries,
    table,
    write_json,
)
from kvsieve.evals.task import Case, Question, Task
from kvsieve.evals.tasks import TASKS
from kvsieve.model.support import cache_name
from kvsieve.policy.compose import Policy

if TYPE_CHECKING:
    from kvsieve.streams import Stream

__all__ = ["Settings", "build_cases", "evaluate", "guesses", "run", "run_case", "warnings_of"]

_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""What generation is asked for, whatever the model's own settings are."""


class Progress(Protocol):
    """What is told of the tokens that were read or written since it was told last."""

    def __call__(self, tokens: int) -> object: ...


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        task: its name.
        policies: as text.
        model: `smollm2`, a local folder, or a GGUF file.
        lengths: tokens of a case: context, longest question and the room for its answer.
        cases: how many of each length; seed: of all of them.
        chunk: most tokens that are given to a stream at a time.
        json: a file that holds what has been found so far, written after every case.
        resume: cases that the file holds are not run again.
    """

    task: str
    policies: tuple[str, ...]
    model: str = "smollm2"
    lengths: tuple[int, ...] = (2048,)
    cases: int = 10
    seed: int = 0
    chunk: int = 512
    dtype: str = "float32"
    json: Path | None = None
    resume: bool = False
    backend: str | None = None

    def facts(self) -> dict[str, Any]:
        """What two runs must have in common for their results to stand in one table. Policies, lengths and cases may be added."""
        told = {name: getattr(self, name) for name in ("task", "model", "seed", "chunk", "dtype", "backend")}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return {**told, "threads": torch.get_num_threads(), "kvsieve": kvsieve.__version__, **versions}


def run(settings: Settings) -> list[CaseResult]:
    """Loads the model, runs the task and prints a table; see :func:`evaluate`.

    Raises:
        KvsieveError: before the model is loaded, for policies that do not parse, a file that cannot be written, and a file to go on
            with that was written under other settings. Others as :func:`evaluate` and ``load_model``.
    """
    from kvsieve.evals.models import load_model
    from kvsieve.model import fingerprint

    policies = list({repr(policy): policy for policy in map(kvsieve.methods.parse, settings.policies)}.values())
    if not policies:
        raise KvsieveError("name a policy at least")
    if settings.task not in TASKS:
        raise KvsieveError(f"there is no task {settings.task!r}; known: {', '.join(TASKS)}")
    if settings.resume:
        check_resume(settings.json)
    facts = settings.facts()
    if settings.json is not None:
        if settings.resume:
            read_cases(settings.json, facts)
        check_writable(settings.json)
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
    facts["weights"] = fingerprint.weights(model)[:16]
    held = read_cases(settings.json, facts) if settings.resume and settings.json is not None else {}
    task, results = TASKS[settings.task], dict(held)
    keys = ((repr(policy), length, index) for length in settings.lengths for index in range(settings.cases) for policy in policies)
    wanted = list(dict.fromkeys(keys))
    cases = build_cases(tokenizer, task, settings)
    guessed = guesses(task, cases)
    try:
        for result in evaluate(model, tokenizer, task, policies, settings, held, cases):
            results[result.key] = result
            if settings.json is not None:
                about = {name: getattr(task, name) for name in ("name", "metric", "source")}
                write_json(settings.json, as_json(facts, about, list(results.values()), guessed))
    except KeyboardInterrupt:
        done = sum(key in results for key in wanted)
        print(f"kvsieve: {interrupted(done, f'of {len(wanted)} cases', settings.json)}", file=sys.stderr)
        raise
    found = [results[key] for key in wanted]
    print(f"{task.name}: {task.metric}\n\n{table(summaries(found))}")
    if guessed:
        print(f"\nwithout a model:\n\n{guesses_table(guessed)}")
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    policies: Sequence[Policy],
    settings: Settings,
    held: dict[tuple[str, int, int], CaseResult] | None = None,
    cases: Mapping[tuple[int, int], Case] | None = None,
) -> Iterator[CaseResult]:
    """The results of a task, case by case; of one case, policy by policy, so that what is interrupted compares them fairly.

    Args:
        model, tokenizer: any that a stream serves.
        settings: lengths, cases, seed, chunk and backend count here.
        held: results that are there already, by :attr:`CaseResult.key`; they are not run again.
        cases: those of :func:`build_cases`, where they are made already.

    Raises:
        KvsieveError: before anything is run, for lengths too short for the task, cases that are held and that this tokenizer
            makes otherwise, policies with a bank in a file, and what :func:`kvsieve.stream` refuses of any of them.
    """
    from kvsieve.model.hooks import examined

    with examined(model):
        yield from _evaluate(model, tokenizer, task, policies, settings, {} if held is None else held, cases)


def _evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    policies: Sequence[Policy],
    settings: Settings,
    held: dict[tuple[str, int, int], CaseResult],
    cases: Mapping[tuple[int, int], Case] | None,
) -> Iterator[CaseResult]:
    for policy in policies:
        # What a policy cannot do on this model is said now, not after the first case of another one.
        kvsieve.stream(model, _of_one_case(policy), backend=settings.backend).close()
    cases = build_cases(tokenizer, task, settings) if cases is None else cases
    for key, result in held.items():
        if key[1:] in cases and cases[key[1:]].digest != result.case:
            raise ResultsError(
                f"case {result.index} of {result.length:,} tokens is another one in the file: tokenizer or task changed since; "
                "name another --json"
            )
    left = [(policy, at) for at in cases for policy in policies if (repr(policy), *at) not in held]
    for warning in warnings_of(model, policies, settings.lengths):
        print(f"kvsieve: {warning}", file=sys.stderr)
    with _bar(sum(cases[at].num_read for _, at in left)) as bar:
        for policy, (length, index) in left:
            bar.set_description_str(f"{task.name}, case {index} of {length:,} tokens, {policy!r}")
            with kvsieve.stream(model, _of_one_case(policy), backend=settings.backend) as stream:
                case = cases[length, index]
                result = run_case(stream, tokenizer, task, case, settings, length, index, progress=bar.update)
            yield result


def build_cases(tokenizer: Any, task: Task, settings: Settings) -> dict[tuple[int, int], Case]:
    """The cases by length and number.

    Raises:
        KvsieveError: for lengths too short for the task.
    """
    return {
        (length, index): task.build(tokenizer, length, settings.seed, index)
        for length in settings.lengths
        for index in range(settings.cases)
    }


def guesses(task: Task, cases: Mapping[tuple[int, int], Case]) -> list[Guess]:
    """How well players without a model do, by length; none where the task has no such players."""
    scores: dict[tuple[int, str], list[float]] = {}
    for (length, _), case in cases.items():
        by_player: dict[str, list[float]] = {}
        for question in case.questions:
            for player, answer in question.guesses:
                by_player.setdefault(player, []).append(task.score(question, answer))
        for player, found in by_player.items():
            scores.setdefault((length, player), []).append(statistics.fmean(found))
    return [Guess(player, length, statistics.fmean(found), len(found)) for (length, player), found in scores.items()]


def run_case(
    stream: Stream, tokenizer: Any, task: Task, case: Case, settings: Settings, length: int, index: int, *, progress: Progress
) -> CaseResult:
    """One case in an open stream that has seen nothing."""
    at_work = _Work(stream, settings.chunk, progress)
    forget_peak()
    last, answers = len(case.turns), []
    for number, turn in enumerate(case.turns, 1):
        at_work.read(turn)
        at_work.end_turn()
        asked = [question for question in case.questions if (question.after or last) == number]
        mark = stream.mark() if len(asked) > 1 or (asked and number < last) else None
        for question in asked:
            said = at_work.choose(question) if question.options else at_work.answer(question)
            answers.append(tokenizer.decode(said, skip_special_tokens=True))
            if mark is not None and (number < last or question is not asked[-1]):
                stream.rewind(mark)
    scores = tuple(task.score(question, answer) for question, answer in zip(case.questions, answers))
    return CaseResult(
        policy=repr(stream.policy),
        length=length,
        index=index,
        case=case.digest,
        score=sum(scores) / len(scores),
        scores=scores,
        answers=tuple(answers),
        read=case.num_read,
        written=at_work.written,
        bytes_held=at_work.bytes_held,
        peak_bytes=peak_bytes(),
        prefill_seconds=round(at_work.prefill_seconds, 4),
        decode_seconds=round(at_work.decode_seconds, 4),
    )


class _Work:
    """A stream at work, and what it took."""

    def __init__(self, stream: Stream, chunk: int, progress: Progress) -> None:
        self._stream, self._chunk, self._progress = stream, chunk, progress
        self._device = next(stream.model.parameters()).device
        self.written = self.bytes_held = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def read(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), self._chunk):
            piece = ids[start : start + self._chunk]
            began = time.perf_counter()
            self._stream.feed(torch.tensor([piece], device=self._device))
            self.prefill_seconds += self._now() - began
            self._measure(len(piece))

    def end_turn(self) -> None:
        began = time.perf_counter()
        self._stream.end_turn()
        self.prefill_seconds += self._now() - began

    def answer(self, question: Question) -> list[int]:
        """The tokens that are written. The question's last token is read by the step that writes the first of them."""
        self.read(question.ids[:-1])
        last = torch.tensor([question.ids[-1:]], device=self._device)
        began = time.perf_counter()
        ids = self._stream.generate(last, max_new_tokens=question.max_new_tokens, **_GREEDY)
        self.decode_seconds += self._now() - began
        self._measure(1)
        new: list[int] = ids[0, 1:].tolist()
        self.written += len(new)
        return new

    def choose(self, question: Question) -> Sequence[int]:
        """The option that is the most probable, by its mean log-probability a token."""
        self.read(question.ids[:-1])
        mark, scores = self._stream.mark(), []
        for option in question.options:
            self._stream.rewind(mark)
            began = time.perf_counter()
            scores.append(self._log_probability(question.ids[-1], option))
            self.prefill_seconds += self._now() - began
            self._measure(len(option))
        self._progress(1)
        return question.options[max(range(len(scores)), key=scores.__getitem__)]

    def _log_probability(self, last: int, option: Sequence[int]) -> float:
        """The mean log-probability of the option's tokens after the token ``last``, in nats a token."""
        model, given = self._stream.model, torch.tensor([[last, *option[:-1]]], device=self._device)
        with torch.no_grad():
            logits = model(given, **{cache_name(model): self._stream.cache}).logits[0].float()
        return float(logits.log_softmax(-1).gather(1, torch.tensor(option, device=self._device)[:, None]).mean())

    def _now(self) -> float:
        """The time at which the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _measure(self, tokens: int) -> None:
        self.bytes_held = max(self.bytes_held, int(self._stream.stats().bytes_held))
        self._progress(tokens)


def warnings_of(model: Any, policies: Sequence[Policy], lengths: Sequence[int]) -> list[str]:
    """A line for each policy that shows tokens at their true distances, and is to read more of them than the model knows."""
    from kvsieve.evals.models import trained_length

    trained = trained_length(model)
    if trained is None or max(lengths, default=0) <= trained:
        return []
    return [
        f"{policy!r} keeps true positions, and this model was trained for {trained:,} tokens: expect little of it beyond "
        f"(--length {max(lengths)})"
        for policy in policies
        if not policy.moves
    ]


def _of_one_case(policy: Policy) -> Policy:
    """The policy with a bank of its own, if it has one: a bank remembers the cases before.

    Raises:
        KvsieveError: for a bank in a file.
    """
    if policy.bank is None:
        return policy
    if getattr(policy.bank, "path", None) is not None:
        raise KvsieveError(f"{policy!r} would know the cases before by its bank's file: leave the file out")
    return kvsieve.methods.parse(repr(policy))


def _bar(tokens: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=tokens, unit=" tokens", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True)
