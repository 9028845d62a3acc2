"""The demo's plan fits the time that there is, and its last sentence is true of its numbers, whatever they are."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tiny
from kvsieve.demo import stages
from kvsieve.demo.plan import Pace, Plan, make_plan
from kvsieve.demo.report import compared, verdict, within
from kvsieve.evals.stream_nll import Holding, Progress, Reading

NAMES = ("full cache", "LM-Infinite", "StreamingLLM", "SirLLM")
TRAINED, GOAL = 8192, 11_264


def planned(pace: Pace, seconds: float, available: int = 24_000) -> Plan:
    return make_plan(pace, seconds, NAMES, available=available, trained=TRAINED, width=1536, step=512)


def cost(plan: Plan, pace: Pace) -> float:
    return pace.full(plan.stop) + (len(plan.memories) - 1) * pace.bounded(plan.stop - plan.start, 1536)


@pytest.mark.parametrize("scale", [0.2, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5])
def test_a_plan_reaches_beyond_the_trained_length_where_that_fits_and_says_so_where_not(scale: float) -> None:
    pace = Pace(0.0018 * scale, 4.5e-7 * scale)
    plan = planned(pace, 130.0)
    assert plan.memories[0] == "full cache"
    assert {"StreamingLLM", "SirLLM"} <= set(plan.memories)
    assert plan.start % 512 == plan.stop % 512 == plan.expected % 512 == 0
    assert plan.stop >= GOAL
    if plan.expected == plan.stop:
        assert cost(plan, pace) <= 130.0 * 1.25
    else:
        assert plan.expected < plan.stop
        assert plan.needed > 130.0


def test_a_slower_machine_gives_up_first_what_matters_least() -> None:
    plans = [planned(Pace(0.0018 * s, 4.5e-7 * s), 130.0) for s in (0.2, 0.4, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 2.4, 3.0, 4.0)]
    kinds = [(len(plan.memories) == 4, plan.start == 0, plan.expected >= GOAL) for plan in plans]
    seen = list(dict.fromkeys(kinds))
    assert seen == [(True, True, True), (False, True, True), (False, False, True), (False, True, False)]


def test_a_short_text_is_read_to_its_end() -> None:
    plan = planned(Pace(1e-4, 1e-8), 130.0, available=3000)
    assert (plan.start, plan.stop, plan.needed) == (0, 3000, 0.0)


def reading(name: str, first: int, stop: int) -> Reading:
    made = Reading(name, 512, first, nll=[1.0] * ((stop - first) // 512))
    made.steps.append(Progress(stop - first, 1.0, 1.0, Holding(1, 1), 1.0))
    return made


def test_what_is_compared_was_read_by_all() -> None:
    readings = [reading("full cache", 0, 11_264), reading("SirLLM", 6144, 11_264)]
    assert compared(readings) == (10_240, 11_264)
    assert within(readings, TRAINED) == (7168, 8192)
    assert readings[1].nll_between(*within(readings, TRAINED)) == 1.0
    early = [reading("full cache", 0, 2560), reading("SirLLM", 0, 2560)]
    assert (compared(early), within(early, TRAINED)) == ((1536, 2560), (0, 2560))


def found(
    full: float | None, bounded: tuple[float | None, ...], *, stop: int = GOAL, correct: tuple[int, int, int] = (4, 0, 4)
) -> Any:
    names = ("full cache", "StreamingLLM", "SirLLM")
    rows = [
        {"memory": name, "stop": stop, "nll_compared": nll, "bytes_held": size << 20, "seconds": 30.0}
        for name, nll, size in zip(names, (full, *bounded), (247, 24, 23))
    ]
    return {
        "settings": {"budget": 1024},
        "machine": {"trained_length": TRAINED},
        "plan": {"needed": 200.0, "stop": GOAL},
        "compared_positions": (stop - 1024, stop),
        "seconds": 150.0,
        "reading": rows,
        "shopping": [{"memory": name, "correct": count, "asked": 4} for name, count in zip(names, correct)],
    }


def test_a_collapse_is_claimed_where_the_numbers_show_it() -> None:
    said = verdict(found(3.06, (2.54, 2.5)))
    assert "tokens 10,240 to 11,264" in said
    assert "the full cache falls apart and every bounded memory reads on" in said
    assert "StreamingLLM 2.54, SirLLM 2.50 nats per token in at most 24 MiB; full cache 3.06 in 247" in said


@pytest.mark.parametrize(
    ("full", "bounded", "words"),
    [
        (2.4, (2.54, 2.5), "the full cache still reads better than every bounded memory"),
        (2.52, (2.54, 2.5), "the full cache does not fall apart here"),
        (2.7, (2.54, 2.5), "the full cache does not fall apart here"),
        (3.06, (3.1, 2.5), "the full cache does not fall apart here"),
    ],
)
def test_no_collapse_is_claimed_where_they_do_not(full: float, bounded: tuple[float, float], words: str) -> None:
    said = verdict(found(full, bounded))
    assert words in said
    assert "falls apart" not in said


def test_a_text_that_ends_before_the_collapse_says_that_time_was_up() -> None:
    said = verdict(found(1.81, (1.84, 1.89), stop=9728))
    assert "over tokens 8,704 to 9,728, beyond the 8,192" in said
    assert said.endswith("; the time was up before token 11,264.")
    assert "time was up" not in verdict(found(2.4, (2.54, 2.5)))


@pytest.mark.parametrize("stop", [2560, 8192, 9184])
def test_a_text_that_ends_too_early_shows_nothing_and_says_so(stop: int) -> None:
    said = verdict(found(9.0, (2.5, 2.5), stop=stop))
    assert f"up to token {stop:,} only, so nothing here shows" in said
    assert "`kvsieve demo --seconds 300` should show it" in said
    assert "falls apart" not in said
    assert "only, so nothing" in verdict(found(None, (None, None), stop=300))


@pytest.mark.parametrize(
    ("correct", "words"),
    [((4, 0, 4), "better than"), ((4, 3, 1), "worse than"), ((4, 2, 2), "no better than")],
)
def test_the_shopping_list_is_told_as_it_went(correct: tuple[int, int, int], words: str) -> None:
    said = verdict(found(3.06, (2.54, 2.5), correct=correct))
    assert f"remembers the shopping lists {words} StreamingLLM ({correct[2]} and {correct[1]} of 4" in said
    assert "by the full cache 4)" in said


def read_all(monkeypatch: pytest.MonkeyPatch, plan: Plan, seconds: float) -> list[Reading]:
    monkeypatch.setattr(stages, "_continue", lambda stream, tokenizer, settings: {})
    settings = stages.Settings(budget=128, chunk=256, seconds=seconds)
    return stages._read_all(tiny.model(), None, tiny.ids(1, plan.stop), plan, settings, time.perf_counter())[0]


@pytest.mark.parametrize("start", [0, 512])
def test_memories_that_run_out_of_time_have_read_the_same(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(NAMES, start, 4096, 4096, 1.0, 0.0)
    readings = read_all(monkeypatch, plan, seconds=0.0)
    assert [reading.first for reading in readings] == [0, start, start, start]
    assert {reading.stop for reading in readings} == {start + 2048}
    assert compared(readings) == (start + 1024, start + 2048)
    assert [len(reading.nll) for reading in readings] == [(start + 2048) // 512, *[4] * 3]


def test_memories_with_time_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan((NAMES[0], *NAMES[2:]), 0, 2500, 2500, 1.0, 0.0)
    readings = read_all(monkeypatch, plan, seconds=3600.0)
    assert [(reading.name, reading.stop) for reading in readings] == [(name, 2500) for name in plan.memories]
    assert readings[0].steps[-1].holding.resident == 2500
    assert all(reading.steps[-1].holding.resident <= 128 + 63 for reading in readings[1:])
