"""What can be measured, and how it is asked for. Neither torch nor transformers is imported: the command line reads this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kvsieve.errors import BenchError

__all__ = ["DTYPES", "POLICIES", "RANDOM", "TABLES", "WHOLE", "Options", "Shape"]

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""Short names of the element types, and torch's."""


MOST_ROUNDS = 50
"""Rounds of a case: a static cache has room for so many tokens, and some more."""


@dataclass(frozen=True)
class Shape:
    """The heads of an attention layer: query heads, key-value heads, channels of a head.

    >>> Shape.parse("32/8/128").group
    4
    """

    heads: int
    kv_heads: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that ``text`` names, such as ``9/3/64``.

        Raises:
            BenchError: unless it is three counts, the first a multiple of the second, and the last even.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise BenchError(f"cannot read the shape {text!r}; write heads/kv heads/head size, such as 32/8/128")
        heads, kv_heads, dim = (int(part) for part in parts)
        if heads % kv_heads or dim % 2:
            raise BenchError(f"shape {text}: heads must be a multiple of kv heads, and the head size even")
        return cls(heads, kv_heads, dim)

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token's key and value."""
        return 2 * self.kv_heads * self.dim * itemsize

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.dim}"


@dataclass(frozen=True)
class _Table:
    """What a table measures unless it is told otherwise."""

    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    shapes: tuple[Shape, ...] = (Shape(9, 3, 64), Shape(32, 8, 128))


TABLES = {
    "attend": _Table(tuple(1024 << i for i in range(8)), (1024, 8192)),
    "decode": _Table((512, 2048, 8192, 32768), (512, 2048), dtypes=("f32", "bf16"), shapes=(Shape(9, 3, 64),)),
    "search": _Table((8192, 32768, 131072, 524288), (8192, 32768), dtypes=("bf16",)),
    "prefill": _Table((512, 1024, 2048, 4096, 8192), (512, 2048)),
    "policies": _Table((512, 2048, 8192), (512, 2048), dtypes=("f32",), shapes=(Shape(9, 3, 64),)),
}
"""The tables, and the cases of each."""

WHOLE = ("decode", "policies")
"""Tables of a whole model, which has its own shape."""

RANDOM = "random"
"""The model of those tables unless one is named: SmolLM2-135M's shape with random weights."""

POLICIES = (
    *("full()", "streamingllm(1024)", "sirllm(1024)", "snapkv(1024)", "quest(1024)"),
    'full() | quantized(4, when="prefill")',
)
"""What ``policies`` measures unless it is told otherwise."""


@dataclass(frozen=True)
class Options:
    """What to measure and how; make one with :meth:`of`.

    Attributes:
        table: ``"attend"``, ``"decode"``, ``"search"``, ``"prefill"`` or ``"policies"``.
        shapes, dtypes, lengths: the cases, in all combinations. ``decode`` and ``policies`` have a model, and the shape is its own.
        rounds: rounds of every case; cases that take above 200 ms make do with five.
        threads: threads of torch and of the kernels. With one, the thread's own CPU time is measured; with more, the wall's.
        json: also write everything to this file, after every row; resume: rows that it holds are not measured again.
        plot: a picture of the table, PNG or SVG.
        model: of ``decode`` and ``policies``: ``random``, ``smollm2``, a local folder, or a GGUF file.
        policies: of ``policies``, as text.
        weights: of ``decode``: ``int8`` or ``int4`` for linear layers in so few bits, in the dtype ``f32``.
        compiled: of ``decode``: streams decode by compiled code.
    """

    table: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    rounds: int = 9
    threads: int = 1
    json: Path | None = field(default=None, compare=False)
    resume: bool = field(default=False, compare=False)
    plot: Path | None = field(default=None, compare=False)
    model: str = RANDOM
    policies: tuple[str, ...] = POLICIES
    weights: str | None = None
    compiled: bool = False

    @classmethod
    def of(
        cls,
        table: str,
        *,
        shapes: list[str] | None = None,
        dtypes: list[str] | None = None,
        lengths: list[int] | None = None,
        rounds: int | None = None,
        threads: int = 1,
        json: Path | None = None,
        resume: bool = False,
        plot: Path | None = None,
        model: str | None = None,
        policies: list[str] | None = None,
        weights: str | None = None,
        compiled: bool = False,
        quick: bool = False,
    ) -> Options:
        """Options of ``table``, checked; what is not given is the table's own choice, less of it when ``quick``.

        Raises:
            BenchError: for an unknown table or dtype, an unreadable shape, counts that cannot be measured, what the table does not
                take, a file to go on with that is not named, and a picture of an unknown kind.

        >>> Options.of("attend", dtypes=["bf16"], quick=True).lengths
        (1024, 8192)
        """
        if table not in TABLES:
            raise BenchError(f"unknown table {table!r}; known: {', '.join(TABLES)}")
        usual = TABLES[table]
        if shapes is not None and table in WHOLE:
            raise BenchError(f"{table} measures a whole model, whose shape is its own; leave --shape out")
        if model is not None and table not in WHOLE:
            raise BenchError(f"{table} measures one layer of a --shape; --model goes with {' and '.join(WHOLE)}")
        if policies is not None and table != "policies":
            raise BenchError(f"{table} has its own policies; --policy goes with policies")
        if weights is not None and (table != "decode" or set(dtypes or usual.dtypes) != {"f32"}):
            raise BenchError("--weights goes with decode --dtype f32: what is left of the model stays in float32")
        if compiled and table != "decode":
            raise BenchError(f"{table} runs no model by compiled code; --compile goes with decode")
        if resume and json is None:
            raise BenchError("--resume goes on with a file: name it by --json")
        if rounds is not None and rounds > MOST_ROUNDS:
            raise BenchError(f"--rounds is at most {MOST_ROUNDS}, got {rounds}")
        apart = (rounds or 9) + 3
        if table == "policies" and any(b - a < apart for a, b in pairwise(sorted(set(lengths or ())))):
            raise BenchError(f"lengths of {table} are at least {apart} tokens apart, because measuring reads some")
        if plot is not None and plot.suffix not in (".png", ".svg"):
            raise BenchError(f"a picture is .png or .svg, got --plot {plot}")
        for dtype in dtypes or ():
            if dtype not in DTYPES:
                raise BenchError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        for length in lengths or ():
            if length < 32:
                raise BenchError(f"a length of {length} measures nothing; the least is 32 tokens")
        if rounds is not None and rounds < 3:
            raise BenchError(f"a median needs at least 3 rounds, got {rounds}")
        if threads < 1:
            raise BenchError(f"threads must be at least 1, got {threads}")
        return cls(
            table,
            tuple(Shape.parse(shape) for shape in shapes) if shapes else usual.shapes,
            tuple(dtypes) if dtypes else usual.dtypes,
            tuple(dict.fromkeys(lengths)) if lengths else usual.quick_lengths if quick else usual.lengths,
            rounds or (5 if quick else 9),
            threads,
            json=json,
            resume=resume,
            plot=plot,
            model=model or RANDOM,
            policies=tuple(policies) if policies else POLICIES,
            weights=weights,
            compiled=compiled,
        )
