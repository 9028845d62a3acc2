"""InfLLM written out key by key, and a layer without a model under a policy that fetches blocks; shared by the tests.

The twin is slow on purpose: for every query a list of what it reads and how far away each token is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.facts import LayerRope
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.blocks import Blocks
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.part import Forward, LayerInput


def rope(size: int, layout: Any = "half", factor: float = 1.0) -> LayerRope:
    return LayerRope(10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size), layout, factor)


@dataclass
class Numbers:
    """The sizes of a twin, by the names of the published code."""

    n_local: int
    n_init: int
    bs: int
    topk: int
    r_k: int
    per_head: bool = False
    summary: str = "representatives"


def suits(q: torch.Tensor, k: torch.Tensor, attention: torch.Tensor, n: Numbers, turn: LayerRope) -> float:
    """How well a block suits queries: ``q`` ``[group, m, D]``, keys ``k`` ``[bs, D]``, and the attention that each of these got."""
    far = n.n_local - 1
    if n.summary == "bounds":
        keys = turn.rotate(k, torch.full((len(k),), -far), factor=False)
        most = torch.maximum(q * keys.max(0).values, q * keys.min(0).values).sum(-1)
        return float(most.mean(1).sum(0))
    best = sorted(range(len(k)), key=lambda t: (-float(attention[t]), t))[: n.r_k]
    asked = turn.rotate(q, torch.full((q.shape[1],), far)).mean(1).sum(0)
    return float(asked @ (k if n.summary == "mean" else k[best]).mean(0))


@dataclass
class Answer:
    """Out ``[H, T, Dv]``; of each execution block the chosen blocks of each KV head; attention ``[Hkv, T]`` inside windows."""

    out: torch.Tensor
    chosen: list[list[list[int]]] = field(default_factory=list)
    r: Any = None


def infllm(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], blocks: list[int], n: Numbers, turn: LayerRope, scale: float
) -> Answer:
    """``q`` ``[H, T, D]`` over ``k``, ``v`` ``[Hkv, T, D]``, not rotated, in execution blocks of these sizes; in float64."""
    q, k, v = (x.double() for x in qkv)
    (heads, count, _), kv_heads = q.shape, k.shape[0]
    group, far = heads // kv_heads, n.n_local - 1
    found = Answer(torch.zeros(heads, count, v.shape[2], dtype=torch.float64), r=torch.zeros(kv_heads, count, dtype=torch.float64))
    st = 0
    for size in blocks:
        num = max((st - n.n_init - n.n_local) // n.bs, 0)
        spans = [range(n.n_init + b * n.bs, n.n_init + (b + 1) * n.bs) for b in range(num)]
        scores = torch.zeros(kv_heads, num, dtype=torch.float64)
        for head in range(kv_heads):
            mine = q[head * group : (head + 1) * group, st : st + size]
            for b, span in enumerate(spans):
                scores[head, b] = suits(mine, k[head, span], found.r[head, span], n, turn)
        judged = scores if n.per_head else scores.sum(0, keepdim=True).expand(kv_heads, -1)
        chosen = [sorted(sorted(range(num), key=lambda b, row=row: (-float(row[b]), b))[: n.topk]) for row in judged]  # type: ignore[misc]
        found.chosen.append(chosen)
        for i in range(st, st + size):
            for head in range(heads):
                mine = head // group
                held = {t for b in chosen[mine] for t in spans[b]} | set(range(n.n_init)) | set(range(n.n_init + num * n.bs, i + 1))
                near = range(max(i - far, 0), i + 1)
                read = sorted(held & set(range(i - far)) if i > far else set()) + list(near)
                at = torch.tensor([far if i - t > far else i - t for t in read])
                turned = turn.rotate(q[head, i][None].expand(len(read), -1), at)
                keys = turn.rotate(k[mine, read], torch.zeros(len(read), dtype=torch.long))
                p = ((turned * keys).sum(-1) * scale).softmax(0)
                found.out[head, i] = p @ v[mine, read]
                found.r[mine, near.start : i + 1] += p[-len(near) :]
        st += size
    assert st == count
    return found


class FetchingLayer:
    """One layer without a model under a policy that fetches blocks; queries and keys are pre-RoPE."""

    def __init__(self, backend: str, policy: Any, call: AttendCall) -> None:
        self.backend, self.policy, self.call = backends.get(backend), policy, call
        self.blocks = Blocks(make_planner(policy.specs(1), policy.stored_keys))
        facts = SimpleNamespace(layers=(), trained_length=None, ranks=None)
        setting: Any = SimpleNamespace(policy=policy, facts=facts, backend=self.backend, blocks=self.blocks)
        part = Fetching.of(setting)
        assert part is not None
        self.part: Fetching = part
        self.store: Any = None

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int] | None = None) -> torch.Tensor:
        """Reads ``q`` ``[B, H, n, D]``, ``k``, ``v``: ``[B, n, H, Dv]``."""
        batch, width = q.shape[0], q.shape[2]
        if self.store is None:
            self.store = self.backend.make_store(k, v)
        lens = [width] * batch if lens is None else lens
        forward = Forward(lens, width, self.blocks.seen or [0] * batch)
        self.part.begin(forward)
        if self.backend.capabilities.residents_suffice:
            forward.step = self.blocks.planner.begin_residents(lens, width)
        else:
            forward.step = self.blocks.planner.begin(lens, width, True, self.backend.capabilities.needs_parts)
        out = self.part.attend(LayerInput(0, q, k, v, self.call, forward, self.store))
        assert out is not None
        change = self.part.commit(forward)
        self.blocks.planner.commit()
        change()
        return out

    def chosen(self, row: int = 0) -> list[list[int]]:
        """The blocks that the last queries chose, of each KV head."""
        read = self.part.read[0][row]
        assert read is not None
        blocks = read.choice.blocks
        return blocks * (self.store.read([])[0].shape[0] if len(blocks) == 1 else 1)
