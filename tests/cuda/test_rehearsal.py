"""`make gpu` cannot run here; its rehearsal can, so that it does not rot until a GPU is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest


def test_every_section_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert set(record) == {name for name, _ in gpu.SECTIONS}
    assert gpu.errors(record) == []
    assert set(record["attention"]) - {"seconds"} == {"200", "500"}
    for row in (record["attention"]["200"], record["attention"]["500"]):
        assert {"kvsieve rotated", "kvsieve raw", "sdpa", "flex", "copy"} <= set(row)
    assert {"thin 0.5", "thin 0.4", "4 bits", "thin 0.5, raw"} <= set(record["packed"])
    assert record["packed"]["4 bits"]["bytes"] < record["packed"]["thin 0.5"]["bytes"] < record["packed"]["plain"]["bytes"]
    for row in (record["sparse"]["200"], record["sparse"]["500"]):
        assert {"dense", "HiP", "InfiniteHiP", "chunk"} <= set(row)
        assert row["HiP"]["keys_read"] < 200
        assert {"choice stands", "from stage 1", "from stage 2", "from stage 3"} <= set(row["InfiniteHiP"])
    for row in (record["fetching"]["200"], record["fetching"]["500"]):
        assert {"dense", "InfLLM", "InfLLM per head", "LongHeads"} <= set(row)
        assert row["LongHeads"]["tokens_read"] <= 64 < row["LongHeads"]["compared"] * 16
    assert 0 < record["host"]["loaded"] <= record["host"]["fetched"] == 3
    for row in (record["systems"]["200"], record["systems"]["500"]):
        assert {"dense", "SelectiveV", "RefreshKV", "Quest", "MemoryBank", "HiP past the length"} <= set(row)
        assert row["SelectiveV"]["100 values: mass"] < 1
        assert row["RefreshKV"]["relative_error"] is not None
    assert record["whole_token"]["SirLLM 500"]["captures"] == 1
    assert "SirLLM" in capsys.readouterr().out


def test_a_section_that_fails_is_reported_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(b: gpu.Bench) -> dict[str, object]:
        raise RuntimeError("the GPU is on fire")

    monkeypatch.setattr(gpu, "SECTIONS", [("about", gpu.about), ("broken", fails), ("copy", gpu.copy_bandwidth)])
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert "on fire" in record["broken"]["error"]
    assert "gb_per_s" in record["copy"]
    assert "FAILED /broken" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main([]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
