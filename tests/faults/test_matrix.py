"""The counts on the page of guarantees are those of the last recorded run of the fault matrix."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import load


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return load("tests/faults/run.py")


def test_the_page_says_what_the_record_does(matrix: ModuleType) -> None:
    if not matrix.RECORD.exists():
        pytest.skip('no run is recorded; make faults FAULT_ARGS="--whole --record", then run.py --page')
    record = json.loads(matrix.RECORD.read_text(encoding="utf-8"))
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.page(text, record) == text, "python tests/faults/run.py --page"
    assert [row["row"] for row in record["rows"]] == list(matrix.ROWS)
    assert all(row["count"] > 0 for row in record["rows"])
    named = text.partition("## Not promised")[2]
    assert all(f"`{row['row']}`" in named for row in record["rows"] if row["wrong"]), "what does not hold is named at the end"
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
    row: Any = matrix.Row("a promise", "tries", (str(tmp_path / "one.py"), "{n}"), 5, 7, matrix.total("tried"))
    monkeypatch.setitem(matrix.ROWS, "one", row)
    found = matrix.run("one", 2.0)
    assert (found["count"], found["wrong"]) == (count, wrong)
    assert found["command"].endswith(" 10")


def test_a_whole_run_is_as_much_as_its_row_says_and_more_of_a_row_is_more_of_it(matrix: ModuleType) -> None:
    files, memory = matrix.ROWS["files"], matrix.ROWS["memory"]
    assert files.command(None)[-1] == "1000000"
    assert files.command(2.0)[-1] == str(2 * files.size)
    assert memory.command(6.0)[-1] == "1", "every place, where otherwise every sixth one is tried"
    assert all(row.whole >= row.size or "--every" in row.script for row in matrix.ROWS.values())


def test_a_row_takes_its_own_place_in_the_record(matrix: ModuleType, tmp_path: Path) -> None:
    path, names = tmp_path / "record" / "faults.json", list(matrix.ROWS)
    for name, count in ((names[2], 1), (names[0], 2), (names[2], 3)):
        matrix.recorded(path, {"row": name, "count": count})
    assert json.loads(path.read_text())["rows"] == [{"row": names[0], "count": 2}, {"row": names[2], "count": 3}]


def test_days_and_machines_are_told_of_each_row(matrix: ModuleType) -> None:
    row = {"count": 1234, "unit": "files", "wrong": [], "seconds": 5, "command": "x.py 1", "machine": "A (2 cores, x)"}
    one, other = ({**row, "row": name, "date": f"{day} May 2030"} for name, day in (("files", 1), ("GIL", 2)))
    text = matrix.table({"rows": [one, {**other, "wrong": ["this"]}]})
    assert "Recorded 1 May 2030 on machine A (2 cores, x) by `python tests/faults/run.py --record`: files." in text
    assert "Recorded 2 May 2030" in text
    assert "| 1,234 files | holds | 5 | `x.py 1` |" in text
    assert "| 1 wrong |" in text
    assert "each row." in matrix.table({"rows": [one]})


def test_every_script_of_a_row_is_there(matrix: ModuleType) -> None:
    assert all(Path(matrix.__file__).with_name(row.script[0]).is_file() for row in matrix.ROWS.values())


def test_memory_that_grows_with_a_text_is_told_and_a_chunk_of_ids_more_is_not(matrix: ModuleType) -> None:
    long_run = load("tests/faults/long_run.py")

    def wrong(tokens: int, leak: float, more: int) -> list[str]:
        samples = [(at, 10**8 + round(leak * at) + (more if 2 * at > tokens else 0), 0) for at in range(0, tokens, tokens // 64)]
        slope, _, between = long_run.slopes(samples, slice(16), slice(-16, None))
        row = {"way": "feed", "policy": "one", "slower": 1.0, "us_of_columns": 0.0, "us_a_token_early": 1.0}
        measured = {"bytes_per_1000_tokens": 1000 * slope, "chunk_per_1000_tokens": 1000 * long_run.CHUNK / between}
        return list(long_run.verdict({**row, **measured}))

    assert wrong(50_000, 0.0, long_run.CHUNK) == []
    assert wrong(50_000, 1.0, long_run.CHUNK) == []
    assert len(wrong(50_000, 2.0, 0)) == 1
    assert len(wrong(50_000, 0.0, 3 * long_run.CHUNK)) == 1
    assert len(wrong(1_000_000, 1.1, 0)) == 1, "over a long text a chunk is nothing"
