"""The CUDA operations as torch sees them: checked arguments, launch geometry, and registration with ``torch.library``.

Nothing here knows how a kernel gets onto a device. That is a :class:`Launcher`: CuPy's in :mod:`kvsieve.backends.cuda`; in the
tests one that runs the same sources on the CPU. One launcher serves one type of device, see :func:`register`.

Each operation is ``torch.ops.kvsieve.<name>``, with a fake (shapes and dtypes without running), so that ``torch.compile`` and graph
capture pass through it. `blocks`, the table that says where each block lies, stands for the memory itself: operations that write
keys and values say that they change `blocks`. Called as plain functions they skip torch's dispatcher, which costs as much as a
launch.

None of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch

from kvsieve.backends.nvrtc import Module
from kvsieve.errors import BackendError, ShapeError

__all__ = [
    "DTYPES",
    "Format",
    "Launcher",
    "append",
    "attend",
    "attend_module",
    "carry",
    "check_dims",
    "dims_supported",
    "gather",
    "hip",
    "launcher_of",
    "merge",
    "move",
    "narrow",
    "pack",
    "register",
    "rotate",
    "scatter",
    "slot_width",
    "sparse",
    "surprisal",
    "top_k",
    "turns",
    "unpack",
]

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The dtypes of keys and values, by their names in the kernels."""

THREADS = 128
LAYOUTS = {"half": 1, "interleaved": 2}

Argument = int | float | None
Size = tuple[int, int, int]
F = TypeVar("F", bound=Callable[..., Any])


class Launcher(Protocol):
    """Runs kernels on one type of device."""

    def launch(self, module: Module, grid: Size, block: int, args: Sequence[Argument], device: torch.device) -> None:
        """Start ``module``'s first instantiation on the device's current stream.

        Every argument is 8 bytes: an address or a count (int; None for null), or a double (float).
        """

    def processors(self, device: torch.device) -> int:
        """How many multiprocessors the device has."""


_launchers: dict[str, Launcher] = {}


def register(device_type: str, launcher: Launcher) -> None:
    """Let ``launcher`` serve all devices of one type."""
    _launchers[device_type] = launcher


def launcher_of(device: torch.device) -> Launcher:
    """The launcher of a device.

    Raises:
        BackendError: if none was registered.
    """
    found = _launchers.get(device.type)
    if found is None:
        raise BackendError(f"no CUDA kernels run on {device}; move the tensors to a CUDA device, or use another backend")
    return found


# ------------------------------------------------------------------------------------------------------------------------- checks


def dims_supported(dtype: torch.dtype, *dims: int) -> bool:
    """Whether rows of ``dims`` channels in ``dtype`` can be read in whole 16-byte pieces, and fit the tiles of `attend`."""
    return dtype in DTYPES and all(0 < d <= 256 and d * dtype.itemsize % 16 == 0 for d in dims)


def _check(good: bool, what: str) -> None:
    if not good:
        raise ShapeError(what)


def check_dims(dtype: torch.dtype, *dims: int) -> None:
    """Raise BackendError where :func:`dims_supported` does not hold."""
    if not dims_supported(dtype, *dims):
        sizes = " and ".join(str(d) for d in dims)
        raise BackendError(
            "backend 'cuda' holds float32, bfloat16 and float16 heads of at most 256 channels in whole 16-byte pieces "
            f"(a multiple of {16 // dtype.itemsize}), not {sizes} in {dtype}; use backend='reference'"
        )


def _misfit(name: str, x: torch.Tensor, dtype: torch.dtype, shape: str, device: torch.device) -> ShapeError:
    return ShapeError(
        f"{name} must be a contiguous {dtype} tensor {shape} on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}, "
        f"strides {x.stride()}"
    )


# These run for every layer of every token: messages are made only where something is wrong.


def _check_table(name: str, x: torch.Tensor, dtype: torch.dtype, width: int, device: torch.device) -> None:
    if x.dtype is not dtype or x.dim() != 2 or x.shape[1] != width or x.device != device or not x.is_contiguous():
        raise _misfit(name, x, dtype, f"[n, {width}]", device)


