"""The kernels as Python reaches them: numbers worked out by hand, errors, and the instruction set that the environment asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from kvsieve import _core
from kvsieve.errors import KvsieveError

KEY = np.array([[[1, 2, 3, 4]]], np.float32)
THETA = [1.0, 0.01]


@pytest.mark.parametrize(
    ("layout", "position", "want"),
    [
        ("half", 6, [1.798417, 1.756545, 2.601095, 4.11273]),
        ("half", 4, [1.616764, 1.838443, -2.717733, 4.076779]),
        ("interleaved", 4, [0.859961, -2.06409, 2.837643, 4.116768]),
    ],
)
def test_rotate(layout: str, position: int, want: list[float]) -> None:
    rope, out, back = _core.Rope(THETA, layout, 1.0), np.empty_like(KEY), np.empty_like(KEY)
    at = np.array([position])
    _core.rotate(KEY, at, rope, out)
    np.testing.assert_allclose(out[0, 0], want, atol=1e-5)
    _core.rotate(out, at, rope, back, inverse=True)
    np.testing.assert_allclose(back, KEY, atol=1e-5)


def test_top_k_is_by_value_then_index_and_ranks_nan_last() -> None:
    scores = np.array([[1, 3, np.nan, 3, 2]], np.float32)
    assert _core.top_k(scores, 5).tolist() == [[1, 3, 4, 0, 2]]
    with pytest.raises(KvsieveError):
        _core.top_k(scores, 6)


@pytest.mark.parametrize("level", _core.isa_levels())
def test_the_environment_chooses_the_instruction_set(level: str) -> None:
    code = "from kvsieve import _core; print(_core.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "KVSIEVE_ISA": level}, check=True
    )
    assert done.stdout.strip() == level


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from kvsieve import _core; _core.isa()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "KVSIEVE_ISA": "mmx"}, check=False
    )
    assert done.returncode == 1
    assert "kvsieve.errors." in done.stderr
    assert "mmx" in done.stderr
