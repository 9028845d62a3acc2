"""How the backends are laid out, and what each says that it can hold."""

from __future__ import annotations

import ast
import copy
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_cases
import kvsieve
import pytest
import tiny
import torch
from kvsieve import backends
from kvsieve._core import selection_rules
from kvsieve.backends.base import check_stream
from kvsieve.backends.capabilities import Capabilities
from kvsieve.backends.rules import implementation
from kvsieve.errors import BackendError, PolicyError
from kvsieve.policy.storage import Packing

FOLDER = Path(backends.__file__).parent
SAME = {"__init__", "backend", "capabilities", "selection", "store"}
RULES_IN_PYTHON = [name for name in backends.BACKENDS if (FOLDER / name / "select").is_dir()]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, type-only ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_backend_imports_no_other_and_has_the_files_of_all(name: str) -> None:
    others = tuple(f"kvsieve.backends.{other}" for other in backends.BACKENDS if other != name)
    for path in (FOLDER / name).rglob("*.py"):
        assert not [module for module in imported(path) if module.startswith(others)], path
    assert {path.stem for path in (FOLDER / name).iterdir()} >= SAME


def test_what_they_share_knows_none_of_them() -> None:
    folders = tuple(f"kvsieve.backends.{name}" for name in backends.BACKENDS)
    for path in FOLDER.glob("*.py"):
        assert not [module for module in imported(path) if module.startswith(folders)], path


def capabilities(name: str) -> Capabilities:
    return importlib.import_module(f"kvsieve.backends.{name}.capabilities").CAPABILITIES


@pytest.mark.parametrize("name", RULES_IN_PYTHON)
def test_a_selection_rule_is_a_file_named_by_its_kind(name: str) -> None:
    select = importlib.import_module(f"kvsieve.backends.{name}.select")
    kinds = {module.name for module in pkgutil.iter_modules(select.__path__)}
    assert capabilities(name).selection.rules == kinds >= {"hip", "infinite"}
    for kind in kinds:
        assert implementation(select, SimpleNamespace(kind=kind)).__name__ == f"{select.__name__}.{kind}"
    with pytest.raises(PolicyError, match=r"'hip' or .*'infinite'.*, not 'best'"):
        implementation(select, SimpleNamespace(kind="best"))


def test_the_cores_selection_rules_are_those_of_the_cpu() -> None:
    assert set(backends.BACKENDS) - set(RULES_IN_PYTHON) == {"cpu"}
    rules = selection_rules()
    assert capabilities("cpu").selection.rules == set(rules) >= {"hip", "infinite"}
    core = FOLDER.parents[2] / "rust" / "kvsieve-core" / "src" / "select"
    if core.is_dir():
        assert all((core / f"{rule}.rs").is_file() for rule in rules)


def test_an_operation_is_a_file_of_its_name() -> None:
    package = importlib.import_module("kvsieve.backends.cuda.ops")
    for module in pkgutil.iter_modules(package.__path__):
        found = importlib.import_module(f"{package.__name__}.{module.name}")
        if module.name not in ("angles", "declare", "format", "launch", "residents"):
            assert callable(getattr(found, module.name))
            assert getattr(torch.ops.kvsieve, module.name).default._schema.name == f"kvsieve::{module.name}"
            assert module.name in kernel_cases.operations(), "it has no row of arguments"


RULE: Any = kvsieve.HiP().selection
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "ask", "message"),
    [
        (
            {},
            lambda can: can.check_layer(CPU, torch.float32, 64, 64),
            r"'cuda' holds tensors on a CUDA device.*'cpu' or 'reference'",
        ),
        ({}, lambda can: can.check_heads(torch.float64, 64, 64), r"float32, bfloat16 and float16.*not 64 and 64 in torch.float64"),
        ({}, lambda can: can.check_heads(torch.bfloat16, 512), r"at most 256 channels.*\(a multiple of 8\), not 512"),
        ({}, lambda can: can.check_heads(torch.float32, 18), r"whole 16-byte pieces \(a multiple of 4\), not 18.*'reference'"),
        (
            {"selection": replace(capabilities("cuda").selection, page_bounds=False)},
            lambda can: can.check_selection(kvsieve.Quest().selection, "post_rope", False),
            r"page bounds.*HiP",
        ),
        (
            {"selection": replace(capabilities("cuda").selection, stored_keys=frozenset({"post_rope"}))},
            lambda can: can.check_selection(RULE, "pre_rope", False),
            r"stores pre-RoPE ones; leave out extend=",
        ),
        ({}, lambda can: can.check_selection(RULE, "post_rope", True), r"compresses some; leave the storage rule out"),
        ({"storage": frozenset({"pruned"})}, lambda can: can.check_storage(Packing(64, 4, 4)), r"no quantized tokens"),
        ({"storage": frozenset()}, lambda can: can.check_storage(Packing(40)), r"no pruned tokens"),
        ({"stored_keys": frozenset({"post_rope"})}, lambda can: can.check_stored_keys("pre_rope"), r"no pre-RoPE keys"),
    ],
)
def test_what_cannot_be_held_is_refused_with_what_to_do(change: dict[str, Any], ask: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        ask(replace(capabilities("cuda"), **change))


def test_an_unknown_rule_is_refused() -> None:
    rule: Any = SimpleNamespace(kind="best", page_bounds=False)
    with pytest.raises(BackendError, match=r"selects by .*hip, infinite.*, not by 'best'"):
        capabilities("cpu").check_selection(rule, "post_rope", False)


def test_a_stream_asks_when_it_opens() -> None:
    model = copy.deepcopy(tiny.model()).double()
    with pytest.raises(BackendError, match=r"'cpu' holds float32, bfloat16 and float16, not torch.float64.*'reference'"):
        kvsieve.stream(model, kvsieve.Full(), backend="cpu")
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert stream.stats().backend == "reference"


def test_everything_fits_the_reference() -> None:
    layer: Any = SimpleNamespace(device=torch.device("meta"), dtype=torch.float64, key_dim=7, value_dim=1000)
    check_stream(backends.get("reference"), [layer], "pre_rope", [Packing(5), Packing(7, 2, 8)], kvsieve.Quest().selection)
