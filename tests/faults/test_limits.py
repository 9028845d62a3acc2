"""A process that gets no more memory from the system; `make faults` refuses more often, under more policies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts what /proc tells")
@pytest.mark.slow
def test_a_stream_that_gets_no_memory_goes_on_once_there_is_some() -> None:
    """The process of each policy ends well, its stream is its twin's, and something was refused.

    Mostly within ten calls; seldom the allocator has so much in reserve that it takes more than forty.
    """
    policies = ["--policy", "Full", "--policy", "SirLLM"]
    command = [sys.executable, str(Path(__file__).with_name("limits.py")), *policies, "--refusals", "4", "--rounds", "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["policy"] for row in found] == policies[1::2]
    assert all(row["wrong"] == [] for row in found)
    assert all(row["refusals"] >= 2 for row in found)
