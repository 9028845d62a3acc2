"""`kvsieve eval` on any model: every task's cases are the same for everybody and as long as asked, and no finished case is lost."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from eval_cases import POLICIES, Chunky, Letters, evaluate, settings, stock_choice
from kvsieve.cli import main
from kvsieve.errors import KvsieveError
from kvsieve.evals import harness, needles, prose, results
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


# ----------------------------------------------------------------------------------------------------------------------- harness


SHORT = {
    "grocery": 900,
    "common-words": 1200,
    "frequent-words": 1000,
    "chat-memory": 900,
    "copy": 500,
    "niah-multiquery": 700,
    "niah-multivalue": 600,
    "rps": 400,
}


@every_task
def test_the_harness_runs_every_task_under_two_policies(task: Any) -> None:
    length = SHORT.get(task.name, 560)
    full, window = evaluate(task.name, lengths=(length,), cases=1)
    case = task.build(Letters(), length, 0, 0)
    for result in (full, window):
        assert result.read == case.num_read
        assert len(result.answers) == len(result.scores) == len(case.questions)
        asked = [q for q in case.questions if not q.options]
        assert result.written == sum(q.max_new_tokens for q in asked), "the tiny model knows no end"
        assert result.case == case.digest
        assert [task.score(q, a) for q, a in zip(case.questions, result.answers)] == list(result.scores)
        assert result.prefill_seconds > 0
        assert (result.decode_seconds > 0) == bool(asked)
        assert result.peak_bytes is None or result.peak_bytes > 10 * 2**20
    assert 0 < window.bytes_held < full.bytes_held
    assert [full.policy, window.policy] == [repr(kvsieve.Full()), repr(kvsieve.StreamingLLM(64))]


def test_the_full_cache_answers_as_stock_generate_does() -> None:
    """Each question of the context alone: the second one knows nothing of the first."""
    full, _ = evaluate("kv-turns", cases=1)
    case = TASKS["kv-turns"].build(Letters(), 400, 0, 0)
    for question, answer in zip(case.questions, full.answers):
        ids = torch.tensor([[*case.turns[0], *question.ids]])
        wanted = tiny.model().generate(ids, max_new_tokens=question.max_new_tokens, do_sample=False)
        assert answer == Letters().decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_choice_is_the_most_probable_option() -> None:
    task, tokenizer = TASKS["grocery"], Letters()
    full, _ = evaluate("grocery", lengths=(900,), cases=1)
    case = task.build(tokenizer, 900, 0, 0)
    context = [one for turn in case.turns for one in turn]
    for question, answer, score in zip(case.questions, full.answers, full.scores):
        best = stock_choice(context, question)
        assert answer == tokenizer.decode(best)
        assert score == float(answer.strip() == question.expected[0])
        assert len(set(question.options)) == 5


def test_the_right_option_is_at_any_place() -> None:
    tokenizer, places = Letters(), set()
    for index in range(12):
        for question in TASKS["grocery"].build(tokenizer, 900, 0, index).questions:
            places.add([tokenizer.decode(option).strip() for option in question.options].index(question.expected[0]))
    assert len(places) == 5


def test_a_right_answer_is_scored_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    task, asked = TASKS["kv-turns"], []

    def answer(work: Any, question: Question) -> list[int]:
        asked.append(question)
        good = len(asked) % 4 != 0
        return [*encode(Letters(), f" {question.expected[0]}\nnext" if good else " none")]

    monkeypatch.setattr(harness._Work, "answer", answer)
    policies = [kvsieve.Full()]
    (result,) = harness.evaluate(tiny.model(), Letters(), task, policies, settings(cases=1))
    assert result.scores == (1.0, 1.0, 1.0, 0.0)
    assert result.score == 0.75


def test_a_model_inside_of_a_wrapper_is_asked_as_a_stream_would_look_through_it() -> None:
    asked = TASKS["niah-single"], [kvsieve.Full()], settings(lengths=(560,), cases=1)
    (plain,), (wrapped,) = (
        harness.evaluate(model, Letters(), *asked) for model in (tiny.model(), torch.compile(tiny.model(), backend="eager"))
    )
    assert wrapped.answers == plain.answers


def test_settings_of_the_model_do_not_change_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = evaluate("niah-single", lengths=(560,), cases=1)
    generation = tiny.model().generation_config
    monkeypatch.setattr(generation, "repetition_penalty", 5.0)
    monkeypatch.setattr(generation, "num_beams", 2)
    assert [result.answers for result in evaluate("niah-single", lengths=(560,), cases=1)] == [r.answers for r in plain]


def test_policies_that_cannot_go_beyond_the_trained_length_are_warned_of() -> None:
    policies = [kvsieve.methods.parse(text) for text in ("full()", "streamingllm(64)", "quest(64)", "quest(64, extend=True)")]
    assert harness.warnings_of(tiny.model(), policies, (512, 4096)) == []
    said = harness.warnings_of(tiny.model(), policies, (512, 4097))
    assert len(said) == 2
    assert all("trained for 4,096 tokens" in line and "--length 4097" in line for line in said)
    assert said[0].startswith("Full()")
    assert said[1].startswith("Quest(")


def test_a_bank_does_not_remember_the_cases_before(tmp_path: Path) -> None:
    task, text = TASKS["niah-single"], "streamingllm(40, sinks=2) >> memorybank(chunk=4, top_k=16)"
    asked = settings(lengths=(560,), cases=3)

    def answers(policy: kvsieve.policy.Policy, **changes: Any) -> dict[int, Any]:
        made = harness.evaluate(tiny.model(), Letters(), task, [policy], settings(lengths=(560,), **changes))
        return {result.index: result.answers for result in made}

    one = kvsieve.methods.parse(text)
    together = answers(one, cases=3)
    assert together == answers(one, cases=3)
    run = (0, 1, 2)
    alone = {}
    for index in run:
        with kvsieve.stream(tiny.model(), kvsieve.methods.parse(text)) as stream:
            case = task.build(Letters(), 560, 0, index)
            result = harness.run_case(stream, Letters(), task, case, asked, 560, index, progress=lambda tokens: None)
            alone[index] = result.answers
    assert together == alone
    path = str(tmp_path / "bank").replace("\\", "/")
    with pytest.raises(KvsieveError, match="leave the file out"):
        answers(kvsieve.methods.parse(f'streamingllm(40) >> memorybank("{path}")'))


# ------------------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(dtype=dtype), Letters()))
    what = ["--policy", POLICIES[0], "--policy", POLICIES[1], "--length", "300,400", "--cases", "2"]
    return ["eval", "kv-turns", *what, "--json", str(tmp_path / "out.json")]


Held = Callable[[], dict[str, Any]]


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return lambda: json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def steady(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is measured."""
    measured = {"peak_bytes", "prefill_seconds", "decode_seconds"}
    return [{name: value for name, value in case.items() if name not in measured} for case in cases]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The fourth case is interrupted, once. What was begun."""
    run_case, begun = harness.run_case, []

    def stops(stream: Any, tokenizer: Any, task: Any, case: Any, settings: Any, length: int, index: int, **more: Any) -> Any:
        begun.append((repr(stream.policy), length, index))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return run_case(stream, tokenizer, task, case, settings, length, index, **more)

    monkeypatch.setattr(harness, "run_case", stops)
    return begun


def test_a_run_prints_its_table_and_writes_its_file(argv: list[str], held: Held, capsys: Any) -> None:
    assert main(argv) == 0
    told = held()
    assert len(told["cases"]) == 8
    assert [(c["length"], c["index"]) for c in told["cases"]] == [(n, i) for n in (300, 400) for i in (0, 1) for _ in POLICIES]
    assert [(row["policy"], row["length"], row["cases"]) for row in told["summary"]] == [
        (repr(kvsieve.methods.parse(policy)), length, 2) for length in (300, 400) for policy in POLICIES
    ]
    assert told["settings"]["task"] == told["task"]["name"] == "kv-turns"
    captured = capsys.readouterr()
    rows = [line for line in captured.out.splitlines() if line.startswith(("Full()", "StreamingLLM("))]
    assert len(rows) == 4
    assert "read a second" in captured.out
    assert captured.err == "", "no bars where there is no terminal"


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    argv: list[str], held: Held, interrupted: list[tuple[str, int, int]], capsys: Any
) -> None:
    assert main(argv) == 130
    said = capsys.readouterr().err
    assert "3 of 8 cases are in" in said
    assert "--resume" in said
    assert len(held()["cases"]) == 3
    first = held()["cases"]
    assert main([*argv, "--resume"]) == 0
    assert held()["cases"][:3] == first
    assert len(interrupted) == 9
    assert len(set(interrupted)) == 8, "what was finished is not run again"
    resumed = held()
    assert main(argv) == 0
    assert steady(held()["cases"]) == steady(resumed["cases"])
    before = len(interrupted)
    assert main([*argv, "--resume"]) == 0
    assert len(interrupted) == before


def test_an_interruption_without_a_file_says_that_nothing_is_kept(argv: list[str], interrupted: list[Any], capsys: Any) -> None:
    assert main(argv[: argv.index("--json")]) == 130
    assert "3 of 8 cases are lost: --json FILE keeps them" in capsys.readouterr().err


def test_policies_lengths_and_cases_may_be_added(argv: list[str], held: Held, interrupted: list[Any]) -> None:
    path = argv[argv.index("--json") :]
    few = ["eval", "kv-turns", "--policy", "full()", "--length", "300", "--cases", "1", *path]
    assert main(few) == 0
    assert main([*few, "--resume", "--policy", "streamingllm(64)", "--length", "400", "--cases", "1"]) == 130
    assert main([*few, "--resume", "--policy", "streamingllm(64)", "--length", "400", "--cases", "1"]) == 0
    assert len(held()["cases"]) == 4


@pytest.mark.parametrize("change", ["seed 5", "dtype bfloat16", "chunk 32", "backend cpu", "model other", "threads 2"])
def test_a_file_of_other_settings_is_refused(argv: list[str], change: str, held: Held, capsys: Any) -> None:
    argv = [*argv, "--length", "300", "--cases", "1"]
    assert main(argv) == 0
    before, (name, value), threads = held(), change.split(), torch.get_num_threads()
    try:
        assert main([*argv, "--resume", f"--{name}", value]) == 2
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert f"is of another run: {name} is" in said
    assert held() == before


def test_another_task_and_other_weights_are_refused(
    argv: list[str], held: Held, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*argv, "--length", "300", "--cases", "1"]
    assert main(argv) == 0
    before = held()
    assert main(["eval", "copy", *argv[2:], "--resume"]) == 2
    assert "task is 'kv-turns' there and 'copy' here" in capsys.readouterr().err
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(seed=1), Letters()))
    assert main([*argv, "--resume"]) == 2
    assert "weights is" in capsys.readouterr().err
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(), Chunky()))
    assert main([*argv, "--resume"]) == 2
    assert "tokenizer or task changed since" in capsys.readouterr().err
    assert held() == before


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        '{"settings": {}}',
        '{"settings": [], "cases": [3]}',
        '{"settings": {}, "cases": [{"policy": "Full()"}]}',
        "[]",
    ],
)
def test_a_file_of_something_else_is_left_alone(argv: list[str], text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out.json").write_text(text)
    assert main([*argv, "--resume"]) == 2
    assert "was not written by this command" in one_line(capsys)
    assert (tmp_path / "out.json").read_text() == text


def one_line(capsys: Any) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvsieve: ")
    return str(line)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "fulll()"], "fulll"),
        (["--length", "20"], "a case of kv-turns needs at least"),
        (["--length", "8,192"], "a case of kv-turns needs at least"),
        (["--backend", "abacus"], "abacus"),
        (["--policy", "streamingllm('1KiB')"], "1KiB"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(argv: list[str], more: list[str], said: str, capsys: Any, tmp_path: Path) -> None:
    assert main([*argv, *more]) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("more", [["--cases", "0"], ["--length", "300;400"], ["--length", "300,"], ["--seed", "x"]])
def test_wrong_arguments_exit_with_2(argv: list[str], more: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*argv, *more])
    assert stop.value.code == 2
    assert "_lengths" not in capsys.readouterr().err


def test_a_folder_of_ones_own_is_asked(tmp_path: Path, capsys: Any) -> None:
    """A model and a tokenizer as `save_pretrained` writes them, through the whole command."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code - 28 for code in range(32, 127)} | {"\n": 3, "<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tiny.model().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "model")
    capsys.readouterr()
    out = tmp_path / "out.json"
    argv = ["eval", "niah-single", "--model", str(tmp_path / "model"), "--policy", "full()", "--length", "500", "--cases", "1"]
    assert main([*argv, "--json", str(out)]) == 0
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    mine = TASKS["niah-single"].build(Letters(), 500, 0, 0)
    assert case["read"] == mine.num_read - 1, "this tokenizer puts nothing before a text"
    assert case["written"] == mine.questions[0].max_new_tokens
    assert main([*argv, "--json", str(out), "--resume", "--model", "smollm3"]) == 2


