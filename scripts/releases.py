"""Releases of transformers beside the locked one: which they are, and a folder that puts one before the main environment.

    releases.py resolve oldest            the oldest release that pyproject.toml allows, as the index has it
    releases.py resolve newest            the newest release on the index; the locked one, loudly, where the index is out of reach
    releases.py overlay 5.16.0 FOLDER     FOLDER gets that release and those of its requirements that the environment lacks

Run by the environment's own interpreter. An overlay holds no torch: what the release accepts of the environment stays there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def declared(project: Path = ROOT / "pyproject.toml") -> SpecifierSet:
    """The releases that pyproject.toml allows: the one place that says which is the oldest."""
    lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    return next(Requirement(line).specifier for line in lines if Requirement(line).name == "transformers")


def indexed() -> list[Version]:
    """Every release that the index offers to this Python, oldest first; none where it cannot be reached."""
    done = subprocess.run([*PIP, "index", "versions", "--json", "transformers"], capture_output=True, text=True)
    if done.returncode:
        print(f"kvsieve: THE INDEX OF PACKAGES CANNOT BE ASKED FOR TRANSFORMERS: {done.stderr.strip()}", file=sys.stderr)
        return []
    return sorted(Version(found) for found in json.loads(done.stdout)["versions"])


def floor(allowed: SpecifierSet) -> Version:
    """The version after ``>=``, with the three parts that releases have (5.16 is 5.16.0)."""
    parts = next(Version(bound.version) for bound in allowed if bound.operator == ">=").release
    return Version(".".join(str(part) for part in (*parts, 0, 0)[: max(3, len(parts))]))


def resolve(which: str) -> Version:
    """The exact release that ``oldest``, ``newest`` or a version names."""
    if which not in ("oldest", "newest"):
        return Version(which)
    allowed, here = declared(), [found for found in indexed() if not found.is_prerelease]
    if which == "oldest":
        return min((found for found in here if found in allowed), default=floor(allowed))
    if not here:
        locked = Version(version("transformers"))
        print(f"kvsieve: THE NEWEST RELEASE IS UNKNOWN; the locked {locked} stands in for it", file=sys.stderr)
        return locked
    if max(here) not in allowed:
        print(f"kvsieve: the newest release, {max(here)}, lies outside of `transformers{allowed}`", file=sys.stderr)
    return max(found for found in here if found in allowed)


def overlay(release: Version, folder: Path) -> None:
    """Install the release and what the environment lacks for it into ``folder``; ``folder/overlay.lock`` lists them."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        plan = [*PIP, "install", "--quiet", "--dry-run", "--report", str(report), f"transformers=={release}"]
        subprocess.run(plan, check=True, stdout=sys.stderr)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    lines = sorted(f"{item['name']}=={item['version']}" for item in found)
    shared = [line for line in lines if line.split("==")[0].lower() in ("torch", "numpy")]
    if shared:
        raise SystemExit(f"kvsieve: transformers {release} wants {', '.join(shared)}, which overlays share with the environment")
    install = [*PIP, "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder), *lines]
    subprocess.run(install, check=True, stdout=sys.stderr)
    (folder / "overlay.lock").write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    acts = parser.add_subparsers(dest="act", required=True)
    acts.add_parser("resolve").add_argument("which")
    making = acts.add_parser("overlay")
    making.add_argument("release", type=Version)
    making.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.act == "resolve":
        print(resolve(given.which))
    else:
        overlay(given.release, given.folder)


if __name__ == "__main__":
    main()
