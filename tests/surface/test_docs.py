"""Examples in docstrings run, and README's first one prints what it says; the pages are in test_pages.py."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import json
import re
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import kvsieve
import pages
import pytest
import torch
from kvsieve.evals.results import Guess, Summary, case_of, guesses_table, summaries, table
from kvsieve.evals.tasks import TASKS
from kvsieve.methods import SYSTEMS

ROOT = Path(__file__).parents[2]
README_FILE = ROOT / "README.md"
PAGES = README_FILE.parent / "docs" / "policies"
README = README_FILE.read_text(encoding="utf-8")
RECORDED = pages.load("scripts/tables.py")
MODULES = [
    *(system.make.__module__ for system in SYSTEMS),
    *(f"kvsieve.{name}" for name in ("bench.options", "evals.packing_nll", "view.trace")),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.skipif(not PAGES.is_dir(), reason="docs/policies/ is not there yet")
def test_every_guarantee_names_tests_that_exist() -> None:
    """A promise in the table, and the functions that hold it; `::name` is in the file that was named last."""
    file, found = "", 0
    for line in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines():
        for name in re.findall(r"`((?:tests/[\w/]+\.py)?::\w+)`", line):
            path, test = name.split("::")
            file = path or file
            text = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), name
            found += 1
    assert found > 25


def test_every_published_system_has_its_page_and_every_page_its_system() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} == {system.page for system in SYSTEMS}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Any]) -> Path:
    """The small model as a folder in bfloat16, such as the Hub has it."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = smollm2
    config = copy.deepcopy(model.config)
    config.__dict__.pop(
        "quantization_config", None
    )  # transformers refuses to save what it read from GGUF, although it dequantised it
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


HUB = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def readme_example() -> str:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]


@pytest.mark.model
def test_the_first_example_of_the_readme_prints_what_it_says(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    code = readme_example()
    printed = re.findall(r"it prints\n\n```\n(.*?)```", README, re.DOTALL)[0]
    assert code.count(HUB) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(compile(code.replace(HUB, repr(str(small_model))), "README.md", "exec"), {})
    assert capsys.readouterr().out.split() == printed.split()


def test_the_quickstart_is_the_example_of_the_readme_with_a_name_from_the_command_line() -> None:
    """Statement by statement, so that to run one of them is to run both."""
    script = (README_FILE.parent / "examples" / "quickstart.py").read_text(encoding="utf-8")
    named = f"name = sys.argv[1] if len(sys.argv) > 1 else {HUB}"
    assert script.count(named) == 1
    _docstring, first, *others = ast.parse(script.replace(named, f"name = {HUB}")).body
    assert ast.unparse(first) == "import sys"
    assert [ast.dump(one) for one in others] == [ast.dump(one) for one in ast.parse(readme_example()).body]


# -------------------------------------------------------------------------------------------------------------- recorded results


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Summary]]:
    """Of each task that was recorded, its summaries, made anew of its cases."""
    told = json.loads((README_FILE.parent / "benches" / "record" / "tasks.json").read_text(encoding="utf-8"))
    found = {}
    for task, run in told["runs"].items():
        assert run["settings"]["task"] == run["task"]["name"] == task
        found[task] = summaries([case_of(case) for case in run["cases"]])
        assert [asdict(row) for row in found[task]] == run["summary"]
    return found


def text_name(policy: str) -> str:
    return repr(kvsieve.methods.parse(policy))


@pytest.mark.parametrize("table", RECORDED.TABLES, ids=lambda table: table.name)
def test_tables_are_the_recorded_ones(table: Any) -> None:
    """A table of a page is what its record makes of it, and its section tells the day of the record."""
    text = pages.read(table.page)
    assert RECORDED.placed(text, table) == text, "run python scripts/tables.py"
    told = table.recorded
    day = date.fromisoformat(told["date"])
    assert f"Recorded {day.day} {day:%B %Y} on" in RECORDED.section(text, table)


def test_a_table_that_was_changed_by_hand_is_found() -> None:
    table = next(table for table in RECORDED.TABLES if table.name == "task-scores")
    text = pages.read(table.page)
    assert RECORDED.placed(text.replace("| `grocery` | 2 | 100 %", "| `grocery` | 2 | 90 %"), table) == text
    with pytest.raises(ValueError, match="task-scores"):
        RECORDED.placed(text.replace(table.marker, ""), table)


def test_every_task_is_recorded(recorded: dict[str, list[Summary]]) -> None:
    assert set(recorded) == set(TASKS)


def test_the_outputs_of_the_guide_are_the_recorded_ones(recorded: dict[str, list[Summary]]) -> None:
    """Each task's command is followed by what it printed, and is the one that was recorded."""
    page = README_FILE.parent / "docs" / "guides" / "evaluate.md"
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"```sh\nkvsieve eval ([\w-]+) ([^\n]*)\n```\n\n```text\n(.*?)\n```", text, re.DOTALL)
    assert [task for task, _, _ in shown] == list(TASKS)
    runs = next(one for one in RECORDED.TABLES if one.name == "task-scores").recorded["runs"]
    for task, arguments, printed in shown:
        mine = recorded[task]
        guessed = [Guess(**told) for told in runs[task].get("without_a_model", ())]
        assert printed == table(mine) + (f"\n\nwithout a model:\n\n{guesses_table(guessed)}" if guessed else "")
        assert f"--cases {mine[0].cases} --threads 1" in arguments
        assert [text_name(policy) for policy in re.findall(r'--policy "([^"]+)"', arguments)] == [row.policy for row in mine]


def test_the_tables_of_the_neighbours_are_the_recorded_ones() -> None:
    """`python benches/peers/run.py --render benches/record/peers.json` prints what belongs on the page."""
    from peers import table

    told = json.loads((ROOT / "benches" / "record" / "peers.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results" / "peers.md").read_text(encoding="utf-8")
    made = [table.run_table(run) for run in told["runs"].values()]
    assert made
    assert not [text[:300] for text in made if text not in page]
    assert page.count("\n| rival |") == len(made)


@pytest.mark.model
def test_the_recorded_cases_are_those_of_todays_tasks(smollm2: tuple[Any, Any]) -> None:
    told = json.loads((README_FILE.parent / "benches" / "record" / "tasks.json").read_text(encoding="utf-8"))
    for task, run in told["runs"].items():
        for case in run["cases"]:
            made = TASKS[task].build(smollm2[1], case["length"], run["settings"]["seed"], case["index"])
            assert made.digest == case["case"], (task, case["index"])
