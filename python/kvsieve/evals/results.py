"""What an evaluation has found so far, as a file that is whole at any moment, and as a table."""

from __future__ import annotations

import contextlib
import errno
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from kvsieve.errors import KvsieveError, SaveError
from kvsieve.files.replace import replacing
from kvsieve.view.live import plain_table

__all__ = [
    "CaseResult",
    "Guess",
    "ResultsError",
    "Summary",
    "as_json",
    "case_of",
    "check_resume",
    "check_writable",
    "guesses_table",
    "interrupted",
    "read_cases",
    "read_held",
    "summaries",
    "table",
    "write_json",
]


_WHAT = "file of results"

T = TypeVar("T")


class ResultsError(KvsieveError, OSError):
    """A file of results that cannot be read or written, or is of a run with other settings; the message says what to do."""


@dataclass(frozen=True)
class CaseResult:
    """One case under one policy.

    Attributes:
        policy: written out.
        length, index: tokens that were asked for, and the number of the case.
        case: digest of the case; see :attr:`kvsieve.evals.task.Case.digest`.
        score: the mean of ``scores``, those of the questions, 0 to 1.
        answers: what was written after each question.
        read, written: tokens that were given to the model, and tokens that it wrote.
        bytes_held: the most that keys, values and what goes with them took after a chunk or an answer (``Stats.bytes_held``).
        peak_bytes: the most memory of the process, weights included, while the case ran; None where the system does not tell.
        prefill_seconds, decode_seconds: wall time of reading and of writing.
    """

    policy: str
    length: int
    index: int
    case: str
    score: float
    scores: tuple[float, ...]
    answers: tuple[str, ...]
    read: int
    written: int
    bytes_held: int
    peak_bytes: int | None
    prefill_seconds: float
    decode_seconds: float

    @property
    def key(self) -> tuple[str, int, int]:
        """What no other result of a run has."""
        return self.policy, self.length, self.index


@dataclass(frozen=True)
class Summary:
    """The cases of one policy and length.

    Attributes:
        score: the mean, 0 to 1.
        cases: how many; read: tokens that they gave to the model.
        bytes_held, peak_bytes: the most of any case.
        prefill, decode: tokens a second, over all cases.
    """

    policy: str
    length: int
    score: float
    cases: int
    read: int
    bytes_held: int
    peak_bytes: int | None
    prefill: float
    decode: float


@dataclass(frozen=True)
class Guess:
    """What a player without a model got: the mean ``score`` of so many ``cases`` of a length, 0 to 1."""

    player: str
    length: int
    score: float
    cases: int


def summaries(results: Sequence[CaseResult]) -> list[Summary]:
    """A summary for each length and policy, in the order of the results."""
    groups: dict[tuple[int, str], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.length, result.policy), []).append(result)
    return [_summary(mine) for mine in groups.values()]


def _summary(mine: Sequence[CaseResult]) -> Summary:
    peaks = [result.peak_bytes for result in mine if result.peak_bytes is not None]
    read, written = (sum(getattr(result, name) for result in mine) for name in ("read", "written"))
    return Summary(
        policy=mine[0].policy,
        length=mine[0].length,
        score=statistics.fmean(result.score for result in mine),
        cases=len(mine),
        read=read,
        bytes_held=max(result.bytes_held for result in mine),
        peak_bytes=max(peaks) if peaks else None,
        prefill=read / max(sum(result.prefill_seconds for result in mine), 1e-9),
        decode=written / max(sum(result.decode_seconds for result in mine), 1e-9),
    )


def table(found: Sequence[Summary]) -> str:
    """A line for each summary."""
    header = ("policy", "length", "score", "cases", "tokens read", "held, MiB", "peak, MiB", "read a second", "written a second")
    cells = [
        (
            row.policy,
            f"{row.length:,}",
            f"{100 * row.score:.1f} %",
            f"{row.cases}",
            f"{row.read:,}",
            f"{row.bytes_held / 2**20:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            f"{row.prefill:,.0f}",
            f"{row.decode:.1f}" if row.decode else "",
        )
        for row in found
    ]
    return plain_table(header, cells)


