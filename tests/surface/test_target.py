"""Several clones share one of cargo's target folders: each runs what it holds, and builds it once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "target_sources.py"
MANIFEST = '[package]\nname = "said"\nversion = "0.1.0"\nedition = "2021"\n\n[[bin]]\nname = "said"\npath = "rust/main.rs"\n'


class Clone:
    """A folder with the script and one Rust program, which builds in a folder that others use as well."""

    def __init__(self, root: Path, target: Path, word: str) -> None:
        self.root, self.target = root, target
        for folder in ("rust", "scripts"):
            (root / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, root / "scripts")
        (root / "Cargo.toml").write_text(MANIFEST)
        (root / "Cargo.lock").write_text('version = 3\n\n[[package]]\nname = "said"\nversion = "0.1.0"\n')
        self.say(word)

    def say(self, word: str) -> None:
        (self.root / "rust" / "main.rs").write_text(f'fn main() {{\n    println!("{word}");\n}}\n')

    def times(self, command: str) -> int:
        script = str(self.root / "scripts" / SCRIPT.name)
        return subprocess.run([sys.executable, script, command, str(self.target)], check=False).returncode

    def take(self) -> None:
        """What `claim_target` does, without its locks."""
        if self.times("check") == 3:
            assert self.times("claim") == 0
            assert self.times("check") == 0

    def run(self) -> tuple[str, bool]:
        """What the program says, and whether it had to be compiled for that."""
        self.take()
        env = {**os.environ, "CARGO_TARGET_DIR": str(self.target)}
        done = subprocess.run(["cargo", "run", "--offline"], cwd=self.root, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip(), "Compiling" in done.stderr


@pytest.mark.skipif(shutil.which("cargo") is None, reason="needs cargo")
def test_each_clone_runs_its_own_sources_and_compiles_none_twice(tmp_path: Path) -> None:
    one, two = (Clone(tmp_path / name, tmp_path / "target", name) for name in ("one", "two"))
    assert one.run() == ("one", True)
    assert two.run() == ("two", True), "its sources are older than what the other clone has built"
    assert one.run() == ("one", True)
    assert one.run() == ("one", False)
    three = Clone(tmp_path / "three", tmp_path / "target", "one")
    assert three.run() == ("one", False), "a new clone of sources that are built already"
    three.say("other")
    assert three.run() == ("other", True)


def test_a_source_is_as_old_as_the_folder_has_known_what_it_holds(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone", tmp_path / "target", "one")
    source, manifest = clone.root / "rust" / "main.rs", clone.root / "Cargo.toml"
    clone.take()
    first = source.stat().st_mtime_ns
    os.utime(source, ns=(0, 0))
    clone.take()
    assert source.stat().st_mtime_ns == first
    clone.say("two")
    clone.take()
    assert source.stat().st_mtime_ns > first
    assert manifest.stat().st_mtime_ns == first, "it has not changed"
    clone.say("one")
    clone.take()
    assert source.stat().st_mtime_ns > first, "between the two the folder held others"


def test_a_damaged_list_is_made_anew(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone", tmp_path / "target", "one")
    (tmp_path / "target").mkdir()
    for damage in ("", "[]", '{"rust/main.rs": 3}'):
        (tmp_path / "target" / "sources.json").write_text(damage)
        assert clone.times("check") == 3
        clone.take()
        assert clone.times("check") == 0
