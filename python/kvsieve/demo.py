"""The demo: a long text, a shopping list and a continuation, each through memories with and without a budget.

Only orchestration lives here; measuring is in `evals`, drawing in `view`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kvsieve
from kvsieve.errors import KvsieveError
from kvsieve.evals import shopping, stream_nll
from kvsieve.evals.models import fastest_dtype, load_smollm2, trained_length
from kvsieve.evals.stream_nll import Reading
from kvsieve.evals.texts import read_text
from kvsieve.view.curves import Series, plot_curves
from kvsieve.view.live import LiveTable, plain_table
from kvsieve.view.tokens import TokenMark, TokenSection, tokens_page
from kvsieve.view.typist import print_while_generating

__all__ = ["Settings", "run"]

_BUCKET = 1024
_SINKS = 4
_PROMPT = "\n\nIn short, what matters most about names and values in Python is that"
_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What the demo runs. Counts are tokens unless they say otherwise; `full_seconds` caps the full cache's reading."""

    out: Path = Path("out/demo")
    text: Path | None = None
    tokens: int = 24_000
    full_tokens: int = 12_288
    full_seconds: float = 120.0
    budget: int = 1024
    dialogues: int = 2
    new_tokens: int = 60
    chunk: int = 512
    seed: int = 0
    dtype: str | None = None
    threads: int | None = None
    backend: str | None = None

    def quick(self) -> Settings:
        """A fraction of everything: seconds rather than minutes, and no claim in the numbers."""
        return replace(self, tokens=min(self.tokens, 3072), full_tokens=2048, dialogues=1, new_tokens=16)

    @property
    def shopping_budget(self) -> int:
        """Half the budget: the dialogues are short, and less than half of each must fit."""
        return self.budget // 2


@dataclass(frozen=True)
class Recollection:
    """All dialogues through one memory: mean retention and recall, 0 to 1, and the outcomes they come from."""

    name: str
    outcomes: Sequence[shopping.Outcome]
    seconds: float

    @property
    def retention(self) -> float:
        """Share of the items' tokens resident before the questions, over all dialogues."""
        return sum(outcome.retention for outcome in self.outcomes) / len(self.outcomes)

    @property
    def recall(self) -> float:
        """Share of all questions answered correctly."""
        return sum(outcome.recall for outcome in self.outcomes) / len(self.outcomes)


