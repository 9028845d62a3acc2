"""Options of the benches."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tokens", type=int, default=100_000, help="how many tokens a stream of the flatness bench sees")
    parser.addoption("--threads", type=int, default=1, help="threads of the bench of whole prompts")
