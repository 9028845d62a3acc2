"""The table of selection rules: a backend's folder ``select/`` holds one rule a file, named after the kind that the rule declares.

So a rule is added to a backend by adding a file, and nothing else knows its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

from kvsieve.errors import PolicyError

__all__ = ["implementation", "kinds"]


def kinds(folder: Iterable[str]) -> frozenset[str]:
    """The kinds of rules that lie in ``folder``, a package's ``__path__``."""
    return frozenset(module.name for module in pkgutil.iter_modules(folder))


@cache
def _find(package: str, kind: str) -> ModuleType:
    select = importlib.import_module(package)
    known = kinds(select.__path__)
    if kind not in known:
        raise PolicyError(f"a selection is of kind {' or '.join(map(repr, sorted(known)))}, not {kind!r}")
    return importlib.import_module(f"{package}.{kind}")


def implementation(select: ModuleType, rule: Any) -> Any:
    """The file of ``rule`` in the package ``select``.

    Raises:
        PolicyError: if there is none.
    """
    return _find(select.__name__, rule.kind)