def guesses_table(guessed: Sequence[Guess]) -> str:
    """A line for each player without a model."""
    cells = [(one.player, f"{one.length:,}", f"{100 * one.score:.1f} %", f"{one.cases}") for one in guessed]
    return plain_table(("player", "length", "score", "cases"), cells)


# -------------------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, told: Any, *, allow_nan: bool = True) -> None:
    """Writes ``told`` as JSON. The file is at any moment the old or the new one, also after a crash.

    Raises:
        ResultsError: if it cannot be written; the old one is then as it was.
        ValueError: for what is no number, without ``allow_nan``.
    """
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    try:
        with replacing(path, _WHAT) as file:
            file.write(text.encode())
    except SaveError as error:
        raise _unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """What would keep :func:`write_json` from writing ``path`` is found before hours of work; the file is left as it is.

    Raises:
        ResultsError: if it cannot be written.
    """
    try:
        with contextlib.suppress(_Enough), replacing(path, _WHAT) as file:
            file.write(b"\n")
            file.flush()
            raise _Enough
    except SaveError as error:
        raise _unwritable(path, error) from error


class _Enough(Exception):
    """The file can be written; it is not."""


def _unwritable(path: Path, error: SaveError) -> ResultsError:
    found = error.__cause__
    if not isinstance(found, OSError):
        return ResultsError(f"{error}; choose another --json")
    full = found.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    advice = "free some and run it again with --resume: what is in the file stays" if full else "choose another --json"
    return ResultsError(f"cannot write {path}: {found.strerror or found}; {advice}")


def interrupted(done: int, what: str, path: Path | None) -> str:
    """What becomes of the ``done`` results of a run that is interrupted, and how it goes on."""
    kept = "are lost: --json FILE keeps them" if path is None else f"are in {path}: go on with --resume"
    return f"{done} {what} {kept}"


def read_held(path: Path, facts: Mapping[str, Any], read: Callable[[Any], tuple[Mapping[str, Any], T]]) -> T | None:
    """What a file of results holds of a run that is gone on with; None if there is no file.

    Args:
        facts: what two runs must have in common for their results to stand in one table.
        read: takes what is in the file; gives the facts of its run, and the results. It may raise KeyError, TypeError, ValueError.

    Raises:
        ResultsError: for a file of something else, and for one of a run with other facts, with the first that differs.
    """
    if not path.exists():
        return None
    try:
        theirs, results = read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} was not written by this command, and is left as it is: {error}") from error
    for name, mine in facts.items():
        if theirs.get(name) != mine:
            raise ResultsError(
                f"{path} is of another run: {name} is {theirs.get(name)!r} there and {mine!r} here; name another --json"
            )
    return results


def check_resume(path: Path | None) -> Path:
    """The file that ``--resume`` goes on with.

    Raises:
        KvsieveError: if none is named.
    """
    if path is None:
        raise KvsieveError("--resume goes on with a file: name it by --json")
    return path


def read_cases(path: Path, facts: Mapping[str, Any]) -> dict[tuple[str, int, int], CaseResult]:
    """The results of a run that is gone on with, by :attr:`CaseResult.key`; none without a file. Raises as :func:`read_held`."""
    cases = read_held(path, facts, lambda held: (dict(held["settings"]), [case_of(told) for told in held["cases"]]))
    return {case.key: case for case in cases or ()}


def case_of(told: Mapping[str, Any]) -> CaseResult:
    """A result as it stands in a file. Raises KeyError, TypeError or ValueError for what is none."""
    values = {field.name: told[field.name] for field in fields(CaseResult)}
    for name in ("scores", "answers"):
        values[name] = tuple(values[name])
    case = CaseResult(**values)
    numbers = (case.length, case.index, case.score, case.read, case.written, case.bytes_held, case.prefill_seconds)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"case {case.index} holds what is no number")
    return case


def as_json(
    facts: Mapping[str, Any], task: Mapping[str, str], results: Sequence[CaseResult], guessed: Sequence[Guess] = ()
) -> dict[str, Any]:
    """What :func:`read_cases` reads, beside the summaries, for people and plots."""
    return {
        "task": dict(task),
        "settings": dict(facts),
        "summary": [asdict(row) for row in summaries(results)],
        "without_a_model": [asdict(one) for one in guessed],
        "cases": [asdict(result) for result in results],
    }
