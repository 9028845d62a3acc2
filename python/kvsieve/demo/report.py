"""What the demo found, as data, pictures and words. The last words are computed from the numbers above them."""

from __future__ import annotations

import itertools
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kvsieve
from kvsieve.demo.plan import BUCKET, COMPARED
from kvsieve.evals import shopping
from kvsieve.evals.models import trained_length
from kvsieve.evals.stream_nll import Reading
from kvsieve.view.curves import Series, plot_curves
from kvsieve.view.live import plain_table
from kvsieve.view.tokens import TokenMark, TokenSection, tokens_page

if TYPE_CHECKING:
    from kvsieve.demo.settings import Settings

__all__ = [
    "COMPARED",
    "FULL",
    "Recollection",
    "compared",
    "draw",
    "machine",
    "page",
    "print_summary",
    "reading_report",
    "recollection_report",
    "verdict",
    "within",
]

FULL = "full cache"
_MIB = 2**20
_APART = 0.3
"""The full cache has fallen apart if it is worse than every bounded memory by so many nats per token (perplexity times 1.35)."""


@dataclass(frozen=True)
class Recollection:
    """All dialogues through one memory: mean retention, 0 to 1, and questions answered."""

    name: str
    outcomes: Sequence[shopping.Outcome]

    @property
    def retention(self) -> float:
        """Share of the items' tokens resident before the questions, over all dialogues."""
        return sum(outcome.retention for outcome in self.outcomes) / len(self.outcomes)

    @property
    def asked(self) -> int:
        """Questions."""
        return sum(len(outcome.answers) for outcome in self.outcomes)

    @property
    def correct(self) -> int:
        """Questions whose true option scored best."""
        return sum(answer.correct for outcome in self.outcomes for answer in outcome.answers)


# ------------------------------------------------------------------------------------------------------------------------- data


def compared(readings: Sequence[Reading]) -> tuple[int, int]:
    """The last 1,024 positions, in whole buckets, of the text: every memory read them."""
    first, stop = max(reading.first for reading in readings), min(reading.stop for reading in readings)
    stop = stop // BUCKET * BUCKET
    return max(stop - COMPARED, first), stop


def within(readings: Sequence[Reading], trained: int) -> tuple[int, int]:
    """The positions within the trained length that every memory read; the first 1,024 are left out where some began late."""
    first = max(reading.first for reading in readings)
    stop = min(trained, *(reading.stop for reading in readings)) // BUCKET * BUCKET
    return min(first + COMPARED if first else 0, stop), stop


def reading_report(reading: Reading, trained: int, readings: Sequence[Reading]) -> dict[str, Any]:
    """One row: what was read, held, and lost; nll in nats per token."""
    last = reading.steps[-1]
    return {
        "memory": reading.name,
        "first": reading.first,
        "stop": reading.stop,
        "tokens": last.seen,
        "seconds": round(last.seconds, 2),
        "tokens_per_second": round(last.tokens_per_second, 1),
        "resident": last.holding.resident,
        "bytes_held": last.holding.bytes_held,
        "nll_within_trained": _round(reading.nll_between(*within(readings, trained))),
        "nll_compared": _round(reading.nll_between(*compared(readings))),
        "nll_mean": _round(last.mean_nll),
        "bucket": reading.bucket,
        "nll_by_bucket": [_round(nll) for nll in reading.nll],
        "steps": [
            {"seen": s.seen, "resident": s.holding.resident, "bytes_held": s.holding.bytes_held, "seconds": s.seconds}
            for s in reading.steps
        ],
    }


def recollection_report(recollection: Recollection) -> dict[str, Any]:
    """One row: what was kept of the lists and answered about them."""
    return {
        "memory": recollection.name,
        "retention": _round(recollection.retention),
        "recall": _round(recollection.correct / recollection.asked),
        "correct": recollection.correct,
        "asked": recollection.asked,
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


def machine(model: Any) -> dict[str, Any]:
    """What it ran on."""
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
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        "trained_length": trained_length(model),
    }


# --------------------------------------------------------------------------------------------------------------------- pictures


def draw(readings: Sequence[Reading], settings: Settings, trained: int) -> None:
    """`curves.png`: nll and bytes by position in the text."""
    series = []
    for reading in readings:
        edges = [*range(reading.first, reading.stop, reading.bucket), reading.stop]
        name = reading.name if reading.name == FULL else f"{reading.name}, {settings.budget:,} tokens"
        series.append(
            Series(
                name=name,
                centres=[(start + stop) / 2 for start, stop in itertools.pairwise(edges)],
                nll=reading.nll,
                seen=[reading.first, *(reading.first + step.seen for step in reading.steps)],
                bytes_held=[0, *(step.holding.bytes_held for step in reading.steps)],
            )
        )
    title = f"SmolLM2-135M-Instruct ({settings.text.name if settings.text else 'Python documentation'})"
    plot_curves(series, settings.out / "curves.png", trained_length=trained, title=title)


