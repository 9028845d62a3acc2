"""Budgets are counts: of tokens (an int) or of bytes (a string such as ``"64MiB"``). Never ratios. And what is a count at all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvsieve import _core
from kvsieve.checks import LARGEST, integer, told
from kvsieve.errors import BudgetError, PolicyError

__all__ = ["BLOCK", "check_budget", "check_choice", "check_count", "parse_bytes", "tokens_for"]

BLOCK: int = _core.BLOCK
"""Tokens in one block, the unit of allocation."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes meant by ``text``, for example ``"64MiB"`` (2**20) or ``"64MB"`` (10**6).

    Raises:
        BudgetError: if ``text`` is not a number followed by a unit, or is zero.
    """
    match = _BYTES.fullmatch(text) if len(text) <= 64 else None
    if match is None or match[2].upper() not in _UNITS:
        raise BudgetError(f"cannot read the budget {told(text)}; write tokens as an int or bytes such as '64MiB' or '2GB'")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if not 0 < value <= LARGEST:
        raise BudgetError(f"a budget must be positive, and at most {LARGEST} bytes, got {text!r}")
    return value


def check_budget(budget: int | str, *, sinks: int, recent: int, name: str) -> int | str:
    """``budget`` unchanged, if it can hold ``sinks + recent`` tokens and one more (a byte budget is checked when resolved).

    Raises:
        BudgetError: for a ratio, a negative or zero count, or one that is too small.
    """
    if isinstance(budget, str):
        parse_bytes(budget)
        return budget
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"{name}: a budget is a count of tokens (int) or bytes (such as '64MiB'), got {told(budget)}")
    if not 0 < budget <= LARGEST:
        raise BudgetError(f"{name}: a budget must be positive, and at most {LARGEST}, got {told(budget)}")
    if budget <= sinks + recent - (recent > 0):
        raise BudgetError(
            f"{name}: a budget of {budget} tokens cannot hold {sinks} sinks and {recent} recent tokens; "
            f"give it at least {sinks + max(recent, 1)}"
        )
    return budget


def check_count(name: str, value: object, least: int = 0) -> None:
    """Refuse what is not an int of at least ``least``.

    Raises:
        PolicyError: with the name of the parameter and what was given.
    """
    integer(name, value, least, LARGEST, PolicyError)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a text that is none of ``known``.

    Raises:
        PolicyError: naming those.
    """
    if not isinstance(value, str) or value not in known:
        raise PolicyError(f"{name} must be {' or '.join(map(repr, known))}, got {told(value)}")


def tokens_for(budget: int | str, bytes_per_token: int) -> int:
    """Tokens that ``budget`` buys, per sequence.

    A byte budget counts whole blocks of 64 tokens and sets two aside (the sinks' block and the one being filled), so that the
    bytes held in steady state stay below it.

    Raises:
        BudgetError: if the bytes do not hold three blocks.
    """
    if isinstance(budget, int):
        return budget
    total = parse_bytes(budget)
    blocks = total // (BLOCK * bytes_per_token)
    if blocks < 3:
        raise BudgetError(
            f"{budget} is {total} bytes, which holds {blocks} blocks of {BLOCK} tokens at {bytes_per_token} bytes a token; "
            f"give it at least {3 * BLOCK * bytes_per_token} bytes"
        )
    return (blocks - 2) * BLOCK
