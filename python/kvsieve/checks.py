"""What callers may pass: one check for each kind of argument. What it returns is plain Python, whatever type came in.

Numbers of numpy are numbers. A bool is no count and no row, and a float is no int, however whole: both are slips more often than
not. Tensors of token ids have :mod:`kvsieve.model.ids`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

import numpy as np

from kvsieve.errors import ArgumentError, KvsieveError, RangeError

__all__ = [
    "LARGEST",
    "MOST_ROWS",
    "as_plain",
    "check_flag",
    "check_path",
    "check_rows",
    "check_tokens",
    "integer",
    "plain",
    "plain_fields",
    "real",
    "told",
]

P = ParamSpec("P")
T = TypeVar("T")

LARGEST = 2**53
"""Numbers of tokens beyond this are not exact in the arithmetic of distances."""

MOST_ROWS = 2**16
"""Sequences of a batch."""


def told(value: object) -> str:
    """What was given, for a message: short and in one line, whatever it is."""
    try:
        if hasattr(value, "dtype") and not isinstance(value, np.generic):
            return f"{type(value).__name__} of {value.dtype}"
        text = " ".join(repr(value).split())
    except Exception:
        text = type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."


def plain(value: Any) -> Any:
    """A number of numpy as Python's, and so in tuples and lists; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(plain(one) for one in value)
    return value


def as_plain(make: Callable[P, T]) -> Callable[P, T]:
    """A constructor whose arguments may be numbers of numpy: it gets Python's, and so does the text that it writes of itself."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        return make(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return made


def plain_fields(rule: Any) -> None:
    """Make the numbers of numpy among the fields of a frozen dataclass Python's."""
    for one in fields(rule):
        value = getattr(rule, one.name)
        if isinstance(value, np.generic | tuple | list):
            object.__setattr__(rule, one.name, plain(value))


def integer(
    name: str, value: object, least: int = 0, most: int = LARGEST, error: type[KvsieveError] = ArgumentError, what: str = ""
) -> int:
    """``value`` as an int.

    Args:
        what: what it counts, for the message.

    Raises:
        ArgumentError: (or ``error``) for what is no int, or not within ``least`` to ``most``.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise error(f"{name} must be {what}an int of at least {least}, got {told(value)}")
    if number < least:
        raise error(f"{name} must be {what}an int of at least {least}, got {told(number)}")
    if number > most:
        raise error(f"{name} must be {what}an int of at most {most}, got {told(number)}")
    return int(number)


def real(value: object) -> float | None:
    """``value`` as a float that is finite; None for what is none."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        found = float(number)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def check_flag(name: str, value: object, error: type[KvsieveError] = ArgumentError) -> bool:
    """``value`` as a bool.

    Raises:
        ArgumentError: (or ``error``) for anything else than True or False.
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise error(f"{name} must be True or False, got {told(value)}")
    return flag


def check_path(name: str, value: object, error: type[KvsieveError] = ArgumentError) -> str:
    """``value`` as the path of a file, a text.

    Raises:
        ArgumentError: (or ``error``) for a number, bytes, nothing, or a text that no file can have as its name.
    """
    try:
        path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    except Exception:
        path = None
    if not isinstance(path, str) or not path:
        raise error(f"{name} must be a path, a str or an os.PathLike[str], got {told(value)}")
    try:
        found = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        found = False
    if not found:
        raise error(f"{name} must be a path, and no file can have the name {told(ascii(path))}")
    return path


def check_tokens(start: object, stop: object) -> tuple[int, int]:
    """The tokens ``start`` to ``stop - 1`` of a row.

    Raises:
        RangeError: for a range that is none.
    """
    first, end = (integer(name, value, 0, LARGEST, RangeError) for name, value in (("start", start), ("stop", stop)))
    if first >= end:
        raise RangeError(f"tokens {first} to {end} are none: start must lie before stop")
    return first, end


def check_rows(rows: object, num_rows: int) -> list[int] | None:
    """Rows of a stream, ascending, each once; None for all of them.

    Args:
        rows: an int, or a sequence of ints; None.
        num_rows: rows that the stream holds; 0 before its first token, when any row may be meant.

    Raises:
        RangeError: for a row that there is not.
    """
    if rows is None:
        return None
    several = isinstance(rows, np.ndarray) and rows.ndim == 1
    several = several or (isinstance(rows, Sequence) and not isinstance(rows, str | bytes | bytearray))
    given: Any = rows if several else [rows]
    if len(given[MOST_ROWS : MOST_ROWS + 1]):
        raise RangeError(f"rows must name at most {MOST_ROWS} rows, got {told(rows)}")
    found = set()
    for row in given:
        number = plain(row)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < (num_rows or LARGEST):
            raise RangeError(f"the stream holds rows 0 to {max(num_rows, 1) - 1}, not {told(row)}")
        found.add(number)
    if not found:
        raise RangeError("rows must name at least one row, or be None for all of them")
    return sorted(found)
