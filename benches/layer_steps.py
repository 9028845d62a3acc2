"""One step of one layer, again and again, under policies that read a part of a long text: on the CPU and on a GPU.

What the benches of InfLLM, LongHeads and RefreshKV share. No model runs; the part of a stream that decides what is read is the real
one, and what it knows of the text before is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from kvsieve.backends.base import AttendCall, HeadSets
from kvsieve.backends.pieces import attend_pieces
from kvsieve.methods.refresh_kv import RefreshSelection
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.blocks import Blocks
from kvsieve.runtime.fetching import Fetched, Fetching
from kvsieve.runtime.part import Forward, LayerInput
from kvsieve.runtime.summaries import Summed, Table

__all__ = ["FetchingStep", "Layer", "RefreshStep", "exact", "holding"]


def holding(policy: Any, length: int) -> Any:
    """A planner of ``policy`` whose only row holds ``length`` tokens."""
    planner = make_planner(policy.specs(1), policy.stored_keys)
    planner.restore(length, [(length, [(list(range(length)), [0.0] * length)])])
    return planner


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer at the beginning of a step.

    Attributes:
        backend: of ``store``, which holds ``length`` tokens where a planner puts them (:func:`holding`).
        k, v: of the tokens that come, ``[1, Hkv, n, D]`` and ``[1, Hkv, n, Dv]``.
        call: the numbers that its attention adds.
        heads: of queries.
    """

    backend: Any
    store: Any
    length: int
    k: torch.Tensor
    v: torch.Tensor
    call: AttendCall
    heads: int


