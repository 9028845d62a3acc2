"""The lock files still resolve: what pyproject.toml asks for, held to a lock's versions, comes to exactly that lock.

Nothing is installed; the index's metadata is enough (some seconds a lock). A lock is checked by an interpreter of its Python:
PYTHON310 or PYTHON311, the running one, `python3.10` on PATH, or pyenv's. Without one, pip resolves for that version from here; it
then reads environment markers as the running Python does, so packages that only the older one needs are not compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lock import pins, shared, wanted

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (
    ("3.10", "requirements-3.10.lock", "main"),
    ("3.11", "requirements.lock", "main"),
    ("3.11", "requirements-docs.lock", "docs"),
    ("3.11", "requirements-ray.lock", "ray"),
)
"""Python, file, and which of pyproject.toml's dependencies it holds."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def candidates(release: str) -> Iterator[str]:
    yield os.environ.get(f"PYTHON{release.replace('.', '')}", "")
    yield sys.executable
    yield shutil.which(f"python{release}") or ""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted((str(path) for path in pyenv.glob(f"versions/{release}.*/bin/python3")), reverse=True)


def interpreter(release: str) -> str | None:
    """An interpreter of that Python that starts (a shim on PATH may not), or None."""
    asked = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    for path in filter(None, candidates(release)):
        done = subprocess.run([path, "-c", asked], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == release:
            return path
    return None


def resolved(release: str, lock: Path, which: str, python: str | None, scratch: Path) -> dict[str, str]:
    """Names and versions that pip comes to within the lock; raises CalledProcessError with pip's words where it comes to none."""
    report = scratch / f"{lock.name}.json"
    install = ["install", "--dry-run", "--quiet", "--ignore-installed", "--report", str(report)]
    install += [f"--constraint={one}" for one in (lock, shared(which)) if one is not None]
    if python is None:
        command = [*PIP, *install, "--python-version", release, "--only-binary=:all:", "--target", str(scratch / "none")]
    else:
        command = [*PIP, "--python", python, *install]
    subprocess.run([*command, *wanted(which)], check=True, capture_output=True, text=True)
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def reachable() -> bool:
    return subprocess.run([*PIP, "index", "versions", "pip"], capture_output=True).returncode == 0


def complaint(release: str, name: str, which: str, scratch: Path) -> str | None:
    """What is wrong with one lock, in one sentence; None where nothing is."""
    beside, python = shared(which), interpreter(release)
    locked = pins(ROOT / name) | ({} if beside is None else pins(beside))
    try:
        found = resolved(release, ROOT / name, which, python, scratch)
    except subprocess.CalledProcessError as error:
        if not reachable():
            print(f"kvsieve: {name} WAS NOT CHECKED: the index of packages cannot be reached", file=sys.stderr)
            return None
        return f"{name} does not resolve on Python {release}; run `make lock` with it:\n{error.stderr.strip()}"
    expected = locked if python else {package: locked[package] for package in locked if package in found}
    if found != expected:
        odd = sorted(found.items() ^ expected.items())
        return f"{name} is not what pyproject.toml comes to on Python {release}; run `make lock` with it: {odd}"
    how = (
        python or f"pip's --python-version, because no Python {release} is installed: {len(locked) - len(found)} pins not compared"
    )
    print(f"kvsieve: {name}: {len(found)} packages resolve on Python {release} ({how})", file=sys.stderr)
    return None


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wrong = [found for lock in LOCKS if (found := complaint(*lock, Path(scratch)))]
    if wrong:
        raise SystemExit("kvsieve: " + "\n".join(wrong))


if __name__ == "__main__":
    main()
