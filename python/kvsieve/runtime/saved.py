"""What a session file holds of one part, and the questions that a part may ask of it without being deceived.

A file whose bytes are those that were written can still have been made by something else. What a part takes from it has the type,
the length, the range, the dtype and the shape that it asked for, or else the file is refused.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvsieve.errors import SessionError

__all__ = ["Saved"]

MOST = 1 << 40
"""No count in a file is larger."""


@dataclass(frozen=True, eq=False)
class Saved:
    """What a session file holds of a part: plain data for JSON, and tensors by name.

    Attributes:
        seen: of each row, tokens that it had seen; given when a file is read.
        vocabulary: token ids that the model has; None if that is not known.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seen: Sequence[int] = ()
    vocabulary: int | None = None

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of ``key``, of this type."""
        if key not in self.data:
            raise SessionError(f"it does not say {key!r}")
        return of_kind(self.data[key], kind, key)

    def count(self, key: str, most: int = MOST) -> int:
        """A number from 0 to ``most``."""
        return in_range(self.get(key, int), 0, most, key)

    def by_row(self, key: str, least: int = 0, ahead: int = 0) -> list[int]:
        """Of each row a number from ``least`` to the tokens that it had seen and ``ahead`` more; empty where there is none yet."""
        values = self.get(key, list)
        if values and len(values) != len(self.seen):
            raise SessionError(f"it has {len(values)} {key!r} for {len(self.seen)} rows")
        return [in_range(of_kind(x, int, key), least, seen + ahead, key) for x, seen in zip(values, self.seen)]

    def rows(self, key: str) -> list[Any]:
        """Of each row what it says."""
        values = self.get(key, list)
        if len(values) != len(self.seen):
            raise SessionError(f"it has {len(values)} {key!r} for {len(self.seen)} rows")
        return list(values)

    def tensor(self, name: str, dtype: torch.dtype | None, *shape: int | None) -> torch.Tensor:
        """The tensor ``name``, of this dtype (None: of any floating-point one) and shape (None: of any size)."""
        if name not in self.tensors:
            raise SessionError(f"it has no {name!r}")
        found = self.tensors[name]
        fits = found.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, found.shape))
        if not fits or (found.dtype != dtype if dtype is not None else not found.is_floating_point()):
            raise SessionError(f"its {name!r} is {found.dtype} {list(found.shape)}, which does not fit")
        return found

    def indices(self, name: str, most: int, *shape: int | None) -> torch.Tensor:
        """The int64 tensor ``name`` of numbers from 0 to ``most - 1``."""
        found = self.tensor(name, torch.int64, *shape)
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < most):
            raise SessionError(f"its {name!r} has numbers from {int(found.min())} to {int(found.max())}, not below {most}")
        return found


def of_kind(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """``value``, which must be of this type. True is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise SessionError(f"its {what!r} is {type(value).__name__}, not {' or '.join(one.__name__ for one in kinds)}")
    return value


def in_range(value: int, least: int, most: int, what: str) -> int:
    """``value``, which must be from ``least`` to ``most``."""
    if not least <= value <= most:
        raise SessionError(f"its {what!r} is {value}, not from {least} to {most}")
    return value


def listed(value: Any, length: int, what: str) -> list[Any]:
    """``value``, which must be a list of this length."""
    if len(of_kind(value, list, what)) != length:
        raise SessionError(f"its {what!r} has {len(value)} values in place of {length}")
    return list(value)


def pair(value: Any, most: int, what: str) -> tuple[int, int]:
    """A range ``(start, stop)`` within ``0 .. most`` that is not empty."""
    start, stop = (in_range(of_kind(x, int, what), 0, most, what) for x in listed(value, 2, what))
    if start >= stop:
        raise SessionError(f"its {what!r} has the range {value}")
    return start, stop


def layer_of(name: str, layers: Container[int]) -> int:
    """The layer that a key names; one of ``layers``."""
    index = int(name) if name.isascii() and name.isdigit() and len(name) < 9 else -1
    if index not in layers or str(index) != name:
        raise SessionError(f"it tells of layer {name[:20]!r}, which this model does not have")
    return index
