"""Rock, paper, scissors: what is asked when, what players without a model get, and that a question in between leaves no trace."""

from __future__ import annotations

import statistics

import kvsieve
import tiny
from eval_cases import Letters, evaluate, settings, stock_choice
from kvsieve.evals import harness, results
from kvsieve.evals.task import Case
from kvsieve.evals.tasks import TASKS
from kvsieve.evals.tasks.rps import MOVES, beating

TASK, LENGTH = TASKS["rps"], 1400


def rounds(case: Case) -> list[tuple[str, str]]:
    """The model's move and the player's, read off the text."""
    lines = [str(Letters().decode(turn, skip_special_tokens=True)).splitlines()[-2:] for turn in case.turns]
    return [(ours.split()[-1].rstrip("."), theirs.split()[3].rstrip(".")) for ours, theirs in lines]


def test_each_move_is_beaten_by_the_next() -> None:
    assert {move: beating(move) for move in MOVES} == {"rock": "paper", "paper": "scissors", "scissors": "rock"}


def test_the_player_has_a_favourite_and_questions_come_late() -> None:
    for index, favourite in enumerate(MOVES):
        case = TASK.build(Letters(), 40000, 0, index)
        played = [theirs for _, theirs in rounds(case)]
        shares = [played.count(move) / len(played) for move in (favourite, beating(favourite), beating(beating(favourite)))]
        assert len(played) > 600
        assert all(abs(share - wanted) < 0.06 for share, wanted in zip(shares, (0.5, 0.3, 0.2)))
        after = [question.after for question in case.questions]
        assert after == sorted(set(after))
        assert len(after) == 32
        assert after[0] in range(len(played) // 2, len(played) // 2 + 2)
        assert after[-1] == len(played)


def test_what_wins_is_the_move_that_beats_the_next_one() -> None:
    case = TASK.build(Letters(), LENGTH, 0, 0)
    played = [theirs for _, theirs in rounds(case)]
    for question in case.questions[:-1]:
        assert question.expected == (beating(played[question.after or 0]),)
        assert [Letters().decode(option) for option in question.options] == [f" {move}" for move in MOVES]


def test_players_without_a_model() -> None:
    """A constant move wins as often as it wins; the one who counts sees the favourite."""
    cases = {(LENGTH, index): TASK.build(Letters(), LENGTH, 0, index) for index in range(30)}
    found = {guess.player: guess for guess in harness.guesses(TASK, cases)}
    assert list(found) == ["always rock", "always paper", "always scissors", "counting"]
    for move in MOVES:
        won = [statistics.fmean(q.expected == (move,) for q in case.questions) for case in cases.values()]
        assert abs(found[f"always {move}"].score - statistics.fmean(won)) < 1e-12
        assert 0.25 < found[f"always {move}"].score < 0.42
    assert 0.42 < found["counting"].score < 0.6
    assert {guess.cases for guess in found.values()} == {30}
    assert "always paper" in results.guesses_table(list(found.values()))


def test_who_counts_sees_only_the_rounds_before() -> None:
    case = TASK.build(Letters(), LENGTH, 0, 2)
    played = [theirs for _, theirs in rounds(case)]
    for question in case.questions:
        seen = played[: question.after]
        guess = dict(question.guesses)["counting"]
        assert seen.count(MOVES[MOVES.index(guess) - 1]) == max(map(seen.count, MOVES))


def test_a_question_in_between_is_of_what_stands_before_it_and_leaves_no_trace() -> None:
    """Under the full cache a choice is that of a stock forward over the rounds before it; under a window nothing is left either."""
    full, window = evaluate("rps", lengths=(LENGTH,), cases=1)
    case, model = TASK.build(Letters(), LENGTH, 0, 0), tiny.model()
    assert len(full.answers) == len(window.answers) == len(case.questions) > 4
    for question, answer in list(zip(case.questions, full.answers))[::3]:
        context = [one for turn in case.turns[: question.after] for one in turn]
        assert answer == Letters().decode(stock_choice(context, question))
    last = Case(case.turns, case.questions[-1:])
    with kvsieve.stream(model, kvsieve.StreamingLLM(64)) as stream:
        alone = harness.run_case(stream, Letters(), TASK, last, settings(task="rps"), LENGTH, 0, progress=lambda tokens: None)
    assert alone.answers == window.answers[-1:]
    assert full.read == case.num_read


def test_the_first_option_of_a_list_is_right_in_a_fifth_of_the_cases() -> None:
    task = TASKS["grocery"]
    found = harness.guesses(task, {(900, index): task.build(Letters(), 900, 0, index) for index in range(60)})
    assert [guess.player for guess in found] == ["always the first option"]
    assert 0.1 < found[0].score < 0.3
