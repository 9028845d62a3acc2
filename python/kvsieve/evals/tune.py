"""Which policy for this text, on this model, within so many bytes: quality against bytes and time, and the line of Python to use.

Every candidate reads the same beginning of the text in chunks, and each token is predicted from what the candidate holds; what
counts is the mean negative log-likelihood (nats a token) of the second half, where a budget has had to forget. Nothing is chosen by
what a paper says. Bytes are measured, and a candidate that took more or much fewer than allowed is sized again by what it took.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kvsieve
from kvsieve.errors import BackendError, KvsieveError, PolicyError, UnsupportedError
from kvsieve.evals.candidates import CANDIDATES, Candidate
from kvsieve.evals.results import check_resume, check_writable, interrupted, read_held, write_json
from kvsieve.evals.stream_nll import Reading, read, stream_meter
from kvsieve.evals.texts import read_text
from kvsieve.methods.registry import SYSTEMS
from kvsieve.policy.compose import Policy
from kvsieve.view.live import plain_table

__all__ = ["Settings", "Tried", "best_of", "front", "in_python", "run", "table"]

NEAR = 0.01
"""Nats a token that are not worth more bytes or time: about one percent of perplexity."""

SAME_SPEED = 1.15
"""Two times are told apart from this ratio on: one reading each is not more exact."""

_PROBE = 512
"""Tokens of a first reading, by which speed and bytes a token are known."""

_SLACK = 128
"""Tokens that a bounded policy may hold besides: a block that is not full, and those that wait to be evicted."""

_LEAST = 1024
"""Tokens of a text that is worth comparing on."""


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        bytes: most bytes of keys and values, and what goes with them.
        model: `smollm2`, a local folder, or a GGUF file; text: a file, None for Python's own reference pages.
        seconds: for the whole, model loading left out; what is read is chosen to fit.
        policies: more candidates, as text.
        length: tokens of the text; None for as many as the time allows.
        json: a file that holds what has been tried so far; resume: what it holds is not tried again.
        plot: a picture (PNG) of quality against bytes.
    """

    bytes: int
    model: str = "smollm2"
    text: Path | None = None
    seconds: float = 600.0
    policies: tuple[str, ...] = ()
    length: int | None = None
    chunk: int = 256
    dtype: str = "float32"
    json: Path | None = None
    resume: bool = False
    plot: Path | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        name: for people; policy: written out.
        nll: nats a token, mean over the second half of the text.
        bytes_held: the most that was held after a chunk; seconds: of reading and scoring; tokens: that were read.
        fits: whether it held no more than allowed.
    """

    name: str
    policy: str
    nll: float
    bytes_held: int
    seconds: float
    tokens: int
    fits: bool

    @property
    def perplexity(self) -> float:
        """`exp` of :attr:`nll`; inf where that is beyond all numbers."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


# ---------------------------------------------------------------------------------------------------------------------- choices


def front(tried: Sequence[Tried]) -> list[Tried]:
    """Those that fit and that no other one which fits beats in quality, bytes or time without being worse in one of them."""
    fitting = [one for one in tried if one.fits and math.isfinite(one.nll)]

    def beaten(one: Tried) -> bool:
        mine = one.nll, one.bytes_held, one.seconds
        return any(
            all(x <= y for x, y in zip((other.nll, other.bytes_held, other.seconds), mine))
            and (other.nll, other.bytes_held, other.seconds) != mine
            for other in fitting
        )

    return [one for one in fitting if not beaten(one)]


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """Of those that fit and whose quality is within :data:`NEAR` of the best, the smallest of the fast ones."""
    fitting = [one for one in tried if one.fits and math.isfinite(one.nll)]
    least = min((one.nll for one in fitting), default=math.nan)
    good = [one for one in fitting if one.nll <= least + NEAR]
    fastest = min((one.seconds for one in good), default=math.nan)
    return min((one for one in good if one.seconds <= SAME_SPEED * fastest), key=lambda one: one.bytes_held, default=None)


def in_python(policy: str) -> str:
    """A policy's text as Python that a user can paste."""
    names = "|".join(sorted((system.name for system in SYSTEMS), key=len, reverse=True))
    return re.sub(rf"\b({names})\(", r"kvsieve.\1(", policy)


def line_of(one: Tried) -> str:
    """The line of Python that opens a stream with it."""
    return (
        f"with kvsieve.stream(model, {in_python(one.policy)}) as stream:  # {one.bytes_held / 1e6:.1f} MB, "
        f"perplexity {one.perplexity:.2f}"
    )


def is_bounded(policy: str) -> bool:
    """Whether what it holds ends somewhere, however long the text."""
    return bool(kvsieve.methods.parse(policy).memories[-1].roles.evict.evicts)


# ------------------------------------------------------------------------------------------------------------------------- runs