def test_resume_needs_a_file(argv: list[str], capsys: Any) -> None:
    assert main([*argv[: argv.index("--json")], "--resume"]) == 2
    assert "name it by --json" in one_line(capsys)


def test_a_model_without_the_interface_is_one_line(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import transformers

    other = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=2)).eval()
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (other, Letters()))
    assert main(argv) == 2
    assert "Bloom" in one_line(capsys)


# -------------------------------------------------------------------------------------------------------------------------- files


def test_a_file_that_cannot_be_written_is_found_before_the_model_is_loaded(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: pytest.fail("the model was loaded"))
    os.mkfifo(tmp_path / "out.json")
    assert main(argv) == 2
    said = one_line(capsys)
    assert f"cannot write the file of results {tmp_path / 'out.json'}: that is a pipe" in said
    assert "choose another --json" in said


def test_a_full_disk_keeps_what_was_written(argv: list[str], held: Held, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sync, synced = os.fsync, []

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) > 4:  # of each file, and of its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert main(argv) == 2
    said = one_line(capsys)
    assert "No space left on device; free some and run it again with --resume" in said
    assert len(held()["cases"]) == 2
    monkeypatch.setattr(os, "fsync", sync)
    assert main([*argv, "--resume"]) == 0
    assert len(held()["cases"]) == 8


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    results.write_json(path, {"old": "é"})
    results.check_writable(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": "é"}
    with pytest.raises(TypeError):
        results.write_json(path, {"new": object()})

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(results.ResultsError, match=r"out\.json: I/O error; choose another --json"):
        results.write_json(path, {"new": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": "é"}
    assert [one.name for one in tmp_path.iterdir()] == ["out.json"]


# ------------------------------------------------------------------------------------------------------------------------ passkey


def test_passkey_has_two_ways_and_does_not_mix_them(argv: list[str], capsys: Any) -> None:
    argv = ["eval", "passkey", *argv[2:]]
    assert main([*argv, "--dense"]) == 2
    assert "leave them or --cases out" in one_line(capsys)
    where = argv.index("--cases")
    assert main([*argv[:where], *argv[where + 2 :], "--resume"]) == 2
    assert "say how many by --cases" in one_line(capsys)
    assert main([*argv, "--length", "400"]) == 0


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


@pytest.mark.model
def test_the_small_model_finds_a_number_with_the_full_cache_and_not_with_a_window(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    policies = [kvsieve.Full(), kvsieve.StreamingLLM(128)]
    asked = settings(task="niah-single", lengths=(512,), cases=1, chunk=512)
    full, window = harness.evaluate(model, tokenizer, TASKS["niah-single"], policies, asked)
    assert (full.score, window.score) == (1.0, 0.0)
