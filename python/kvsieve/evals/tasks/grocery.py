"""A shopping list, many turns of small talk, and the question what was on the list, as a choice among five.

After SirLLM's grocery shopping task, Yao et al., ACL 2024, arXiv 2405.12528, with the text of :mod:`kvsieve.evals.shopping_text` in
plain lines "User:" and "Assistant:". :mod:`kvsieve.evals.shopping` is the demo's form of it, which tells as well what was retained.
"""

from __future__ import annotations

from typing import Any

from kvsieve.evals.shopping_text import ITEMS
from kvsieve.evals.task import Case, Question, Task, encode, first_line, largest, opening, rng
from kvsieve.evals.turns import small_talk, turn

__all__ = ["TASK"]

NAME = "grocery"
LISTED, OPTIONS = 2, 5


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A list of two items, and a question for each."""
    draw = rng(NAME, seed, index)
    listed = {category: draw.sample(ITEMS[category], OPTIONS) for category in draw.sample(sorted(ITEMS), LISTED)}
    questions = []
    for category, (item, *others) in listed.items():
        text = f"User: Please read out my shopping list.\nAssistant: Here is your shopping list:\n- {category}:"
        names = draw.sample([item, *others], OPTIONS)
        options = tuple(encode(tokenizer, f" {option}") for option in names)
        guesses, longest = (("always the first option", names[0]),), max(map(len, options))
        questions.append(Question(encode(tokenizer, text), (item,), longest, options=options, guesses=guesses))
    items = "".join(f"\n- {category}: {options[0]}" for category, options in listed.items())
    said = [
        turn("Hello! Do you have a little time for me today?", "Hello! Yes, I am happy to help you."),
        turn(f"Please remember my shopping list.{items}", "Of course. I will keep the list for you."),
    ]
    first, told = opening(tokenizer), [encode(tokenizer, one) for one in said]
    talk = [encode(tokenizer, one) for one in small_talk(draw, length)]

    def made(count: int) -> Case:
        return Case(((*first, *told[0]), *told[1:], *talk[:count]), tuple(questions))

    return largest(NAME, length, made)


TASK = Task(
    name=NAME,
    summary="a shopping list after many turns, as a choice among five (after SirLLM)",
    metric="share of the two questions whose right item is the most probable of five, by mean log-probability a token",
    source="after SirLLM, Yao et al., ACL 2024, arXiv 2405.12528",
    build=build,
    score=first_line,
)
