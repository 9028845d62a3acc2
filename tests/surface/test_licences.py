"""The page of licences is that of the lock files, and every licence is one that is known."""

from __future__ import annotations

from types import ModuleType

import pytest
from pages import load


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    return load("scripts/licences.py")


def test_the_page_is_that_of_the_lock_files(licences: ModuleType) -> None:
    page = licences.PAGE.read_text(encoding="utf-8")
    assert licences.problems(page) == [], "python scripts/licences.py --write"
    assert len(licences.rust_locked()) > 80
    assert len(licences.python_locked()) > 60
    assert page.count("in the wheel") > 10


def test_a_package_that_is_not_there_or_too_many_and_a_strange_licence_are_told(licences: ModuleType) -> None:
    page = licences.PAGE.read_text(encoding="utf-8")
    without = page.replace(next(line for line in page.splitlines(True) if line.startswith("| rayon 1")), "")
    assert any("rayon" in line and "not on the page" in line for line in licences.problems(without))
    assert licences.problems(page + "| nobody 1.0 | MIT |\n") == ["nobody 1.0 is on the page and in no lock file"]
    assert any("'SSPL-1.0'" in line for line in licences.problems(page.replace("| MIT |", "| SSPL-1.0 |", 1)))


@pytest.mark.parametrize(
    ("licence", "wrong"),
    [
        ("MIT", None),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", None),
        ("MIT OR Apache-2.0 OR LGPL-2.1-or-later", None),
        ("LGPL-2.1-or-later", "is under LGPL-2.1-or-later"),
        ("GPL-3.0-only OR AGPL-3.0-only", "has the unknown licence 'GPL-3.0-only'"),
        ("", "says no licence"),
    ],
)
def test_a_licence_is_judged(licences: ModuleType, licence: str, wrong: str | None) -> None:
    assert licences.judged(licence) == wrong