def page(recollections: Sequence[Recollection], tokenizer: Any, budget: int) -> str:
    """`tokens.html`: the first dialogue, as each bounded memory holds it."""
    sections = [
        TokenSection(
            title=f"{recollection.name}, budget {budget:,}",
            caption=_caption(recollection.outcomes[0]),
            tokens=_marks(recollection.outcomes[0], tokenizer),
        )
        for recollection in reversed(recollections)
        if recollection.name != FULL
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


# ------------------------------------------------------------------------------------------------------------------------ words


def print_summary(found: dict[str, Any], settings: Settings) -> None:
    """The table, where the files lie, and the verdict as the last thing."""
    shopped = {row["memory"]: row for row in found["shopping"]}
    (low, high), (since, stop) = found["within_positions"], found["compared_positions"]
    header = ("memory", "up to", "tok/s", "MiB held", f"nll {low:,}-{high:,}", f"nll {since:,}-{stop:,}", "items kept", "answered")
    rows = []
    for row in found["reading"]:
        asked = shopped.get(row["memory"])
        rows.append(
            (
                row["memory"],
                f"{row['stop']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['bytes_held'] / _MIB:.1f}",
                _cell(row["nll_within_trained"]),
                _cell(row["nll_compared"]),
                "-" if asked is None else f"{asked['retention']:.0%}",
                "-" if asked is None else f"{asked['correct']} of {asked['asked']}",
            )
        )
    print("\n" + plain_table(header, rows))
    print(
        f"\nnll: negative log-likelihood in nats per token, mean over the positions named. Room for {settings.budget:,} tokens "
        f"while reading, for {settings.shopping_budget:,} in the shopping lists; memory is held in blocks of 64 tokens. "
        f"{found['machine']['dtype']}, {found['machine']['threads']} threads, {found['seconds']:.0f} s in all, "
        f"{found['cpu_seconds']:.0f} s of CPU time."
    )
    if start := found["plan"]["start"]:
        print(
            f"The full cache read from the first token, the bounded memories from token {start:,} on: they hold nothing before it."
        )
    print("written: " + ", ".join(str(settings.out / name) for name in ("report.json", "curves.png", "tokens.html")))
    print("\n" + textwrap.fill(found["verdict"], 110))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def verdict(found: dict[str, Any]) -> str:
    """One sentence, true of the report it is computed from, whatever came out."""
    return f"{_shopping_verdict(found)}; {_reading_verdict(found)}."


def _shopping_verdict(found: dict[str, Any]) -> str:
    rows = {row["memory"]: row for row in found["shopping"]}
    sir, window, full = (rows[name] for name in ("SirLLM", "StreamingLLM", FULL))
    room = found["settings"]["budget"] // 2
    how = "better than" if sir["correct"] > window["correct"] else "worse than"
    how = "no better than" if sir["correct"] == window["correct"] else how
    return (
        f"With room for {room:,} tokens SirLLM remembers the shopping lists {how} StreamingLLM ({sir['correct']} and "
        f"{window['correct']} of {sir['asked']} questions answered, by the full cache {full['correct']})"
    )


def _reading_verdict(found: dict[str, Any]) -> str:
    trained, (start, stop) = found["machine"]["trained_length"], found["compared_positions"]
    full, *bounded = found["reading"]
    if full["nll_compared"] is None or start < trained:
        needed = found["plan"]["needed"]
        more = f": `kvsieve demo --seconds {_time_needed(found, needed)}` should show it" if needed else ""
        return (
            f"the text was read up to token {full['stop']:,} only, so nothing here shows what happens beyond the {trained:,} "
            f"tokens that the model was trained for{more}"
        )
    where = f"over tokens {start:,} to {stop:,}, beyond the {trained:,} that the model was trained for,"
    others = ", ".join(f"{row['memory']} {row['nll_compared']:.2f}" for row in bounded)
    gaps = [full["nll_compared"] - row["nll_compared"] for row in bounded]
    held = max(row["bytes_held"] for row in bounded)
    sizes = (
        f"{others} nats per token in at most {held / _MIB:.0f} MiB; full cache {full['nll_compared']:.2f} in "
        f"{full['bytes_held'] / _MIB:.0f}"
    )
    if min(gaps) >= _APART:
        return f"{where} the full cache falls apart and every bounded memory reads on ({sizes})"
    early = f"; the time was up before token {found['plan']['stop']:,}" if full["stop"] < found["plan"]["stop"] else ""
    if max(gaps) < 0:
        return f"{where} the full cache still reads better than every bounded memory ({sizes}){early}"
    return f"{where} the full cache does not fall apart here ({sizes}){early}"


def _time_needed(found: dict[str, Any], reading: float) -> int:
    """Seconds of the whole demo if reading took `reading`, rounded up to whole half minutes."""
    spent = found["seconds"] - sum(row["seconds"] for row in found["reading"])
    return int(-(-(reading + spent + 20) // 30) * 30)
