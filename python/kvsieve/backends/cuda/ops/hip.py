"""HiP's beam search over a binary tree of blocks."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops import residents as shared
from kvsieve.backends.cuda.ops.angles import Angles, angle_arguments, check_angles
from kvsieve.backends.cuda.ops.declare import WRITTEN, Shaped, Table, operation, require
from kvsieve.backends.cuda.ops.launch import Argument, module, start
from kvsieve.backends.cuda.ops.residents import QUERY_COLUMNS, Residents, check_queries, check_slots, queries_together

__all__ = ["REPRESENTATIVES", "Hip", "hip"]

REPRESENTATIVES = {"middle": 0, "first": 1, "last": 2, "oracle": 3}
"""Which block speaks for a node, by its number in the kernels."""


class Hip(NamedTuple):
    """HiP's choices of blocks of queries, those that begin with stage 0 (Lee et al., ICLR 2025).

    Attributes:
        q: ``[B, H, q, D]``, rows at multiples of 16 bytes, rotated as the keys are.
        queries: int32 ``[n, 16]``, see :data:`QUERY_COLUMNS`; a region has more blocks than ``most``.
        most_queries: of a block of queries; stride: every so many of them are scored, counted back from the last.
        block: tokens of a block; most: how many are chosen; representative: a value of :data:`REPRESENTATIVES`.
        held, spare: int32 ``[slots, Hkv, slot_width(most)]``; written where ``queries`` say.
        angles: by which pre-RoPE keys, or the queries alone, are turned.

    Returns:
        Representative keys scored, int32 ``[n, Hkv]``.
    """

    q: Annotated[torch.Tensor, Shaped(("rows", "heads", "queries", "channels"), aligned=True)]
    residents: Residents
    queries: Annotated[torch.Tensor, Table(torch.int32, QUERY_COLUMNS)]
    most_queries: int
    kv_heads: int
    window: int
    stride: int
    block: int
    most: int
    representative: int
    held: Annotated[torch.Tensor, WRITTEN]
    spare: Annotated[torch.Tensor, WRITTEN]
    angles: Angles = Angles()

    def check(self) -> None:
        check_queries(self, self.q.shape[-1])
        check_angles(self, self.q.shape[-1])
        require(self.stride > 0, f"a stride of {self.stride} queries; at least 1")
        good = self.block > 0 and 0 < self.most <= shared.NODES
        require(good, f"{self.most} blocks of {self.block} tokens; at most {shared.NODES} blocks, of at least one token")
        check_slots("choices", (self.held, self.spare), self.kv_heads, self.most)

    def outputs(self) -> torch.Tensor:
        return self.queries.new_empty((self.queries.shape[0], self.kv_heads))

    def launch(self) -> torch.Tensor:
        q, heads, count, scored = self.q, self.kv_heads, self.queries.shape[0], self.outputs()
        raw = [] if self.angles.table is None else [True]
        kernel = module("search", "hip", q.dtype, q.shape[3], queries_together(self), *raw)
        head: list[Argument] = [q.data_ptr(), *q.stride()[:3], *self.residents]
        middle: list[Argument] = [
            q.shape[1] // heads,
            self.window,
            self.stride,
            self.block,
            self.most,
            self.representative,
            self.held,
            self.spare,
        ]
        for lo in range(0, count, shared.BAND):
            args: list[Argument] = [
                *head,
                self.queries.data_ptr() + 4 * QUERY_COLUMNS * lo,
                *middle,
                scored.data_ptr() + 4 * heads * lo,
                *angle_arguments(self.angles),
            ]
            start(kernel, (1, heads, min(shared.BAND, count - lo)), args, q.device, block=shared.SEARCHERS)
        return scored


hip = operation(Hip)
