"""One stage of InfiniteHiP, or of Quest: chunks that are judged on their own."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops import residents as shared
from kvsieve.backends.cuda.ops.angles import Angles, angle_arguments, check_angles
from kvsieve.backends.cuda.ops.declare import WRITTEN, Shaped, Table, Vector, operation, require
from kvsieve.backends.cuda.ops.launch import Argument, launcher_of, module, start
from kvsieve.backends.cuda.ops.residents import QUERY_COLUMNS, Residents, check_queries, check_slots, queries_together
from kvsieve.budget import BLOCK

__all__ = ["Narrow", "narrow"]


class Narrow(NamedTuple):
    """One stage of InfiniteHiP for blocks of queries, those that begin with it or an earlier one (Lee et al., 2025).

    Attributes:
        q, residents, queries, most_queries, stride, representative: as for :class:`Hip`.
        chunk: tokens of this stage's chunks; most: how many stay; candidates: no block of queries has more to choose from.
        from_chunk, from_most, from_held, from_spare: those of the stage before; 0 and None for stage 0.
        held, spare: int32 ``[slots, Hkv, slot_width(most)]``; written where ``queries`` say.
        arrivals: int32 ``[2 * n * Hkv]`` or more, zero before and after.
        by_bounds: of stage 0: its chunks are blocks of the text, and judged by their page bounds, which the table of blocks names.
        angles: as for :class:`Hip`.

    Returns:
        Keys scored, int32 ``[n, Hkv]``; bounds of a block count as two.
    """

    q: Annotated[torch.Tensor, Shaped(("rows", "heads", "queries", "channels"), aligned=True)]
    residents: Residents
    queries: Annotated[torch.Tensor, Table(torch.int32, QUERY_COLUMNS)]
    most_queries: int
    kv_heads: int
    window: int
    stride: int
    stage: int
    chunk: int
    most: int
    candidates: int
    representative: int
    from_chunk: int
    from_most: int
    from_held: torch.Tensor | None
    from_spare: torch.Tensor | None
    held: Annotated[torch.Tensor, WRITTEN]
    spare: Annotated[torch.Tensor, WRITTEN]
    arrivals: Annotated[torch.Tensor, Vector(torch.int32, lambda op: 2 * op.band * op.kv_heads), WRITTEN]
    by_bounds: bool = False
    angles: Angles = Angles()

    @property
    def band(self) -> int:
        """Blocks of queries in a launch."""
        room = max(1, shared.SCRATCH // (4 * max(self.kv_heads, 1) * max(self.candidates, 1)))
        return min(shared.BAND, self.queries.shape[0], room)

    def check(self) -> None:
        check_queries(self, self.q.shape[-1])
        check_angles(self, self.q.shape[-1])
        stage, most, chunk, before = self.stage, self.most, self.chunk, self.from_chunk
        require(self.stride > 0, f"a stride of {self.stride} queries; at least 1")
        good = 0 <= stage < shared.STAGES and chunk > 0 and most > 0
        require(good, f"stage {stage} of {shared.STAGES}, {most} chunks of {chunk} tokens")
        check_slots("choices", (self.held, self.spare), self.kv_heads, most)
        require(not self.by_bounds or (stage == 0 and chunk == BLOCK), f"bounds are of {BLOCK} tokens, and of the first stage")
        turned = self.by_bounds and self.angles.table is not None and not self.angles.alone
        require(not turned, "bounds of keys before RoPE can only be compared with queries that are turned alone")
        later = (stage > 0) == (self.from_held is not None) == (self.from_spare is not None)
        require(later, "all stages but the first have one before them")
        if self.from_held is not None and self.from_spare is not None:
            check_slots("the stage before", (self.from_held, self.from_spare), self.kv_heads, self.from_most)
            require(before > 0 and before % chunk == 0, f"chunks of {before} tokens are no multiple of {chunk}")

    def outputs(self) -> torch.Tensor:
        return self.queries.new_empty((self.queries.shape[0], self.kv_heads))

    def launch(self) -> torch.Tensor:
        q, heads, count, band, candidates = self.q, self.kv_heads, self.queries.shape[0], self.band, self.candidates
        scored = self.outputs()
        ranks = torch.empty(band * heads * candidates, dtype=torch.int32, device=q.device)
        # As many thread blocks as fill the device; two warps' worth of chunks for each, at least.
        fill = launcher_of(q.device).processors(q.device) * 4 // max(heads * min(band, count), 1)
        splits = max(1, min(fill, -(-candidates // 64)))
        raw = self.angles.table is not None
        flags = [self.by_bounds, raw] if raw else [True] if self.by_bounds else []
        kernel = module("search", "narrow", q.dtype, q.shape[3], queries_together(self), *flags)
        head: list[Argument] = [q.data_ptr(), *q.stride()[:3], *self.residents]
        middle: list[Argument] = [
            q.shape[1] // heads,
            self.window,
            self.stride,
            self.stage,
            self.chunk,
            self.from_chunk,
            self.most,
            self.from_most,
        ]
        slots = [self.representative, self.from_held, self.from_spare, self.held, self.spare, ranks, candidates, self.arrivals]
        for lo in range(0, count, max(band, 1)):
            args: list[Argument] = [
                *head,
                self.queries.data_ptr() + 4 * QUERY_COLUMNS * lo,
                *middle,
                *slots,
                scored.data_ptr() + 4 * heads * lo,
                *angle_arguments(self.angles),
            ]
            start(kernel, (splits, heads, min(band, count - lo)), args, q.device, block=shared.SEARCHERS)
        return scored


narrow = operation(Narrow)
