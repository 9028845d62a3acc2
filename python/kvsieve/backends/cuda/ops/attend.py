"""Attend queries to spans of plain and packed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.nvrtc import Module
from kvsieve.backends.cuda.ops.declare import Shaped, Table, Vector, check_heads, operation, require
from kvsieve.backends.cuda.ops.format import PACKED_COLUMNS, Format
from kvsieve.backends.cuda.ops.launch import THREADS, Argument, module, start
from kvsieve.backends.cuda.ops.merge import merge_partials, scratch
from kvsieve.errors import ShapeError

__all__ = ["HIGHEST", "LOGITS", "SUMMED", "Attend", "attend", "attend_module", "heads_of", "resident"]

SUMMED, HIGHEST, LOGITS = range(3)
"""What is told of the keys: for each KV head the sum of their probabilities over its query heads, or the highest of them; or for
each query head the logits, and then no value is read."""

NOT_PACKED = (None, 0, 0, 0, 0)
"""What the kernel is told where no block is packed."""

Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@cache
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
    numbers = key_dim, value_dim, *heads_of(group, key_dim), raw, *(bits or ())
    return module("attend", "attend", dtype, *numbers)


def resident(group: int, key_dim: int, raw: bool, bits: tuple[int, int] | None) -> int:
    """Thread blocks of `attend` that a multiprocessor holds; its registers allow no more. As ``resident`` in attend.cu."""
    _, subsets = heads_of(group, key_dim)
    if bits is not None and (any(bits) or raw or subsets > 1):
        return 2
    return 3 if subsets == 1 or (subsets == 2 and not raw) else 2


class Attend(NamedTuple):
    """Attend every query to its spans. Item ``i = row * q + query`` reads ``spans[starts[i] : starts[i + 1]]``.

    Attributes:
        q: ``[B, H, q, D]``, any strides but 1 along D.
        blocks: as for :class:`Append`.
        starts: int32 ``[B * q + 1]``; spans: int32 ``[capacity, 4]`` as ``Step.span_table`` gives them. They may name a KV
            head, where each item is of one: ``B`` is the number of KV heads then, ``H`` the query heads of one, and ``kv_heads`` 1.
        rotations: float32 ``[n, R]``, those that spans name; in_block: float32 ``[64, R]``, those of a block's slots. Both None
            where nothing rotates.
        splits: thread blocks per item and head.
        scale, softcap: of the logits; softcap 0 for none.
        layout: 0 nothing rotates, 1 half, 2 interleaved; factor: multiplies the rotated channels of the queries.
        raw: whether spans may ask for keys to be rotated.
        sink_logits: float32 ``[H]``: learned logits without a value; ``[B * H]`` where each row has its own, for one query each.
        key_starts: int64 ``[B * q + 1]``, where each item's keys begin among ``total_keys``; None unless scores are wanted.
        packed: int64 ``[n, 8]``, where packed blocks lie, which spans number from ``_core.PACKED`` on; format: theirs, as the four
            integers of a :class:`Format`. Both None where there are none.
        told: :data:`SUMMED`, :data:`HIGHEST` or :data:`LOGITS`, of every key.

    Returns:
        out ``[B, q, H, Dv]`` in q's dtype (zero where nothing is read; ``[B, q, H, 0]`` with logits); lse float32 ``[B, q, H]``
        without the sink logits (-inf there); attention scores float32 ``[Hkv, total_keys]``, each key's probability summed over
        its group, or the highest in it, or logits ``[H, total_keys]`` (``[Hkv, 0]`` when not asked for).
    """

    q: Annotated[torch.Tensor, Shaped(("rows", "heads", "queries", "channels"))]
    blocks: Annotated[torch.Tensor, Table(torch.int64, 4)]
    starts: Annotated[torch.Tensor, Vector(torch.int32, lambda op: op.items + 1)]
    spans: Annotated[torch.Tensor, Table(torch.int32, 4)]
    rotations: Annotated[torch.Tensor | None, Table(torch.float32, lambda op: 2 * op.pairs or op.rotations.shape[-1])]
    in_block: Annotated[torch.Tensor | None, Table(torch.float32, lambda op: 2 * op.pairs or op.in_block.shape[-1])]
    kv_heads: int
    value_dim: int
    splits: int
    scale: float
    softcap: float = 0.0
    layout: int = 0
    factor: float = 1.0
    raw: bool = False
    sink_logits: Annotated[torch.Tensor | None, Vector(torch.float32, lambda op: op.q.shape[1])] = None
    key_starts: Annotated[torch.Tensor | None, Vector(torch.int64, lambda op: op.items + 1)] = None
    total_keys: int = 0
    packed: Annotated[torch.Tensor | None, Table(torch.int64, PACKED_COLUMNS)] = None
    format: Sequence[int] | None = None
    told: int = SUMMED

    @property
    def items(self) -> int:
        """Queries of all rows."""
        return self.q.shape[0] * self.q.shape[2]

    @property
    def pairs(self) -> int:
        """Pairs of channels that rotate."""
        return self.in_block.shape[1] // 2 if self.layout and self.in_block is not None else 0

    def check(self) -> None:
        heads, key_dim, kv_heads = self.q.shape[1], self.q.shape[3], self.kv_heads
        check_heads(self.q.dtype, key_dim, self.value_dim)
        if kv_heads <= 0 or heads % kv_heads:
            raise ShapeError(f"{heads} query heads are no multiple of {kv_heads} key-value heads")
        if not 0 < self.splits <= 65535 or self.items > 65535:
            raise ShapeError(f"{self.splits} splits of {self.items} queries: at most 65,535 of each")
        if self.layout:
            require(self.rotations is not None and self.in_block is not None, "rotations and in_block are needed where keys rotate")
            require(0 < 2 * self.pairs <= key_dim, f"{2 * self.pairs} rotated channels in keys of {key_dim}")
        if self.sink_logits is not None:
            mine, own = self.sink_logits.shape[0], self.items * heads
            require(mine in (heads, own), f"{mine} sink logits: {heads}, or {own} where each row has its own")
        require(self.told in (SUMMED, HIGHEST, LOGITS), f"told must be one of 0 to 2, got {self.told}")
        require(self.told != LOGITS or self.key_starts is not None, "key_starts are needed where logits are told")
        require((self.packed is None) == (self.format is None), "packed blocks need a format, and a format packed blocks")
        if self.format is not None:
            Format(*self.format).check(key_dim, self.value_dim)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, heads, queries, _ = self.q.shape
        lse = self.q.new_empty((rows, queries, heads), dtype=torch.float32)
        told = (heads if self.told == LOGITS else self.kv_heads, 0 if self.key_starts is None else self.total_keys)
        out = self.q.new_empty((rows, queries, heads, 0 if self.told == LOGITS else self.value_dim))
        return out, lse, self.q.new_empty(told, dtype=torch.float32)

    def launch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, lse, scores = self.run()
        assert lse is not None
        return out, lse, lse.new_empty((self.kv_heads, 0)) if scores is None else scores

    def run(self, with_lse: bool = True) -> Result:
        """As :meth:`launch`, with None for what was not asked for."""
        q = self.q
        (rows, heads, queries, _), device = q.shape, q.device
        if self.told == LOGITS:
            return self._logits()
        sinks = heads if self.sink_logits is None else len(self.sink_logits)
        held = scratch(self.items * heads, self.splits, sinks, self.value_dim, device)
        logits = norms = None
        if self.key_starts is not None:
            logits = torch.empty(heads, self.total_keys, dtype=torch.float32, device=device)
            norms = torch.empty(self.items, heads, dtype=torch.float32, device=device)
        self._start(held.out, held.lse, logits)
        out = torch.empty(rows, queries, heads, self.value_dim, dtype=q.dtype, device=device)
        lse = torch.empty(rows, queries, heads, dtype=torch.float32, device=device) if with_lse else None
        merge_partials(held, self.sink_logits, out, lse, norms)
        return out, lse, None if logits is None or norms is None else self._scores(logits, norms)

    def _logits(self) -> Result:
        """Every key's logits, and no value."""
        out, _, logits = self.outputs()
        rows, heads, queries, _ = self.q.shape
        parts = torch.empty(rows, queries, heads, self.splits, dtype=torch.float32, device=self.q.device)
        self._start(0, parts.data_ptr(), logits)
        return out, parts.logsumexp(-1), logits

    def _start(self, part_out: int, part_lse: int, logits: torch.Tensor | None) -> None:
        q, kv_heads, splits, value_dim = self.q, self.kv_heads, self.splits, self.value_dim
        _, heads, queries, key_dim = q.shape
        group = heads // kv_heads
        per_warp, subsets = heads_of(group, key_dim)
        bits, packed = self._packed()
        args: list[Argument] = [q.data_ptr(), *q.stride()[:3], self.blocks, self.starts, self.spans, self.rotations, self.in_block]
        args += (self.pairs, self.layout, float(self.factor), float(self.scale), float(self.softcap), queries, group)
        args += (part_out, part_lse, logits, self.key_starts, self.total_keys, *packed)
        kernel = attend_module(q.dtype, key_dim, value_dim, group, self.raw, bits)
        start(kernel, (splits, kv_heads * -(-group // (per_warp * subsets)), self.items), args, q.device)

    def _packed(self) -> tuple[tuple[int, int] | None, Sequence[Argument]]:
        """Bits of packed blocks' codes, and what the kernel is told of them."""
        if self.packed is None or self.format is None:
            return None, NOT_PACKED
        made, dtype, dims = Format(*self.format), self.q.dtype, (self.q.shape[3], self.value_dim)
        return made[1:3], [self.packed, made.kept, made.wide(dtype), made.log_group, made.tile(dtype, *dims)]

    def _scores(self, logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Attention scores of logits ``[H, keys]`` and the norms of their softmax."""
        items, total = self.items, self.total_keys
        scores = torch.empty(self.kv_heads, total, dtype=torch.float32, device=logits.device)
        group = self.q.shape[1] // self.kv_heads
        args: list[Argument] = [logits, self.key_starts, total, norms, group, int(self.told == HIGHEST), scores]
        grid = (min(-(-total // (items * THREADS)), 1024), self.kv_heads, items)
        start(module("merge", "attention_scores"), grid, args, logits.device)
        return scores


attend = operation(Attend)
