"""`kvsieve bench` stopped, gone on with, or unable to write; its pictures; and `policies`, without its processes."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kvsieve
import pages
import pytest
import tiny
import torch
from kvsieve.bench import Options, alone, attend, decode, picture, policies, subject
from kvsieve.bench.alone import Job
from kvsieve.bench.caches import RIVALS, cache_bytes, make_cache
from kvsieve.bench.report import Report
from kvsieve.bench.run import run
from kvsieve.cli import main
from kvsieve.errors import AccuracyError, BenchError
from kvsieve.facts import LayerRope

ATTEND = ["bench", "attend", "--quick", "--shape", "9/3/64", "--length", "1024", "--rounds", "3"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes that are measured, of which nothing is measured really."""
    asked: list[str] = []

    def measure(shape: Any, dtype: str, length: int, rounds: int, clock: Any, report: Report) -> None:
        if dtype == "f16" and "f16" not in asked:
            asked.append(dtype)
            raise KeyboardInterrupt
        asked.append(dtype)
        timed = {"median_ms": 1.0, "min_ms": 0.5, "max_ms": 2.0, "rounds": 3, "calls": 1}
        times = dict.fromkeys(("post_rope", "pre_rope", "generate_default", "packed_sdpa"), timed)
        facts = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.dim, "dtype": dtype, "length": length}
        speeds = {"read_gb_per_s": 9.0, "gb_per_s": 8.0, "of_read": 0.9, "best": "packed_sdpa", "bytes_read": 1}
        ratios = dict.fromkeys(times, 1.0)
        errors = {"post_rope": 1e-7, "generate_default": 1e-7}
        report.row(**facts, **speeds, ratios=ratios, errors=errors, times=times)

    monkeypatch.setattr(attend, "measure", measure)
    return asked


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_was_measured_before_an_interruption_is_not_measured_again(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attend.json"
    argv = [*ATTEND, "--json", str(path)]
    assert main(argv) == 130
    assert f"2 rows are in {path}: go on with --resume" in capsys.readouterr().err
    assert [row["dtype"] for row in json.loads(path.read_text())["rows"]] == ["f32", "bf16"]
    assert main([*argv, "--resume"]) == 0
    assert measured == ["f32", "bf16", "f16", "f16"]
    assert [row["dtype"] for row in json.loads(path.read_text())["rows"]] == ["f32", "bf16", "f16"]
    out = capsys.readouterr().out
    assert all(f" {dtype} " in out for dtype in ("f32", "bf16", "f16"))
    # Rows that this run does not ask for stay.
    assert main([*argv, "--resume", "--dtype", "bf16"]) == 0
    assert sorted(row["dtype"] for row in json.loads(path.read_text())["rows"]) == ["bf16", "f16", "f32"]
    assert main([*argv, "--dtype", "bf16"]) == 0
    assert [row["dtype"] for row in json.loads(path.read_text())["rows"]] == ["bf16"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "was not written by this command"),
        ("[]", "was not written by this command"),
        ('{"rows": [3]}', "was not written by this command"),
        ('{"table": "decode", "rows": []}', "is of another run: table is 'decode' there"),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_with(
    content: str, said: str, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attend.json"
    path.write_text(content)
    assert main([*ATTEND, "--json", str(path), "--resume"]) == 2
    assert said in one_line(capsys)
    assert path.read_text() == content
    assert measured == []


def test_a_full_disk_is_one_line_and_what_was_there_stays(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attend.json"
    assert main([*ATTEND, "--json", str(path), "--dtype", "f32"]) == 0
    before = path.read_bytes()
    capsys.readouterr()

    def fsync(held: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert main([*ATTEND, "--json", str(path), "--dtype", "bf16", "--resume"]) == 2
    assert "No space left on device" in one_line(capsys)
    assert path.read_bytes() == before
    assert [name.name for name in tmp_path.iterdir()] == ["attend.json"]


# --------------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_drawn_of_the_rows_and_is_the_same_every_time(tmp_path: Path, measured: list[str]) -> None:
    pytest.importorskip("matplotlib")
    one, two, pixels = (tmp_path / name for name in ("one.svg", "two.svg", "three.png"))
    for path in (one, two, pixels):
        assert main([*ATTEND, "--dtype", "f32", "bf16", "--plot", str(path)]) == 0
    assert one.read_bytes() == two.read_bytes()
    assert all(word in one.read_text() for word in ("9/3/64 bf16", "pre_rope", "kvsieve bench attend"))
    assert pixels.read_bytes().startswith(b"\x89PNG")


def test_a_line_of_the_picture_is_a_column_of_the_rows() -> None:
    timed = {"median_ms": 3.0}
    row = {"dtype": "f32", "name": "Full()", "bytes_held": 2 << 20, "resident_bytes": 5 << 20, "times": {"token": timed}}
    rows = [{**row, "length": 64}, {**row, "length": 32, "resident_bytes": None}]
    time, held, process = picture.panels({"table": "policies", "rows": rows})
    assert (time.lines[0].name, time.lines[0].lengths, time.lines[0].values) == ("Full()", [32, 64], [3.0, 3.0])
    assert held.lines[0].values == [2.0, 2.0]
    assert (process.lines[0].lengths, process.lines[0].values) == ([64], [5.0])
    with pytest.raises(BenchError, match="nothing to draw"):
        picture.draw({"rows": []}, Path("x.svg"))


# --------------------------------------------------------------------------------------------------------------------- policies


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes load the tiny model."""
    monkeypatch.setattr(alone, "load", lambda name, dtype: (tiny.model(), None))
    monkeypatch.setattr(subject, "VOCABULARY", tiny.VOCAB)


def job(name: str, longest: int = 200) -> Job:
    return Job(name, "random", "float32", longest, 32, 1)


@pytest.mark.usefixtures("small")
def test_every_exact_cache_reads_on_to_the_same_logits() -> None:
    found = {}
    for name in ("DynamicCache", "StaticCache", "Full()"):
        with ExitStack() as left:
            work = alone.Work(job(name), left)
            told = [work.read(70), work.token(), work.token(), work.read(150)]
            assert (told[0]["read"], told[3]["read"]) == (70, 150 - 73)
            found[name] = torch.tensor([told[0]["logits"], told[3]["logits"]])
            assert told[3]["bytes_held"] > told[0]["bytes_held"] > 0
            assert told[3]["resident_bytes"] is None or told[3]["resident_bytes"] > 50 << 20
    torch.testing.assert_close(found["StaticCache"], found["DynamicCache"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["Full()"], found["DynamicCache"], rtol=1e-4, atol=1e-4)


class Beside:
    """Stands for a process: a thread that serves."""

    def __init__(self, context: Any, given: Job) -> None:
        self.name = given.name
        self._pipe, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=alone.serve, args=(theirs, given))
        self._thread.start()

    __call__ = policies.Alone.__call__
    answer = policies.Alone.answer
    opened = policies.Alone.opened

    def close(self) -> None:
        self._pipe.close()
        self._thread.join()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, small: None) -> Iterator[None]:
    monkeypatch.setattr(policies, "Alone", Beside)
    monkeypatch.setattr("kvsieve.evals.models.quietly", lambda: ExitStack())
    monkeypatch.setattr(policies, "readers", lambda: (1 << 20, {"read": lambda: None}))
    yield
    assert threading.active_count() < 20


POLICIES = ["bench", "policies", "--rounds", "3", "--policy", "full()", "streamingllm(64)", "--length", "40", "130"]


@pytest.mark.usefixtures("beside")
def test_policies_writes_every_policy_beside_transformers_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policies.json"
    assert main([*POLICIES, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    ours = ["Full()", "StreamingLLM(budget=64, sinks=4)"]
    assert [(row["length"], row["name"]) for row in rows if row["name"] != "QuantizedCache"] == [
        (length, name) for length in (40, 130) for name in ("DynamicCache", "StaticCache", *ours)
    ]
    held = {(row["length"], row["name"]): row["bytes_held"] for row in rows}
    assert held[130, ours[1]] < held[130, "Full()"]
    assert all(row["times"]["token"]["rounds"] == 3 and row["times_as_fast"] > 0 for row in rows)
    assert all(row["error"] < 1e-3 for row in rows if row["name"] in policies.EXACT)
    out = capsys.readouterr().out
    told = json.loads(path.read_text())
    told["rows"] = [row for row in rows if row["length"] == 40 or row["name"] != ours[1]]
    path.write_text(json.dumps(told))
    assert main([*POLICIES, "--json", str(path), "--resume"]) == 0
    again = json.loads(path.read_text())["rows"]
    assert sorted((row["length"], row["name"]) for row in again) == sorted(held)
    assert [row for row in again if row["name"] != ours[1]] == [row for row in rows if row["name"] != ours[1]]
    assert ours[1] in out


@pytest.mark.usefixtures("beside")
def test_what_should_be_exact_and_is_not_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies.TOLERANCE, "f32", -1.0)
    with pytest.raises(AccuracyError, match="nothing was timed"):
        policies.run(Options.of("policies", lengths=[40], policies=["full()"]), Report(Options.of("policies")))


@pytest.mark.usefixtures("small")
def test_a_process_that_is_gone_is_an_error() -> None:
    gone = Beside.__new__(Beside)
    gone.name = "Full()"
    gone._pipe, theirs = multiprocessing.Pipe()
    theirs.close()
    gone._process = type("Gone", (), {"join": lambda self, seconds: None, "exitcode": -9})()  # type: ignore[attr-defined]
    with pytest.raises(BenchError, match=r"its process ended \(exit -9\)"):
        gone("token")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_keys_that_are_rotated_back_are_those_before_the_rotation(layout: Any) -> None:
    rope = LayerRope(1e4 ** (-torch.arange(6).double() / 6), layout, 1.25)
    keys, positions = torch.randn(2, 5, 16), [0, 3, 4, 900, 70_000]
    rotated = rope.rotate(keys.double(), torch.tensor(positions)).float()
    torch.testing.assert_close(subject.unrotated(rotated, positions, rope), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_named_model_has_read_a_text(compiled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bounded policies hold tokens of it where they were, and every answer is compared before anything is timed."""
    letters = pages.Letters()
    made = copy.deepcopy(tiny.model())
    monkeypatch.setattr(
        "kvsieve.evals.models.load_model", lambda name, dtype: (made, lambda text, **_: letters(text, return_tensors="pt"))
    )
    monkeypatch.setattr(decode, "BUDGET", 32)
    monkeypatch.setattr(decode, "BOUNDED", {"LMInfinite": lambda: kvsieve.LMInfinite(28, sinks=4)})
    asked: list[bool] = []

    def compile(model: Any, disable: bool = False) -> None:
        asked.append(not disable)
        kvsieve.compiling.compile(model, disable=disable, **({} if disable else {"backend": "eager"}))

    monkeypatch.setattr(kvsieve, "compile", compile)
    subject.load.cache_clear()
    report = Report(Options.of("decode", model="mine"))
    monkeypatch.setattr(decode, "cells", lambda row: [])
    try:
        decode.run(Options.of("decode", model="mine", dtypes=["f32"], lengths=[90], rounds=3, compiled=compiled), report)
    finally:
        subject.load.cache_clear()
    (row,) = report.content["rows"]
    assert asked == ([True, False] if compiled else [])
    assert made.get_decoder()._compiled_call_impl is None
    assert row["resident"]["LMInfinite"] <= 32
    assert all(row["errors"][name] < 1e-4 for name in ("Full", "LMInfinite", "StaticCache"))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_named_model_is_loaded_once(weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(
        "kvsieve.evals.models.load_model", lambda name, dtype: (loaded.append(name) or copy.deepcopy(tiny.model()), None)
    )
    monkeypatch.setattr(decode.Case, "__init__", lambda *args: None)
    monkeypatch.setattr(decode.Case, "measure", lambda *args: None)
    subject.load.cache_clear()
    try:
        run(Options.of("decode", model="mine", dtypes=["f32"], lengths=[90], rounds=3, weights=weights))
    finally:
        subject.load.cache_clear()
    assert loaded == ["mine"]


def test_bytes_of_a_cache_are_those_of_its_storages() -> None:
    config = tiny.model().config
    for name in RIVALS:
        try:
            cache = make_cache(name, config, 64)
        except NotImplementedError:
            assert name == "QuantizedCache"
            continue
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for index in range(config.num_hidden_layers):
            cache.update(torch.zeros(1, heads, 16, dim), torch.zeros(1, heads, 16, dim), index)
        plain = 2 * 4 * 16 * heads * dim * config.num_hidden_layers
        assert {"DynamicCache": plain, "StaticCache": 4 * plain}.get(name, cache_bytes(cache)) <= cache_bytes(cache) < 5 * plain
