"""What the CUDA backend can hold, and follow: what its kernels can read."""

from __future__ import annotations

from kvsieve.backends.capabilities import FLOATS, Capabilities, SelectionCapabilities
from kvsieve.backends.cuda import select
from kvsieve.backends.rules import kinds

__all__ = ["CAPABILITIES"]

CAPABILITIES = Capabilities(
    "cuda",
    SelectionCapabilities(
        kinds(select.__path__),
        compressed=False,
        split_pages=False,
    ),
    devices=frozenset({"cuda"}),
    dtypes=FLOATS,
    max_head_dim=256,  # the tiles of `attend`
    row_bytes=16,  # rows are read in whole vectors
)
