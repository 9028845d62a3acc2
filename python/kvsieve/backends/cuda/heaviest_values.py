"""Of each query head the heaviest values alone: every key is scored, few values are read.

The attention kernel runs without its values and keeps the logits; the best of them are picked, and their values added up where they
lie. Nothing waits for the device. The definition is :mod:`kvsieve.backends.heaviest_values`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.cuda.ops.add_values import AddValues
from kvsieve.backends.cuda.ops.format import Format
from kvsieve.backends.cuda.ops.top_k import TopK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsieve.backends.cuda.plan import Plan
    from kvsieve.policy.select import HeaviestValues

__all__ = ["Scored", "heaviest", "pick"]

Picked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Columns int64 ``[H, m]`` and their weights float32 ``[H, m]``, zero for what is not added up; the mass ``[H]``."""

Where = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, torch.dtype, torch.Tensor | None, Format | None]
"""Where the values of a step's spans lie: the arguments of :class:`AddValues` after the first three."""


class Scored(NamedTuple):
    """What all queries of a step score.

    Attributes:
        lse: float32 ``[B, q, H]``, without learned logits; logits: float32 ``[H, keys]``, of all items one after another.
        starts: where those of each item begin, on the host; where: their values.
    """

    lse: torch.Tensor
    logits: torch.Tensor
    starts: npt.NDArray[np.int64]
    where: Where


def pick(logits: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, rule: HeaviestValues) -> Picked:
    """The heaviest keys of one query, of equal ones the earlier.

    Args:
        logits: float32 ``[H, n]``; lse: float32 ``[H]``, without the learned logits ``sinks`` ``[H]``.
    """
    count = logits.shape[1] if rule.top is None else min(rule.top, logits.shape[1])
    columns, _ = TopK(logits, count).launch()
    shares = torch.exp(logits.gather(1, columns) - lse[:, None])
    if rule.mass is not None:
        # Columns ascend, so that of equal ones the earlier comes first. Another one is needed while those before are not enough.
        shares, order = shares.sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        before = torch.cat([shares.new_zeros(shares.shape[0], 1), shares.cumsum(1)[:, :-1]], 1)
        shares = torch.where(before < rule.mass, shares, 0.0)
    mass = shares.sum(1)
    weights = shares if sinks is None else shares * torch.sigmoid(lse - sinks)[:, None]
    return columns, weights / mass[:, None] if rule.renormalise else weights, mass


def heaviest(
    scored: Scored, plan: Plan, sinks: torch.Tensor | None, rule: HeaviestValues, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last query of each of these rows adds up: ``[n, H, Dv]``, and the masses float32 ``[n, H]``."""
    columns_of, starts = scored.lse.shape[1], scored.starts
    items = [(row + 1) * columns_of - 1 for row in rows]
    picked = [
        pick(scored.logits[:, starts[item] : starts[item + 1]], scored.lse[row, -1], sinks, rule) for row, item in zip(rows, items)
    ]
    most = max(columns.shape[1] for columns, _, _ in picked)
    columns, weights = (torch.stack([_widened(one[which], most) for one in picked]) for which in (0, 1))
    out = AddValues(columns, weights, plan.upload(np.array(items, np.int32)), *scored.where).launch()
    return out, torch.stack([mass for _, _, mass in picked])


def _widened(x: torch.Tensor, most: int) -> torch.Tensor:
    """``x`` ``[H, m]`` with zeros behind it, ``[H, most]``."""
    return x if x.shape[1] == most else torch.nn.functional.pad(x, (0, most - x.shape[1]))
