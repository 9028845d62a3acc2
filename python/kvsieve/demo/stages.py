"""What the demo does, in order: a shopping list, a plan by this machine's speed, a long text, a continuation, a report.

Measuring is in `evals`, drawing in `view`, words in `demo.report`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kvsieve
from kvsieve.demo import report as words
from kvsieve.demo.plan import BUCKET, Plan, make_plan, measure_pace
from kvsieve.demo.report import FULL, Recollection
from kvsieve.demo.settings import Settings
from kvsieve.errors import KvsieveError
from kvsieve.evals import shopping, stream_nll
from kvsieve.evals.models import fastest_dtype, load_smollm2, quietly, trained_length
from kvsieve.evals.stream_nll import Progress, Reading
from kvsieve.evals.texts import read_text
from kvsieve.files.replace import replacing
from kvsieve.model.hooks import examined
from kvsieve.view.live import LiveTable
from kvsieve.view.typist import print_while_generating

__all__ = ["Settings", "run"]

_SINKS = 4
_PROMPT = "\n\nIn short, what matters most about names and values in Python is that"
_MIB = 2**20
_MOST_DIALOGUES = 4
_SHOPPING_SECONDS = 26.0  # from the start of the demo, loading included, until no further dialogue is begun
_AFTERWARDS = 12.0  # seconds for what follows the reading: a continuation, a picture, the report


def run(settings: Settings, began: float | None = None) -> dict[str, Any]:
    """Runs the demo, prints its tables, writes `report.json`, `curves.png` and `tokens.html`, returns the report.

    Args:
        settings: what to run.
        began: when the program started, by `time.perf_counter()`; importing torch is part of the demo's time.

    Raises:
        KvsieveError: for a text of fewer than two tokens, a missing model, or without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KvsieveError("drawing curves needs matplotlib; pip install 'kvsieve[demo]'")
    began = time.perf_counter() if began is None else began
    _bounded(settings.budget), _listing(settings.shopping_budget)  # a budget that is too small is refused before anything is loaded
    settings.out.mkdir(parents=True, exist_ok=True)
    text = read_text(settings.text)
    print(f"kvsieve {kvsieve.__version__}: loading SmolLM2-135M-Instruct", flush=True)
    model, tokenizer = load_smollm2()
    model = model.to(fastest_dtype(model) if settings.dtype is None else getattr(torch, settings.dtype))
    trained = trained_length(model)
    assert trained is not None
    ids = _first_tokens(tokenizer, text, settings.tokens or 2 * trained)

    with examined(model):
        recollections = _recollect_all(model, tokenizer, settings, began)
        plan = _plan(model, ids, settings, trained, began)
        readings, continuation = _read_all(model, tokenizer, ids, plan, settings, began)

    found: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "machine": words.machine(model),
        "plan": asdict(plan),
        "compared_positions": words.compared(readings),
        "within_positions": words.within(readings, trained),
        "shopping": [words.recollection_report(recollection) for recollection in recollections],
        "reading": [words.reading_report(reading, trained, readings) for reading in readings],
        "continuation": continuation,
    }
    words.draw(readings, settings, trained)
    page = words.page(recollections, tokenizer, settings.shopping_budget)
    _write(settings.out / "tokens.html", page)
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["cpu_seconds"] = round(time.process_time(), 1)
    found["verdict"] = words.verdict(found)
    _write(settings.out / "report.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    words.print_summary(found, settings)
    return found


def _write(path: Path, text: str) -> None:
    """A file of the demo, which takes the place of an older one only when it is complete."""
    with replacing(path, "file of the demo") as file:
        file.write(text.encode())


def _first_tokens(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """The first `count` tokens of `text` as ids `[1, count]`; fewer when the text is shorter."""
    ids = tokenizer(text[: 12 * count], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :count]
    if ids.shape[1] < 2:
        raise KvsieveError("the text has fewer than two tokens; give a longer one")
    return torch.as_tensor(ids)


# ---------------------------------------------------------------------------------------------------------------- shopping list


def _recollect_all(model: Any, tokenizer: Any, settings: Settings, began: float) -> list[Recollection]:
    """Dialogue after dialogue, each through every memory, until there is no time for another."""
    budget = settings.shopping_budget
    memories = _listing(budget)
    ready = time.perf_counter()
    dialogues = shopping.make_dialogues(settings.dialogues or _MOST_DIALOGUES, seed=settings.seed)
    title = f"\nshopping lists: named once, then small talk, then questions with five options; room for {budget:,} tokens"
    outcomes: dict[str, list[shopping.Outcome]] = {name: [] for name in memories}
    with LiveTable(("memory", "lists", "of the items' tokens kept", "questions answered"), title=title) as table:
        for dialogue in dialogues:
            this = time.perf_counter()
            for name, policy in memories.items():
                with kvsieve.stream(model, policy, backend=settings.backend) as stream:
                    outcomes[name].append(shopping.run_dialogue(model, tokenizer, stream, dialogue))
                table.update(name, *_recollection_cells(Recollection(name, outcomes[name])), final=settings.dialogues is None)
            now = time.perf_counter()
            if settings.dialogues is None and now - began + (now - this) > _SHOPPING_SECONDS:
                break
        if settings.dialogues is not None:
            for name in memories:
                table.update(name, *_recollection_cells(Recollection(name, outcomes[name])), final=True)
    print(f"  after {time.perf_counter() - began:.0f} s, of which {ready - began:.0f} s went into starting and loading")
    return [Recollection(name, outcomes[name]) for name in memories]


def _listing(budget: int) -> dict[str, Any]:
    """The memories that keep the shopping lists."""
    return {
        FULL: kvsieve.Full(),
        "StreamingLLM": kvsieve.StreamingLLM(budget=budget, sinks=_SINKS),
        "SirLLM": kvsieve.SirLLM(budget=budget, sinks=_SINKS, recent=budget // 8),
    }


def _recollection_cells(recollection: Recollection) -> tuple[str, ...]:
    answered = f"{recollection.correct} of {recollection.asked}"
    return (str(len(recollection.outcomes)), f"{recollection.retention:.0%}", answered)


# -------------------------------------------------------------------------------------------------------------------- long text


def _bounded(budget: int) -> dict[str, Any]:
    """The bounded memories; the first is given up first, and the continuation goes on from the last one's stream."""
    return {
        "LM-Infinite": kvsieve.LMInfinite(window=budget - _SINKS, sinks=_SINKS),
        "StreamingLLM": kvsieve.StreamingLLM(budget=budget, sinks=_SINKS),
        "SirLLM": kvsieve.SirLLM(budget=budget, sinks=_SINKS),
    }


def _plan(model: Any, ids: torch.Tensor, settings: Settings, trained: int, began: float) -> Plan:
    """What is read; says what it leaves out, and why."""
    names, available = (FULL, *_bounded(settings.budget)), ids.shape[1]
    pace = measure_pace(model, ids, settings.chunk, settings.backend)
    left = settings.seconds - (time.perf_counter() - began) - _AFTERWARDS
    if settings.tokens is not None:
        width = settings.budget + settings.chunk
        seconds = pace.full(available) + (len(names) - 1) * pace.bounded(available, width)
        return Plan(names, 0, available, available, seconds, 0.0)
    plan = make_plan(
        pace,
        left,
        names,
        available=available,
        trained=trained,
        width=settings.budget + settings.chunk,
        step=settings.chunk,
    )
    print(
        f"\n{1 / pace.token:,.0f} tokens a second here, attention aside; {left:.0f} s are left for reading, which should reach "
        f"token {plan.expected:,} of {plan.stop:,}."
    )
    if left_out := [name for name in names if name not in plan.memories]:
        print(f"Left out, to save time: {', '.join(left_out)}.")
    if plan.start:
        print(f"The full cache reads from the start; the bounded memories begin at token {plan.start:,}, to save time.")
    return plan


def _read_all(
    model: Any, tokenizer: Any, ids: torch.Tensor, plan: Plan, settings: Settings, began: float
) -> tuple[list[Reading], dict[str, Any]]:
    """All memories in turns, a chunk each, so that they end at the same token whenever that is."""
    policies = {FULL: kvsieve.Full(), **_bounded(settings.budget)}
    title = f"\nreading up to token {plan.stop:,} in chunks of {settings.chunk}, budget {settings.budget:,}"
    limit = None if settings.tokens is not None else began + settings.seconds - _AFTERWARDS
    least = plan.start + 2 * words.COMPARED
    with contextlib.ExitStack() as streams:
        readings, turns = [], []
        for name in plan.memories:
            stream = streams.enter_context(kvsieve.stream(model, policies[name], backend=settings.backend))
            reading = Reading(name, BUCKET, 0 if name == FULL else plan.start)
            part = ids[:, reading.first : plan.stop]
            meter = stream_nll.stream_meter(stream)
            readings.append(reading)
            turns.append(stream_nll.read(model, part, stream.cache, meter, reading, chunk=settings.chunk))
        with LiveTable(("memory", "up to token", "tok/s", "resident", "MiB held", "nll so far"), title=title) as table:
            while readings[0].stop < plan.start:
                _step(table, readings[0], turns[0])
            while readings[0].stop < plan.stop:
                for reading, turn in zip(readings, turns):
                    _step(table, reading, turn)
                if limit is not None and time.perf_counter() > limit and readings[0].stop >= least:
                    break
            for reading in readings:
                table.update(reading.name, *_reading_cells(reading, reading.steps[-1]), final=True)
        if readings[0].stop < plan.stop:
            print(f"Stopped at token {readings[0].stop:,} of {plan.stop:,}: the time was up.")
        return readings, _continue(stream, tokenizer, settings)


def _step(table: LiveTable, reading: Reading, turn: Iterator[Progress]) -> None:
    table.update(reading.name, *_reading_cells(reading, next(turn)))


def _reading_cells(reading: Reading, step: Progress) -> Sequence[str]:
    return (
        f"{reading.first + step.seen:,}",
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
    with quietly():  # transformers warns of texts beyond the trained length: that is what the memory is for
        text = print_while_generating(stream, tokenizer, ids, max_new_tokens=settings.new_tokens, repetition_penalty=1.1)
    seconds = time.perf_counter() - began
    print()
    return {"prompt": _PROMPT, "text": text, "seconds": round(seconds, 2), "stats": stream.stats().as_dict()}
