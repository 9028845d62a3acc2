"""A user tells four facts early, corrects two of them later, and asks for all after many turns of small talk.

After LongMemEval, Wu et al., ICLR 2025, arXiv 2410.10813 (information from a session, and knowledge updates). Wording of our own,
in plain lines "User:" and "Assistant:" that need no model's template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvsieve.evals.task import Case, Task, ask, encode, first_line, largest, opening, rng
from kvsieve.evals.turns import small_talk, turn

__all__ = ["TASK"]

NAME = "chat-memory"


@dataclass(frozen=True)
class Fact:
    """What a user tells, how it is asked for, how the answer begins, and what it may be."""

    told: str
    asked: str
    answer: str
    values: tuple[str, ...]


FACTS = (
    Fact("I live in {}.", "Where do I live?", "You live in", ("Lisbon", "Oslo", "Vienna", "Cairo", "Toronto")),
    Fact("My dentist sees me on {}.", "When does my dentist see me?", "Your dentist sees you on", ("Monday", "Thursday", "Friday")),
    Fact("My car is parked in {} Street.", "Where is my car parked?", "Your car is parked in", ("Maple", "Station", "Chapel")),
    Fact("My train leaves at {} o'clock.", "When does my train leave?", "Your train leaves at", ("seven", "nine", "eleven")),
    Fact("I work as a {}.", "What do I work as?", "You work as a", ("plumber", "nurse", "translator", "welder", "florist")),
    Fact("My daughter plays the {}.", "What does my daughter play?", "Your daughter plays the", ("cello", "trumpet", "harp")),
    Fact("The key is under the {}.", "Where is the key?", "The key is under the", ("doormat", "flowerpot", "ladder", "woodpile")),
    Fact("My sister is called {}.", "What is my sister called?", "Your sister is called", ("Ingrid", "Paloma", "Beatrice")),
)
TOLD, CORRECTED = 4, 2


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A conversation, a turn at a time."""
    draw = rng(NAME, seed, index)
    facts = draw.sample(FACTS, TOLD)
    values = [draw.sample(fact.values, 2) for fact in facts]
    questions = tuple(
        ask(
            tokenizer,
            f"User: {fact.asked}\nAssistant: {fact.answer}",
            [new if at < CORRECTED else old],
            outdated=[old] if at < CORRECTED else [],
        )
        for at, (fact, (old, new)) in enumerate(zip(facts, values))
    )
    said = [
        turn(f"Please remember: {_small(fact.told.format(old))}", "I will remember it.") for fact, (old, _) in zip(facts, values)
    ]
    said += [
        turn(f"That has changed. Now {_small(fact.told.format(new))}", "Thank you, I have noted the change.")
        for fact, (_, new) in zip(facts[:CORRECTED], values)
    ]
    places = [(at + 0.5) / (4 * TOLD) for at in range(TOLD)] + [0.5 + at / (4 * CORRECTED) for at in range(CORRECTED)]
    talk = [encode(tokenizer, one) for one in small_talk(draw, length)]
    told = [encode(tokenizer, one) for one in said]
    first = opening(tokenizer)

    def made(count: int) -> Case:
        ends = [round(place * count) for place in places]
        turns = []
        for at in range(count + 1):
            turns += [one for one, end in zip(told, ends) if end == at]
            turns += talk[at : at + 1] if at < count else []
        return Case(((*first, *turns[0]), *turns[1:]), questions)

    return largest(NAME, length, made)


def _small(sentence: str) -> str:
    """A sentence as it goes on after a colon."""
    return sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]


TASK = Task(
    name=NAME,
    summary="facts told early, corrected later, asked for after many turns (after LongMemEval)",
    metric="share of the four questions whose answer contains the newest fact, and not an older one, in its first line",
    source="after LongMemEval, Wu et al., ICLR 2025, arXiv 2410.10813",
    build=build,
    score=first_line,
)
