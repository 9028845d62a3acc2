"""The harness of benches/peers: its protocol, its turns, its files and its table. No rival is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import cases, driver, environments, run, table, worker

ECHO = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if request["do"] == "hang":
        time.sleep(60)
    if request["do"] == "babble":
        print("hello", flush=True)
    if request["do"] == "fail":
        print(json.dumps({"error": "ValueError: no"}), flush=True)
    print(json.dumps({"pid": os.getpid(), **request}), flush=True)
"""


@pytest.fixture
def workers(tmp_path: Path) -> Any:
    def start(name: str) -> driver.Process:
        return driver.Process([sys.executable, "-S", "-c", ECHO], tmp_path / f"{name}.log", {"PYTHONPATH": ""})

    made = driver.Workers(start, timeout=20)
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------------------------- processes


def test_a_worker_answers_again_and_again_in_the_same_process(workers: driver.Workers) -> None:
    first, second = (workers.ask("a", {"do": "x", "long": "z" * 200_000, "n": n}) for n in range(2))
    assert (first["n"], second["n"], second["pid"]) == (0, 1, first["pid"])
    assert workers.ask("b", {"do": "x"})["pid"] != first["pid"]


def test_a_worker_that_dies_is_a_fault_with_its_last_words_and_starts_anew(workers: driver.Workers) -> None:
    before = workers.ask("a", {"do": "x"})["pid"]
    with pytest.raises(driver.Fault, match="ended with 3: out of luck"):
        workers.ask("a", {"do": "die"})
    assert workers.ask("a", {"do": "x"})["pid"] != before


def test_a_worker_that_hangs_is_a_fault_and_ends(workers: driver.Workers) -> None:
    workers.ask("a", {"do": "x"})
    process = workers._running["a"]
    assert isinstance(process, driver.Process)
    with pytest.raises(driver.Fault, match=r"no answer within 0.2 seconds"):
        process.ask({"do": "hang"}, 0.2)
    assert process._process.returncode is not None


def test_an_error_and_an_answer_that_is_none_are_faults(workers: driver.Workers) -> None:
    with pytest.raises(driver.Fault, match="ValueError: no"):
        workers.ask("a", {"do": "fail"})
    with pytest.raises(driver.Fault, match="no JSON"):
        workers.ask("b", {"do": "babble"})


def test_a_rivals_exception_is_an_answer_of_one_line_and_the_next_request_is_served() -> None:
    class Rival:
        packages = ()

        def encode(self, text: str) -> list[int]:
            if text == "bad":
                raise RuntimeError("one\n  two")
            return [1]

        def weights_bytes(self) -> int:
            return 7

        def score(self, row: Any, prompt: Any, following: Any) -> tuple[list[float], list[int]]:
            return [float("nan")], []

    said: list[str] = []
    requests = [{"do": "hello", "text": "bad"}, {"do": "hello", "text": "good"}, {"do": "dance"}]
    requests += [{"do": "score", "row": {}, "prompt": [], "following": []}]
    worker.serve(Rival, iter([json.dumps(one) for one in requests]), said.append)
    errors = [json.loads(line).get("error") for line in said]
    assert errors[0] == "RuntimeError: one two"
    assert json.loads(said[1]) == {"versions": {}, "ids": [1], "weights_bytes": 7}
    assert errors[2] == "ValueError: no request 'dance'"
    assert "not finite" in errors[3]


# -------------------------------------------------------------------------------------------------------------------------- turns


def test_rows_take_turns_and_one_that_fails_gets_no_other() -> None:
    lacking, order, failed = {"a": 3, "b": 3, "c": 2}, [], {}

    def measure(key: str) -> None:
        order.append(key)
        if key == "b" and order.count("b") == 2:
            raise driver.Fault("gone")
        lacking[key] -= 1

    driver.turns("abc", lambda key: lacking[key], measure, lambda key, error: failed.update({key: error}))
    assert "".join(order) == "ab" + "abc" + "ac"
    assert failed == {"b": "gone"}


