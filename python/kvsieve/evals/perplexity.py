"""Perplexity of a text as it streams through a policy, by position: what forgetting costs, on any model and any text.

Every token but the first is predicted from what the policy holds, in chunks of `chunk` tokens, and never read twice. The
perplexity is `exp` of the mean negative log-likelihood (Jelinek et al., 1977), here with its curve over the text.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kvsieve
from kvsieve.errors import KvsieveError
from kvsieve.evals.peak import forget_peak, peak_bytes
from kvsieve.evals.results import check_resume, check_writable, interrupted, read_held, write_json
from kvsieve.evals.stream_nll import Reading, read, stream_meter
from kvsieve.evals.texts import read_text
from kvsieve.policy.compose import Policy
from kvsieve.view.live import plain_table

__all__ = ["Row", "Settings", "run", "table"]


@dataclass(frozen=True)
class Settings:
    """What is read.

    Attributes:
        policies: as text; one of them is read after the other.
        model: `smollm2`, a local folder, or a GGUF file; text: a file, None for Python's own reference pages.
        length: tokens of the text; chunk: tokens of a forward.
        bucket: tokens of a point of the curve, at most an eighth of the text.
        json: a file that holds what has been read so far, written after every policy.
        resume: policies that the file holds are not read again.
    """

    policies: tuple[str, ...] = ("full()", "streamingllm(1024)")
    model: str = "smollm2"
    text: Path | None = None
    length: int = 8192
    chunk: int = 512
    bucket: int = 1024
    dtype: str = "float32"
    json: Path | None = None
    resume: bool = False
    backend: str | None = None

    def facts(self, text: str) -> dict[str, Any]:
        """What two runs must have in common for their rows to stand in one table."""
        told = {name: getattr(self, name) for name in ("model", "length", "chunk", "bucket", "dtype", "backend")}
        return {**told, "text": hashlib.sha256(text.encode()).hexdigest(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Row:
    """One policy.

    Attributes:
        policy: written out.
        nll: the curve, nats a token: the mean over each `bucket` tokens of the text, the last of which may be shorter.
        mean: over all tokens but the first; tail: over the whole points in the last quarter of the text.
        bytes_held: the most that keys, values and what goes with them took after a chunk.
        seconds: of forwards and scoring, wall time; tokens: that were read.
        peak_bytes: the most memory of the process, weights included; None where the system does not tell.
    """

    policy: str
    nll: tuple[float, ...]
    mean: float
    tail: float
    bytes_held: int
    seconds: float
    tokens: int
    peak_bytes: int | None = None


def run(settings: Settings) -> list[Row]:
    """Reads the text under every policy; prints a table, and writes JSON after every policy if asked to.

    Raises:
        KvsieveError: before anything is read, for policies that do not parse, a text that is too short, and a file to resume that
            was written by other settings.
    """
    from kvsieve.evals.models import load_model
    from kvsieve.model.hooks import examined

    policies = [kvsieve.methods.parse(text) for text in settings.policies]
    if not policies:
        raise KvsieveError("name a policy at least")
    if settings.length < 2:
        raise KvsieveError(f"a text needs 2 tokens at least, got --length {settings.length}")
    text = read_text(settings.text)
    facts = settings.facts(text)
    rows = _done(settings, facts)
    if settings.json is not None:
        check_writable(settings.json)
    if not all(repr(policy) in rows for policy in policies):
        model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : settings.length]
        if ids.shape[1] < settings.length:
            raise KvsieveError(f"the text has {ids.shape[1]:,} tokens; give a longer one, or --length {ids.shape[1]}")
        try:
            with examined(model):
                for policy in policies:
                    if repr(policy) not in rows:
                        rows[repr(policy)] = _read(model, policy, ids, settings)
                        _write(settings.json, facts, rows)
        except KeyboardInterrupt:
            print(f"kvsieve: {interrupted(len(rows), 'policies', settings.json)}", file=sys.stderr)
            raise
    wanted = [rows[repr(policy)] for policy in policies]
    print("\n" + table(wanted))
    return wanted


def _read(model: Any, policy: Policy, ids: torch.Tensor, settings: Settings) -> Row:
    reading = Reading(repr(policy), max(1, min(settings.bucket, settings.length // 8)))
    live = sys.stderr.isatty()
    forget_peak()
    with kvsieve.stream(model, policy, backend=settings.backend) as stream:
        for step in read(model, ids.to(model.device), stream.cache, stream_meter(stream), reading, chunk=settings.chunk):
            if live:
                print(f"\r{policy!r}: {step.seen:,} of {ids.shape[1]:,} tokens", end="", file=sys.stderr, flush=True)
    if live:
        print(file=sys.stderr)
    print(f"{policy!r}: {reading.steps[-1].mean_nll:.4f} nats a token, {reading.seconds:.0f} s", flush=True)
    return Row(
        policy=repr(policy),
        nll=tuple(reading.nll),
        mean=reading.steps[-1].mean_nll,
        tail=reading.nll_between(3 * settings.length // 4, settings.length),
        bytes_held=max(step.holding.bytes_held for step in reading.steps),
        seconds=reading.seconds,
        tokens=reading.stop,
        peak_bytes=peak_bytes(),
    )


def _done(settings: Settings, facts: dict[str, Any]) -> dict[str, Row]:
    """Rows of the file to go on with, by policy."""
    if not settings.resume:
        return {}
    rows = read_held(check_resume(settings.json), facts, lambda held: (dict(held["settings"]), [_row(row) for row in held["rows"]]))
    return {row.policy: row for row in rows or ()}


def _row(told: dict[str, Any]) -> Row:
    """Raises KeyError, TypeError or ValueError for what is none."""
    return Row(
        policy=str(told["policy"]),
        nll=tuple(map(float, told["nll"])),
        mean=float(told["mean"]),
        tail=float(told["tail"]),
        bytes_held=int(told["bytes_held"]),
        seconds=float(told["seconds"]),
        tokens=int(told["tokens"]),
        peak_bytes=told.get("peak_bytes"),
    )


def _write(path: Path | None, facts: dict[str, Any], rows: dict[str, Row]) -> None:
    if path is None:
        return
    told = {"settings": facts, "rows": [asdict(row) for row in rows.values()]}
    write_json(path, told)


def table(rows: Sequence[Row]) -> str:
    """A line for each policy."""
    header = ("policy", "tokens", "nats a token", "perplexity", "last quarter", "bytes held, MiB", "peak, MiB", "tokens a second")
    cells = [
        (
            row.policy,
            f"{row.tokens:,}",
            f"{row.mean:.3f}",
            f"{math.exp(row.mean):.2f}" if row.mean < 700 else "inf",
            f"{row.tail:.3f}",
            f"{row.bytes_held / 2**20:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            f"{row.tokens / max(row.seconds, 1e-9):.0f}",
        )
        for row in rows
    ]
    return plain_table(header, cells)
