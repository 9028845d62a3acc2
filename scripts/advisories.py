"""What pip-audit says of the Python packages of a lock file, without taking a package that it could not ask about for a good one.

    python scripts/advisories.py requirements.lock

pip-audit ends well where the index knows nothing of a package (a mirror without PyPI's JSON, say), and even where it knows none.
Ends with 1 where an advisory was found, and with 2 where pip-audit told nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def told(report: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """Lines of what was found in a report of pip-audit's JSON, the packages that were not asked about, and how many were."""
    found, unasked, asked = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unasked.append(package["name"])
            continue
        asked += 1
        for advisory in package["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "nothing yet"
            found.append(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    return found, unasked, asked


def main(argv: list[str]) -> int:
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-f", "json", "-r", argv[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found, unasked, asked = told(json.loads(done.stdout))
    except (ValueError, KeyError):
        print(f"advisories of Python packages: pip-audit told nothing: {done.stderr.strip()[-300:]}")
        return 2
    print(*found, sep="\n", end="\n" if found else "")
    print(f"advisories of Python packages: {len(found)}, of {asked} packages")
    if unasked:
        print(f"not asked, for the index tells nothing of them: {len(unasked)} packages ({', '.join(unasked[:3])}, ...)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