class FetchingStep:
    """A policy that fetches blocks: the part that chooses, fetches and reads them, and sums up those that are complete.

    Args:
        generator: of the summaries. They are not the keys' own, so that queries choose here and there.
    """

    def __init__(self, policy: Any, layer: Layer, generator: torch.Generator | None = None) -> None:
        self.layer, self.rule, planner = layer, policy.fetching, holding(policy, layer.length)
        self.runs = planner.runs(0, 0)
        facts = SimpleNamespace(layers=(), trained_length=None, ranks=None)
        setting: Any = SimpleNamespace(policy=policy, facts=facts, blocks=Blocks(planner))
        part = Fetching.of(setting)
        assert part is not None
        self.part = part
        self.part.rows = [{0: self._before(generator)}]
        (_, heads, width, dim), can = layer.k.shape, layer.backend.capabilities
        self.summaries = self.part.rows[0][0].table.data
        assert self.summaries.shape == (heads, self.rule.num_blocks(layer.length), dim)
        self._forward = Forward([width], width, [layer.length])
        if can.residents_suffice:
            self.step = planner.begin_residents([width], width)
        else:
            self.step = planner.begin([width], width, True, can.needs_parts)
        self._forward.step = self.step

    def _before(self, generator: torch.Generator | None) -> Summed:
        """What is known before the step."""
        (_, heads, _, dim), device = self.layer.k.shape, self.layer.k.device
        summaries = torch.randn(heads, self.rule.num_blocks(self.layer.length), dim, generator=generator).to(device)
        behind = self.layer.length - self.rule.start - summaries.shape[1] * self.rule.block
        if self.part.summary.needs_scores:
            return Summed(Table.of(summaries), torch.zeros(heads, behind, device=device))
        # The chunk that is being filled.
        queries = (torch.zeros(self.layer.heads, behind, dim, device=device),) if behind else ()
        return Summed(Table.of(summaries), torch.zeros(heads, 0, device=device), queries)

    def run(self, q: torch.Tensor) -> torch.Tensor:
        """Queries ``[1, H, n, D]``: their answers ``[1, n, H, Dv]``."""
        self.part.begin(self._forward)
        given = LayerInput(0, q, self.layer.k, self.layer.v, self.layer.call, self._forward, self.layer.store)
        out = self.part.attend(given)
        assert out is not None
        return out

    @property
    def last(self) -> Fetched:
        """What the queries read that ran last."""
        read = self.part._reads[0][0]
        assert read is not None
        return read

    @property
    def tokens_read(self) -> int:
        """By the last of these queries, for a KV head."""
        return sum(hi - lo for lo, hi in self.last.read(0))

    def checked(
        self, q: torch.Tensor, read: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run queries that share a choice, which must be of the blocks that suit them best.

        Args:
            read: keys and values of tokens ``lo..hi``, the new ones among them.

        Returns:
            Their answers ``[H, n, Dv]``, and the definition's from what was chosen, in float64.
        """
        out, found, rule = self.run(q)[0].transpose(0, 1), self.last.choice, self.rule
        first, width = self.layer.length, q.shape[2]
        among, most = rule.candidates(first), rule.limit(first)
        assert found.compared == len(among) > most
        asked = q[0].double().sum(1).view(len(self.summaries), -1, q.shape[3]).sum(1)
        products = (self.summaries[:, among.start : among.stop].double() * asked[:, None]).sum(-1)
        judged = products if rule.per_head else products.sum(0, keepdim=True)
        chosen = torch.tensor(found.blocks, device=q.device) - among.start
        assert chosen.shape == (len(judged), most)
        assert (chosen.diff(dim=-1) > 0).all()
        # Sums in float32 are so far off at most; the next block is worse by a hundred times as much.
        least = judged.topk(most, -1).values[:, -1] - 1e-5 * judged.std(-1)
        assert (judged.gather(-1, chosen).amin(-1) >= least).all()
        pieces = rule.pieces(first, width, found.blocks)
        want = attend_pieces(
            q[0].double(),
            first,
            pieces,
            lambda lo, hi: tuple(x.double() for x in read(lo, hi)),
            self.layer.call,
            False,
        )
        return out, want.out


class RefreshStep:
    """RefreshKV's steps of a layer: of one token that reads all and lets heads choose, and of one that reads what they chose.

    Args:
        step: that of one new token, by a planner that keeps all.
    """

    def __init__(self, budget: int, layer: Layer, step: Any) -> None:
        self.rule, self.layer = RefreshSelection(budget), layer
        self._given = layer.k, layer.v, step, layer.call

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """A full step's: ``[Hkv, length + 1]``."""
        _, (scores,) = self.layer.store.run_with_sets(q, *self._given, [None])
        assert scores is not None
        return scores

    def choose(self, q: torch.Tensor, newer: int = 0) -> HeadSets:
        """What heads read after a full step and ``newer`` tokens."""
        rest = self.layer.length - newer
        tokens, order = self.rule.choose(self.scores(q)[:, :rest])
        return HeadSets(tokens.contiguous(), order.contiguous(), newer, rest)

    def partial(self, q: torch.Tensor, sets: HeadSets) -> torch.Tensor:
        """``[H, Dv]``"""
        out: torch.Tensor = self.layer.store.run_with_sets(q, *self._given, [sets])[0]
        return out[0, 0]

    def checked(self, q: torch.Tensor, sets: HeadSets, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A partial step's answer, and the definition's in float64; the budget, and the token itself, are what each head reads."""
        named = [sets.read(head, self.layer.length + 1).to(k.device) for head in range(len(k))]
        assert all(len(mine) == self.rule.budget + 1 for mine in named)
        return self.partial(q, sets), exact(q, k, v, self.layer.call.scale, named)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, named: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention of each group's queries ``[1, H, 1, D]`` to those of their head's keys ``[Hkv, n, D]`` that are named, in float64.

    Returns:
        ``[H, Dv]``
    """
    out = []
    for head, (queries, mine) in enumerate(zip(q[0, :, 0].double().chunk(len(k)), named, strict=True)):
        out.append((queries @ k[head, mine].double().T * scale).softmax(-1) @ v[head, mine].double())
    return torch.cat(out)
