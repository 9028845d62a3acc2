"""The layout: the package's imports point downwards, none run in a circle; its calls are short, and so is every Python file.

Imports are read from the source, those for types and those inside functions included. A module depends on what its import names: on
the module where that is one, on the package where it is a name of the package's own.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "kvsieve"

LEVELS = (
    ("cli",),
    ("serve", "chat", "evals", "bench", "view", "demo", "graphs", "arguments", "loading", "quantized_weights"),
    ("__init__", "batching", "compiling", "streams", "generate", "reading", "session", "trace", "banks", "recording"),
    ("model",),
    ("runtime",),
    ("backends",),
    ("methods",),
    ("policy",),
    ("bank",),
    ("files",),
    ("errors", "checks", "budget", "stats", "facts", "locks", "_core"),
)
"""Folders and files of the package, the highest first: each may import its own level and those below."""

MOST_LINES, MOST_ARGUMENTS = 500, 8
ENGINE_LINES = 350


def modules() -> dict[str, Path]:
    """Every module of the package, ``__init__`` for the package itself, and the file that it is in."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py*")):
        if path.suffix not in (".py", ".pyi"):
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "kvsieve":
                    yield name.name.removeprefix("kvsieve").lstrip(".") or "__init__"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvsieve":
            assert node.level == 0
            base = (node.module or "").removeprefix("kvsieve").lstrip(".")
            for name in node.names:
                inner = f"{base}.{name.name}".lstrip(".")
                yield inner if inner in MODULES else base or "__init__"


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports. Asked by tests alone: every worker loads this file, and one of them runs it."""
    found = {name: set(imported(path)) - {name} for name, path in MODULES.items()}
    for name, others in found.items():
        for other in others:
            assert other in MODULES, f"{name} imports {other}, which is not in the package"
        # A module that is imported runs its packages first.
        packages = [".".join(other.split(".")[:depth]) for other in others for depth in range(1, other.count(".") + 1)]
        others |= {package for package in packages if package in MODULES and not f"{name}.".startswith(f"{package}.")}
    return found


def level(module: str) -> int:
    top = module.split(".")[0]
    return next(at for at, names in enumerate(LEVELS) if top in names)


def circles() -> list[set[str]]:
    """Groups of modules that reach each other (Tarjan's algorithm would be faster)."""
    reach: dict[str, set[str]] = {}
    for name in graph():
        seen: set[str] = set()
        left = [name]
        while left:
            for other in graph()[left.pop()]:
                if other not in seen:
                    seen.add(other)
                    left.append(other)
        reach[name] = seen
    groups = {frozenset(b for b in graph() if b in reach[a] and a in reach[b]) for a in graph() if a in reach[a]}
    return [set(group) for group in groups]


def test_every_module_has_a_place() -> None:
    known = {name for names in LEVELS for name in names}
    assert {name.split(".")[0] for name in MODULES} <= known


def test_imports_point_downwards() -> None:
    assert not {(name, other) for name, others in graph().items() for other in others if level(other) < level(name)}


def test_no_imports_run_in_a_circle() -> None:
    assert not circles()


def test_no_part_of_a_stream_is_known_to_the_engine_or_to_session_files() -> None:
    parts = {f"runtime.{name}" for name in ("compression", "eviction", "head_eviction", "selection", "sliding", "surprisal")}
    for name in ("runtime.engine", "runtime.held", "runtime.part", "session"):
        assert not graph()[name] & parts, name


def test_what_a_package_is_says_its_docstring_alone() -> None:
    """A package's own file that imports its modules makes circles of all that they import from it."""
    for name in ("model", "runtime"):
        assert not graph()[name]


def lengths(root: Path) -> dict[str, int]:
    """The lines of every Python file of a repository: tests, benches and scripts as well, but not what git ignores."""
    ignored = {line.strip("/") for line in (root / ".gitignore").read_text().splitlines() if line.startswith("/")}
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in ignored]
    found = [path for folder in folders for path in folder.rglob("*.py*")] + list(root.glob("*.py"))
    return {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in found
        if path.suffix in (".py", ".pyi")
    }


def too_long(root: Path) -> set[str]:
    return {name for name, lines in lengths(root).items() if lines > MOST_LINES}


def test_files_are_short() -> None:
    assert not too_long(ROOT)
    found = lengths(ROOT)
    assert {"tests/surface/test_layout.py", "benches/gpu.py", "scripts/tables.py", "python/kvsieve/_core.pyi"} <= found.keys()
    assert found["python/kvsieve/runtime/engine.py"] < ENGINE_LINES


@pytest.mark.parametrize("name", ["tests/unit/test_it.py", "benches/it.py", "scripts/it.py", "python/it/it.pyi", "it.py"])
def test_a_long_file_is_found_wherever_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("/out/\n*.so\n")
    for path, lines in ((name, MOST_LINES), ("out/it.py", 9999)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("pass\n" * lines)
    assert not too_long(tmp_path)
    (tmp_path / name).write_text("pass\n" * (MOST_LINES + 1))
    assert too_long(tmp_path) == {name}


def test_calls_are_short() -> None:
    found = {}
    for path in MODULES.values():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        lines = [call.lineno for call in calls if len(call.args) > MOST_ARGUMENTS]
        if lines:
            found[str(path.relative_to(PACKAGE))] = lines
    assert not found


@pytest.mark.parametrize("module", ["model", "runtime", "streams", "methods", "policy"])
def test_the_graph_is_read_at_all(module: str) -> None:
    """The reader sees imports at the top, for types, and in functions."""
    assert any(other.split(".")[0] == module for others in graph().values() for other in others)
    assert "kvsieve" not in MODULES
