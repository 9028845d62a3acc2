"""The compiled core under random arguments; `make fuzz` makes many more calls."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import kvsieve
import pytest


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_core", Path(__file__).with_name("fuzz_core.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_core"] = module
    spec.loader.exec_module(module)
    return module


def test_whatever_is_called_with_anything_ends_in_a_result_or_a_typed_error(fuzz: ModuleType) -> None:
    assert fuzz.run(3000, seed=20) == []


def test_everything_that_the_stub_declares_is_called(fuzz: ModuleType) -> None:
    calls = fuzz.read_stub(Path(kvsieve.__file__).with_name("_core.pyi"))
    assert {"begin", "attend", "Planner", "Eviction.window", "num_blocks", "keep_window", "Sparse"} <= {call.name for call in calls}
    assert len(calls) > 130


def test_a_panic_and_a_death_are_told(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "fuzz_broken.py"
    text = Path(fuzz.__file__).read_text(encoding="utf-8")
    needle = '        found = getattr(target, call.name.split(".")[-1])\n'
    assert text.count(needle) == 1
    broken.write_text(
        text.replace(
            needle,
            needle + "        if call.name == 'isa':\n            os.abort()\n"
            "        if call.name == 'isa_levels':\n            raise SystemExit('as a panic')\n",
        ),
        encoding="utf-8",
    )
    monkeypatch.setattr(fuzz, "__file__", str(broken))
    told = fuzz.run(600, seed=1, tell=lambda _: None)
    assert any(line.startswith("DIED -6") and " isa()" in line for line in told)
    assert any(line.startswith("RAW SystemExit") and " isa_levels()" in line for line in told)
