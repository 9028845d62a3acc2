"""Ways to run a tiny model, and a single layer without a model; shared by the tests."""

from __future__ import annotations

from typing import Any

import kvsieve
import numpy as np
import torch
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cpu.tensors import view
from kvsieve.facts import LayerRope
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.head_eviction import HeadEviction
from kvsieve.runtime.sliding import SlidingLayers

# ------------------------------------------------------------------------------------------------------------------- with a model


@torch.no_grad()
def forward(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """One plain forward of the new columns ``ids``; ``mask`` covers everything seen and them. Logits ``[B, q, V]``."""
    positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions, **kwargs).logits


def forwards(model: Any, cache: Any, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain forwards of ``chunks`` columns each; the last size repeats until ``ids`` is used up. Logits of every column."""
    out, lo, sizes = [], 0, list(chunks)
    while lo < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        hi = min(lo + size, ids.shape[1])
        out.append(forward(model, cache, ids[:, lo:hi], None if mask is None else mask[:, :hi]))
        lo = hi
    return torch.cat(out, 1)


def greedy(model: Any, ids: torch.Tensor, new: int, **kwargs: Any) -> torch.Tensor:
    """Greedy tokens, the prompt included."""
    return model.generate(ids, do_sample=False, max_new_tokens=new, **kwargs)


_answers: dict[Any, list[int]] = {}


def solo(model: Any, texts: list[torch.Tensor], new: int = 6) -> list[list[int]]:
    """What the stock model answers greedily to each text ``[n]`` alone. A model that nobody changes is asked once."""
    import tiny

    answers = []
    for text in texts:
        asked = id(model), tuple(text.tolist()), new
        answer = _answers.get(asked)
        if answer is None:
            # Without a mask, generate would take what was said with the id of the pad for pads.
            answer = greedy(model, text[None], new, attention_mask=torch.ones_like(text)[None])[0, len(text) :].tolist()
            if tiny.is_shared(model):
                _answers[asked] = answer
        answers.append(list(answer))
    return answers


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[n_i]`` as one left-padded batch and its mask."""
    width = max(len(r) for r in rows)
    ids = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.long), torch.ones_like(r)]) for r in rows])
    return ids, mask


def joined(*parts: Any) -> torch.Tensor:
    """Ids of texts, one behind the other: ``[n]``."""
    return torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])


def ids_of(stream: kvsieve.Stream) -> list[list[int]]:
    return [row.tolist() for row in stream.ids]


def positions(stream: kvsieve.Stream) -> list[list[int]]:
    """Kept positions of every row; where they differ by head, those of the first one."""
    first = stream._engine.facts.layers[0].index
    return [kept.positions.tolist() for kept in stream.kept(first, 0)]


def heads(stream: kvsieve.Stream, row: int = 0) -> list[list[int]]:
    """What each head of each layer holds of a row."""
    layers = stream._engine.facts.layers
    return [stream.kept(x.index, h)[row].positions.tolist() for x in layers for h in range(x.num_kv_heads)]


def holds(stream: kvsieve.Stream, tokens: set[int], row: int = 0) -> bool:
    """Whether every head of a row holds ``tokens``."""
    return all(tokens <= set(held) for held in heads(stream, row))


def lacks(stream: kvsieve.Stream, tokens: set[int], row: int = 0) -> bool:
    """Whether no head of a row holds any of ``tokens``."""
    return all(not tokens & set(held) for held in heads(stream, row))


