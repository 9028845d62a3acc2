"""`kvsieve eval perplexity`: the numbers are those of stock attention, and what was read is not read again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from kvsieve.cli import main
from kvsieve.evals import perplexity

TEXT = "".join(chr(97 + (7 * i + i // 11) % 26) for i in range(400))


class Letters:
    """A tokenizer with one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[3 + ord(letter) % (tiny.VOCAB - 3) for letter in text]])}


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(dtype=dtype), Letters()))
    where = ["--text", str(tmp_path / "text"), "--json", str(tmp_path / "rows.json")]
    return ["eval", "perplexity", "--length", "320", "--chunk", "48", "--bucket", "40", *where]


Rows = Callable[[], dict[str, Any]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return lambda: {row["policy"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}


def test_the_full_cache_has_the_perplexity_of_stock_attention(argv: list[str], rows: Rows, capsys: Any) -> None:
    assert main([*argv, "--policy", "full()", "streamingllm(64)"]) == 0
    ids = Letters()(TEXT)["input_ids"][:, :320]
    with torch.no_grad():
        losses = F.cross_entropy(tiny.model()(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
    full, window = rows().values()
    assert full["mean"] == pytest.approx(float(losses.mean()), abs=1e-4)
    curve = [float(part.mean()) for part in (losses[:39], *torch.split(losses[39:], 40))]
    assert full["nll"] == pytest.approx(curve, abs=1e-4)
    assert full["tail"] == pytest.approx(float(losses[239:].mean()), abs=1e-4)
    assert window["nll"][0] == pytest.approx(curve[0], abs=1e-4)
    assert abs(window["mean"] - full["mean"]) > 1e-3, "a window of 64 tokens forgets"
    assert 0 < window["bytes_held"] < full["bytes_held"]
    table = capsys.readouterr().out
    assert f"{math.exp(full['mean']):.2f}" in table
    assert "StreamingLLM(budget=64" in table


def test_an_interrupted_run_goes_on(argv: list[str], rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read, asked = "full()", perplexity._read, []

    def interrupted(model: Any, policy: Any, *rest: Any) -> perplexity.Row:
        asked.append(repr(policy))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read(model, policy, *rest)

    monkeypatch.setattr(perplexity, "_read", interrupted)
    argv = [*argv, "--policy", first, "streamingllm(64)", "lminfinite(64)"]
    assert main(argv) == 130
    held = rows()
    assert list(held) == asked[:1]
    assert main([*argv, "--resume"]) == 0
    assert len(asked) == 4
    assert asked[0] not in asked[1:], "what was read is not read again"
    assert len(rows()) == 3
    assert rows()[asked[0]] == held[asked[0]]
    before = rows()
    assert main([*argv, "--resume"]) == 0
    assert len(asked) == 4
    assert rows() == before


def test_without_resume_everything_is_read_again(argv: list[str], rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = perplexity._read, []
    monkeypatch.setattr(perplexity, "_read", lambda model, policy, *rest: (asked.append(policy), read(model, policy, *rest))[1])
    for policies in (["full()"], ["full()"], ["streamingllm(64)"]):
        assert main([*argv, "--policy", *policies]) == 0
    assert len(asked) == 3
    assert len(rows()) == 1


@pytest.mark.parametrize(
    "change", ["length 319", "chunk 47", "bucket 39", "dtype bfloat16", "backend cpu", "model other", "threads 2", "text"]
)
def test_rows_of_another_run_are_refused(argv: list[str], change: str, rows: Rows, capsys: Any, tmp_path: Path) -> None:
    assert main([*argv, "--policy", "full()"]) == 0
    held, (name, *value), threads = rows(), change.split(), torch.get_num_threads()
    if not value:
        (tmp_path / "text").write_text(TEXT.upper())
    other = [f"--{name}", *value] if value else []
    try:
        assert main([*argv, "--policy", "full()", "streamingllm(64)", "--resume", *other]) == 2
    finally:
        torch.set_num_threads(threads)
    assert f"is of another run: {name} is" in capsys.readouterr().err
    assert rows() == held


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "fulll()"], "fulll"),
        (["--policy", "full()", "--length", "1"], "2 tokens at least"),
        (["--policy", "full()", "--length", "5000"], "the text has 400 tokens"),
        (["--policy", "full()", "--text", "no/such/text"], "No such file"),
    ],
)
def test_what_cannot_be_is_said_at_once(argv: list[str], more: list[str], said: str, capsys: Any, tmp_path: Path) -> None:
    assert main([*argv, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("not json", "was not written by"),
        ('{"settings": {}}', "was not written by"),
        ('{"settings": [], "rows": []}', "is of another run"),
        ('{"settings": {}, "rows": [{"policy": "Full()", "nll": [], "mean": null}]}', "was not written by"),
        ('{"settings": {}, "rows": [3]}', "was not written by"),
    ],
)
def test_a_file_of_something_else_is_left_alone(argv: list[str], held: str, said: str, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(held)
    assert main([*argv, "--policy", "full()", "--resume"]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == held


def test_resume_needs_a_file(argv: list[str], capsys: Any) -> None:
    where = argv.index("--json")
    assert main([*argv[:where], *argv[where + 2 :], "--policy", "full()", "--resume"]) == 2
    assert "--json" in capsys.readouterr().err
