"""A package that pip-audit could not ask about does not count as one without an advisory."""

from __future__ import annotations

import json
import subprocess
from types import ModuleType
from typing import Any

import pytest
from pages import load

GOOD = {"name": "good", "version": "1.0", "vulns": []}
FOUND: list[dict[str, Any]] = [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}]
BAD = {"name": "bad", "version": "2.0", "vulns": FOUND}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on the index"}


@pytest.fixture(scope="module")
def advisories() -> ModuleType:
    return load("scripts/advisories.py")


@pytest.mark.parametrize(
    ("output", "status", "says"),
    [
        (json.dumps({"dependencies": [GOOD]}), 0, ["0, of 1 packages"]),
        (
            json.dumps({"dependencies": [GOOD, UNKNOWN]}),
            0,
            ["0, of 1 packages", "tells nothing of them: 1 packages"],
        ),
        (
            json.dumps({"dependencies": [BAD, UNKNOWN]}),
            1,
            ["bad 2.0: PYSEC-1, fixed in 2.1", "PYSEC-2, fixed in nothing yet", "not asked"],
        ),
        ("", 2, ["pip-audit told nothing: no way out"]),
    ],
)
def test_what_was_found_and_what_was_not_asked_is_told(
    advisories: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    status: int,
    says: list[str],
) -> None:
    def audit(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "some.lock"
        return subprocess.CompletedProcess(command, 1, output, "no way out")

    monkeypatch.setattr(advisories.subprocess, "run", audit)
    assert advisories.main(["some.lock"]) == status
    told = capsys.readouterr().out
    assert all(text in told for text in says)
