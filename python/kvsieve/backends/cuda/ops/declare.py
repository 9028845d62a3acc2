"""What an operation is: one class that declares its arguments once.

    class TopK(NamedTuple):
        x: Annotated[torch.Tensor, Shaped(("rows", "columns"), torch.float32)]      an argument, and what is checked of it
        k: int

        def check(self) -> None: ...       what the arguments must be to each other (optional)
        def outputs(self): ...             empty results: their shapes and dtypes
        def launch(self): ...              fills and returns them

    top_k = operation(TopK)

From these come the schema ``kvsieve::top_k(Tensor x, int k) -> (Tensor, Tensor)``, the checks, torch's fake (shapes and dtypes
without running, so that ``torch.compile`` and graph capture pass through it) and the implementation on every device that has a
launcher. An argument that is a NamedTuple itself stands for its fields. One that an operation changes is marked :data:`WRITTEN`;
``blocks``, the table that says where each block lies, stands for the memory itself: operations that write keys and values say that
they change it.

``top_k(x, k)`` checks, and skips torch's dispatcher, which costs as much as a launch; ``TopK(x, k).launch()`` does not check, for
arguments that are known to fit, as a store's own are. No operation waits for the device.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, ParamSpec, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import library

from kvsieve.backends.cuda.capabilities import CAPABILITIES
from kvsieve.backends.cuda.ops.launch import is_aligned
from kvsieve.errors import ShapeError

__all__ = ["WRITTEN", "Shaped", "Table", "Vector", "operation", "require"]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

Count = int | Callable[[Any], int]
"""A number, or a function of the operation that gives it."""

WRITTEN = "written"
"""Marks an argument that the operation changes."""

check_heads = CAPABILITIES.check_heads
"""Raises BackendError for head sizes that no kernel can read."""


def require(good: bool, what: str) -> None:
    """Raise ShapeError unless ``good``."""
    if not good:
        raise ShapeError(what)


# ---------------------------------------------------------------------------------------------------------- checks of one argument

# Messages are made only where something is wrong.


def _misfit(name: str, x: torch.Tensor, dtype: torch.dtype, shape: str, device: torch.device) -> ShapeError:
    return ShapeError(
        f"{name} must be a contiguous {dtype} tensor {shape} on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}, "
        f"strides {x.stride()}"
    )


class Table(NamedTuple):
    """A contiguous tensor ``[n, width]``."""

    dtype: torch.dtype
    width: Count

    def check(self, name: str, x: torch.Tensor, op: Any, device: torch.device) -> None:
        width = self.width if isinstance(self.width, int) else self.width(op)
        if x.dtype is not self.dtype or x.dim() != 2 or x.shape[1] != width or x.device != device or not x.is_contiguous():
            raise _misfit(name, x, self.dtype, f"[n, {width}]", device)


class Vector(NamedTuple):
    """A contiguous tensor of at least so many numbers."""

    dtype: torch.dtype
    least: Count = 0

    def check(self, name: str, x: torch.Tensor, op: Any, device: torch.device) -> None:
        least = self.least if isinstance(self.least, int) else self.least(op)
        if x.dtype is not self.dtype or x.dim() != 1 or x.shape[0] < least or x.device != device or not x.is_contiguous():
            raise _misfit(name, x, self.dtype, f"[at least {least}]", device)


class Shaped(NamedTuple):
    """A tensor with these axes, of which the last one is contiguous; if ``aligned``, rows begin at multiples of 16 bytes."""

    axes: tuple[str, ...]
    dtype: torch.dtype | None = None
    aligned: bool = False
    any_stride: bool = False

    def check(self, name: str, x: torch.Tensor, op: Any, device: torch.device) -> None:
        good = x.dim() == len(self.axes) and x.device == device and (self.dtype is None or x.dtype is self.dtype)
        if not good or (x.stride(-1) != 1 and not self.any_stride) or (self.aligned and not is_aligned(x)):
            rows = ", rows at multiples of 16 bytes" if self.aligned else ""
            raise ShapeError(
                f"{name} must be {self.dtype or 'a tensor'} [{', '.join(self.axes)}]{rows}, on {device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}"
            )


# ------------------------------------------------------------------------------------------------------------------ declarations


class Declared(Protocol[R_co]):
    """An operation with its arguments."""

    def launch(self) -> R_co: ...


class _Argument(NamedTuple):
    """One argument: its path (``rows.blocks``), type in the schema, checks, default, and whether it is written."""

    path: str
    type: str
    checks: tuple[Any, ...]
    written: bool
    default: Any = inspect.Parameter.empty

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


_TYPES: dict[Any, str] = {torch.Tensor: "Tensor", int: "int", float: "float", bool: "bool", torch.dtype: "ScalarType"}


def _schema_type(hint: Any) -> str:
    """``Tensor?`` of ``torch.Tensor | None``, ``int[]`` of ``Sequence[int]``."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (x for x in get_args(hint) if x is not type(None))
        return f"{_schema_type(inner)}?"
    if get_origin(hint) is not None and get_args(hint) == (int,):
        return "int[]"
    return _TYPES[hint]


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _arguments(declared: type, prefix: str = "") -> Iterator[_Argument]:
    """The arguments of an operation, in the order of its schema."""
    defaults = declared._field_defaults  # type: ignore[attr-defined]
    for name, hint in get_type_hints(declared, include_extras=True).items():
        base, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if _is_group(base):
            yield from _arguments(base, f"{prefix}{name}.")
            continue
        checks = tuple(note for note in notes if note != WRITTEN)
        default = defaults.get(name, inspect.Parameter.empty)
        yield _Argument(prefix + name, _schema_type(base), checks, WRITTEN in notes, default)