def run(settings: Settings) -> list[Tried]:
    """Tries candidates until the time is up; prints a table and a recommendation, and writes JSON after each if asked to.

    Raises:
        KvsieveError: before anything is read, for policies that do not parse, files that cannot be written, a text that is too
            short, and a budget in which no candidate fits.
    """
    from kvsieve.evals.models import load_model
    from kvsieve.model.hooks import examined

    more = [Candidate("as asked", lambda _, text=text: text) for text in settings.policies]  # type: ignore[misc]
    for candidate in more:
        kvsieve.methods.parse(candidate.text(0) or "")
    if settings.resume:
        check_resume(settings.json)
    text = read_text(settings.text)
    for path in (settings.json, settings.plot):
        if path is not None:
            check_writable(path)
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
    # Enough for any length that the time allows; the whole of a large file would take longer to cut into tokens than to read.
    ids = tokenizer(text[: 8 << 20], return_tensors="pt", verbose=False)["input_ids"]
    with examined(model):
        work = _Work(model, ids, settings)
        tried = work.held(hashlib.sha256(text.encode()).hexdigest())
        try:
            for one in work.candidates([*more, *CANDIDATES], tried):
                tried = [*tried, one]
                work.write(tried)
                print(f"{one.policy}: {one.nll:.4f} nats a token, {one.bytes_held / 1e6:.1f} MB, {one.seconds:.0f} s", flush=True)
        except KeyboardInterrupt:
            print(f"kvsieve: {interrupted(len(tried), 'candidates', settings.json)}", file=sys.stderr)
            raise
    report(tried, settings, work)
    return tried