def run(settings: Settings) -> dict[str, Any]:
    """Runs the demo, prints its table, writes `report.json`, `curves.png` and `tokens.html`, returns the report."""
    began = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    text = read_text(settings.text)
    dtype = fastest_dtype() if settings.dtype is None else getattr(torch, settings.dtype)
    print(f"kvsieve {kvsieve.__version__}: loading SmolLM2-135M-Instruct in {str(dtype).removeprefix('torch.')}")
    model, tokenizer = load_smollm2(dtype)
    ids = _first_tokens(tokenizer, text, settings.tokens)

    readings, continuation = _read_all(model, tokenizer, ids, settings)
    recollections = _recollect_all(model, tokenizer, settings)

    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "machine": _machine(model, dtype),
        "compared_positions": _compared(readings),
        "reading": [_reading_report(reading, trained_length(model), _compared(readings)) for reading in readings],
        "shopping": [_recollection_report(recollection) for recollection in recollections],
        "continuation": continuation,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (settings.out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _draw(readings, settings, trained_length(model))
    page = _page(recollections, tokenizer, settings)
    (settings.out / "tokens.html").write_text(page, encoding="utf-8")
    _print_summary(report, settings)
    return report


def _first_tokens(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """The first `count` tokens of `text` as ids `[1, count]`; fewer when the text is shorter."""
    ids = tokenizer(text[: 12 * count], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :count]
    if ids.shape[1] < 2:
        raise KvsieveError("the text has fewer than two tokens; give a longer one")
    return torch.as_tensor(ids)


def _bounded(budget: int) -> dict[str, Any]:
    """The three bounded memories; SirLLM comes last, because the continuation goes on from its stream."""
    return {
        "StreamingLLM": kvsieve.StreamingLLM(budget=budget, sinks=_SINKS),
        "LM-Infinite": kvsieve.LMInfinite(window=budget - _SINKS, sinks=_SINKS),
        "SirLLM": kvsieve.SirLLM(budget=budget, sinks=_SINKS),
    }


def _read_all(model: Any, tokenizer: Any, ids: torch.Tensor, settings: Settings) -> tuple[list[Reading], dict[str, Any]]:
    title = f"reading {ids.shape[1]:,} tokens in chunks of {settings.chunk}, budget {settings.budget:,}"
    readings = []
    with contextlib.ExitStack() as streams:
        with LiveTable(("memory", "tokens", "tok/s", "resident", "MiB held", "nll so far"), title=title) as table:
            full = streams.enter_context(kvsieve.stream(model, kvsieve.Full(), backend=settings.backend))
            readings.append(
                _read(
                    table,
                    Reading("full cache", _BUCKET),
                    (model, ids[:, : settings.full_tokens], full.cache, stream_nll.stream_meter(full)),
                    chunk=settings.chunk,
                    seconds=settings.full_seconds,
                )
            )
            for name, policy in _bounded(settings.budget).items():
                streams.close()
                stream = streams.enter_context(kvsieve.stream(model, policy, backend=settings.backend))
                source = (model, ids, stream.cache, stream_nll.stream_meter(stream))
                readings.append(_read(table, Reading(name, _BUCKET), source, chunk=settings.chunk))
        return readings, _continue(stream, tokenizer, settings)


def _read(table: LiveTable, reading: Reading, source: tuple[Any, ...], **options: Any) -> Reading:
    model, ids, cache, measure = source
    for step in stream_nll.read(model, ids, cache, measure, reading, **options):
        cells = _reading_cells(step)
        table.update(reading.name, *cells)
    table.update(reading.name, *cells, final=True)
    return reading


def _reading_cells(step: stream_nll.Progress) -> tuple[str, ...]:
    return (
        f"{step.seen:,}",
        f"{step.tokens_per_second:,.0f}",
        f"{step.holding.resident:,}",
        f"{step.holding.bytes_held / _MIB:.1f}",
        f"{step.mean_nll:.3f}",
    )


def _continue(stream: Any, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Goes on writing after everything that the stream has read."""
    before = stream.stats()
    print(f"\ngenerating after {before.seen:,} tokens with {before.resident:,} of them resident ({before.policy}):")
    print(_PROMPT.strip(), end="", flush=True)
    ids = torch.as_tensor(tokenizer(_PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"])
    began = time.perf_counter()
    text = print_while_generating(stream, tokenizer, ids, max_new_tokens=settings.new_tokens, repetition_penalty=1.1)
    seconds = time.perf_counter() - began
    print()
    return {"prompt": _PROMPT, "text": text, "seconds": round(seconds, 2), "stats": stream.stats().as_dict()}


def _recollect_all(model: Any, tokenizer: Any, settings: Settings) -> list[Recollection]:
    budget = settings.shopping_budget
    memories = {
        "full cache": kvsieve.Full(),
        "StreamingLLM": kvsieve.StreamingLLM(budget=budget, sinks=_SINKS),
        "SirLLM": kvsieve.SirLLM(budget=budget, sinks=_SINKS, recent=budget // 8),
    }
    dialogues = shopping.make_dialogues(settings.dialogues, seed=settings.seed)
    num_questions = sum(len(dialogue.questions) for dialogue in dialogues)
    title = f"{len(dialogues)} shopping lists, {num_questions} questions, budget {budget:,}"
    with LiveTable(("memory", "dialogues", "items kept", "recall"), title=title) as table:
        return [
            _recollect(table, name, _outcomes(model, tokenizer, policy, dialogues, settings), len(dialogues))
            for name, policy in memories.items()
        ]


def _outcomes(
    model: Any, tokenizer: Any, policy: Any, dialogues: Sequence[shopping.Dialogue], settings: Settings
) -> Iterator[shopping.Outcome]:
    return shopping.run_dialogues(model, tokenizer, lambda: kvsieve.stream(model, policy, backend=settings.backend), dialogues)


def _recollect(table: LiveTable, name: str, outcomes: Iterator[shopping.Outcome], total: int) -> Recollection:
    began = time.perf_counter()
    done: list[shopping.Outcome] = []
    for outcome in outcomes:
        done.append(outcome)
        so_far = Recollection(name, tuple(done), time.perf_counter() - began)
        cells = (f"{len(done)}/{total}", f"{so_far.retention:.0%}", f"{so_far.recall:.0%}")
        table.update(name, *cells, final=len(done) == total)
    return so_far


def _compared(readings: Sequence[Reading]) -> tuple[int, int]:
    """The last 2,048 positions, in whole buckets, that every memory read: texts differ too much along the way to compare others."""
    stop = min(reading.steps[-1].seen for reading in readings) // _BUCKET * _BUCKET
    return max(stop - 2 * _BUCKET, 0), stop


def _reading_report(reading: Reading, trained: int | None, compared: tuple[int, int]) -> dict[str, Any]:
    last = reading.steps[-1]
    return {
        "memory": reading.name,
        "tokens": last.seen,
        "seconds": round(last.seconds, 2),
        "tokens_per_second": round(last.tokens_per_second, 1),
        "resident": last.holding.resident,
        "bytes_held": last.holding.bytes_held,
        "nll_within_trained": _round(reading.nll_between(0, last.seen if trained is None else trained)),
        "nll_compared": _round(reading.nll_between(*compared)),
        "nll_mean": _round(last.mean_nll),
        "bucket": reading.bucket,
        "nll_by_bucket": [_round(nll) for nll in reading.nll],
        "steps": [
            {"seen": s.seen, "resident": s.holding.resident, "bytes_held": s.holding.bytes_held, "seconds": s.seconds}
            for s in reading.steps
        ],
    }


def _recollection_report(recollection: Recollection) -> dict[str, Any]:
    return {
        "memory": recollection.name,
        "retention": _round(recollection.retention),
        "recall": _round(recollection.recall),
        "seconds": round(recollection.seconds, 2),
        "dialogues": [
            {
                "seed": outcome.seed,
                "tokens": len(outcome.ids),
                "resident": len(outcome.kept),
                "retention": _round(outcome.retention),
                "answers": [
                    {
                        "options": answer.options,
                        "scores": [_round(score) for score in answer.scores],
                        "truth": answer.truth,
                        "correct": answer.correct,
                    }
                    for answer in outcome.answers
                ],
            }
            for outcome in recollection.outcomes
        ],
    }


def _round(value: float) -> float | None:
    """Four decimals; `None` for nan, which JSON does not know."""
    return None if value != value else round(float(value), 4)


def _machine(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    import transformers

    from kvsieve import _core

    return {
        "kvsieve": kvsieve.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "instruction_set": _core.isa(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "model": "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        "trained_length": trained_length(model),
    }


def _draw(readings: Sequence[Reading], settings: Settings, trained: int | None) -> None:
    series = []
    for reading in readings:
        edges = [*range(0, reading.steps[-1].seen, reading.bucket), reading.steps[-1].seen]
        series.append(
            Series(
                name=reading.name if reading.name == "full cache" else f"{reading.name}, {settings.budget:,} tokens",
                centres=[(start + stop) / 2 for start, stop in itertools.pairwise(edges)],
                nll=reading.nll,
                seen=[step.seen for step in reading.steps],
                bytes_held=[step.holding.bytes_held for step in reading.steps],
            )
        )
    plot_curves(
        series,
        settings.out / "curves.png",
        trained_length=trained,
        title="SmolLM2-135M-Instruct reads a long text",
    )


def _page(recollections: Sequence[Recollection], tokenizer: Any, settings: Settings) -> str:
    sections = [
        TokenSection(
            title=f"{recollection.name}, budget {settings.shopping_budget:,}",
            caption=_caption(recollection.outcomes[0]),
            tokens=_marks(recollection.outcomes[0], tokenizer),
        )
        for recollection in reversed(recollections)
        if recollection.name != "full cache"
    ]
    return tokens_page(
        sections,
        title="What the memory kept",
        intro="One shopping-list dialogue, as each memory holds it just before it is asked what was on the list. "
        "Point at a token for its position and its score, the token's surprisal.",
        marked="an item of the list",
    )


def _caption(outcome: shopping.Outcome) -> str:
    correct = sum(answer.correct for answer in outcome.answers)
    return f"{outcome.retention:.0%} of the items' tokens kept, {correct} of {len(outcome.answers)} questions answered correctly."


def _marks(outcome: shopping.Outcome, tokenizer: Any) -> list[TokenMark]:
    scores = dict(zip(outcome.kept.tolist(), outcome.scores.tolist(), strict=True))
    items = set(outcome.item_positions)
    return [
        TokenMark(
            text=tokenizer.decode([token]),
            position=position,
            kept=position in scores,
            score=scores.get(position, float("nan")),
            marked=position in items,
        )
        for position, token in enumerate(outcome.ids)
    ]


def _print_summary(report: dict[str, Any], settings: Settings) -> None:
    shopped = {row["memory"]: row for row in report["shopping"]}
    trained = report["machine"]["trained_length"]
    start, stop = report["compared_positions"]
    compared = f"nll {start:,}-{stop:,}"
    header = (
        "memory",
        "read",
        "tok/s",
        "MiB",
        "nll to trained length" if trained is None else f"nll to {trained:,}",
        compared,
        "items kept",
        "recall",
    )
    rows = []
    for row in report["reading"]:
        shopping_row = shopped.get(row["memory"])
        rows.append(
            (
                row["memory"],
                f"{row['tokens']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['bytes_held'] / _MIB:.1f}",
                _cell(row["nll_within_trained"]),
                _cell(row["nll_compared"]),
                "-" if shopping_row is None else f"{shopping_row['retention']:.0%}",
                "-" if shopping_row is None else f"{shopping_row['recall']:.0%}",
            )
        )
    print("\n" + plain_table(header, rows))
    print(
        f"\nnll in nats per token; the model was trained on {trained:,} positions. Budget {settings.budget:,} for reading, "
        f"{settings.shopping_budget:,} for the shopping lists. {report['seconds']:.0f} s in all."
    )
    full = report["reading"][0]
    if full["seconds"] >= settings.full_seconds:
        print(f"The full cache stopped at {full['tokens']:,} tokens: its {settings.full_seconds:.0f} s were up.")
    print("written: " + ", ".join(str(settings.out / name) for name in ("report.json", "curves.png", "tokens.html")))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