def _schema(name: str, arguments: Sequence[_Argument], returns: Any) -> str:
    letters, parts = iter("abcdefgh"), []
    for argument in arguments:
        kind = argument.type.replace("Tensor", f"Tensor({next(letters)}!)") if argument.written else argument.type
        default = "" if argument.default is inspect.Parameter.empty else f"={argument.default}"
        parts.append(f"{kind} {argument.name}{default}")
    if returns is type(None):
        result = "()"
    else:
        result = f"({', '.join('Tensor' for _ in get_args(returns))})" if get_args(returns) else "Tensor"
    return f"{name}({', '.join(parts)}) -> {result}"


Layout = list["tuple[Any, Layout] | None"]
"""Of each argument of a declaration the group that it is, with its own layout; None for a plain one."""


def _layout(declared: Any) -> Layout:
    return [(hint, _layout(hint)) if _is_group(hint) else None for hint in get_type_hints(declared).values()]


def _build(declared: Any, layout: Layout, values: Iterator[Any]) -> Any:
    """The operation of flat values."""
    return declared(*(next(values) if group is None else _build(*group, values) for group in layout))


def _flat(op: Any, layout: Layout) -> list[Any]:
    """The inverse of :func:`_build`."""
    values: list[Any] = []
    for value, group in zip(op, layout):
        values += [value] if group is None else _flat(value, group[1])
    return values


# ------------------------------------------------------------------------------------------------------------------ registration

_library: Any = library.Library("kvsieve", "DEF")  # type: ignore[no-untyped-call]


def operation(declared: Callable[P, Declared[R_co]]) -> Callable[P, R_co]:
    """Define ``torch.ops.kvsieve.<name>``, the class's name in snake case, and give the function that checks and launches.

    The function goes through torch's dispatcher only where it is being compiled.
    """
    made = cast(Any, declared)
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", made.__name__).lower()
    arguments = tuple(_arguments(made))
    checks = [(a.name, attrgetter(a.path), check.check) for a in arguments for check in a.checks]
    where = attrgetter(next(a.path for a in arguments if a.type == "Tensor"))
    returns, related, layout = get_type_hints(made.launch)["return"], getattr(made, "check", None), _layout(made)

    def rebuilt(values: tuple[Any, ...]) -> Any:
        # The dispatcher leaves trailing defaults out.
        return _build(made, layout, iter((*values, *(a.default for a in arguments[len(values) :]))))

    def checked(op: Any) -> Any:
        device = where(op).device
        for argument, get, check in checks:
            x = get(op)
            if x is not None:
                check(argument, x, op, device)
        if related is not None:
            related(op)
        return op.launch()

    _library.define(_schema(name, arguments, returns))
    _library.impl(name, lambda *values: checked(rebuilt(values)), "CompositeExplicitAutograd")
    empty = (lambda *values: None) if returns is type(None) else (lambda *values: rebuilt(values).outputs())
    library.register_fake(f"kvsieve::{name}", empty, lib=_library)
    dispatched = getattr(torch.ops.kvsieve, name).default

    @wraps(made, updated=())
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        op = made(*args, **kwargs)
        return dispatched(*_flat(op, layout)) if torch.compiler.is_compiling() else checked(op)

    call.__name__ = name
    return call
