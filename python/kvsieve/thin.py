"""Which channels of its keys a sequence keeps, and the format of packed tokens: what :class:`kvsieve.roles.Pack` decides.

ThinK (Xu et al., ICLR 2025, arXiv 2407.21018) weighs channel ``j`` of a head by ``||Q[:, j]|| * ||K[:, j]||``, the Frobenius norm
of the matrix of rank one that it adds to the logits, with the queries of the end of the prompt, and drops the lightest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from kvsieve.facts import LayerRope

__all__ = ["Channels", "LayerShape", "Observed", "Packing", "choose", "kept", "scores"]


@dataclass(frozen=True)
class LayerShape:
    """A layer as a pack role sees it: its index, KV heads, and channels of a key and of a value."""

    index: int
    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Packing:
    """The format of a layer's packed tokens.

    Attributes:
        key_kept: channels of a key that are kept, the same number in each head.
        key_bits, value_bits: bits of a code, 2, 4 or 8; 0 for numbers as they came.
        group: numbers that share a step and a least value, float16 each: tokens of one key channel, channels of one value.
    """

    key_kept: int
    key_bits: int = 0
    value_bits: int = 0
    group: int = 32

    def bits_per_token(self, value_dim: int, dtype: torch.dtype) -> tuple[float, float, float]:
        """Bits of one token of one head: its key, its value, and its share of scales. Rows are whole bytes."""
        wide = dtype.itemsize * 8
        key = -(-self.key_kept * self.key_bits // 8) * 8 if self.key_bits else self.key_kept * wide
        value = -(-value_dim * self.value_bits // 8) * 8 if self.value_bits else value_dim * wide
        scales = (self.key_kept if self.key_bits else 0) + (value_dim if self.value_bits else 0)
        return key, value, scales * 32 / self.group


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of its keys that a sequence keeps in one layer.

    Attributes:
        index: int64 ``[Hkv, kept]``: the first channels of the kept rotary pairs, then their second ones, then the others.
            ``-1 - c`` stands for channel ``c`` stored as zero.
        pairs: how many rotary pairs each head keeps; 0 where channels were chosen one by one.
    """

    index: torch.Tensor
    pairs: tuple[int, ...]

    @classmethod
    def all(cls, keys: torch.Tensor, rope: LayerRope | None) -> Channels:
        """Every channel of ``keys`` ``[Hkv, n, D]``."""
        heads, dim = keys.shape[0], keys.shape[2]
        return _in_order(torch.ones(heads, dim, dtype=torch.bool), rope, whole_pairs=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of the channels, 16 bits each."""
        return 2 * self.index.numel()

    def with_zeros(self, keys: torch.Tensor, rope: LayerRope | None) -> Channels:
        """Every channel of ``keys`` ``[Hkv, n, D]``, those not kept here stored as zero."""
        every = Channels.all(keys, rope)
        kept = [set(row) for row in self.index.tolist()]
        index = [[c if c in mine else -1 - c for c in row] for mine, row in zip(kept, every.index.tolist())]
        return Channels(torch.tensor(index), every.pairs)


@dataclass(frozen=True, eq=False)
class Observed:
    """What a pack role sees of one sequence in one layer.

    Attributes:
        layer: the layer.
        queries: float32 ``[H, m, D]``, the newest queries; keys: ``[Hkv, n, D]``, all residents.
        settled: how many of the first keys are about to be packed.
        rope: the layer's rotation; None where it has none.
        raw: whether queries and keys are as they were before rotation.
    """

    layer: LayerShape
    queries: torch.Tensor
    keys: torch.Tensor
    settled: int
    rope: LayerRope | None
    raw: bool


def kept(dim: int, ratio: float, channels: Literal["pairs", "single"] = "single", round_to: int | None = None) -> int:
    """How many of ``dim`` channels stay when the share ``ratio`` is dropped, rounded down to whole channels, or whole pairs.

    ``round_to`` rounds what stays up to a multiple, ``dim`` at most.

    >>> kept(128, 0.4), kept(128, 0.4, "pairs"), kept(128, 0.4, round_to=8)
    (77, 78, 80)
    """
    size = 2 if channels == "pairs" else 1
    # In binary 0.3 * 10 is 2.9999..., which must not lose a channel.
    count = dim - size * int(ratio * (dim // size) + 1e-9)
    while round_to is not None and count < dim and count % round_to:
        count = min(count + size, dim)
    return count


def scores(queries: torch.Tensor, keys: torch.Tensor, *, raw_pairs: LayerRope | None = None) -> torch.Tensor:
    """Weight of each channel: float32 ``[Hkv, D]``, ``sum(q**2)`` over queries and the heads of a group times ``sum(k**2)``.

    Args:
        queries: ``[H, m, D]``; keys: ``[Hkv, n, D]``.
        raw_pairs: where both were not rotated yet, their rotation. Each channel then gets its pair's mean energy, which does not
            depend on the angle: what the product is on average over positions.
    """
    group = queries.shape[0] // keys.shape[0]
    energy = [queries.float().square().sum(1).view(keys.shape[0], group, -1).sum(1), keys.float().square().sum(1)]
    if raw_pairs is not None:
        a, b = _pairs(raw_pairs)
        for x in energy:
            mean = (x[:, a] + x[:, b]) / 2
            x[:, a], x[:, b] = mean, mean
    return energy[0] * energy[1]


def choose(
    queries: torch.Tensor,
    keys: torch.Tensor,
    count: int,
    channels: Literal["pairs", "single"],
    rope: LayerRope | None,
    *,
    raw: bool = False,
) -> Channels:
    """The ``count`` heaviest channels of each KV head, or as many in whole pairs; of equals, the higher channel stays.

    Args:
        queries: ``[H, m, D]``; keys: ``[Hkv, n, D]``, those that will lose channels.
        rope: says which channels are a pair; halves of the head where there is none.
        raw: whether both are as they were before rotation.
    """
    weight = scores(queries, keys, raw_pairs=rope if raw else None).cpu()
    weight = torch.nan_to_num(weight, nan=torch.inf)
    dim = weight.shape[1]
    if channels == "single":
        drop = weight.argsort(dim=1, stable=True)[:, : dim - count]
        mask = torch.ones_like(weight, dtype=torch.bool).scatter_(1, drop, False)
        return _in_order(mask, rope, whole_pairs=False)
    units = [torch.stack(_pairs(rope), 1)] if rope is not None else []
    rest = torch.arange(0 if rope is None else rope.rotary_dim, dim)
    half = len(rest) // 2
    units.append(torch.stack([rest[:half], rest[half : 2 * half]], 1))
    pairs = torch.cat(units)
    drop = weight[:, pairs].sum(2).argsort(dim=1, stable=True)[:, : (dim - count) // 2]
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row, gone in zip(mask, drop):
        row[pairs[gone].flatten()] = False
    return _in_order(mask, rope, whole_pairs=True)


def _pairs(rope: LayerRope) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that rotate together."""
    half = rope.rotary_dim // 2
    if rope.layout == "half":
        return torch.arange(half), torch.arange(half, 2 * half)
    return torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2)


def _in_order(mask: torch.Tensor, rope: LayerRope | None, whole_pairs: bool) -> Channels:
    """The channels of ``mask`` (bool ``[Hkv, D]``) in the order of :class:`Channels`."""
    if rope is None or not whole_pairs:
        return Channels(torch.stack([row.nonzero()[:, 0] for row in mask]), (0,) * len(mask))
    first, second = _pairs(rope)
    rows, pairs = [], []
    for row in mask:
        own = row[first]
        others = row.clone()
        others[: rope.rotary_dim] = False
        rows.append(torch.cat([first[own], second[own], others.nonzero()[:, 0]]))
        pairs.append(int(own.sum()))
    return Channels(torch.stack(rows), tuple(pairs))
