"""`kvsieve tune`: what it tries fits, what it recommends is what it measured, and what it found is not lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.cli import main
from kvsieve.errors import KvsieveError
from kvsieve.evals import tune
from kvsieve.evals.candidates import CANDIDATES
from kvsieve.evals.tune import Settings, Tried, best_of, front, in_python, is_bounded, line_of, run

TOKEN = 2 * 2 * 2 * 32 * 4
"""Bytes of a token of the tiny model."""

LENGTH = 1536


def model(dtype: torch.dtype = torch.float32) -> Any:
    """Heads of 32 channels, as codes in groups of 32 need them."""
    return tiny.model("llama", dtype, head_dim=32)


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % tiny.VOCAB for letter in text]])}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (model(dtype), Letters()))
    path = tmp_path / "text"
    path.write_text(
        "".join(f"the {number}th line of this text is not like the others, {number * 37 % 91}\n" for number in range(60))
    )
    return path


def settings(text: Path, **changes: Any) -> Settings:
    return Settings(**{"bytes": 600 * TOKEN, "text": text, "length": LENGTH, "seconds": 10_000.0, **changes})


def row(name: str, nll: float, held: int, seconds: float, *, fits: bool = True) -> Tried:
    return Tried(name, name, nll, held, seconds, 100, fits)


# ---------------------------------------------------------------------------------------------------------------------- choices


def test_the_front_is_what_nothing_beats() -> None:
    tried = [
        row("best", 2.0, 100, 9.0),
        row("small", 2.1, 10, 5.0),
        row("fast", 2.2, 90, 1.0),
        row("beaten", 2.2, 100, 5.0),
        row("over", 1.0, 10**9, 1.0, fits=False),
        row("nan", math.nan, 1, 0.1),
        row("twin", 2.1, 10, 5.0),
    ]
    assert [one.name for one in front(tried)] == ["best", "small", "fast", "twin"]


def test_the_best_is_the_smallest_of_the_fast_among_the_good() -> None:
    good = [row("best", 2.0, 100, 9.0), row("fast", 2.009, 90, 4.0), row("as fast", 2.008, 50, 4.4), row("slow", 2.0, 10, 4.7)]
    others = [row("worse", 2.02, 1, 0.1), row("over", 1.0, 10**9, 0.1, fits=False)]
    best = best_of([*others, *good])
    assert best is not None
    assert best.name == "as fast"
    assert best_of([row("over", 1.0, 10**9, 0.1, fits=False)]) is None


def test_the_line_of_python_is_the_policy() -> None:
    for text in ("streamingllm(64) | quantized(8, when='prefill')", "sirllm(64) >> full()", "quest(64) | think(0.5)", "h2o(80)"):
        policy = kvsieve.methods.parse(text)
        assert repr(eval(in_python(repr(policy)), {"kvsieve": kvsieve})) == repr(policy)


def test_what_evicts_is_bounded() -> None:
    kinds = {"full()": False, "full() | quantized(8)": False, "quest(1024)": False, "sirllm(64)": True, "snapkv(64)": True}
    assert {text: is_bounded(text) for text in kinds} == kinds
    assert is_bounded("streamingllm(64) | quantized(8, when='prefill')")
    assert not is_bounded("streamingllm(64) >> full()")


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda one: one.name)
def test_every_candidate_is_a_policy_that_can_be_saved(candidate: Any) -> None:
    for tokens in (0, 127, 128, 5000):
        made = candidate.text(tokens)
        assert (made is None) == (tokens < 128 and not candidate.holds_all)
        if made is not None:
            policy = kvsieve.methods.parse(made)
            assert repr(kvsieve.methods.parse(repr(policy))) == repr(policy)


# ------------------------------------------------------------------------------------------------------------------------- runs


def test_what_is_tried_fits_and_what_does_not_is_said(text: Path, capsys: Any) -> None:
    tried = run(settings(text))
    said = capsys.readouterr().out
    assert {one.tokens for one in tried} == {LENGTH}
    assert all(one.bytes_held <= 600 * TOKEN for one in tried if one.fits)
    assert all(one.fits for one in tried)
    assert all(math.isfinite(one.nll) for one in tried)
    names = {one.name for one in tried}
    # Of 1,536 tokens, 600 fit as they are and all of them in codes.
    assert "everything" not in names
    assert {"newest tokens", "surprising tokens in 8 bits", "everything in 8 bits", "everything in 4 bits"} <= names
    assert "not tried: everything (Full()): 1,536 tokens do not fit, about 600 would" in said
    best = best_of(tried)
    assert best is not None
    assert f"with kvsieve.stream(model, {in_python(best.policy)}) as stream:" in said
    # It need not be one for texts without end, and then both are named.
    assert ("It holds every token" in said) == (not is_bounded(best.policy))
    bounded = best_of([one for one in tried if is_bounded(one.policy)])
    assert bounded is not None
    assert line_of(bounded) in said
    # A budget is used: what evicts holds most of what is allowed.
    window = next(one for one in tried if one.name == "newest tokens")
    assert window.bytes_held > 0.7 * 600 * TOKEN


def test_quality_is_that_of_reading_the_text_in_one_piece(text: Path) -> None:
    """The second half, in nats a token, of a memory that forgets nothing: what the stock model says."""
    tried = run(settings(text, bytes=2000 * TOKEN, length=1024, policies=("full()",)))
    full = next(one for one in tried if one.policy == "Full()")
    ids = Letters()(text.read_text())["input_ids"][:, :1024]
    with torch.no_grad():
        logits = model()(ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert full.nll == pytest.approx(float(losses[511:].mean()), rel=1e-4)


def test_a_budget_that_holds_too_little_tries_what_it_can(text: Path, capsys: Any) -> None:
    with pytest.raises(KvsieveError, match=r"no policy holds 1,536 tokens of this text in 30,000 bytes; allow more --bytes"):
        run(settings(text, bytes=30_000))
    assert "newest tokens: 30,000 bytes are too few" in capsys.readouterr().out


def test_when_the_time_is_up_the_rest_is_said(text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    tried = run(settings(text, seconds=100.0))
    assert 1 <= len(tried) < 4
    assert "the time was up; more --seconds try it" in capsys.readouterr().out


def test_what_was_found_is_gone_on_with(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "tried.json"
    measure, done = tune._Work.measure, []

    def interrupted(self: Any, kind: Any, made: str, length: int) -> Tried:
        if length == LENGTH:
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(made)
        return measure(self, kind, made, length)

    with monkeypatch.context() as patched:
        patched.setattr(tune._Work, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings(text, json=path))
    assert "--resume" in capsys.readouterr().err
    held = json.loads(path.read_text())["tried"]
    assert 1 <= len(held) <= 3
    again = run(settings(text, json=path, resume=True))
    assert [one.policy for one in again[: len(held)]] == [one["policy"] for one in held]
    assert [one.seconds for one in again[: len(held)]] == [one["seconds"] for one in held]
    whole = run(settings(text))
    assert [(one.policy, one.nll) for one in again] == [(one.policy, one.nll) for one in whole]
    with pytest.raises(KvsieveError, match="bytes is"):
        run(settings(text, json=path, resume=True, bytes=700 * TOKEN))
    path.write_text("[]")
    with pytest.raises(KvsieveError, match="was not written by this command"):
        run(settings(text, json=path, resume=True))


def ended(arguments: list[str]) -> object:
    """The exit status, whoever says it."""
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--bytes", "12"], "cannot read the budget"),
        (["--bytes", "1MB", "--policy", "nothing(3)"], "nothing"),
        (["--bytes", "1MB", "--resume"], "name it by --json"),
        (["--bytes", "1MB", "--length", "99"], "1,024 tokens are needed at least"),
        (["--bytes", "1MB", "--length", "99999"], "give a longer one"),
        (["--bytes", "1MB", "--text", "/nowhere/x"], "/nowhere/x"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(text: Path, arguments: list[str], match: str, capsys: Any) -> None:
    given = ["tune", *arguments, *([] if "--text" in arguments else ["--text", str(text)])]
    assert ended(given) == 2
    assert match in capsys.readouterr().err


def test_the_picture_is_drawn(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kvsieve.view.front import plot_front

    plot_front([("a", 10**6, 2.0, True), ("b", 2 * 10**6, 2.5, False)], 3 * 10**6, tmp_path / "front.png", title="two")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="one point"):
        plot_front([], 1, tmp_path / "none.png")
