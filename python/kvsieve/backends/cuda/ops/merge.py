"""One softmax over the union of the parts' keys."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Shaped, Vector, check_heads, operation, require
from kvsieve.backends.cuda.ops.launch import Argument, module, start

__all__ = ["Merge", "Partials", "merge", "merge_partials", "scratch"]


class Partials(NamedTuple):
    """Partial results in scratch memory: float32 out ``[items, H, splits, Dv]``, and behind it lse ``[items, H, splits]``.

    Attributes:
        out, lse: addresses; splits: their number; heads: how many sink logits there are; memory: what keeps them alive.
    """

    out: int
    lse: int
    splits: int
    heads: int
    memory: torch.Tensor


def scratch(results: int, splits: int, heads: int, value_dim: int, device: torch.device) -> Partials:
    """Room for ``splits`` parts of each of ``results`` results, whose sink logits repeat after ``heads`` of them; not written."""
    parts = results * splits
    memory = torch.empty(parts * (value_dim + 1), dtype=torch.float32, device=device)
    address = memory.data_ptr()
    return Partials(address, address + 4 * parts * value_dim, splits, heads, memory)


def merge_partials(
    partials: Partials,
    sink_logits: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    norms: torch.Tensor | None,
) -> None:
    """Merge into ``out`` ``[..., Dv]``, and ``lse`` and ``norms`` where they are asked for."""
    dim = out.shape[-1]
    args: list[Argument] = [partials.out, partials.lse, partials.splits, partials.heads, sink_logits, out, lse, norms]
    start(module("merge", "merge", out.dtype, dim), (out.numel() // dim, 1, 1), args, out.device)


class Merge(NamedTuple):
    """One softmax over the union of the parts' keys.

    Attributes:
        part: float32 ``[items, H, parts, Dv]``, normalised; part_lse: float32 ``[items, H, parts]``, -inf for a part without keys.
        sink_logits: float32 ``[H]``, learned logits without a value.
        dtype: of the result.

    Returns:
        out ``[items, H, Dv]`` and lse float32 ``[items, H]``, without the sink logits.
    """

    part: Annotated[torch.Tensor, Shaped(("items", "heads", "parts", "channels"), torch.float32)]
    part_lse: Annotated[torch.Tensor, Shaped(("items", "heads", "parts"), torch.float32)]
    sink_logits: Annotated[torch.Tensor | None, Vector(torch.float32, lambda op: op.part.shape[1])]
    dtype: torch.dtype

    def check(self) -> None:
        part, lse = self.part, self.part_lse
        require(part.is_contiguous() and lse.is_contiguous(), f"part and part_lse must be contiguous, strides {part.stride()}")
        require(lse.shape == part.shape[:3], f"part_lse must be {tuple(part.shape[:3])}, got {tuple(lse.shape)}")
        check_heads(self.dtype, part.shape[3])

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.part
        out = part.new_empty((part.shape[0], part.shape[1], part.shape[3]), dtype=self.dtype)
        return out, part.new_empty(part.shape[:2])

    def launch(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.outputs()
        part = self.part
        held = Partials(part.data_ptr(), self.part_lse.data_ptr(), part.shape[2], part.shape[1], part)
        merge_partials(held, self.sink_logits, out, lse, None)
        return out, lse


merge = operation(Merge)
