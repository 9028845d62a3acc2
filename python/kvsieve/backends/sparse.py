"""Searching attention for a chunk of a prompt: see :mod:`kvsieve.backends.search` for what it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvsieve import _core
    from kvsieve.backends import AttendCall

__all__ = ["attend_chunk"]


def attend_chunk(
    core: _core.Store, sparse: _core.Sparse, q: torch.Tensor, step: _core.Step, call: AttendCall, threads: int
) -> torch.Tensor:
    """Attends the step's queries, many at a time, to what ``sparse`` chooses among the tokens that ``core`` already holds.

    The same choices as :meth:`Sparse.attend` wherever scores are equal, and the same answer but for the order of sums; with bfloat16
    on machines that multiply pairs of it, weights are rounded to it too. What a later single query finds chosen is the same as well.

    Args:
        core: the layer's store, the step's tokens appended.
        sparse: the layer's rule and choices.
        q: ``[rows, heads, queries, key channels]``, the store's dtype, in the frame of its keys; rows are padded on the left.
        step: the open step.
        call: scale, soft cap and learned sinks.
        threads: at least 1; how many changes no bit.

    Returns:
        ``[rows, queries, heads, value channels]`` of the dtype of ``q``, zero for pads.

    Raises:
        ShapeError: queries that do not fit the store or the step.
        UnsupportedError: a memory that does not keep every token where the model put it.
    """
    from kvsieve.backends.cpu import _view  # which may import this module

    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], core.value_dim, dtype=q.dtype)
    sinks = None if call.sinks is None else call.sinks.detach().float().numpy()
    sparse.attend(core, _view(q), step, call.scale, call.softcap, sinks, _view(out), None, threads, chunk=True)
    return out