class _Work:
    """A model, a text, and the time that is left."""

    def __init__(self, model: Any, ids: torch.Tensor, settings: Settings) -> None:
        self.model, self.ids, self.settings = model, ids, settings
        self.began = time.monotonic()
        self.left_out: list[str] = []
        if ids.shape[1] < _LEAST:
            raise KvsieveError(f"the text has {ids.shape[1]:,} tokens; to compare policies it needs {_LEAST:,} at least")
        probe = self.measure(Candidate("", lambda _: "full()"), "full()", _PROBE)
        self.per_token = max(probe.bytes_held / _PROBE, 1.0)
        self.speed = _PROBE / max(probe.seconds, 1e-9)
        self.length = self._length()
        self.digest = ""

    @property
    def affordable(self) -> int:
        """Tokens of the plain cache that fit."""
        return int(self.settings.bytes / self.per_token)

    def _length(self) -> int:
        """Tokens of the text that all candidates can read in the time; beyond what fits, so that budgets have to forget."""
        asked, most = self.settings.length, self.ids.shape[1]
        if asked is not None:
            if asked > most:
                raise KvsieveError(f"the text has {most:,} tokens; give a longer one, or --length {most}")
            if asked < _LEAST:
                raise KvsieveError(f"--length {asked}: to compare policies {_LEAST:,} tokens are needed at least")
            return asked
        # Some candidates are slower than the plain cache of the probe, and attention grows: half the speed is what is counted on.
        count = len(CANDIDATES) + len(self.settings.policies)
        possible = int(self.settings.seconds * self.speed / 2 / count)
        return max(min(possible, most, 8 * self.affordable), min(most, _LEAST)) // 256 * 256

    @property
    def time_left(self) -> float:
        return self.settings.seconds - (time.monotonic() - self.began)

    def candidates(self, kinds: Sequence[Candidate], tried: Sequence[Tried]) -> Iterator[Tried]:
        """The results of those that are not there yet, while time is left."""
        known = {one.name if one.name != "as asked" else one.policy for one in tried}
        slots: dict[str, int] = {}
        for kind in kinds:
            try:
                found = self._tried(kind, known, slots)
            except (PolicyError, UnsupportedError, BackendError) as error:
                self.left_out.append(f"{kind.name}: {error}")
                continue
            if found is not None:
                yield found

    def _tried(self, kind: Candidate, known: set[str], slots: dict[str, int]) -> Tried | None:
        """None of a kind that is known already, or that cannot be tried; why not is in :attr:`left_out`."""
        if kind.name in known:
            return None
        tokens = self._tokens(kind, slots)
        text = kind.text(tokens)
        if text is None:
            self.left_out.append(f"{kind.name}: {self.settings.bytes:,} bytes are too few")
            return None
        policy = repr(kvsieve.methods.parse(text))
        if policy in known:
            return None
        if kind.holds_all and self.length > tokens:
            self.left_out.append(f"{kind.name} ({policy}): {self.length:,} tokens do not fit, about {tokens:,} would")
            return None
        if self.time_left <= 0:
            self.left_out.append(f"{kind.name} ({policy}): the time was up; more --seconds try it")
            return None
        return self._sized(kind, text, tokens)

    def _tokens(self, kind: Candidate, slots: dict[str, int]) -> int:
        """How many tokens a kind can hold in the bytes, by what its storage took for a short text."""
        if not kind.stored:
            return self.affordable - _SLACK if not kind.holds_all else self.affordable
        if kind.stored not in slots:
            few, many = (self.measure(kind, f"full() | {kind.stored}", size).bytes_held for size in (_PROBE, 2 * _PROBE))
            a_token = max((many - few) / _PROBE, 1.0)
            slots[kind.stored] = int(max(self.settings.bytes - (few - a_token * _PROBE), 0) / a_token)
        return slots[kind.stored] - (0 if kind.holds_all else _SLACK)

    def _sized(self, kind: Candidate, text: str, tokens: int) -> Tried:
        """A candidate that holds no more than allowed, where fewer tokens can make that so."""
        found = self.measure(kind, text, self.length)
        if found.fits or kind.holds_all or kind.name == "as asked":
            return found
        fewer = kind.text(int(tokens * self.settings.bytes / found.bytes_held) - 32)
        return found if fewer is None else self.measure(kind, fewer, self.length)

    def measure(self, kind: Candidate, text: str, length: int) -> Tried:
        """Read the first ``length`` tokens of the text."""
        policy: Policy = kvsieve.methods.parse(text)
        reading = Reading(repr(policy), max(length // 32, 1))
        ids = self.ids[:, :length].to(self.model.device)
        live = sys.stderr.isatty()
        with kvsieve.stream(self.model, policy, backend=self.settings.backend) as stream:
            for step in read(self.model, ids, stream.cache, stream_meter(stream), reading, chunk=self.settings.chunk):
                if live:
                    print(f"\r\033[K{policy!r}: {step.seen:,} of {length:,} tokens", end="", file=sys.stderr, flush=True)
        if live:
            print("\r\033[K", end="", file=sys.stderr)
        held = max(step.holding.bytes_held for step in reading.steps)
        nll = reading.nll_between(length // 2, length)
        return Tried(kind.name, repr(policy), nll, held, reading.seconds, length, held <= self.settings.bytes)

    # --------------------------------------------------------------------------------------------------------------------- file

    def facts(self) -> dict[str, Any]:
        """What two runs must have in common for their rows to stand in one table."""
        names = ("model", "bytes", "chunk", "dtype", "backend")
        told = {name: getattr(self.settings, name) for name in names}
        return {**told, "text": self.digest, "threads": torch.get_num_threads()}

    def held(self, digest: str) -> list[Tried]:
        """What the file to go on with holds; its length is this run's too."""
        self.digest = digest
        if not self.settings.resume:
            return []
        path = check_resume(self.settings.json)
        told = read_held(
            path,
            self.facts(),
            lambda held: (dict(held["settings"]), (int(held["length"]), [Tried(**row) for row in held["tried"]])),
        )
        if told is None:
            return []
        length, rows = told
        if self.settings.length not in (None, length):
            raise KvsieveError(f"{path} is of another run: length is {length} there and {self.settings.length} here")
        self.length = length
        return rows

    def write(self, tried: Sequence[Tried]) -> None:
        if self.settings.json is not None:
            told = {"settings": self.facts(), "length": self.length, "tried": [asdict(one) for one in tried]}
            write_json(self.settings.json, told)


# ----------------------------------------------------------------------------------------------------------------------- report


def report(tried: Sequence[Tried], settings: Settings, work: _Work) -> None:
    """The table, what was left out and why, and the line of Python to use."""
    best = best_of(tried)
    print("\n" + table(tried))
    for line in work.left_out:
        print(f"not tried: {line}")
    if best is None:
        raise KvsieveError(f"no policy holds {work.length:,} tokens of this text in {settings.bytes:,} bytes; allow more --bytes")
    if work.length <= work.affordable and settings.length is None:
        print(
            f"\nThe {work.length:,} tokens that were read fit as they are: whether to forget was not asked. A longer text, more "
            "--seconds or fewer --bytes ask it."
        )
    print(f"\n{line_of(best)}")
    if not is_bounded(best.policy):
        fit = int(best.tokens * settings.bytes / best.bytes_held)
        print(f"It holds every token: a text of more than about {fit:,} takes more than {settings.bytes / 1e6:g} MB.")
        bounded = best_of([one for one in tried if is_bounded(one.policy)])
        if bounded is not None:
            print(f"For texts without end:\n{line_of(bounded)}")
    if settings.plot is not None:
        from kvsieve.view.front import plot_front

        chosen = {one.policy for one in front(tried)}
        points = [(one.policy, one.bytes_held, one.nll, one.policy in chosen) for one in tried if math.isfinite(one.nll)]
        plot_front(points, settings.bytes, settings.plot, title=f"{work.length:,} tokens of the text")
        print(f"{settings.plot} shows it")


def table(tried: Sequence[Tried]) -> str:
    """A line for each candidate, the best first; a star for those on the front, `over` for those that held more than allowed."""
    chosen = {one.policy for one in front(tried)}
    header = ("", "policy", "nats a token", "perplexity", "MB held", "tokens a second")
    cells = [
        (
            "*" if one.policy in chosen else "" if one.fits else "over",
            one.policy,
            f"{one.nll:.3f}",
            f"{one.perplexity:.2f}",
            f"{one.bytes_held / 1e6:.1f}",
            f"{one.tokens / max(one.seconds, 1e-9):.0f}",
        )
        for one in sorted(tried, key=lambda one: (not one.fits, one.nll))
    ]
    return plain_table(header, cells)
