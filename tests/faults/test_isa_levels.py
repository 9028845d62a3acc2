"""Every instruction set of this machine retains, selects and answers the same; `make faults` runs all systems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from kvsieve import _core
from pages import load

SCRIPT = Path(__file__).with_name("isa_levels.py")


def test_every_level_retains_selects_and_answers_the_same() -> None:
    names = ["--system", "sirllm", "--system", "hip", "--system", "quantized"]
    done = subprocess.run([sys.executable, str(SCRIPT), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["levels"] == _core.isa_levels()
    assert found["compared"] > 50 * (len(found["levels"]) - 1)


def test_what_differs_is_told() -> None:
    compare = load("tests/faults/isa_levels.py").compare
    one = {"a out": np.zeros(3), "a kept": np.arange(3)}
    assert compare(one, one) == []
    assert len(compare(one, {"a out": np.ones(3), "a kept": np.arange(1, 4)})) == 2
    assert len(compare(one, {"a out": np.zeros(3)})) == 1
