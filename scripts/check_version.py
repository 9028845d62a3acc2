"""pyproject.toml, Cargo.toml and, where one is given, a tag (v1.2.3) name the same version: `check_version.py [TAG]`."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    found = {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "Cargo.toml": tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"],
    }
    if len(sys.argv) > 1:
        found[f"the tag {sys.argv[1]}"] = sys.argv[1].removeprefix("v")
    if len(set(found.values())) > 1:
        raise SystemExit("the versions differ: " + ", ".join(f"{where} says {version}" for where, version in found.items()))
    print(found["pyproject.toml"])


if __name__ == "__main__":
    main()