def _check_vector(name: str, x: torch.Tensor, dtype: torch.dtype, least: int, device: torch.device) -> None:
    if x.dtype is not dtype or x.dim() != 1 or x.shape[0] < least or x.device != device or not x.is_contiguous():
        raise _misfit(name, x, dtype, f"[at least {least}]", device)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows of ``x`` are contiguous and begin at multiples of 16 bytes."""
    together = 0
    *outer, last = x.stride()
    for stride in outer:
        together |= stride
    return last == 1 and not x.data_ptr() & 15 and not together * x.element_size() & 15


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy whose rows are contiguous and begin at multiples of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _launch(module: Module, grid: Size, args: Sequence[Argument], device: torch.device, block: int = THREADS) -> None:
    if 0 not in grid:
        launcher_of(device).launch(module, grid, block, args, device)


# ------------------------------------------------------------------------------------------------------------------ instantiations


@cache
def _module(file: str, template: str, *parameters: object) -> Module:
    values = [str(p).lower() if isinstance(p, bool) else DTYPES[p] if isinstance(p, torch.dtype) else str(p) for p in parameters]
    return Module(f"{file}.cu", (f"{template}<{', '.join(values)}>" if values else template,))


def heads_of(group: int, key_dim: int) -> tuple[int, int]:
    """Query heads per warp, and how many such sets a thread block of `attend` serves, for a group of ``group`` heads."""
    most = 4 if key_dim <= 128 else 2
    subsets = next(s for s in (1, 2, 4) if 4 * s >= group or s == most)
    return min(-(-group // subsets), 4), subsets


@cache
def attend_module(
    dtype: torch.dtype, key_dim: int, value_dim: int, group: int, raw: bool, bits: tuple[int, int] | None = None
) -> Module:
    """The instantiation of `attend` for these sizes, and for packed blocks of ``bits`` (of key and value codes), if any."""
    heads, subsets = heads_of(group, key_dim)
    return _module("attend", "attend", dtype, key_dim, value_dim, heads, subsets, raw, *(bits or ()))


def resident(group: int, key_dim: int, raw: bool, bits: tuple[int, int] | None) -> int:
    """Thread blocks of `attend` that a multiprocessor holds; its registers allow no more. As ``resident`` in attend.cu."""
    _, subsets = heads_of(group, key_dim)
    if bits is not None and (any(bits) or raw or subsets > 1):
        return 2
    return 3 if subsets == 1 or (subsets == 2 and not raw) else 2


# ------------------------------------------------------------------------------------------------------------------ packed blocks


class Format(NamedTuple):
    """How a layer's packed blocks are laid out; see packed.cuh.

    Attributes:
        kept: channels of a key that are kept; key_bits, value_bits: of a code, 2, 4 or 8, or 0 for numbers as they came.
        group: numbers that share a scale: 8, 16, 32 or 64.
    """

    kept: int
    key_bits: int
    value_bits: int
    group: int

    def check(self, key_dim: int, value_dim: int) -> None:
        """Raise ShapeError if a layer of these head sizes cannot be packed so."""
        _check(0 < self.kept <= key_dim, f"a key of {key_dim} channels cannot keep {self.kept}")
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            _check(bits in (0, 2, 4, 8), f"{name} must be 0, 2, 4 or 8, got {bits}")
        if self.key_bits or self.value_bits:
            fits = self.group in (8, 16, 32, 64) and (not self.value_bits or value_dim % self.group == 0)
            _check(fits, f"group must be 8, 16, 32 or 64 and divide the {value_dim} channels of a value, got {self.group}")

    @property
    def log_group(self) -> int:
        """The group as a power of two."""
        return max(self.group, 1).bit_length() - 1

    def wide(self, dtype: torch.dtype) -> int:
        """Numbers of a row of keys: those kept, rounded up to whole vectors of 16 bytes."""
        vector = 16 // dtype.itemsize
        return -(-self.kept // vector) * vector

    def rows(self, dtype: torch.dtype, value_dim: int) -> tuple[int, int, int, int]:
        """Bytes of a row of keys, of the scales of a group of keys, of a row of values, and of its scales."""
        wide = self.wide(dtype)
        key = wide * self.key_bits // 8 if self.key_bits else wide * dtype.itemsize
        value = value_dim * self.value_bits // 8 if self.value_bits else value_dim * dtype.itemsize
        return key, 4 * wide if self.key_bits else 0, value, 4 * value_dim // self.group if self.value_bits else 0

    def tile(self, dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
        """Slots of a packed block that pass through a stage of `attend` at once: as many as fit where plain ones would."""
        plain = 1
        while plain < 64 and 2 * plain * (key_dim + value_dim) * dtype.itemsize <= 16384:
            plain *= 2
        room, tile = plain * (key_dim + value_dim) * dtype.itemsize, 64
        while tile > 1 and self._stage(tile, dtype, value_dim) > room:
            tile //= 2
        return tile

    def _stage(self, tile: int, dtype: torch.dtype, value_dim: int) -> int:
        """Bytes of a tile in shared memory, as attend.cu lays it out."""
        key, key_scale, value, value_scale = self.rows(dtype, value_dim)
        parts = ((tile * key, self.key_bits), (tile * value, self.value_bits), (tile * value_scale, self.value_bits))
        rows = sum(-(-size // 16) * 16 + (16 if bits else 0) for size, bits in parts)
        return rows + (((tile - 1) // self.group + 2) * key_scale if self.key_bits else 0)


PACKED_COLUMNS = 8
"""Integers of a packed block in its table: addresses of keys, their scales, values, their scales, channels; tokens between heads;
two to fill up."""


# ---------------------------------------------------------------------------------------------------------------------- operations

_library: Any = torch.library.Library("kvsieve", "DEF")  # type: ignore[no-untyped-call]


def _operation(schema: str) -> Callable[[F], F]:
    """Define ``kvsieve::<schema>`` and let the function implement it on every device that has a launcher.

    The function that is returned goes through torch's dispatcher only where it is being compiled.
    """

    def wrap(function: F) -> F:
        name = _library.define(schema).split("::")[-1]
        _library.impl(name, function, "CompositeExplicitAutograd")
        operation = getattr(torch.ops.kvsieve, name).default

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (operation if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return cast(F, call)

    return wrap


def _fake(name: str) -> Callable[[F], F]:
    return cast("Callable[[F], F]", torch.library.register_fake(f"kvsieve::{name}", lib=_library))


@_operation("append(Tensor k, Tensor v, Tensor(a!) blocks, Tensor appends, Tensor counts, int tokens) -> ()")
def append(
    k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, appends: torch.Tensor, counts: torch.Tensor, tokens: int
) -> None:
    """Store new tokens where ``appends`` says.

    Args:
        k: ``[B, Hkv, q, D]``; v: ``[B, Hkv, q, Dv]``. Copied first if rows do not begin at multiples of 16 bytes.
        blocks: int64 ``[n, 4]`` (key address, value address, tokens between heads, kind 0).
        appends: int32 ``[capacity, 4]`` (row, column, block, slot), of which ``counts[0]`` count.
        tokens: at most how many may count; sizes the launch.
    """
    check_dims(k.dtype, k.shape[-1], v.shape[-1])
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype is not v.dtype or k.device != v.device:
        raise ShapeError(
            f"k and v must be [rows, heads, columns, channels] alike, got {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        )
    _check_table("blocks", blocks, torch.int64, 4, k.device)
    _check_table("appends", appends, torch.int32, 4, k.device)
    _check_vector("counts", counts, torch.int32, 1, k.device)
    if not 0 <= tokens <= appends.shape[0]:
        raise ShapeError(f"tokens must be at most {appends.shape[0]}, the list's capacity, got {tokens}")
    run_append(k, v, blocks, appends, counts, tokens)


def run_append(
    k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, appends: torch.Tensor, counts: torch.Tensor, tokens: int
) -> None:
    """:func:`append` of arguments that are known to fit, as a store's own are."""
    k, v = aligned(k), aligned(v)
    pieces = (k.shape[3] + v.shape[3]) * k.element_size() // 16
    grid = min(-(-tokens * k.shape[1] * pieces // THREADS), 1024)
    args = (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3])
    module = _module("append", "append", k.dtype, k.shape[3], v.shape[3])
    _launch(module, (grid, 1, 1), (*args, blocks.data_ptr(), appends.data_ptr(), counts.data_ptr(), k.shape[1]), k.device)


@_fake("append")
def _(k: Any, v: Any, blocks: Any, appends: Any, counts: Any, tokens: int) -> None:
    return None


@_operation(
    "attend(Tensor q, Tensor blocks, Tensor starts, Tensor spans, Tensor? turns, Tensor? in_block, int kv_heads, int value_dim, "
    "int splits, float scale, float softcap, int layout, float factor, bool raw, Tensor? sinks, Tensor? key_starts, int total_keys,"
    " Tensor? packed=None, int[]? format=None) -> (Tensor, Tensor, Tensor)"
)
def attend(
    q: torch.Tensor,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    turns: torch.Tensor | None,
    in_block: torch.Tensor | None,
    kv_heads: int,
    value_dim: int,
    splits: int,
    scale: float,
    softcap: float = 0.0,
    layout: int = 0,
    factor: float = 1.0,
    raw: bool = False,
    sinks: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    total_keys: int = 0,
    packed: torch.Tensor | None = None,
    format: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend every query to its spans. Item ``i = row * q + query`` reads ``spans[starts[i] : starts[i + 1]]``.

    Args:
        q: ``[B, H, q, D]``, any strides but 1 along D.
        blocks: as for :func:`append`.
        starts: int32 ``[B * q + 1]``; spans: int32 ``[capacity, 4]`` as ``Step.span_table`` gives them.
        turns: float32 ``[n, R]``, the rotations that spans name; in_block: float32 ``[64, R]``, those of a block's slots. Both None
            where nothing turns.
        splits: thread blocks per item and head.
        scale, softcap: of the logits; softcap 0 for none.
        layout: 0 nothing turns, 1 half, 2 interleaved; factor: multiplies the rotated channels of the queries.
        raw: whether spans may ask for keys to be rotated.
        sinks: float32 ``[H]``: learned logits without a value.
        key_starts: int64 ``[B * q + 1]``, where each item's keys begin among ``total_keys``; None unless the mass is wanted.
        packed: int64 ``[n, 8]``, where packed blocks lie, which spans number from ``_core.PACKED`` on; format: theirs, as the four
            integers of a :class:`Format`. Both None where there are none.

    Returns:
        out ``[B, q, H, Dv]`` in q's dtype (zero where nothing is read); lse float32 ``[B, q, H]`` without the learned sinks (-inf
        there); mass float32 ``[Hkv, total_keys]``, each key's probability summed over its group (``[Hkv, 0]`` when not asked for).
    """
    if q.dim() != 4 or q.stride(3) != 1:
        raise ShapeError(f"q must be [rows, heads, queries, channels], got {tuple(q.shape)}, strides {q.stride()}")
    rows, heads, queries, key_dim = q.shape
    check_dims(q.dtype, key_dim, value_dim)
    items, device = rows * queries, q.device
    if kv_heads <= 0 or heads % kv_heads:
        raise ShapeError(f"{heads} query heads are no multiple of {kv_heads} key-value heads")
    if not 0 < splits <= 65535 or items > 65535:
        raise ShapeError(f"{splits} splits of {items} queries: at most 65,535 of each")
    _check_table("blocks", blocks, torch.int64, 4, device)
    _check_vector("starts", starts, torch.int32, items + 1, device)
    _check_table("spans", spans, torch.int32, 4, device)
    pairs = 0
    if layout:
        if turns is None or in_block is None:
            raise ShapeError("turns and in_block are needed where something turns")
        pairs = in_block.shape[1] // 2
        if not 0 < 2 * pairs <= key_dim:
            raise ShapeError(f"{2 * pairs} rotated channels in keys of {key_dim}")
        _check_table("turns", turns, torch.float32, 2 * pairs, device)
        _check_table("in_block", in_block, torch.float32, 2 * pairs, device)
    if sinks is not None:
        _check_vector("sinks", sinks, torch.float32, heads, device)
    if key_starts is not None:
        _check_vector("key_starts", key_starts, torch.int64, items + 1, device)
    _check((packed is None) == (format is None), "packed blocks need a format, and a format packed blocks")
    if packed is not None and format is not None:
        Format(*format).check(key_dim, value_dim)
        _check_table("packed", packed, torch.int64, PACKED_COLUMNS, device)
    out, lse, mass = run_attend(
        q,
        blocks,
        starts,
        spans,
        turns,
        in_block,
        kv_heads,
        value_dim,
        splits,
        scale,
        softcap,
        layout,
        factor,
        raw,
        sinks,
        key_starts,
        total_keys,
        packed=packed,
        format=None if format is None else Format(*format),
    )
    assert lse is not None
    return out, lse, lse.new_empty((kv_heads, 0)) if mass is None else mass


def run_attend(
    q: torch.Tensor,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    turns: torch.Tensor | None,
    in_block: torch.Tensor | None,
    kv_heads: int,
    value_dim: int,
    splits: int,
    scale: float,
    softcap: float,
    layout: int,
    factor: float,
    raw: bool,
    sinks: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    total_keys: int,
    with_lse: bool = True,
    packed: torch.Tensor | None = None,
    format: Format | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """:func:`attend` of arguments that are known to fit, as a store's own are. Gives None for what was not asked for."""
    rows, heads, queries, key_dim = q.shape
    items, device = rows * queries, q.device
    pairs = in_block.shape[1] // 2 if layout and in_block is not None else 0
    group = heads // kv_heads
    per_warp, subsets = heads_of(group, key_dim)
    chunks = -(-group // (per_warp * subsets))
    parts = items * heads * splits
    scratch = torch.empty(parts * (value_dim + 1), dtype=torch.float32, device=device)
    part = scratch.data_ptr()
    part_lse = part + 4 * parts * value_dim
    logits = norms = mass = None
    if key_starts is not None:
        logits = torch.empty(heads, total_keys, dtype=torch.float32, device=device)
        norms = torch.empty(items, heads, dtype=torch.float32, device=device)
    args: list[Argument] = [q.data_ptr(), *q.stride()[:3], blocks.data_ptr(), starts.data_ptr(), spans.data_ptr()]
    args += [_address(turns), _address(in_block), pairs, layout, float(factor), float(scale), float(softcap), queries, group]
    args += [part, part_lse, _address(logits), _address(key_starts), total_keys]
    bits = None
    if packed is not None and format is not None:
        bits = format.key_bits, format.value_bits
        args += [packed.data_ptr(), format.kept, format.wide(q.dtype), format.log_group, format.tile(q.dtype, key_dim, value_dim)]
    else:
        args += [None, 0, 0, 0, 0]
    _launch(attend_module(q.dtype, key_dim, value_dim, group, raw, bits), (splits, kv_heads * chunks, items), args, device)
    out = torch.empty(rows, queries, heads, value_dim, dtype=q.dtype, device=device)
    lse = torch.empty(rows, queries, heads, dtype=torch.float32, device=device) if with_lse else None
    _merge(part, part_lse, splits, heads, sinks, out, lse, norms)
    if logits is not None and norms is not None:
        mass = torch.empty(kv_heads, total_keys, dtype=torch.float32, device=device)
        args = [logits.data_ptr(), _address(key_starts), total_keys, norms.data_ptr(), group, mass.data_ptr()]
        _launch(_module("merge", "mass"), (min(-(-total_keys // (items * THREADS)), 1024), kv_heads, items), args, device)
    return out, lse, mass


@_fake("attend")
def _(
    q: torch.Tensor,
    blocks: Any,
    starts: Any,
    spans: Any,
    turns: Any,
    in_block: Any,
    kv_heads: int,
    value_dim: int,
    splits: int,
    scale: float,
    softcap: float,
    layout: int,
    factor: float,
    raw: bool,
    sinks: Any,
    key_starts: Any,
    total_keys: int,
    packed: Any = None,
    format: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, heads, queries, _ = q.shape
    lse = q.new_empty((rows, queries, heads), dtype=torch.float32)
    mass = q.new_empty((kv_heads, 0 if key_starts is None else total_keys), dtype=torch.float32)
    return q.new_empty((rows, queries, heads, value_dim)), lse, mass


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _merge(
    part: int,
    part_lse: int,
    parts: int,
    heads: int,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    norms: torch.Tensor | None,
) -> None:
    dim = out.shape[-1]
    args = (part, part_lse, parts, heads, _address(sinks), out.data_ptr(), _address(lse), _address(norms))
    _launch(_module("merge", "merge", out.dtype, dim), (out.numel() // dim, 1, 1), args, out.device)


@_operation("merge(Tensor part, Tensor part_lse, Tensor? sinks, ScalarType dtype) -> (Tensor, Tensor)")
def merge(
    part: torch.Tensor, part_lse: torch.Tensor, sinks: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the union of the parts' keys.

    Args:
        part: float32 ``[items, H, parts, Dv]``, normalised; part_lse: float32 ``[items, H, parts]``, -inf for a part without keys.
        sinks: float32 ``[H]``, learned logits without a value.
        dtype: of the result.

    Returns:
        out ``[items, H, Dv]`` and lse float32 ``[items, H]``, without the learned sinks.
    """
    _check(
        part.dim() == 4 and part.is_contiguous() and part.dtype == torch.float32 and part_lse.is_contiguous(),
        f"part must be contiguous float32 [items, heads, parts, channels], got {part.dtype} {tuple(part.shape)}",
    )
    _check(
        part_lse.shape == part.shape[:3] and part_lse.dtype == torch.float32 and part_lse.device == part.device,
        f"part_lse must be float32 {tuple(part.shape[:3])} on {part.device}, got {part_lse.dtype} {tuple(part_lse.shape)}",
    )
    check_dims(dtype, part.shape[3])
    if sinks is not None:
        _check_vector("sinks", sinks, torch.float32, part.shape[1], part.device)
    out = part.new_empty((part.shape[0], part.shape[1], part.shape[3]), dtype=dtype)
    lse = torch.empty_like(part_lse[..., 0], memory_format=torch.contiguous_format)
    _merge(part.data_ptr(), part_lse.data_ptr(), part.shape[2], part.shape[1], sinks, out, lse, None)
    return out, lse


@_fake("merge")
def _(part: torch.Tensor, part_lse: torch.Tensor, sinks: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    out = part.new_empty((part.shape[0], part.shape[1], part.shape[3]), dtype=dtype)
    return out, part_lse.new_empty(part_lse.shape[:2])


@_operation(
    "gather(Tensor blocks, Tensor runs, int tokens, int kv_heads, int key_dim, int value_dim, ScalarType dtype) -> (Tensor, Tensor)"
)
def gather(
    blocks: torch.Tensor, runs: torch.Tensor, tokens: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[Hkv, tokens, D]`` and values ``[Hkv, tokens, Dv]`` of ``runs``, int32 ``[n, 4]`` (block, lo, hi, tokens before)."""
    check_dims(dtype, key_dim, value_dim)
    k = torch.empty(kv_heads, tokens, key_dim, dtype=dtype, device=blocks.device)
    v = torch.empty(kv_heads, tokens, value_dim, dtype=dtype, device=blocks.device)
    gather_into(k, v, blocks, runs)
    return k, v


def gather_into(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, runs: torch.Tensor) -> None:
    """:func:`gather` into tensors that are there."""
    _copy_runs(blocks, runs, k, v, back=False)


@_fake("gather")
def _(
    blocks: torch.Tensor, runs: Any, tokens: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    k = blocks.new_empty((kv_heads, tokens, key_dim), dtype=dtype)
    return k, blocks.new_empty((kv_heads, tokens, value_dim), dtype=dtype)


@_operation("scatter(Tensor k, Tensor v, Tensor(a!) blocks, Tensor runs) -> ()")
def scatter(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, runs: torch.Tensor) -> None:
    """The inverse of :func:`gather`."""
    check_dims(k.dtype, k.shape[-1], v.shape[-1])
    good = k.is_contiguous() and v.is_contiguous() and k.dim() == 3 and k.shape[:2] == v.shape[:2] and k.dtype == v.dtype
    _check(good and k.device == v.device, f"k and v must be contiguous [heads, tokens, channels], got {k.shape} and {v.shape}")
    _check(is_aligned(k) and is_aligned(v), "k and v must begin at multiples of 16 bytes")
    _copy_runs(blocks, runs, k, v, back=True)


@_fake("scatter")
def _(k: Any, v: Any, blocks: Any, runs: Any) -> None:
    return None


def _copy_runs(blocks: torch.Tensor, runs: torch.Tensor, k: torch.Tensor, v: torch.Tensor, back: bool) -> None:
    _check_table("blocks", blocks, torch.int64, 4, k.device)
    _check_table("runs", runs, torch.int32, 4, k.device)
    module = _module("gather", "gather", k.dtype, k.shape[2], v.shape[2], back)
    args = (blocks.data_ptr(), runs.data_ptr(), k.data_ptr(), v.data_ptr(), k.shape[1])
    _launch(module, (runs.shape[0], k.shape[0], 1), args, k.device)


@_operation("move(Tensor(a!) blocks, Tensor moves, int kv_heads, int key_dim, int value_dim, ScalarType dtype) -> ()")
def move(blocks: torch.Tensor, moves: torch.Tensor, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Move tokens between slots, in the order of ``moves``, int32 ``[n, 4]`` (from, to, from_slot | to_slot << 16, length)."""
    check_dims(dtype, key_dim, value_dim)
    _check_table("blocks", blocks, torch.int64, 4, blocks.device)
    _check_table("moves", moves, torch.int32, 4, blocks.device)
    pieces = (key_dim + value_dim) * dtype.itemsize // 16
    grid = (pieces if moves.shape[0] else 0, kv_heads, 1)
    module = _module("move", "move", dtype, key_dim, value_dim)
    _launch(module, grid, (blocks.data_ptr(), moves.data_ptr(), moves.shape[0]), blocks.device, block=64)


@_fake("move")
def _(blocks: Any, moves: Any, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    return None


@_operation(
    "pack(Tensor blocks, Tensor(a!) packed, Tensor moves, Tensor starts, int kv_heads, int key_dim, int value_dim, "
    "ScalarType dtype, int[] format, bool thin) -> ()"
)
def pack(
    blocks: torch.Tensor,
    packed: torch.Tensor,
    moves: torch.Tensor,
    starts: torch.Tensor,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    format: Sequence[int],
    thin: bool,
) -> None:
    """Pack tokens of plain blocks: kept channels and codes.

    Args:
        blocks: int64 ``[n, 4]``, as for :func:`append`; packed: int64 ``[m, 8]``, where packed blocks lie.
        moves: int32 ``[k, 4]`` (from, to, from_slot | to_slot << 16, length), ``to`` counted from the first packed block, those
            into one block together and in their order; starts: int32 ``[blocks + 1]``, where each block's begin.
        dtype: of the layer; format: the four integers of a :class:`Format`.
        thin: whether ``blocks`` are float32 rows of kept channels alone, without values.
    """
    made = Format(*format)
    made.check(key_dim, value_dim)
    check_dims(dtype, key_dim, value_dim)
    _check_table("blocks", blocks, torch.int64, 4, packed.device)
    _check_table("packed", packed, torch.int64, PACKED_COLUMNS, packed.device)
    _check_table("moves", moves, torch.int32, 4, packed.device)
    _check_vector("starts", starts, torch.int32, 1, packed.device)
    module = _module("pack", "pack", dtype, made.key_bits, made.value_bits, thin)
    args = (blocks.data_ptr(), packed.data_ptr(), moves.data_ptr(), starts.data_ptr())
    sizes = (key_dim, made.kept, made.wide(dtype), value_dim, made.log_group)
    _launch(module, (starts.shape[0] - 1, kv_heads, 1), (*args, *sizes), packed.device)


@_fake("pack")
def _(
    blocks: Any,
    packed: Any,
    moves: Any,
    starts: Any,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    format: Any,
    thin: bool,
) -> None:
    return None


@_operation(
    "unpack(Tensor packed, Tensor runs, Tensor(a!) k, Tensor(b!)? v, int key_dim, int value_dim, ScalarType dtype, int[] format)"
    " -> ()"
)
def unpack(
    packed: torch.Tensor,
    runs: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    format: Sequence[int],
) -> None:
    """Write the tokens of packed ``runs`` to ``k`` ``[Hkv, tokens, D]``, zero where a channel was dropped, and ``v``.

    ``runs`` is int32 ``[n, 4]`` (block counted from the first packed one, lo, hi, tokens before). Without ``v``, ``k`` is float32
    ``[Hkv, tokens, wide]`` and takes the kept channels alone.
    """
    made = Format(*format)
    made.check(key_dim, value_dim)
    check_dims(dtype, key_dim, value_dim)
    _check_table("packed", packed, torch.int64, PACKED_COLUMNS, k.device)
    _check_table("runs", runs, torch.int32, 4, k.device)
    width, kind = (made.wide(dtype), torch.float32) if v is None else (key_dim, dtype)
    good = k.dim() == 3 and k.shape[2] == width and k.dtype is kind and k.is_contiguous()
    _check(good, f"k must be contiguous {kind} [heads, tokens, {width}], got {k.dtype} {tuple(k.shape)}")
    if v is not None:
        good = v.shape == (*k.shape[:2], value_dim) and v.dtype is dtype and v.is_contiguous() and v.device == k.device
        _check(good, f"v must be contiguous {dtype} [heads, tokens, {value_dim}], got {v.dtype} {tuple(v.shape)}")
    module = _module("unpack", "unpack", dtype, made.key_bits, made.value_bits, v is None)
    args = (packed.data_ptr(), runs.data_ptr(), k.data_ptr(), _address(v), k.shape[1])
    sizes = (key_dim, made.kept, made.wide(dtype), value_dim, made.log_group)
    _launch(module, (runs.shape[0], k.shape[0], 1), (*args, *sizes), k.device)


@_fake("unpack")
def _(packed: Any, runs: Any, k: Any, v: Any, key_dim: int, value_dim: int, dtype: torch.dtype, format: Any) -> None:
    return None


@_operation("carry(Tensor(a!) packed, Tensor moves, int kv_heads, int value_dim, ScalarType dtype, int[] format) -> ()")
def carry(
    packed: torch.Tensor, moves: torch.Tensor, kv_heads: int, value_dim: int, dtype: torch.dtype, format: Sequence[int]
) -> None:
    """Move packed tokens between slots bit for bit, in the order of ``moves``: all of a token but keys that are codes.

    ``moves`` is as for :func:`move`, blocks counted from the first packed one.
    """
    _check_table("packed", packed, torch.int64, PACKED_COLUMNS, packed.device)
    _check_table("moves", moves, torch.int32, 4, packed.device)
    made = Format(*format)
    key, _, value, scale = made.rows(dtype, value_dim)
    rows = (0 if made.key_bits else key, value, scale)
    pieces = sum(row // min(row & -row, 16) for row in rows if row)
    args = (packed.data_ptr(), moves.data_ptr(), moves.shape[0], *rows)
    _launch(_module("carry", "carry"), (pieces if moves.shape[0] else 0, kv_heads, 1), args, packed.device, block=64)


@_fake("carry")
def _(packed: Any, moves: Any, kv_heads: int, value_dim: int, dtype: torch.dtype, format: Any) -> None:
    return None


@_operation("turns(Tensor positions, Tensor? counts, Tensor frequencies, Tensor(a!) table) -> ()")
def turns(positions: torch.Tensor, counts: torch.Tensor | None, frequencies: torch.Tensor, table: torch.Tensor) -> None:
    """Fill rows of ``table`` (float32 ``[n, 2 * pairs]``) with cosines and sines of int64 ``positions`` ``[n]``.

    ``frequencies`` is float64 ``[pairs]``. With ``counts`` only the first ``counts[0]`` positions count.
    """
    device, pairs = positions.device, frequencies.shape[0]
    _check_vector("positions", positions, torch.int64, 0, device)
    _check_vector("frequencies", frequencies, torch.float64, 1, device)
    _check_table("table", table, torch.float32, 2 * pairs, device)
    _check(table.shape[0] >= positions.shape[0], f"a table of {table.shape[0]} rows for {positions.shape[0]} positions")
    if counts is not None:
        _check_vector("counts", counts, torch.int32, 1, device)
    num = positions.shape[0]
    args = (positions.data_ptr(), num, _address(counts), frequencies.data_ptr(), pairs, table.data_ptr())
    _launch(_module("rotate", "turns"), (min(-(-num * pairs // THREADS), 4096), 1, 1), args, device)


@_fake("turns")
def _(positions: Any, counts: Any, frequencies: Any, table: Any) -> None:
    return None


@_operation("rotate(Tensor x, Tensor positions, Tensor frequencies, int layout, float factor, ScalarType? dtype=None) -> Tensor")
def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    layout: int,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x`` ``[H, n, D]`` rotated by int64 ``positions`` ``[n]``, contiguous, in ``dtype`` (default: that of x).

    ``frequencies`` is float64 ``[R / 2]``; the first R channels rotate and are multiplied by ``factor``.
    """
    device, pairs = x.device, frequencies.shape[0]
    _check(x.dim() == 3 and x.stride(-1) == 1, f"x must be [heads, tokens, channels], got {tuple(x.shape)}")
    _check(x.dtype in DTYPES and (dtype is None or dtype in DTYPES), f"rotate takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
    _check(positions.shape == x.shape[1:2], f"{tuple(positions.shape)} positions for {x.shape[1]} tokens")
    _check_vector("positions", positions, torch.int64, 0, device)
    _check_vector("frequencies", frequencies, torch.float64, 1, device)
    _check(2 * pairs <= x.shape[2], f"{2 * pairs} rotated channels in rows of {x.shape[2]}")
    _check(layout in (1, 2), f"layout must be 1 (half) or 2 (interleaved), got {layout}")
    heads, tokens, dim = x.shape
    out = torch.empty(heads, tokens, dim, dtype=dtype or x.dtype, device=device)
    args = [x.data_ptr(), *x.stride()[:2], positions.data_ptr(), frequencies.data_ptr(), pairs, layout, float(factor)]
    args += [heads, tokens, dim, out.data_ptr()]
    grid = min(-(-tokens * (dim - pairs) // THREADS), 4096)
    _launch(_module("rotate", "rotate", x.dtype, out.dtype), (grid if heads else 0, 1, 1), args, device)
    return out


@_fake("rotate")
def _(
    x: torch.Tensor, positions: Any, frequencies: Any, layout: int, factor: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


@_operation("surprisal(Tensor logits, Tensor ids) -> Tensor")
def surprisal(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``logsumexp(logits) - logits[ids]``: float32 ``[n]`` in nats, of ``[n, V]`` and int64 ``[n]``. An id outside V gives nan."""
    _check(logits.dim() == 2 and logits.shape[1] > 0, f"logits must be [n, vocabulary], got {tuple(logits.shape)}")
    _check(logits.dtype in DTYPES, f"surprisal takes {', '.join(map(str, DTYPES))}, got {logits.dtype}")
    _check(ids.shape == logits.shape[:1], f"{tuple(ids.shape)} ids for {logits.shape[0]} rows")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    ids = ids.contiguous()
    _check_vector("ids", ids, torch.int64, 0, logits.device)
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    args = (logits.data_ptr(), logits.stride(0), logits.shape[1], ids.data_ptr(), out.data_ptr())
    _launch(_module("surprisal", "surprisal", logits.dtype), (logits.shape[0], 1, 1), args, logits.device)
    return out


@_fake("surprisal")
def _(logits: torch.Tensor, ids: Any) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@_operation("top_k(Tensor x, int k) -> (Tensor, Tensor)")
def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (int64 ``[rows, k]``, ascending) of the k largest of float32 ``x`` ``[rows, n]``; the smallest of them, ``[rows]``.

    Of equal values the first columns are taken; nan ranks below everything.
    """
    _check(x.dim() == 2 and x.dtype == torch.float32, f"top_k takes float32 [rows, n], got {x.dtype} {tuple(x.shape)}")
    _check(1 <= k <= x.shape[1], f"k must lie between 1 and {x.shape[1]}, got {k}")
    if x.stride(1) != 1:
        x = x.contiguous()
    columns = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    kth = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    args = (x.data_ptr(), x.stride(0), x.shape[1], k, columns.data_ptr(), kth.data_ptr())
    _launch(_module("top_k", "top_k"), (x.shape[0], 1, 1), args, x.device)
    return columns, kth


@_fake("top_k")
def _(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((x.shape[0], k), dtype=torch.int64), x.new_empty((x.shape[0],))


# ------------------------------------------------------------------------------------------------- searches, and what they find

NODES = 1024
"""Stretches that `hip` can follow at once: its nodes lie in shared memory."""

STAGES = 8
"""Stages of a search, at most."""

SEARCHERS = 256
"""Threads of a thread block that searches."""

QUERY_COLUMNS = 8 + STAGES
"""Integers of a block of queries, see residents.cuh: row, first column, queries, first position, the region's ends, the first stage
to search, one to fill up; the slot of each stage."""

REPRESENTATIVES = {"centre": 0, "first": 1, "last": 2, "oracle": 3}

SPARSE_RESIDENT = 3
"""Thread blocks of `sparse` that a multiprocessor is expected to hold."""

BAND = 32768
"""Blocks of queries in a launch."""

SCRATCH = 64 << 20
"""Bytes of scores that a launch of `narrow` may need."""


def slot_width(most: int) -> int:
    """Integers of a choice of at most ``most`` stretches, for one key-value head."""
    return (most + 7) // 4 * 4


class Rows(NamedTuple):
    """Where the residents of rows lie, all of them, in text order.

    Attributes:
        blocks: int64 ``[n, 4]``, as for :func:`append`.
        starts: int32 ``[rows * items + 1]``; spans: int32 ``[m, 4]``: row ``r`` holds the spans of item ``(r + 1) * items - 1``.
        items: of each row.
    """

    blocks: torch.Tensor
    starts: torch.Tensor
    spans: torch.Tensor
    items: int

    def arguments(self) -> list[Argument]:
        return [self.blocks.data_ptr(), self.starts.data_ptr(), self.spans.data_ptr(), self.items]


def _check_rows(q: torch.Tensor, rows: Rows, queries: torch.Tensor, kv_heads: int) -> None:
    _check(
        q.dim() == 4 and is_aligned(q),
        f"q must be [rows, heads, queries, channels], rows at multiples of 16 bytes, {tuple(q.shape)}",
    )
    _check(kv_heads > 0 and q.shape[1] % kv_heads == 0, f"{q.shape[1]} query heads are no multiple of {kv_heads} key-value heads")
    _check_table("blocks", rows.blocks, torch.int64, 4, q.device)
    _check_vector("starts", rows.starts, torch.int32, q.shape[0] * rows.items + 1, q.device)
    _check_table("spans", rows.spans, torch.int32, 4, q.device)
    _check_table("queries", queries, torch.int32, QUERY_COLUMNS, q.device)


def _check_slots(name: str, held: torch.Tensor, spare: torch.Tensor, kv_heads: int, most: int) -> None:
    for x in (held, spare):
        good = x.dtype is torch.int32 and x.dim() == 3 and x.shape[1:] == (kv_heads, slot_width(most)) and x.is_contiguous()
        _check(good, f"{name} must be contiguous int32 [slots, {kv_heads}, {slot_width(most)}], got {x.dtype} {tuple(x.shape)}")


def _queries_together(num: int) -> int:
    """Queries that a warp scores keys for at once."""
    return 1 if num <= 1 else 2 if num == 2 else 4


@_operation(
    "hip(Tensor q, Tensor blocks, Tensor starts, Tensor spans, int items, Tensor queries, int most_queries, int kv_heads, "
    "int window, int stride, int block, int most, int representative, Tensor(a!) held, Tensor(b!) spare) -> Tensor"
)
def hip(
    q: torch.Tensor,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    kv_heads: int,
    window: int,
    stride: int,
    block: int,
    most: int,
    representative: int,
    held: torch.Tensor,
    spare: torch.Tensor,
) -> torch.Tensor:
    """HiP's choices of blocks of queries, those that begin with stage 0 (Lee et al., ICLR 2025).

    Args:
        q: ``[B, H, q, D]``, rows at multiples of 16 bytes, in the frame of the keys.
        blocks, starts, spans, items: see :class:`Rows`.
        queries: int32 ``[n, 16]``, see :data:`QUERY_COLUMNS`; a region has more blocks than ``most``.
        most_queries: of a block of queries; stride: every so many of them are scored, counted back from the last.
        block: tokens of a block; most: how many are chosen; representative: a value of :data:`REPRESENTATIVES`.
        held, spare: int32 ``[slots, Hkv, slot_width(most)]``; written where ``queries`` say.

    Returns:
        Representative keys scored, int32 ``[n, Hkv]``.
    """
    rows = Rows(blocks, starts, spans, items)
    check_dims(q.dtype, q.shape[-1])
    _check_rows(q, rows, queries, kv_heads)
    _check(stride > 0, f"a stride of {stride} queries; at least 1")
    _check(block > 0 and 0 < most <= NODES, f"{most} blocks of {block} tokens; at most {NODES} blocks, of at least one token")
    _check_slots("choices", held, spare, kv_heads, most)
    group, count = q.shape[1] // kv_heads, queries.shape[0]
    searched = torch.empty(count, kv_heads, dtype=torch.int32, device=q.device)
    module = _module("search", "hip", q.dtype, q.shape[3], _queries_together(group * ((most_queries - 1) // stride + 1)))
    for lo in range(0, count, BAND):
        args = [q.data_ptr(), *q.stride()[:3], *rows.arguments(), queries.data_ptr() + 4 * QUERY_COLUMNS * lo, group, window]
        args += [stride, block, most, representative, held.data_ptr(), spare.data_ptr(), searched.data_ptr() + 4 * kv_heads * lo]
        _launch(module, (1, kv_heads, min(BAND, count - lo)), args, q.device, block=SEARCHERS)
    return searched


@_fake("hip")
def _(
    q: torch.Tensor,
    blocks: Any,
    starts: Any,
    spans: Any,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    kv_heads: int,
    window: int,
    stride: int,
    block: int,
    most: int,
    representative: int,
    held: Any,
    spare: Any,
) -> torch.Tensor:
    return queries.new_empty((queries.shape[0], kv_heads))


@_operation(
    "narrow(Tensor q, Tensor blocks, Tensor starts, Tensor spans, int items, Tensor queries, int most_queries, int kv_heads, "
    "int window, int stride, int stage, int chunk, int most, int candidates, int representative, int from_chunk, int from_most, "
    "Tensor? from_held, Tensor? from_spare, Tensor(a!) held, Tensor(b!) spare, Tensor(c!) arrivals) -> Tensor"
)
def narrow(
    q: torch.Tensor,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    kv_heads: int,
    window: int,
    stride: int,
    stage: int,
    chunk: int,
    most: int,
    candidates: int,
    representative: int,
    from_chunk: int,
    from_most: int,
    from_held: torch.Tensor | None,
    from_spare: torch.Tensor | None,
    held: torch.Tensor,
    spare: torch.Tensor,
    arrivals: torch.Tensor,
) -> torch.Tensor:
    """One stage of InfiniteHiP for blocks of queries, those that begin with it or an earlier one (Lee et al., 2025).

    Args:
        q, blocks, starts, spans, items, queries, most_queries, stride, representative: as for :func:`hip`.
        chunk: tokens of this stage's chunks; most: how many stay; candidates: no block of queries has more to choose from.
        from_chunk, from_most, from_held, from_spare: those of the stage before; 0 and None for stage 0.
        held, spare: int32 ``[slots, Hkv, slot_width(most)]``; written where ``queries`` say.
        arrivals: int32 ``[2 * n * Hkv]`` or more, zero before and after.

    Returns:
        Keys scored, int32 ``[n, Hkv]``.
    """
    rows = Rows(blocks, starts, spans, items)
    check_dims(q.dtype, q.shape[-1])
    _check_rows(q, rows, queries, kv_heads)
    _check(stride > 0, f"a stride of {stride} queries; at least 1")
    _check(0 <= stage < STAGES and chunk > 0 and most > 0, f"stage {stage} of {STAGES}, {most} chunks of {chunk} tokens")
    _check_slots("choices", held, spare, kv_heads, most)
    _check((stage > 0) == (from_held is not None) == (from_spare is not None), "all stages but the first have one before them")
    if from_held is not None and from_spare is not None:
        _check_slots("the stage before", from_held, from_spare, kv_heads, from_most)
        _check(from_chunk > 0 and from_chunk % chunk == 0, f"chunks of {from_chunk} tokens are no multiple of {chunk}")
    group, count, device = q.shape[1] // kv_heads, queries.shape[0], q.device
    band = min(BAND, count, max(1, SCRATCH // (4 * kv_heads * max(candidates, 1))))
    _check_vector("arrivals", arrivals, torch.int32, 2 * band * kv_heads, device)
    searched = torch.empty(count, kv_heads, dtype=torch.int32, device=device)
    ranks = torch.empty(band * kv_heads * candidates, dtype=torch.int32, device=device)
    module = _module("search", "narrow", q.dtype, q.shape[3], _queries_together(group * ((most_queries - 1) // stride + 1)))
    # As many thread blocks as fill the card; two warps' worth of chunks for each, at least.
    fill = launcher_of(device).processors(device) * 4 // max(kv_heads * min(band, count), 1)
    splits = max(1, min(fill, -(-candidates // 64)))
    for lo in range(0, count, max(band, 1)):
        args = [q.data_ptr(), *q.stride()[:3], *rows.arguments(), queries.data_ptr() + 4 * QUERY_COLUMNS * lo, group, window]
        args += [stride, stage, chunk, from_chunk, most, from_most, representative, _address(from_held), _address(from_spare)]
        args += [held.data_ptr(), spare.data_ptr(), ranks.data_ptr(), candidates, arrivals.data_ptr()]
        args += [searched.data_ptr() + 4 * kv_heads * lo]
        _launch(module, (splits, kv_heads, min(band, count - lo)), args, device, block=SEARCHERS)
    return searched


@_fake("narrow")
def _(
    q: torch.Tensor,
    blocks: Any,
    starts: Any,
    spans: Any,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    kv_heads: int,
    window: int,
    stride: int,
    stage: int,
    chunk: int,
    most: int,
    candidates: int,
    representative: int,
    from_chunk: int,
    from_most: int,
    from_held: Any,
    from_spare: Any,
    held: Any,
    spare: Any,
    arrivals: Any,
) -> torch.Tensor:
    return queries.new_empty((queries.shape[0], kv_heads))


def sparse_heads(group: int) -> int:
    """Query heads of a group that a warp of `sparse` serves."""
    return -(-group // -(-group // 4))


@_operation(
    "sparse(Tensor q, Tensor blocks, Tensor starts, Tensor spans, int items, Tensor queries, int most_queries, Tensor? at, "
    "int kv_heads, int value_dim, int sinks, int window, int stage, int stretch, int most, Tensor held, "
    "Tensor spare, int splits, float scale, float softcap, Tensor? learned) -> (Tensor, Tensor)"
)
def sparse(
    q: torch.Tensor,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    at: torch.Tensor | None,
    kv_heads: int,
    value_dim: int,
    sinks: int,
    window: int,
    stage: int,
    stretch: int,
    most: int,
    held: torch.Tensor,
    spare: torch.Tensor,
    splits: int,
    scale: float,
    softcap: float = 0.0,
    learned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend queries to sinks, a window, and what was chosen between them.

    Args:
        q, blocks, starts, spans, items, queries, most_queries: as for :func:`hip`.
        at: int32 ``[B * q, 2]``: the block of queries and the number in it of each query, -1 for a pad; keys are then shared out
            among ``splits`` thread blocks. None for a chunk: each query's keys are one warp's.
        sinks, window: tokens; stage: whose choice; stretch: tokens of what it chose; most: how many, at most.
        held, spare: choices, int32 ``[slots, Hkv, slot_width(most)]``.
        scale, softcap: of the logits; softcap 0 for none.
        learned: float32 ``[H]``: learned logits without a value.

    Returns:
        out ``[B, q, H, Dv]`` in q's dtype, zero for pads; keys read, int32 ``[B * q, Hkv]``.
    """
    found = Rows(blocks, starts, spans, items)
    check_dims(q.dtype, q.shape[-1], value_dim)
    _check_rows(q, found, queries, kv_heads)
    _check_slots("choices", held, spare, kv_heads, most)
    _check(0 <= stage < STAGES and stretch > 0 and splits > 0, f"stage {stage} of {STAGES}, {stretch} tokens, {splits} splits")
    if learned is not None:
        _check_vector("learned", learned, torch.float32, q.shape[1], q.device)
    (rows, heads, columns, key_dim), device = q.shape, q.device
    group, num = heads // kv_heads, rows * columns
    together = sparse_heads(group)
    sets = -(-group // together)
    module = _module("sparse", "sparse", q.dtype, key_dim, value_dim, together, at is None)
    head: list[Argument] = [q.data_ptr(), *q.stride()[:3], *found.arguments()]
    middle: list[Argument] = [columns, group, sinks, window, stage, stretch, most, held.data_ptr(), spare.data_ptr()]
    middle += [float(scale), float(softcap)]
    read = (torch.zeros if at is None else torch.empty)(num, kv_heads, dtype=torch.int32, device=device)
    if at is not None:
        _check_table("at", at, torch.int32, 2, device)
        _check(at.shape[0] == num <= 65535 and splits <= 65535, f"{at.shape[0]} places, {splits} splits of {num} queries")
        parts = num * heads * splits
        scratch = torch.empty(parts * (value_dim + 1), dtype=torch.float32, device=device)
        part, part_lse = scratch.data_ptr(), scratch.data_ptr() + 4 * parts * value_dim
        args = [*head, queries.data_ptr(), at.data_ptr(), *middle, part, part_lse, None, None, read.data_ptr()]
        _launch(module, (splits, kv_heads * sets, num), args, device)
        out = torch.empty(rows, columns, heads, value_dim, dtype=q.dtype, device=device)
        _merge(part, part_lse, splits, heads, learned, out, None, None)
        return out, read
    out = torch.zeros(rows, columns, heads, value_dim, dtype=q.dtype, device=device)
    count, warps = queries.shape[0], THREADS // 32
    for lo in range(0, count, BAND):
        args = [*head, queries.data_ptr() + 4 * QUERY_COLUMNS * lo, None, *middle, None, None, out.data_ptr(), _address(learned)]
        grid = (-(-most_queries // warps), kv_heads * sets, min(BAND, count - lo))
        _launch(module, grid, [*args, read.data_ptr()], device)
    return out, read


@_fake("sparse")
def _(
    q: torch.Tensor,
    blocks: Any,
    starts: Any,
    spans: Any,
    items: int,
    queries: torch.Tensor,
    most_queries: int,
    at: Any,
    kv_heads: int,
    value_dim: int,
    sinks: int,
    window: int,
    stage: int,
    stretch: int,
    most: int,
    held: Any,
    spare: Any,
    splits: int,
    scale: float,
    softcap: float = 0.0,
    learned: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, columns, _ = q.shape
    return q.new_empty((rows, columns, heads, value_dim)), queries.new_empty((rows * columns, kv_heads))