def same_memory(a: kvsieve.Stream, b: kvsieve.Stream) -> bool:
    """Whether two streams hold the same tokens, scores, keys and values, bit for bit."""
    mine, theirs = snapshot(a), snapshot(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def snapshot(stream: kvsieve.Stream) -> dict[str, torch.Tensor]:
    """Copies of everything a stream holds, as bits."""
    planner, found = stream._engine.planner, {}
    for row in range(planner.num_rows):
        for memory in range(planner.num_memories):
            at = f"{memory}.{row}"
            found[f"positions.{at}"] = torch.from_numpy(planner.positions(memory, row).copy())
            found[f"scores.{at}"] = torch.from_numpy(planner.scores(memory, row).copy()).view(torch.int32)
            for index, store in stream._engine.stores.items():
                k, v = store.read(planner.runs(memory, row))
                found[f"keys.{index}.{at}"], found[f"values.{index}.{at}"] = k.clone(), v.clone()
    parts = stream._engine.parts
    sliding, heads = parts.find(SlidingLayers), parts.find(HeadEviction)
    if sliding is not None:
        found.update({f"sliding.{name}": tensor.clone() for name, tensor in sliding.save().tensors.items()})
    for row, state in enumerate(heads.rows if heads is not None else []):
        found[f"since.{row}"] = torch.tensor(state.since)
        for index, layer in state.layers.items():
            assert heads is not None
            found[f"chosen.{index}.{row}"] = layer.chosen.clone()
            if layer.accumulated is not None:
                found[f"accumulated.{index}.{row}"] = layer.accumulated.clone()
            if layer.queries:
                found[f"queries.{index}.{row}"] = torch.cat(layer.queries, 1)[:, -heads.rule.observe :].clone()
    return found


# ---------------------------------------------------------------------------------------------------------------- without a model


class Layer:
    """One layer without a model: a planner and a store, driven as the engine drives them.

    ``feed`` takes pre-RoPE queries and keys; where the policy stores post-RoPE ones, they are rotated to their true positions.
    """

    def __init__(
        self,
        backend: str,
        policy: Any,
        *,
        rope: LayerRope | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        top_k: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.backend = backends.get(backend)
        self.policy, self.rope, self.dtype = policy, rope, dtype
        self.stored_keys = policy.stored_keys
        self.planner = make_planner(policy.specs(1), self.stored_keys)
        self.call = AttendCall(scale, softcap, sinks, rope if policy.moves else None, top_k)
        self.store: Any = None
        self.selects = any(spec.top_k for spec in policy.specs(1))

    def rotated(self, x: torch.Tensor, first: list[int]) -> torch.Tensor:
        """``x`` ``[B, H, q, D]``, row ``r`` rotated as positions ``first[r], first[r] + 1, ...``, in its own dtype."""
        if self.rope is None:
            return x
        rows = [self.rope.rotate(row.double(), torch.arange(at, at + x.shape[2])) for row, at in zip(x, first)]
        return torch.stack(rows).to(x.dtype)

    def feed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lens: list[int] | None = None,
        scores: list[Any] | None = None,
        settle: bool | None = None,
    ) -> torch.Tensor:
        """One forward; the last ``lens[row]`` columns of each row are real. Returns ``[B, q, H, Dv]``."""
        batch, width = q.shape[0], q.shape[2]
        lens = [width] * batch if lens is None else lens
        if self.stored_keys == "post_rope":
            seen = [self.planner.seen(row) if self.planner.num_rows else 0 for row in range(batch)]
            first = [s - (width - n) for s, n in zip(seen, lens)]
            q, k = self.rotated(q, first), self.rotated(k, first)
        if self.dtype is not None:
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        if self.store is None:
            self.store = self.backend.make_store(k, v)
        scored = self.policy.needs_surprisal
        store_all = scored or width <= 16 or len(self.policy.memories) > 1
        parts = self.backend.capabilities.needs_parts or self.selects
        step = self.planner.begin(lens, width, store_all, parts)
        out = self.store.run(q, k, v, step, self.call)
        self.planner.commit()
        if scores is not None:
            for row, values in enumerate(scores):
                if len(values):
                    self.planner.set_scores(row, np.asarray(values, np.float32))
        self.settle(width > 1 if settle is None else settle)
        return out

    def settle(self, force: bool) -> None:
        """Let the policy evict."""
        moves = self.planner.settle(force)
        if len(moves):
            self.store.apply(moves)
        if force:
            self.store.free_unused(self.planner.blocks_in_use(), self.planner.packed_in_use())

    def pack(self, upto: int, channels: Any, packing: Any, row: int = 0) -> None:
        """Pack the first ``upto`` residents of a row, as the engine does it."""
        self.store.set_packing(packing)
        self.store.pack(self.planner.pack(row, upto, packing.group if packing.key_bits else 1), channels)
        self.store.free_unused(self.planner.blocks_in_use(), self.planner.packed_in_use())

    def positions(self, row: int = 0, memory: int = 0) -> list[int]:
        """Positions of the residents."""
        return self.planner.positions(memory, row).tolist()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, distances: torch.Tensor, rope: LayerRope, scale: float
) -> torch.Tensor:
    """The definition in float64, key by key: one query ``[H, D]`` over ``k`` ``[n, Hkv, D]`` seen at ``distances`` ``[n]``."""
    group = q.shape[0] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    at = torch.as_tensor(distances, dtype=torch.long)
    turned = rope.rotate(q.double()[:, None].expand(-1, len(at), -1), at)  # [H, n, D]
    logits = torch.einsum("hnd,nhd->hn", turned, k) * rope.factor * scale
    return torch.einsum("hn,nhd->hd", logits.softmax(-1), v)


def attend_chunk(core: Any, sparse: Any, q: torch.Tensor, step: Any, call: AttendCall, threads: int) -> torch.Tensor:
    """A sparse layer's prompt as the CPU's store runs it, over tokens that ``core`` holds already: ``[rows, q, heads, Dv]``."""
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], core.value_dim, dtype=q.dtype)
    sinks = None if call.sink_logits is None else call.sink_logits.detach().float().numpy()
    sparse.attend(core, view(q), step, call.scale, call.softcap, sinks, view(out), None, threads, chunk=True)
    return out


def distinct(batch: int, length: int) -> torch.Tensor:
    """Token ids of which none comes twice: compared by content, the keys of equal tokens are as good as each other."""
    return 3 + torch.randperm(597, generator=torch.Generator().manual_seed(0))[: batch * length].view(batch, length)


def tokens_of(ranges: Any) -> list[int]:
    """The tokens of ranges ``[n, 2]``."""
    return [token for lo, hi in ranges.tolist() for token in range(lo, hi)]
