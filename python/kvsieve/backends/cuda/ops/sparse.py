"""Attend queries to sinks, a window, and what was chosen between them."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.nvrtc import Module
from kvsieve.backends.cuda.ops import residents as shared
from kvsieve.backends.cuda.ops.angles import Angles, angle_arguments, check_angles
from kvsieve.backends.cuda.ops.declare import Shaped, Table, Vector, operation, require
from kvsieve.backends.cuda.ops.launch import THREADS, Argument, module, start
from kvsieve.backends.cuda.ops.merge import merge_partials, scratch
from kvsieve.backends.cuda.ops.residents import QUERY_COLUMNS, Residents, check_queries, check_slots

__all__ = ["RESIDENT", "Sparse", "heads_together", "sparse"]

RESIDENT = 3
"""Thread blocks of `sparse` that a multiprocessor is expected to hold."""


def heads_together(group: int) -> int:
    """Query heads of a group that a warp of `sparse` serves."""
    return -(-group // -(-group // 4))


class Sparse(NamedTuple):
    """Attend queries to sinks, a window, and what was chosen between them.

    Attributes:
        q, residents, queries, most_queries: as for :class:`Hip`.
        at: int32 ``[B * q, 2]``: the block of queries and the number in it of each query, -1 for a pad; keys are then shared out
            among ``splits`` thread blocks. None for a prefill: each query's keys are one warp's.
        sinks, window: tokens; stage: whose choice; length: tokens of a range that it chose; most: how many, at most.
        held, spare: choices, int32 ``[slots, Hkv, slot_width(most)]``.
        scale, softcap: of the logits; softcap 0 for none.
        sink_logits: float32 ``[H]``: learned logits without a value.
        angles: by which pre-RoPE queries and keys are turned.

    Returns:
        out ``[B, q, H, Dv]`` in q's dtype, zero for pads; keys read, int32 ``[B * q, Hkv]``.
    """

    q: Annotated[torch.Tensor, Shaped(("rows", "heads", "queries", "channels"), aligned=True)]
    residents: Residents
    queries: Annotated[torch.Tensor, Table(torch.int32, QUERY_COLUMNS)]
    most_queries: int
    at: Annotated[torch.Tensor | None, Table(torch.int32, 2)]
    kv_heads: int
    value_dim: int
    sinks: int
    window: int
    stage: int
    length: int
    most: int
    held: torch.Tensor
    spare: torch.Tensor
    splits: int
    scale: float
    softcap: float = 0.0
    sink_logits: Annotated[torch.Tensor | None, Vector(torch.float32, lambda op: op.q.shape[1])] = None
    angles: Angles = Angles()

    def check(self) -> None:
        check_queries(self, self.q.shape[-1], self.value_dim)
        check_angles(self, self.q.shape[-1])
        check_slots("choices", (self.held, self.spare), self.kv_heads, self.most)
        good = 0 <= self.stage < shared.STAGES and self.length > 0 and self.splits > 0
        require(good, f"stage {self.stage} of {shared.STAGES}, {self.length} tokens, {self.splits} splits")
        if self.at is not None:
            num, places = self.q.shape[0] * self.q.shape[2], self.at.shape[0]
            good = places == num <= 65535 and self.splits <= 65535
            require(good, f"{places} places, {self.splits} splits of {num} queries")

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, heads, columns, _ = self.q.shape
        out = self.q.new_empty((rows, columns, heads, self.value_dim))
        return out, self.queries.new_empty((rows * columns, self.kv_heads))

    def launch(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, read = self.outputs()
        if self.at is None:
            self._prefill(out.zero_(), read.zero_())
        else:
            self._decode(out, read)
        return out, read

    def _decode(self, out: torch.Tensor, read: torch.Tensor) -> None:
        """Each query's keys are shared out among thread blocks."""
        q, num = self.q, read.shape[0]
        kernel, head, middle, sets = self._kernel()
        held = scratch(num * q.shape[1], self.splits, q.shape[1], self.value_dim, q.device)
        args: list[Argument] = [*head, self.queries, self.at, *middle, held.out, held.lse, None, None, read]
        args += angle_arguments(self.angles)
        start(kernel, (self.splits, self.kv_heads * sets, num), args, q.device)
        merge_partials(held, self.sink_logits, out, None, None)

    def _prefill(self, out: torch.Tensor, read: torch.Tensor) -> None:
        """Each query's keys are one warp's."""
        kernel, head, middle, sets = self._kernel()
        count, warps = self.queries.shape[0], THREADS // 32
        for lo in range(0, count, shared.BAND):
            first = self.queries.data_ptr() + 4 * QUERY_COLUMNS * lo
            args: list[Argument] = [*head, first, None, *middle, None, None, out, self.sink_logits, read]
            args += angle_arguments(self.angles)
            grid = (-(-self.most_queries // warps), self.kv_heads * sets, min(shared.BAND, count - lo))
            start(kernel, grid, args, self.q.device)

    def _kernel(self) -> tuple[Module, list[Argument], list[Argument], int]:
        """The instantiation, its first arguments, those after the queries, and how many warps share a group."""
        q, group = self.q, self.q.shape[1] // self.kv_heads
        together = heads_together(group)
        raw = [] if self.angles.table is None else [True]
        kernel = module("sparse", "sparse", q.dtype, q.shape[3], self.value_dim, together, self.at is None, *raw)
        head: list[Argument] = [q.data_ptr(), *q.stride()[:3], *self.residents]
        middle: list[Argument] = [q.shape[2], group, self.sinks, self.window, self.stage, self.length, self.most]
        middle += [self.held, self.spare, float(self.scale), float(self.softcap)]
        return kernel, head, middle, -(-group // together)


sparse = operation(Sparse)
