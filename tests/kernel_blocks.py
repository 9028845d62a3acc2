"""What the cases of CUDA kernels are made of: blocks, plain and packed, spans of them, attention over these by its definition."""

from __future__ import annotations

import random
from typing import Any

import torch
from kvsieve._core import PACKED
from kvsieve.backends.cuda.ops.format import Format
from kvsieve.backends.reference.storage import PackedBlock
from kvsieve.facts import LayerRope
from kvsieve.policy.storage import Channels, Packing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


class Blocks:
    """Blocks of random keys and values in two slabs, and their table."""

    def __init__(
        self,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        seed: int,
        device: torch.device | str = "cpu",
        sizes: tuple[int, ...] = (3, 4),
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.dims, self.dtype = heads, (key_dim, value_dim), dtype
        self.slabs = [
            tuple(torch.randn(heads, 64 * n, d, generator=generator).to(device, dtype) for d in self.dims)  # one slab
            for n in sizes
        ]
        self.places = [(slab, i) for slab, n in enumerate(sizes) for i in range(n)]
        rows = []
        for slab, i in self.places:
            key, value = (x.data_ptr() + 64 * i * d * x.element_size() for x, d in zip(self.slabs[slab], self.dims))
            rows.append([key, value, 64 * sizes[slab], 0])
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)

    def read(self, block: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        slab, i = self.places[block]
        k, v = self.slabs[slab]
        return k[:, 64 * i + lo : 64 * i + hi].cpu(), v[:, 64 * i + lo : 64 * i + hi].cpu()


def channels_of(rng: random.Random, heads: int, dim: int, kept: int, rope: LayerRope | None) -> Channels:
    """Random channels: whole pairs of ``rope``, then others; single ones without. A few of those are stored as zero."""
    rows, counts = [], []
    for _ in range(heads):
        if rope is None:
            rows.append([c if rng.random() < 0.9 else -1 - c for c in rng.sample(range(dim), kept)])
            counts.append(0)
            continue
        half, rest = rope.rotary_dim // 2, dim - rope.rotary_dim
        pairs = rng.randint(-(-max(kept - rest, 0) // 2), min(kept // 2, half))
        mine = sorted(rng.sample(range(half), pairs))
        first, second = (
            (mine, [c + half for c in mine]) if rope.layout == "half" else ([2 * c for c in mine], [2 * c + 1 for c in mine])
        )
        rows.append(first + second + sorted(rng.sample(range(rope.rotary_dim, dim), kept - 2 * pairs)))
        counts.append(pairs)
    return Channels(torch.tensor(rows), tuple(counts))


class PackedBlocks:
    """Packed blocks of random tokens in two slabs, their table, and the same blocks as the specification has them."""

    def __init__(
        self,
        packing: Packing,
        sets: list[Channels],
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        seed: int,
        device: torch.device | str = "cpu",
        sizes: tuple[int, ...] = (3, 2),
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = sets[0].index.shape[0]
        self.heads, self.dims, self.dtype, self.packing = heads, (key_dim, value_dim), dtype, packing
        self.format = Format(packing.key_kept, packing.key_bits, packing.value_bits, packing.group)
        self.places = [(slab, i) for slab, n in enumerate(sizes) for i in range(n)]
        self.blocks, self.sets = [], []
        for number in range(len(self.places)):
            k, v = ((torch.randn(heads, 64, d, generator=generator) * 3).to(dtype) for d in self.dims)
            chosen = sets[number % len(sets)]
            block = PackedBlock.empty(packing, chosen, k[None], v[None])
            block.write(0, k, v)
            self.blocks.append(block)
            held = torch.zeros(heads, 1 + self.format.wide(dtype), dtype=torch.int16)
            held[:, 0], held[:, 1 : 1 + packing.key_kept] = torch.tensor(chosen.pairs), chosen.index
            self.sets.append(held.to(device))
        self.slabs = []
        for slab, n in enumerate(sizes):
            mine = [self.laid_out(block) for block, (s, _) in zip(self.blocks, self.places) if s == slab]
            self.slabs.append([torch.stack(x, 1).contiguous().to(device) for x in zip(*mine)])  # [heads, blocks, bytes]
            assert len(mine) == n
        rows = []
        for number, (slab, i) in enumerate(self.places):
            addresses = [x.data_ptr() + i * x.shape[2] for x in self.slabs[slab]]
            rows.append([*addresses, self.sets[number].data_ptr(), 64 * sizes[slab], 0, 0])
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)

    def laid_out(self, block: PackedBlock) -> list[torch.Tensor]:
        """A block's bytes as packed.cuh has them: keys, their scales, values, their scales; uint8 ``[heads, n]`` each."""
        wide = self.format.wide(self.dtype)

        def rows(x: torch.Tensor, bits: int, width: int) -> torch.Tensor:
            padded = torch.cat([x, x.new_zeros(*x.shape[:-1], width - x.shape[-1])], -1)
            if not bits:
                return padded.contiguous().view(torch.uint8).flatten(1)
            codes = padded.unflatten(-1, (-1, 8 // bits)).int() << (torch.arange(8 // bits) * bits)
            return codes.sum(-1).to(torch.uint8).flatten(1)

        def scales(pair: Any, width: int, of_keys: bool) -> torch.Tensor:
            if pair is None:
                return torch.zeros(self.heads, 0, dtype=torch.uint8)
            both = torch.stack([x.squeeze(2 if of_keys else 3) for x in pair], 2)
            both = torch.cat([both, both.new_zeros(*both.shape[:-1], width - both.shape[-1])], -1)
            return both.contiguous().view(torch.uint8).flatten(1)

        keys = rows(block.keys, self.packing.key_bits, wide), scales(block.key_scales, wide, True)
        shares = self.dims[1] // self.packing.group if self.packing.value_bits else 0
        values = rows(block.values, self.packing.value_bits, self.dims[1]), scales(block.value_scales, shares, False)
        return [*keys, *values]

    def read(self, block: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks[block].read(lo, hi, self.dims[0])

    def check(self) -> None:
        """Every byte is what the specification's blocks hold."""
        for number, (slab, i) in enumerate(self.places):
            for name, x, want in zip(
                ("keys", "their scales", "values", "their scales"), self.slabs[slab], self.laid_out(self.blocks[number])
            ):
                assert torch.equal(x[:, i].cpu(), want), f"block {number}: {name} differ"


class Mixed:
    """Plain blocks, and packed ones from PACKED on."""

    def __init__(self, plain: Blocks, packed: PackedBlocks) -> None:
        self.plain, self.packed, self.heads, self.dims = plain, packed, plain.heads, plain.dims

    def read(self, block: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.packed.read(block - PACKED, lo, hi) if block >= PACKED else self.plain.read(block, lo, hi)


def rope_of(dim: int, layout: Any, rotary: int | None = None, factor: float = 1.0) -> LayerRope:
    rotary = dim if rotary is None else rotary
    return LayerRope(10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary), layout, factor)


def table_of(rope: LayerRope, positions: list[int]) -> torch.Tensor:
    return torch.cat(rope.table(torch.tensor(positions), torch.float64, factor=False), 1).float().contiguous()


def random_spans(
    rng: random.Random, items: int, blocks: int, shifts: int, raw: bool
) -> list[list[tuple[int, int, int, int, bool]]]:
    """For each item spans (block, lo, hi, number of the shift or 0, rotate); the last item of several reads nothing."""
    out = []
    for item in range(items):
        spans = []
        for _ in range(rng.choice([1, 3, 6]) if item < max(items - 1, 1) else 0):
            lo = rng.choice([0, 0, rng.randint(0, 63)])
            hi = rng.choice([64, rng.randint(lo, 64)])
            spans.append((rng.randrange(blocks), lo, hi, rng.randint(0, shifts), raw and rng.random() < 0.8))
        out.append(spans)
    return out


def defined(
    q: torch.Tensor,
    held: Blocks,
    spans: list[list[tuple[int, int, int, int, bool]]],
    rope: LayerRope | None,
    shifts: list[int],
    factor: float,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Attention, key by key, in float64: out ``[B, q, H, Dv]``, lse ``[B, q, H]``, attention scores per item ``[Hkv, keys]``."""
    rows, heads, queries, _ = q.shape
    group = heads // held.heads
    out = torch.zeros(rows, queries, heads, held.dims[1], dtype=torch.float64)
    lse = torch.full((rows, queries, heads), -torch.inf, dtype=torch.float64)
    scores = []
    for item, mine in enumerate(spans):
        row, query = item // queries, item % queries
        base = q[row, :, query].double() * scale
        if rope is not None:
            base[:, : rope.rotary_dim] *= factor
        logits, values = [], []
        for block, lo, hi, shift, rotate in mine:
            k, v = (x.double() for x in held.read(block, lo, hi))
            turned = base
            if rope is not None and shift:
                at = torch.tensor([shifts[shift - 1]])
                turned = rope.rotate(base[:, None], at, factor=False)[:, 0]
            if rope is not None and rotate:
                k = rope.rotate(k, torch.arange(lo, hi), factor=False)
            logits.append(torch.einsum("hd,hnd->hn", turned, k.repeat_interleave(group, 0)))
            values.append(v.repeat_interleave(group, 0))
        x = torch.cat([*logits, torch.zeros(heads, 0, dtype=torch.float64)], 1)
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        if x.shape[1] == 0:
            scores.append(torch.zeros(held.heads, 0, dtype=torch.float64))
            continue
        lse[row, query] = x.logsumexp(1)
        norm = lse[row, query] if sinks is None else torch.logaddexp(lse[row, query], sinks.double())
        weights = torch.exp(x - norm[:, None])
        out[row, query] = torch.einsum("hn,hnd->hd", weights, torch.cat(values, 1))
        scores.append(weights.view(held.heads, group, -1).sum(1))
    return out, lse, scores


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """By the norm of the difference; nan never passes."""
    got, want = got.cpu(), want.cpu()
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)
    assert float(error) <= tolerance, f"off by {float(error):.2e}"


def flat(spans: list[list[tuple[int, int, int, int, bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and spans as `attend` takes them."""
    starts, rows = [0], []
    for mine in spans:
        before = 0
        for block, lo, hi, shift, rotate in mine:
            rows.append([block, lo | hi << 8 | int(rotate) << 16, before, shift])
            before += hi - lo
        starts.append(len(rows))
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32).view(-1, 4)
