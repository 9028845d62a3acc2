"""The counts on the page of guarantees are those of the last recorded run of the fault matrix."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fault_matrix", Path(__file__).with_name("run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_matrix"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_record_does(matrix: ModuleType) -> None:
    if not matrix.RECORD.exists():
        pytest.skip('no run is recorded; make faults FAULT_ARGS="--record benches/record/faults.json", then run.py --page')
    record = json.loads(matrix.RECORD.read_text(encoding="utf-8"))
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.page(text, record) == text, "python tests/faults/run.py --page"
    assert [row["row"] for row in record["rows"]] == list(matrix.ROWS)
    assert all(row["count"] > 0 and row["wrong"] == [] for row in record["rows"])
    other = {**record, "rows": [{**record["rows"][0], "count": 1}, *record["rows"][1:]]}
    assert matrix.page(text, other) != text


@pytest.mark.parametrize(
    ("script", "count", "wrong"),
    [
        ('print(\'{"tried": 3, "wrong": []}\\n{"tried": 4, "wrong": []}\')', 7, []),
        ('print(\'{"tried": 3, "wrong": ["this"]}\'); raise SystemExit(1)', 3, ["this"]),
        ('print(\'{"tried": 3, "wrong": []}\'); raise SystemExit("it fell over")', 3, ["it fell over"]),
        ("import os; os.abort()", 0, ["ended without a word"]),
    ],
)
def test_what_a_script_finds_is_counted_and_what_goes_wrong_is_told(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, count: int, wrong: list[str]
) -> None:
    (tmp_path / "one.py").write_text(script, encoding="utf-8")
    row: Any = matrix.Row("a promise", "tries", (str(tmp_path / "one.py"), "{n}"), 5, matrix.total("tried"))
    monkeypatch.setitem(matrix.ROWS, "one", row)
    found = matrix.run("one", 2.0)
    assert (found["count"], found["wrong"]) == (count, wrong)
    assert found["command"].endswith(" 10")


def test_every_script_of_a_row_is_there(matrix: ModuleType) -> None:
    assert all(Path(matrix.__file__).with_name(row.script[0]).is_file() for row in matrix.ROWS.values())
