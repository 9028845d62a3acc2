"""The compiled core under random arguments; `make fuzz` makes many more calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kvsieve
import numpy as np
import pytest
from pages import load


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load("tests/faults/fuzz_core.py")


def test_whatever_is_called_with_anything_ends_in_a_result_or_a_typed_error(fuzz: ModuleType) -> None:
    """And all that the stub declares is called, and got past the checks of its arguments."""
    wrong, returned = fuzz.run(4000, seed=20)
    assert wrong == []
    calls = {call.key for call in fuzz.read_stub(Path(kvsieve.__file__).with_name("_core.pyi"))}
    assert len(calls) > 130
    assert calls - returned == set()


def test_a_panic_and_a_death_are_told(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "fuzz_broken.py"
    text = Path(fuzz.__file__).read_text(encoding="utf-8")
    needle = "        made = function(*arguments, **named)\n"
    assert text.count(needle) == 1
    aborts = "        if key == 'isa':\n            os.abort()\n"
    panics = "        if key == 'isa_levels':\n            raise SystemExit('as a panic')\n"
    broken.write_text(text.replace(needle, aborts + panics + needle), encoding="utf-8")
    monkeypatch.setattr(fuzz, "__file__", str(broken))
    told, _ = fuzz.run(900, seed=2, tell=lambda _: None)
    assert any(line.startswith("DIED -6") and " isa(" in line for line in told)
    assert any(line.startswith("RAW SystemExit") and " isa_levels(" in line for line in told)


def test_saved_tokens_come_as_arrays_or_as_lists() -> None:
    """An array is copied at once, so that a long session keeps no other thread waiting; what is no position is refused in both."""
    from kvsieve import _core

    def planner() -> Any:
        return _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")

    positions, scores = np.array([0, 2, 5], np.int64), np.array([0.5, np.nan, 2.0], np.float32)
    ways = [(positions, scores), (positions.tolist(), scores.tolist()), (np.arange(6)[[0, 2, 5]], scores.repeat(2)[::2])]
    for way in ways:
        made = planner()
        made.restore(6, [(6, [way])])
        assert made.positions(0, 0).tolist() == [0, 2, 5]
        np.testing.assert_array_equal(made.scores(0, 0), scores)
    for wrong in (
        np.array([-1, 2, 5]),
        [-1, 2, 5],
        np.array([0, 2, 6]),
        np.array([2, 0, 5]),
        positions.astype(np.int32)[:2],
        "abc",
    ):
        made = planner()
        with pytest.raises((TypeError, ValueError, OverflowError)):
            made.restore(6, [(6, [(wrong, scores)])])
        assert made.num_rows == 0


NO_BLOCK = """
import resource, sys, tempfile
import numpy as np
from kvsieve import _core
store = _core.Store(2, 16, 16, "float32")
tier = _core.Tier(store, _core.TierFile(tempfile.gettempdir()), 4)
has = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + (256 << 20), -1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for later in (False, True):
    tier.trim(np.array([2**31 - 1, 7, 2**57, -1]), later)
print("kept nothing")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts what /proc tells")
def test_a_number_that_is_no_blocks_keeps_nothing_and_makes_no_list_of_its_length() -> None:
    """Two billion flags were asked for, and the process ended where there was no place for them."""
    done = subprocess.run([sys.executable, "-c", NO_BLOCK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "kept nothing\n"), done.stderr
