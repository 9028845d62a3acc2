"""The state machine over whole streams (`tests/property/test_machine.py`) for so many steps, other ones each time.

python tests/faults/soak.py --steps 50000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

MACHINE = Path(__file__).resolve().parents[1] / "property" / "test_machine.py"


class Outcomes:
    """What pytest found."""

    def __init__(self) -> None:
        self.passed, self.wrong = 0, list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            told = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.wrong.append(f"{report.nodeid.rpartition('::')[2]}: {' '.join(told)[:400] or 'failed'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50_000, help="of both backends together")
    args = parser.parse_args(argv)
    os.environ["KVSIEVE_STEPS"] = str(args.steps)
    found = Outcomes()
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(MACHINE)], plugins=[found])
    if status and not found.wrong:
        found.wrong.append(f"pytest ended with {status}")
    if found.passed < 2 and not found.wrong:
        found.wrong.append(f"{found.passed} backends ran")
    print(json.dumps({"steps": args.steps, "wrong": found.wrong}), flush=True)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
