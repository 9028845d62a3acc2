"""The tasks of `kvsieve eval`: cases are the same for everybody and as long as asked, and answers are scored."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from eval_cases import Chunky, Letters
from kvsieve.errors import KvsieveError
from kvsieve.evals import needles, prose
from kvsieve.evals.task import Case, Question, ask, encode, first_line, found, largest, lines, opening, rng, spread
from kvsieve.evals.tasks import TASKS
from kvsieve.evals.tasks.chat_memory import FACTS

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md"

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def text_of(tokenizer: Any, case: Case) -> str:
    return str(tokenizer.decode([one for turn in case.turns for one in turn], skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------------------------------- tasks


@every_task
@pytest.mark.parametrize("length", [3500, 8000])
@pytest.mark.parametrize("tokenizer", [Letters(), Chunky()], ids=["letters", "chunky"])
def test_cases_are_as_long_as_asked(task: Any, length: int, tokenizer: Any) -> None:
    case = task.build(tokenizer, length, 0, 0)
    most = {"chat-memory": 420, "grocery": 420}.get(task.name, 130)  # a turn of small talk; else a sentence or a few words
    assert length - most < case.num_tokens <= length
    longest = max(len(q.ids) + q.max_new_tokens for q in case.questions)
    assert sum(map(len, case.turns)) == case.num_tokens - longest
    assert all(case.turns)


@every_task
def test_a_case_depends_on_length_seed_and_index_only(task: Any) -> None:
    tokenizer = Letters()
    made = task.build(tokenizer, 3500, 3, 1)
    assert task.build(Letters(), 3500, 3, 1) == made
    others = [task.build(tokenizer, *other) for other in ((3500, 3, 2), (3500, 4, 1), (4000, 3, 1))]
    assert len({case.digest for case in (made, *others)}) == 4
    assert task.build(tokenizer, 3500, 3, 1).digest == made.digest


@every_task
def test_the_answer_scores_1_and_a_wrong_one_0(task: Any) -> None:
    for index in range(4):
        for question in task.build(Letters(), 3500, 0, index).questions:
            assert question.expected
            assert task.score(question, "\n".join(question.expected) + "\nand so on") == 1.0
            for wrong in ("", "\n\n", "I do not know.", "*** 0 ***\n0"):
                assert task.score(question, wrong) == 0.0


@every_task
def test_what_is_asked_stands_in_the_context(task: Any) -> None:
    """And none of it in the questions, where a model could read it off."""
    tokenizer = Letters()
    for index in range(4):
        case = task.build(tokenizer, 3500, 0, index)
        text = text_of(tokenizer, case)
        for question in case.questions:
            asked = tokenizer.decode(question.ids)
            assert all(expected in text and expected not in asked for expected in question.expected)
            assert len(encode(tokenizer, " " + ", ".join(question.expected))) <= question.max_new_tokens


@every_task
def test_a_length_that_is_too_short_is_refused(task: Any) -> None:
    with pytest.raises(KvsieveError, match=rf"a case of {task.name} needs .*--length 24"):
        task.build(Letters(), 24, 0, 0)


@every_task
def test_a_task_says_what_it_is(task: Any) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}", task.source)
    assert "\n" not in task.summary + task.metric
    assert task.name == task.name.lower()


@pytest.mark.parametrize("name", ["passkey", "niah-single"])
def test_needles_lie_at_all_depths(name: str) -> None:
    tokenizer, depths = Letters(), []
    for index in range(12):
        case = TASKS[name].build(tokenizer, 4000, 0, index)
        text = text_of(tokenizer, case)
        depths.append(text.index(case.questions[0].expected[0]) / len(text))
    gaps = [b - a for a, b in zip([0.0, *sorted(depths)], [*sorted(depths), 1.0])]
    assert max(gaps) < 0.25
    assert len({round(spread(0, i), 6) for i in range(100)}) == 100


@pytest.mark.parametrize(
    ("name", "keys", "asked"),
    [("niah-single", 1, 1), ("niah-multikey", 4, 1), ("niah-multivalue", 1, 4), ("niah-multiquery", 4, 4)],
)
def test_the_haystack_has_so_many_needles(name: str, keys: int, asked: int) -> None:
    tokenizer = Letters()
    case = TASKS[name].build(tokenizer, 4000, 0, 0)
    told = re.findall(r"The number of the (\w+ \w+) is (\d{7})\.", text_of(tokenizer, case))
    assert len({thing for thing, _ in told}) == keys
    assert len(case.questions[0].expected) == asked
    things = {thing for thing, number in told if number in case.questions[0].expected}
    assert all(thing in tokenizer.decode(case.questions[0].ids) for thing in things)
    assert {number for thing, number in told if thing in things} == set(case.questions[0].expected)


def test_prose_hardly_repeats_and_tells_no_numbers() -> None:
    drawn = prose.sentences(rng("prose", 0, 0))
    hay = [next(drawn) for _ in range(1000)]
    assert len(set(hay)) > 900
    assert not re.search(r"\d|VAR|number", "".join(hay))
    assert len(set(prose.things(rng("things", 0, 0), 20_000))) == 20_000
    assert len(set(prose.words(rng("words", 0, 0), 2000))) == 2000
    assert len({*prose.NOUNS, *prose.ADJECTIVES}) == len(prose.NOUNS) + len(prose.ADJECTIVES)


def test_needles_are_put_between_sentences_in_order() -> None:
    assert needles.between(["a", "b"], [(1.0, "Z"), (0.0, "A"), (0.5, "M"), (0.5, "N")]) == "AaMNbZ"


def test_variables_are_one_chain_in_order() -> None:
    tokenizer = Letters()
    case = TASKS["variable-tracking"].build(tokenizer, 4000, 0, 0)
    said = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text_of(tokenizer, case))
    assert [name for name, _ in said] == list(case.questions[0].expected)
    assert [value for _, value in said][1:] == [name for name, _ in said][:-1]
    assert said[0][1] in tokenizer.decode(case.questions[0].ids)


@pytest.mark.parametrize("length", [3500, 12000])
def test_common_words_are_the_most_common(length: int) -> None:
    tokenizer = Letters()
    case = TASKS["common-words"].build(tokenizer, length, 0, 0)
    counts = Counter(re.findall(r"\d+\. (\w+)", text_of(tokenizer, case)))
    often = [counts.pop(word) for word in case.questions[0].expected]
    assert len(often) == 10
    assert min(often) == max(often)
    assert min(often) >= 3 * max(counts.values())
    assert min(often) == 30 or length < 10_000


def test_frequent_words_are_the_most_frequent() -> None:
    tokenizer = Letters()
    for index in range(3):
        case = TASKS["frequent-words"].build(tokenizer, 3500, 0, index)
        counts = Counter(re.findall(r"[a-z]{6}|\.{3}", text_of(tokenizer, case).split("\n", 1)[1]))
        (dots, _), *rest = counts.most_common(5)
        assert dots == "..."
        assert [word for word, _ in rest[:3]] == list(case.questions[0].expected)
        assert rest[2][1] > rest[3][1]


def test_a_correction_comes_late_and_replaces_what_it_corrects() -> None:
    tokenizer = Letters()
    for index in range(4):
        case = TASKS["chat-memory"].build(tokenizer, 6000, 0, index)
        text = text_of(tokenizer, case)
        corrected = [question for question in case.questions if question.outdated]
        assert len(corrected) == 2
        for question in corrected:
            old, new = text.index(question.outdated[0]), text.index(question.expected[0])
            assert old < len(text) / 3 < new < 0.8 * len(text)
            assert first_line(question, f" {question.expected[0]}, no longer {question.outdated[0]}") == 0.0
    assert all(len(set(fact.values)) == len(fact.values) >= 2 for fact in FACTS)


def test_no_small_talk_tells_a_fact() -> None:
    from kvsieve.evals.shopping_text import FILLERS

    words = set(re.findall(r"\w+", " ".join(part for filler in FILLERS for part in filler)))
    assert not [value for fact in FACTS for value in fact.values if value in words]


# ----------------------------------------------------------------------------------------------------------------------- scoring


def test_scores() -> None:
    two = Question((), ("Maple", "oak"), 8, ("elm",))
    assert [found(two, text) for text in ("an OAK, a maple", "oak", "ash")] == [1.0, 0.5, 0.0]
    assert [first_line(two, text) for text in ("\n maple oak\nelm", "maple\noak", "maple oak elm", "")] == [1.0, 0.5, 0.0, 0.0]
    assert [lines(two, text) for text in ("Maple\n oak ", "Maple oak", "x\noak", "Oak")] == [1.0, 0.0, 0.5, 0.0]


def test_the_largest_case_is_the_largest() -> None:
    for length in range(12, 60):
        case = largest("x", length, lambda n: Case(((7,) * (3 * n),), (Question((1,), ("a",), 5),)))
        assert length - 3 < case.num_tokens <= length
    with pytest.raises(KvsieveError, match="at least 9 tokens here, got --length 8"):
        largest("x", 8, lambda n: Case(((7,) * (3 * n),), (Question((1,), ("a",), 5),)))


def test_room_for_an_answer_and_what_begins_a_text() -> None:
    assert opening(Letters()) == (1,)
    assert opening(Chunky()) == ()
    question = ask(Letters(), "\nWhere?", ["x" * 400])
    assert len(question.ids) == 7
    assert question.max_new_tokens == 401 + 50


# ----------------------------------------------------------------------------------------------------------------- documentation


def test_the_page_names_every_task_its_metric_and_its_source() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for task in TASKS.values():
        assert f"`{task.name}`" in text, task.name
        assert f"kvsieve eval {task.name} " in text, task.name
        (number,) = re.findall(r"arXiv (\d{4}\.\d{5})", task.source)
        assert number in text, task.name
        assert task.metric in text, task.name


# -------------------------------------------------------------------------------------------------------------------- a real model


@pytest.mark.model
def test_cases_of_a_real_tokenizer_are_as_long_as_asked(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    for task in TASKS.values():
        case = task.build(tokenizer, 2048, 0, 0)
        assert 2048 - 130 < case.num_tokens <= 2048, task.name
