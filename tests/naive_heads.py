"""Eviction per head, the slow way: nothing is ever forgotten, a mask hides what each head evicted, rules are loops over lists.

A copy of the model runs on transformers' own cache, with an attention function that softmaxes over exactly the tokens that each
head holds. It shares no line with the package.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "naive_heads"
BLOCK = 64
_running: list[NaiveHeads] = []


def _attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> tuple[Any, None]:
    return _running[-1].attention(module.layer_idx, q, k, v, scaling, kwargs.get("softcap"), kwargs.get("s_aux")), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


class NaiveHeads:
    """One sequence under SnapKV (``observe``, ``kernel``) or H2O (``recent``, ``sinks``)."""

    def __init__(self, model: Any, rule: str, budget: int, **settings: int) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation(NAME)
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.rule, self.budget, self.settings = rule, budget, settings
        self.seen = 0
        self.held: dict[int, list[list[int]]] = {}
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.numbers: dict[int, Any] = {}
        self.accumulated: dict[int, list[dict[int, float]]] = {}

    def weights(self, layer: int, head: int, query: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Softmax of one query ``[D]`` of one query head over the keys at ``positions``."""
        scale, cap, sinks = self.numbers[layer]
        group = len(sinks) // len(self.held[layer])
        logits = (self.keys[layer][head // group, positions] @ query) * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return torch.cat([logits, sinks[head : head + 1]]).softmax(0)[:-1]

    def attention(self, layer: int, q: Any, k: Any, v: Any, scale: float, cap: float | None, sinks: Any) -> torch.Tensor:
        heads, width, kv_heads = q.shape[1], q.shape[2], k.shape[1]
        group = heads // kv_heads
        self.keys[layer] = k[0].double()
        self.numbers[layer] = scale, cap, torch.full((heads,), -torch.inf).double() if sinks is None else sinks.double()
        held = self.held.setdefault(layer, [[] for _ in range(kv_heads)])
        accumulated = self.accumulated.setdefault(layer, [{} for _ in range(kv_heads)])
        self.queries.setdefault(layer, []).extend(q[0].double().transpose(0, 1))
        out = torch.zeros(1, width, heads, v.shape[3], dtype=torch.float64)
        for i in range(width):
            for head in range(heads):
                positions = [*held[head // group], *range(self.seen, self.seen + i + 1)]
                p = self.weights(layer, head, q[0, head, i].double(), positions)
                out[0, i, head] = p @ v[0, head // group, positions].double()
                given = accumulated[head // group]
                for position, share in zip(positions, p.tolist()):
                    given[position] = given.get(position, 0.0) + share
        for mine in held:
            mine.extend(range(self.seen, self.seen + width))
        return out.to(q.dtype)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, q, V]``."""
        _running.append(self)
        try:
            logits = self.model(ids, past_key_values=self.cache, use_cache=True).logits
        finally:
            _running.pop()
        self.seen += ids.shape[1]
        self.evict(ids.shape[1] > 1)
        return logits

    def evict(self, force: bool) -> None:
        for layer, held in self.held.items():
            for head, mine in enumerate(held):
                if len(mine) > self.budget and (force or len(mine) >= self.budget + BLOCK):
                    held[head] = self.snapkv(layer, head, mine) if self.rule == "snapkv" else self.h2o(layer, head, mine)

    def snapkv(self, layer: int, head: int, mine: list[int]) -> list[int]:
        observe, reach = self.settings["observe"], self.settings["kernel"] // 2
        others, last = mine[:-observe], mine[-observe:]
        group = len(self.numbers[layer][2]) // len(self.held[layer])
        scores = [0.0] * len(others)
        for position in last:
            visible = [p for p in mine if p <= position]
            for one in range(head * group, (head + 1) * group):
                p = self.weights(layer, one, self.queries[layer][position][one], visible)
                scores = [score + share for score, share in zip(scores, p.tolist())]
        pooled = [max(scores[max(i - reach, 0) : i + reach + 1]) for i in range(len(scores))]
        best = sorted(range(len(others)), key=lambda i: (-pooled[i], i))[: self.budget - observe]
        return [*(others[i] for i in sorted(best)), *last]

    def h2o(self, layer: int, head: int, mine: list[int]) -> list[int]:
        recent, sinks = self.settings["recent"], self.settings["sinks"]
        first, others, last = mine[:sinks], mine[sinks : len(mine) - recent], mine[len(mine) - recent :]
        given = self.accumulated[layer][head]
        best = sorted(others, key=lambda p: (-given[p], p))[: self.budget - sinks - recent]
        return [*first, *sorted(best), *last]
