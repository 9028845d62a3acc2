"""Every instruction set of this machine retains, selects and answers the same; `make faults` runs all systems."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from kvsieve import _core

SCRIPT = Path(__file__).with_name("isa_levels.py")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("isa_levels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_level_retains_selects_and_answers_the_same() -> None:
    names = ["--system", "sirllm", "--system", "hip", "--system", "quantized"]
    done = subprocess.run([sys.executable, str(SCRIPT), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["levels"] == _core.isa_levels()
    assert found["compared"] > 50 * (len(found["levels"]) - 1)


def test_what_differs_is_told() -> None:
    compare = script().compare
    one = {"a out": np.zeros(3), "a kept": np.arange(3)}
    assert compare(one, one) == []
    assert len(compare(one, {"a out": np.ones(3), "a kept": np.arange(1, 4)})) == 2
    assert len(compare(one, {"a out": np.zeros(3)})) == 1
