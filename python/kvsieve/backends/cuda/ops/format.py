"""How packed blocks are laid out; see packed.cuh."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import require

__all__ = ["PACKED_COLUMNS", "Format"]


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
        require(0 < self.kept <= key_dim, f"a key of {key_dim} channels cannot keep {self.kept}")
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            require(bits in (0, 2, 4, 8), f"{name} must be 0, 2, 4 or 8, got {bits}")
        if self.key_bits or self.value_bits:
            fits = self.group in (8, 16, 32, 64) and (not self.value_bits or value_dim % self.group == 0)
            require(fits, f"group must be 8, 16, 32 or 64 and divide the {value_dim} channels of a value, got {self.group}")

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
