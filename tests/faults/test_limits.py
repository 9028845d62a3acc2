"""A process that gets no more memory from the system; `make faults` refuses more often, under more policies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts what /proc tells")
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["Full", "SirLLM"])
def test_a_stream_that_gets_no_memory_goes_on_once_there_is_some(policy: str) -> None:
    """Its process ends well, its stream is its twin's, and something was refused."""
    command = [sys.executable, str(Path(__file__).with_name("limits.py")), "--policy", policy, "--refusals", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["refusals"] >= 2
