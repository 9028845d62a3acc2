"""`kvsieve bench`: what it writes, what it refuses, and that nothing wrong is ever timed. No test here looks at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kvsieve.bench import DTYPES, TABLES, Options, Shape, measure, report, rivals
from kvsieve.cli import main
from kvsieve.errors import AccuracyError, BenchError, KvsieveError

ATTEND = ["bench", "attend", "--quick", "--shape", "9/3/64", "--length", "1024", "--rounds", "3"]


def written(path: Path, argv: list[str]) -> dict[str, Any]:
    assert main([*argv, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert set(found) == {
        *(
            "table",
            "model",
            "weights",
            "compiled",
            "date",
            "versions",
            "cpu",
            "instruction_set",
            "threads",
            "clock",
            "rounds",
            "load_average",
            "rows",
            "skipped",
        ),
    }
    assert set(found["versions"]) == {"kvsieve", "torch", "transformers", "numpy", "python"}
    for row in found["rows"]:
        assert row["read_gb_per_s"] > 0
        for timing in row["times"].values():
            assert set(timing) == {"median_ms", "min_ms", "max_ms", "rounds", "calls"}
            assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["max_ms"]
    return found


def test_attend_writes_every_case_with_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(tmp_path / "attend.json", ATTEND)
    assert [row["dtype"] for row in found["rows"]] == list(DTYPES)
    out = capsys.readouterr().out
    for row in found["rows"]:
        assert (row["heads"], row["kv_heads"], row["head_dim"], row["length"]) == (9, 3, 64, 1024)
        assert {"read", "post_rope", "pre_rope", "generate_default", "packed_sdpa", row["best"]} <= set(row["times"])
        others = rivals.DECODE.keys() - (rivals.IN_F32 if row["dtype"] == "f32" else ())
        assert set(row["errors"]) == {"post_rope", "pre_rope", "generate_default", *others}
        for name in ("post_rope", "pre_rope", row["best"]):
            assert 0 < row["errors"][name] <= report.TOLERANCE[row["dtype"]]
        assert row["bytes_read"] == 2 * 3 * 64 * 1024 * (4 if row["dtype"] == "f32" else 2)
        assert row["ratios"]["generate_default"] > 0
        assert any(all(word in line for word in ("9/3/64", row["dtype"], row["best"])) for line in out.splitlines())


def test_search_writes_what_was_scored_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "search", "--shape", "9/3/64", "--dtype", "bf16", "--length", "2048", "4096", "--rounds", "3"]
    rows = written(tmp_path / "search.json", argv)["rows"]
    both, reads = (("HiP", 1024 + 256 + 16), ("Quest", 1024 + 256 + 64)), {"InfiniteHiP": 2048 + 1024 + 256}
    assert [(row["length"], row["policy"].split("(")[0]) for row in rows] == [
        *((2048, name) for name, _ in both),
        *((4096, name) for name in ("HiP", "InfiniteHiP", "Quest")),
    ]
    reads |= dict(both)
    for row in rows:
        assert set(row["seconds"]) == {"full", "every_step", "as_refreshed", "generate_default"}
        assert 0 < row["error"] <= report.TOLERANCE["bf16"]
        name = row["policy"].split("(")[0]
        assert row["read"] == 3 * reads[name]
        assert row["scored"] > 0
        assert row["cycle"] == (16 if name == "InfiniteHiP" else 8)
        assert row["layers"] * row["length"] * 2 * 3 * 64 * 2 >= measure.CACHE
    assert "read whole, nothing to measure" in capsys.readouterr().out


def test_decode_writes_every_policy_and_the_ceiling(tmp_path: Path) -> None:
    (row,) = written(tmp_path / "decode.json", ["bench", "decode", "--dtype", "f32", "--length", "64", "--rounds", "3"])["rows"]
    policies, rivals = {"Full", "StreamingLLM", "LMInfinite", "SirLLM"}, {"StaticCache", "QuantizedCache"}
    assert set(row["times"]) >= {"DynamicCache", "StaticCache", "alone", *policies}
    assert policies < set(row["times_as_fast"]) <= {*policies, *rivals, "alone"}
    assert row["amdahl"] == pytest.approx(row["times"]["DynamicCache"]["median_ms"] / row["times"]["alone"]["median_ms"], abs=1e-3)
    assert row["least_ms"] == pytest.approx((row["weight_bytes"] + row["kv_bytes"]) / row["read_gb_per_s"] / 1e6, rel=1e-2)
    assert row["bytes_held"]["DynamicCache"] == row["kv_bytes"] + row["kv_bytes"] // row["length"]
    assert row["ceiling"] == pytest.approx(1 + row["kv_bytes"] / row["weight_bytes"], abs=1e-4)
    assert row["kv_bytes"] == 30 * 2 * 3 * 64 * 4 * 64
    assert all(row["errors"][name] <= 1e-4 for name in policies)


def test_prefill_writes_the_dense_problem_and_the_windows(tmp_path: Path) -> None:
    argv = ["bench", "prefill", "--shape", "4/2/32", "--length", "1280", "--rounds", "3"]
    rows = written(tmp_path / "prefill.json", argv)["rows"]
    assert [row["dtype"] for row in rows] == list(DTYPES)
    for row in rows:
        policies = {"Full", "StreamingLLM", "LMInfinite"}
        assert {"generate_default", row["best"], *policies} <= set(row["times"])
        assert set(row["us_per_query"]) == policies
        assert all(0 < row["errors"][name] <= report.TOLERANCE[row["dtype"]] for name in (*policies, row["best"]))


def test_a_wrong_answer_is_an_error_and_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rivals.exact
    monkeypatch.setattr(rivals, "exact", lambda *given: right(*given) * 1.02)
    path = tmp_path / "wrong.json"
    assert main([*ATTEND, "--json", str(path)]) == 2
    assert "off float64" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"] == []


def test_a_formulation_that_is_not_exact_never_competes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rivals.DECODE, "nothing", lambda q, k, v, scale: torch.zeros_like(q))
    (row,) = written(tmp_path / "attend.json", [*ATTEND, "--dtype", "f32"])["rows"]
    assert row["errors"]["nothing"] == pytest.approx(1.0)
    assert "nothing" not in row["times"]


@pytest.mark.parametrize("name", list(rivals.DECODE))
def test_every_formulation_is_attention(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 16, generator=generator) for heads, n in ((6, 1), (2, 50), (2, 50)))
    want = rivals.exact(q, k, v, 0.3).flatten()
    torch.testing.assert_close(rivals.DECODE[name](q, k, v, 0.3).double().flatten(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(rivals.PREFILL))
def test_every_formulation_is_causal_attention(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 50, 16, generator=generator) for heads in (6, 2, 2))
    want = rivals.exact(q, k, v, 0.3, causal=True)
    torch.testing.assert_close(rivals.PREFILL[name](q, k, v, 0.3).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rivals.generate_default(q, k, v, 0.3).double(), want, rtol=1e-5, atol=1e-5)


def test_being_worse_than_torch_is_an_error() -> None:
    assert report.check("x", "f32", 5e-6, 5e-6) == 5e-6
    assert report.check("x", "bf16", 1e-3, 1e-4) == 1e-3, "rounding to bfloat16 alone costs more than torch's error here"
    for error, torchs in ((2e-5, 1.0), (8e-6, 5e-6), (float("nan"), 1.0)):
        with pytest.raises(AccuracyError):
            report.check("x", "f32", error, torchs)


def test_what_does_not_fit_is_skipped_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "available_bytes", lambda: 1 << 20)
    found = written(tmp_path / "none.json", [*ATTEND, "--dtype", "bf16"])
    assert found["rows"] == []
    assert [skipped["what"] for skipped in found["skipped"]] == ["9/3/64 bf16 1024"]
    assert "9/3/64 bf16 1024: skipped" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "argv",
    [
        ["attend", "--shape", "9/3"],
        ["attend", "--shape", "9/2/64"],
        ["attend", "--shape", "9/3/63"],
        ["attend", "--shape", "0/3/64"],
        ["attend", "--shape", "a/b/c"],
        ["attend", "--length", "8"],
        ["prefill", "--rounds", "2"],
        ["attend", "--resume"],
        ["attend", "--plot", "x.pdf"],
        ["decode", "--model", "nowhere"],
        ["policies", "--model", "nowhere"],
        ["policies", "--policy", "juggle(3)"],
    ],
)
def test_what_cannot_be_measured_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("kvsieve: ")


@pytest.mark.parametrize("argv", [[], ["race"], ["attend", "--dtype", "int8"], ["attend", "--threads", "0"]])
def test_unknown_words_are_a_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *argv])
    assert stop.value.code == 2
    assert "usage: kvsieve bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "given"),
    [
        ("race", {}),
        ("decode", {"shapes": ["9/3/64"]}),
        ("attend", {"dtypes": ["int8"]}),
        ("attend", {"lengths": [0]}),
        ("attend", {"rounds": 0}),
        ("attend", {"threads": 0}),
        ("attend", {"model": "smollm2"}),
        ("decode", {"policies": ["full()"]}),
    ],
)
def test_options_are_checked(table: str, given: dict[str, Any]) -> None:
    with pytest.raises(BenchError) as error:
        Options.of(table, **given)
    assert isinstance(error.value, KvsieveError)
    assert isinstance(error.value, ValueError)


def test_options_by_default() -> None:
    for name, table in TABLES.items():
        assert Options.of(name).lengths == table.lengths
        assert set(Options.of(name, quick=True).lengths) < set(table.lengths)
    whole = Options.of("attend")
    assert whole.lengths == tuple(1024 << i for i in range(8))
    assert [str(shape) for shape in whole.shapes] == ["9/3/64", "32/8/128"]
    assert whole.dtypes == ("f32", "bf16", "f16")
    assert (whole.rounds, whole.threads) == (9, 1)
    assert Shape.parse("32/8/128").token_bytes(2) == 4096


def test_a_file_that_cannot_be_written_is_found_out_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*ATTEND, "--json", str(tmp_path / "no" / "where.json")])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "where.json" in captured.err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from kvsieve.cli import main\n"
        "try: main(['bench', 'attend', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: kvsieve bench attend" in done.stdout


# -------------------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Stands still unless something takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, then: float | None = None) -> Any:
        """A run of so many seconds; of ``then`` seconds from its fourth call on."""
        calls = []

        def run() -> None:
            calls.append(None)
            self.now += seconds if then is None or len(calls) < 4 else then

        run.calls = calls  # type: ignore[attr-defined]
        return run


def test_short_calls_are_repeated_and_long_ones_get_fewer_rounds() -> None:
    clock = Clock()
    short, long = clock.takes(1e-4), clock.takes(0.5)
    found = measure.interleaved({"short": short, "long": long}, 9, clock=clock)
    assert (found["short"].rounds, found["short"].calls) == (9, 20)
    assert (found["long"].rounds, found["long"].calls) == (5, 1)
    assert len(short.calls) == 2 + 9 * 20
    assert found["short"].median == pytest.approx(1e-4)
    assert found["long"].min == found["long"].max == 0.5
    once = clock.takes(1e-4)
    measure.interleaved({"once": once}, 9, clock=clock, repeat=False)
    assert len(once.calls) == 2 + 9


def test_the_median_stands_between_the_least_and_the_greatest() -> None:
    clock = Clock()
    found = measure.interleaved({"x": clock.takes(0.01, then=0.03)}, 3, clock=clock)["x"]
    assert (found.min, found.median, found.max) == pytest.approx((0.01, 0.03, 0.03))
    assert found.as_dict() == {"median_ms": 30.0, "min_ms": 10.0, "max_ms": 30.0, "rounds": 3, "calls": 1}


def test_copies_take_turns_over_more_than_the_caches() -> None:
    ring = measure.Ring(lambda i: i, bytes_each=(64 << 20) + 1)
    assert [ring.next() for _ in range(5)] == [0, 1, 2, 0, 1]
    assert len(measure.Ring(lambda i: i, bytes_each=1 << 40).copies) == 1


def test_the_machine_is_put_back() -> None:
    threads = torch.get_num_threads()
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(2)
    with contextlib.suppress(KeyError), measure.steady(1):
        assert torch.get_num_threads() == 1
        if cpus is not None:
            assert len(os.sched_getaffinity(0)) == 1
        raise KeyError
    assert torch.get_num_threads() == 2
    if cpus is not None:
        assert os.sched_getaffinity(0) == cpus
    torch.set_num_threads(threads)
