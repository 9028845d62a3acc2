"""The harness of `kvsieve eval`: what a model is asked under a policy, and what its answers are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from eval_cases import Letters, evaluate, settings, stock_choice
from kvsieve.errors import KvsieveError
from kvsieve.evals import harness
from kvsieve.evals.task import Question, encode
from kvsieve.evals.tasks import TASKS

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


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


# -------------------------------------------------------------------------------------------------------------------- a real model


@pytest.mark.model
def test_the_small_model_finds_a_number_with_the_full_cache_and_not_with_a_window(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    policies = [kvsieve.Full(), kvsieve.StreamingLLM(128)]
    asked = settings(task="niah-single", lengths=(512,), cases=1, chunk=512)
    full, window = harness.evaluate(model, tokenizer, TASKS["niah-single"], policies, asked)
    assert (full.score, window.score) == (1.0, 0.0)