# ---------------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "1200"], "too short"),
        (["--resume"], "--json"),
        (["--json", "no/such/folder/x.json"], "no folder"),
        (["--match", "nonsense"], "no row"),
        (["--render", "no.json"], "not a record"),
        (["--budget", "1000"], "multiple of 32"),
        (["--page", "x.md"], "--render"),
        (["--rounds", "-1"], "at least 0"),
        (["--rivals", "nobody"], "invalid choice"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = run.main(arguments)
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_record_of_other_settings_is_not_gone_on_with_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    text = json.dumps({"runs": {"2000": {"settings": {"budget": 512}}}})
    path.write_text(text)
    assert run.main(["--resume", "--json", str(path)]) == 2
    assert "another budget (512)" in capsys.readouterr().err
    assert path.read_text() == text


def test_an_environment_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVSIEVE_CACHE", str(tmp_path))
    monkeypatch.setattr(environments, "_run", failing)
    record = tmp_path / "record.json"
    assert run.main(["--rivals", "llamacpp", "--json", str(record)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "peers: no network"
    assert not record.exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def failing(command: list[str], what: str) -> None:
    Path(command[-1]).mkdir(exist_ok=True)
    raise environments.EnvironmentFault("no network")


# ------------------------------------------------------------------------------------------------------------------- rows, tables


def test_every_row_has_its_own_name_and_a_worker_of_its_rival() -> None:
    rows = cases.rows(1024, 2000)
    assert len({row.key for row in rows}) == len(rows)
    assert {row.rival for row in rows} == set(cases.RIVALS) == set(worker.RIVALS)
    shared = {row.worker for row in rows if row.rival == "kvsieve"}
    assert shared == {"kvsieve-F32-float32", "kvsieve-BF16-bfloat16", "kvsieve-Q4_1-float32"}
    alone = [row.worker for row in rows if row.rival in ("openvino", "llamacpp")]
    assert len(set(alone)) == len(alone)
    assert table.REFERENCE in {row.key for row in rows}


def test_the_ratio_of_a_press_keeps_the_budget() -> None:
    for prompt in (2000, 16000):
        for row in cases.rows(1024, prompt):
            ratio = row.setting.get("arguments", {}).get("compression_ratio")
            assert ratio is None or int((prompt - 1) * (1 - ratio)) == 1024


def record_of_two() -> dict[str, Any]:
    def round_(cpu: float, tokens: list[int]) -> dict[str, Any]:
        return {
            "prefill": {"cpu": cpu, "wall": 9},
            "decode": {"cpu": cpu / 10, "wall": 9},
            "bytes": 2**20,
            "peak": 2**22,
            "tokens": tokens,
        }

    full, broken = (row for row in cases.rows(1024, 2000) if row.key == table.REFERENCE or "rotation" in row.name)
    versions = {"torch": "2"}
    rows = {
        full.key: full.as_dict()
        | {"error": None, "rounds": [round_(cpu, [1, 2]) for cpu in (1, 4, 2)], "versions": versions, "same_ids": True}
        | {"nll": 0.0, "digits": {"near": 5, "far": 0}, "weights_bytes": 10**9 - 2**20},
        broken.key: broken.as_dict() | {"error": "RuntimeError: `a` | b", "rounds": [], "same_ids": None},
    }
    machine = {"cpu": "Some CPU", "instruction_set": "avx512", "python": "3.11"}
    settings = {"prompt": 2000, "tokens": 2, "budget": 1024}
    return {"runs": {"2000": {"settings": settings, "machine": machine, "loads": [1.0], "bandwidths": [1e10], "rows": rows}}}


def test_the_table_shows_medians_the_bound_and_the_error() -> None:
    head, _, full, broken, *rest = table.page_tables(record_of_two()).splitlines()
    cells = [cell.strip() for cell in full.split("|")[1:-1]]
    assert len(cells) == len(table.HEAD) == head.count("|") - 1
    assert cells[5:] == ["1,000", "100.0", "100.0", "1.0", "4", "1.00", "5, 0", "2/2"]
    assert broken.count(table.EMPTY) == 8
    assert rest[1].endswith("failed: `RuntimeError: a | b`")
    assert "Some CPU (avx512)" in rest[3]


def test_tables_go_between_the_marks_of_a_page_and_replace_the_old_ones() -> None:
    record = record_of_two()
    page = "# Title\n\n<!-- prompt 2000 -->\nold\n<!-- end -->\nafter\n"
    once = table.placed(page, record)
    assert table.run_table(record["runs"]["2000"]) in once
    assert once.startswith("# Title\n")
    assert once.endswith("<!-- end -->\nafter\n")
    assert "old" not in once
    assert table.placed(once, record) == once
    for bad in ("nothing", "<!-- prompt 2000 -->\n"):
        with pytest.raises(ValueError, match="has no line"):
            table.placed(bad, record)


def test_agreement_ends_at_the_first_other_token() -> None:
    record = record_of_two()["runs"]["2000"]
    (entry,) = (one for one in record["rows"].values() if one["rounds"])
    other = entry | {"rounds": [entry["rounds"][0] | {"tokens": [7, 2]}]}
    assert table.agreement(other, record) == "0/2"


def test_right_digits_are_counted_in_their_places() -> None:
    assert run.right([0, 1, 2, 3], [9, 1, 5, 3]) == 2
    assert run.right([0], [9, 1]) == 0
