"""How much attention each key gets: probabilities summed over queries, and over the query heads of a key-value head's group.

    logits[h, i, j] = cap(scale * <q[h, i], k[h / group, j]>)       where key j is visible to query i
    p[h, i, :]      = softmax over the visible keys (and the sink logit of head h, which keeps its share)
    score[g, j]     = sum of p[h, i, j] over the heads h of group g and all queries i

Queries and keys are read as the model rotated them. The matrix of a prefill is made for one key-value head and a block of
queries at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsieve._core import Part, Step
    from kvsieve.backends.base import AttendCall, Store

__all__ = ["attention_scores", "highest_of_last", "highest_of_prefill", "keys_of", "of_items", "of_prefill"]

CELLS = 1 << 22
"""Most logits that exist at a time."""

QUERIES = 128
"""Most queries of a block: few beside the keys of a long chunk, so that little is computed that is not seen."""


@torch.no_grad()
def attention_scores(q: torch.Tensor, k: torch.Tensor, q_at: torch.Tensor, k_at: torch.Tensor, call: AttendCall) -> torch.Tensor:
    """The probability that the queries give to each key, summed over queries and over a group's heads.

    Args:
        q: ``[H, m, D]``; k: ``[Hkv, n, D]``, both rotated. ``H`` is a multiple of ``Hkv``.
        q_at: int64 ``[m]``; k_at: int64 ``[Hkv, n]``: positions, ascending. A query sees the keys up to its own position.

    Returns:
        float32 ``[Hkv, n]`` (float64 for queries in float64). A query that sees nothing gives nothing.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, n = k.shape[:2]
    group, count = q.shape[0] // kv_heads, q.shape[1]
    size = max(1, min(QUERIES, CELLS // max(group * n, 1)))
    out = torch.zeros(kv_heads, n, dtype=wide, device=k.device)
    for head in range(kv_heads):
        mine, keys = slice(head * group, (head + 1) * group), k[head].to(wide)
        sink_logits = None if call.sink_logits is None else call.sink_logits[mine].detach().to(device=k.device, dtype=wide)
        for lo in range(0, count, size):
            at = q_at[lo : lo + size]
            # All queries of the block see the keys before `some`, none sees those from `none` on.
            some, none = torch.searchsorted(k_at[head].contiguous(), at[[0, -1]], right=True).tolist()
            logits = (q[mine, lo : lo + size].to(wide) @ keys[:none].T) * call.scale
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            logits[..., some:].masked_fill_((k_at[head, some:none] > at[:, None]).to(k.device), -torch.inf)
            if sink_logits is not None:
                logits = torch.cat([sink_logits[:, None, None].expand(-1, len(at), 1), logits], 2)
            given = (
                logits.softmax(-1).sum((0, 1))
                if some or sink_logits is not None
                else logits.softmax(-1).nan_to_num(0.0).sum((0, 1))
            )
            out[head, :none] += given if sink_logits is None else given[1:]
    return out


@torch.no_grad()
def highest_of_last(q: torch.Tensor, k: torch.Tensor, call: AttendCall) -> torch.Tensor:
    """The highest probability that one query, which sees all keys, gives to each of them, among the query heads of a group.

    Args:
        q: ``[H, D]``; k: ``[Hkv, n, D]``, both rotated.

    Returns:
        float32 ``[Hkv, n]`` (float64 for a query in float64).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).view(k.shape[0], -1, q.shape[1])
    logits = (grouped @ k.to(wide).transpose(1, 2)) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.sink_logits is None:
        return logits.softmax(-1).amax(1)
    sinks = call.sink_logits.detach().to(device=k.device, dtype=wide).view(*grouped.shape[:2], 1)
    return torch.cat([sinks, logits], 2).softmax(-1)[..., 1:].amax(1)


def keys_of(store: Store, part: Part, k: torch.Tensor, new: slice) -> torch.Tensor:
    """Keys ``[Hkv, n, D]`` of a part's residents and new tokens, which are not stored yet."""
    runs, keys = list(zip(*(a.tolist() for a in part.runs()))), k[part.row, :, new]
    return torch.cat([store.read(runs)[0], keys], 1) if runs else keys


def of_prefill(store: Store, q: torch.Tensor, k: torch.Tensor, step: Step, call: AttendCall) -> list[torch.Tensor | None]:
    """For each row :func:`attention_scores` of its new queries over its residents and new tokens; None without new tokens.

    To be called before the step's tokens are stored; the step must have parts and one memory.
    """
    rows: list[torch.Tensor | None] = [None] * q.shape[0]
    for part in step.parts():
        new = slice(q.shape[2] - step.new_lens[part.row], None)
        if step.new_lens[part.row] == 0:
            continue
        keys = keys_of(store, part, k, new)
        q_at, k_at = torch.from_numpy(part.query_true()), torch.from_numpy(part.key_true()).expand(k.shape[1], -1)
        rows[part.row] = attention_scores(q[part.row, :, new], keys, q_at, k_at, call)
    return rows


def highest_of_prefill(
    store: Store, q: torch.Tensor, k: torch.Tensor, step: Step, call: AttendCall, skip: Sequence[bool]
) -> list[torch.Tensor | None]:
    """For each row :func:`highest_of_last` of its last query; None without new tokens, and where ``skip`` says so.

    To be called before the step's tokens are stored; the step must have parts and one memory.
    """
    rows: list[torch.Tensor | None] = [None] * q.shape[0]
    for part in step.parts():
        count = step.new_lens[part.row]
        if count and not skip[part.row]:
            keys = keys_of(store, part, k, slice(q.shape[2] - count, None))
            rows[part.row] = highest_of_last(q[part.row, :, -1], keys, call)
    return rows


def of_items(items: Sequence[torch.Tensor], step: Step) -> list[torch.Tensor | None]:
    """The same from the scores of each item (``row * queries + query``), ``[Hkv, keys that the query sees]``, in text order."""
    rows: list[torch.Tensor | None] = []
    for row, count in enumerate(step.new_lens):
        end = (row + 1) * step.num_queries
        mine = items[end - count : end]
        total = mine[-1].clone() if mine else None
        for item in mine[:-1]:
            assert total is not None
            total[:, : item.shape[1]] += item
        rows.append(total)
    return rows
