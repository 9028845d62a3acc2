"""RefreshKV written out from the paper, naively, to be held beside streams; and what a stream's heads have read.

The twin keeps lists: what each head reads, from the lowest score to the newest token, and every key.
"""

from __future__ import annotations

from typing import Any

import kvsieve
import torch
from kvsieve.runtime.recycling import Recycling
from torch.nn.functional import max_pool1d


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class TwinLayer:
    """Keys and values ``[Hkv, n, D]`` of all tokens; of each head what it reads, the first to go first; the query it chose by."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.recycled: list[list[int]] | None = None
        self.query: torch.Tensor | None = None
        self.similarities: list[float] = []
        self.full = 0


class Twin:
    """A Llama under RefreshKV."""

    def __init__(self, model: Any, budget: int, stride: int, similarity: float | None, kernel: int) -> None:
        self.model, self.budget, self.stride, self.similarity, self.kernel = model, budget, stride, similarity, kernel
        self.layers = [TwinLayer() for _ in model.model.layers]
        self.seen, self.step = 0, 0

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of new tokens ``[n]``."""
        body = self.model.model
        x, n = body.embed_tokens(ids), len(ids)
        cos, sin = (t[0] for t in body.rotary_emb(x[None], torch.arange(self.seen, self.seen + n)[None]))
        self.seen += n
        alone = n == 1 and self.layers[0].recycled is not None and self.seen > self.budget
        self.step = self.step + 1 if alone else 0
        for module, layer in zip(body.layers, self.layers):
            h = module.input_layernorm(x)
            heads = [getattr(module.self_attn, f"{name}_proj")(h).view(n, -1, 16).transpose(0, 1) for name in "qkv"]
            q, k, v = heads
            mean = q[:, -1].mean(0)
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            layer.keys = k if layer.keys is None else torch.cat([layer.keys, k], 1)
            layer.values = v if layer.values is None else torch.cat([layer.values, v], 1)
            full = self.is_full(layer, mean) if alone else True
            answer = self.all_of(layer, q, mean) if full else self.some_of(layer, q)
            layer.full += full and n == 1 and self.seen > self.budget
            x = x + module.self_attn.o_proj(answer.transpose(0, 1).reshape(n, -1))
            x = x + module.mlp(module.post_attention_layernorm(x))
        return self.model.lm_head(body.norm(x))

    def is_full(self, layer: TwinLayer, mean: torch.Tensor) -> bool:
        if self.step % self.stride:
            return False
        if self.similarity is None:
            return True
        assert layer.query is not None
        layer.similarities.append(float(torch.cosine_similarity(mean, layer.query, dim=0)))
        return layer.similarities[-1] <= self.similarity

    def all_of(self, layer: TwinLayer, q: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        group, n = q.shape[0] // layer.keys.shape[0], q.shape[1]
        keys, values = (x.repeat_interleave(group, 0) for x in (layer.keys, layer.values))
        hidden = torch.ones(n, self.seen, dtype=torch.bool).triu(self.seen - n + 1)
        p = (q @ keys.transpose(1, 2) / 4).masked_fill(hidden, -torch.inf).softmax(-1)
        if self.seen > self.budget:
            layer.recycled = [self.best(p[h * group : (h + 1) * group, -1].amax(0)) for h in range(layer.keys.shape[0])]
            layer.query = mean
        return p @ values

    def best(self, raw: torch.Tensor) -> list[int]:
        pooled = max_pool1d(raw[None], self.kernel, 1, self.kernel // 2)[0]
        ranked = sorted(range(self.seen), key=lambda i: (float(pooled[i]), float(raw[i]), -i))
        return ranked[-self.budget :]

    def some_of(self, layer: TwinLayer, q: torch.Tensor) -> torch.Tensor:
        assert layer.recycled is not None
        group, out = q.shape[0] // layer.keys.shape[0], []
        for head in range(q.shape[0]):
            read = sorted([*layer.recycled[head // group], self.seen - 1])
            keys, values = layer.keys[head // group, read], layer.values[head // group, read]
            out.append((q[head] @ keys.T / 4).softmax(-1) @ values)
        for mine in layer.recycled:
            mine.append(self.seen - 1)
            del mine[: max(len(mine) - self.budget, 0)]
        return torch.stack(out)


def part_of(stream: kvsieve.Stream) -> Recycling:
    return stream._engine.parts.the(Recycling)


def read_by(stream: kvsieve.Stream) -> list[list[list[int]] | None]:
    """Of each layer what its heads read in the last forward, or None for everything; of the first row."""
    found: list[list[list[int]] | None] = []
    for index in sorted(part_of(stream).read):
        sets = part_of(stream).read[index][0]
        heads = None if sets is None else [sets.read(head, stream.seen).tolist() for head in range(len(sets.tokens))]
        found.append(heads)
    return found
