"""`kvsieve eval` as a command: tables and files, no finished case is lost, and mistakes are a line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from eval_cases import POLICIES, Chunky, Letters
from kvsieve.cli import main
from kvsieve.evals import harness, results
from kvsieve.evals.tasks import TASKS

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
