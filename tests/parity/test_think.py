"""ThinK and quantised storage: the worked numbers, and every backend against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import kvsieve
import pytest
import torch
from drive import Layer
from kvsieve.backends.reference.storage import dequantize, quantize
from kvsieve.facts import LayerRope
from kvsieve.methods import think
from kvsieve.policy.storage import Channels, Packing
from tiny import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Q = torch.tensor([[[1, 0.5, -2, 0.1], [3, -0.5, 1, 0.2]]])
K = torch.tensor([[[0.2, 2, 0.1, 5], [-0.4, 1, 0.3, 4], [0.1, -3, 0.2, -6], [0.3, 0, -0.2, 5]]])


def rope(dim: int, rotary: int | None = None, layout: Any = "half") -> LayerRope:
    pairs = (dim if rotary is None else rotary) // 2
    return LayerRope(1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs), layout)


# ------------------------------------------------------------------------------------------------------------ which channels stay


def test_scores_of_the_worked_example() -> None:
    mean = think.channel_scores(Q, K) / 8  # two queries, four keys
    assert mean[0].tolist() == pytest.approx([0.375, 0.875, 0.1125, 0.6375])
    norms = [float(torch.linalg.norm(torch.outer(Q[0, :, j], K[0, :, j]))) for j in range(4)]
    assert norms == pytest.approx([1.732051, 2.645751, 0.948683, 2.258318], abs=1e-6)
    assert think.channel_scores(Q, K)[0].sqrt().tolist() == pytest.approx(norms)
    assert think.heaviest_channels(Q, K, 2, "single", None).index.tolist() == [[1, 3]]
    assert think.heaviest_channels(torch.ones(1, 1, 4), K, 2, "single", None).index.tolist() == [[1, 3]]
    assert K[0].square().sum(0).argsort(descending=True).tolist() == [3, 1, 0, 2]
    assert mean[0].argsort(descending=True).tolist() == [1, 3, 0, 2]


def test_greedy_choice_is_by_weight_not_by_error() -> None:
    q, k = torch.ones(1, 1, 3), torch.tensor([[[3, -2.9, 1]]])
    assert think.heaviest_channels(q, k, 1, "single", None).index.tolist() == [[0]]
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        q, k = torch.randn(1, 5, 6, generator=g), torch.randn(1, 9, 6, generator=g)
        weight = think.channel_scores(q, k)[0]
        best = max(itertools.combinations(range(6), 3), key=lambda subset: float(weight[list(subset)].sum()))
        assert think.heaviest_channels(q, k, 3, "single", None).index[0].tolist() == list(best)


def test_one_choice_for_a_group() -> None:
    q = torch.tensor([[[4, 0.1, 1, 1]], [[0.1, 3, 1, 1]]])
    k = torch.tensor([[[1, 1, 1, 0.9], [1, 1, 1, 0.9]]])
    assert think.heaviest_channels(q[:1], k, 2, "single", None).index.tolist() == [[0, 2]]
    assert think.heaviest_channels(q[1:], k, 2, "single", None).index.tolist() == [[1, 2]]
    assert think.heaviest_channels(q, k, 2, "single", None).index.tolist() == [[0, 1]]
    assert (think.channel_scores(q, k)[0] / 4).tolist() == pytest.approx([8.005, 4.505, 1, 0.81])


def test_of_equals_the_higher_channel_stays() -> None:
    assert think.heaviest_channels(torch.ones(1, 1, 6), torch.ones(1, 3, 6), 2, "single", None).index.tolist() == [[4, 5]]
    assert think.heaviest_channels(torch.ones(1, 1, 6), torch.ones(1, 3, 6), 2, "pairs", rope(6)).index.tolist() == [[2, 5]]


@pytest.mark.parametrize(
    ("dim", "ratio", "single"),
    [
        (64, 0.3, 45), (64, 0.4, 39), (64, 0.5, 32), (64, 0.6, 26), (64, 0.7, 20), (64, 0.8, 13),
        (96, 0.3, 68), (96, 0.4, 58), (96, 0.5, 48), (96, 0.6, 39), (96, 0.7, 29), (96, 0.8, 20),
        (128, 0.3, 90), (128, 0.4, 77), (128, 0.5, 64), (128, 0.6, 52), (128, 0.7, 39), (128, 0.8, 26),
    ],
)  # fmt: skip
def test_how_many_channels_stay(dim: int, ratio: float, single: int) -> None:
    assert think.num_kept_channels(dim, ratio) == single
    assert think.num_kept_channels(dim, ratio, "pairs") == dim - 2 * int(ratio * dim / 2 + 1e-9)
    assert think.num_kept_channels(dim, 0.0) == dim
    for to in (8, 32):
        rounded = think.num_kept_channels(dim, ratio, round_to=to)
        assert rounded % to == 0
        assert 0 <= rounded - single < to


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary", [16, 8, 0])
def test_pairs_are_those_of_the_rotation(layout: str, rotary: int) -> None:
    g = torch.Generator().manual_seed(rotary)
    q, k = torch.randn(4, 8, 16, generator=g), torch.randn(2, 20, 16, generator=g)
    turn = rope(16, rotary, layout) if rotary else None
    chosen = think.heaviest_channels(q, k, 10, "pairs", turn)
    assert chosen.index.shape == (2, 10)
    for row, pairs in zip(chosen.index.tolist(), chosen.pairs):
        assert len(set(row)) == 10
        if turn is None:
            assert (pairs, row) == (0, sorted(row))
            continue
        first, second, rest = row[:pairs], row[pairs : 2 * pairs], row[2 * pairs :]
        assert second == [i + rotary // 2 if layout == "half" else i + 1 for i in first]
        assert all(i < rotary for i in first)
        assert all(i >= rotary for i in rest)
        assert (first, rest) == (sorted(first), sorted(rest))


def test_unrotated_pairs_are_weighed_by_what_no_angle_changes() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, turn = torch.randn(2, 8, 16, generator=g), torch.randn(1, 30, 16, generator=g), rope(16)
    chosen = think.heaviest_channels(q, k, 8, "pairs", turn, pre_rope=True)
    at = torch.randint(0, 10_000, (8,), generator=g)
    turned = think.heaviest_channels(turn.rotate(q, at), turn.rotate(k, torch.arange(30)), 8, "pairs", turn, pre_rope=True)
    assert chosen.index.tolist() == turned.index.tolist()


# -------------------------------------------------------------------------------------------------------------------- the storage


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_within_half_a_step(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(200, 32, generator=g) * torch.logspace(-3, 3, 200)[:, None] + torch.randn(200, 1, generator=g) * 30
    codes, step, least = quantize(x, bits)
    assert int(codes.max()) == 2**bits - 1
    error = (dequantize(codes, step, least) - x).abs()
    assert bool((error <= step.float() * 0.5 + x.abs() * 1e-6).all())
    constant = torch.full((1, 32), 1.1)
    assert torch.allclose(dequantize(*quantize(constant, bits)), constant, rtol=1e-3)
    spoilt = torch.ones(3, 4)
    spoilt[0, 1], spoilt[1, 2], spoilt[2, 3] = torch.nan, torch.inf, 1e9
    assert bool(dequantize(*quantize(spoilt, bits)).isnan().all())


def test_bits_of_a_token() -> None:
    bf16 = torch.bfloat16
    assert sum(Packing(128).bits_per_token(128, bf16)) == 4096
    assert sum(Packing(128, 2, 2, 32).bits_per_token(128, bf16)) == 768
    key, value, scales = Packing(77, 2, 2, 32).bits_per_token(128, bf16)
    # 615 bits, and the key's row rounded up to whole bytes.
    assert (key, value, scales) == (160, 256, 77 + 128)


def packed_layer(backend: str, keep: list[int], **packing: Any) -> torch.Tensor:
    """The worked example: four keys, of which three are packed, and one more; the values are 1 to 5."""
    layer = Layer(backend, kvsieve.Full(), scale=0.5)
    values = torch.arange(1.0, 6.0)[None, None, :, None].expand(1, 1, 5, 4).contiguous()
    layer.feed(torch.ones(1, 1, 4, 4), K[None], values[:, :, :4])
    channels = Channels(torch.tensor([keep]), (0,))
    layer.pack(3, channels, Packing(len(keep), **packing))
    new = torch.tensor([[[[0.5, 0.5, 1, -1]]]])
    return layer.feed(torch.tensor([[[[1.0, 2, -1, 0.5]]]]), new, values[:, :, 4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_over_thin_keys(backend: str) -> None:
    assert packed_layer(backend, [0, 1, 2, 3]).unique().tolist() == pytest.approx([1.599631], abs=2e-6)
    assert packed_layer(backend, [1, 3]).unique().tolist() == pytest.approx([1.642745], abs=2e-6)
    # Zeros in place of what was dropped are the same.
    assert packed_layer(backend, [-1, 1, -3, 3]).unique().tolist() == pytest.approx([1.642745], abs=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [2, 14, 16])
@pytest.mark.parametrize("bits", [(0, 0), (0, 4), (8, 8), (4, 4), (2, 2)])
def test_attention_equals_the_definition_over_what_is_stored(backend: str, dtype: torch.dtype, kept: int, bits: Any) -> None:
    g = torch.Generator().manual_seed(kept)
    layer = Layer(backend, kvsieve.Full(), scale=0.3, dtype=dtype)
    q, k, v = (torch.randn(1, heads, 150, 16, generator=g) for heads in (6, 2, 2))
    layer.feed(q[:, :, :140], k[:, :, :140], v[:, :, :140])
    channels = think.heaviest_channels(q[0, :, 100:140], k[0, :, :140], kept, "single", None)
    layer.pack(128, channels, Packing(kept, *bits, 16))
    for at in range(140, 150):
        now = slice(at, at + 1)
        out = layer.feed(q[:, :, now], k[:, :, now], v[:, :, now])
        keys, values = layer.store.read(layer.planner.runs(0, 0))
        group = q.shape[1] // keys.shape[0]
        logits = q[0, :, now].to(dtype).double() @ keys.double().repeat_interleave(group, 0).transpose(1, 2) * 0.3
        exact = logits.softmax(-1) @ values.double().repeat_interleave(group, 0)
        tolerance = 2e-5 if dtype in (torch.float32, torch.float64) else 2e-2
        assert float((out[0].transpose(0, 1).double() - exact).norm() / exact.norm()) < tolerance
    dropped = torch.ones(2, 16, dtype=torch.bool).scatter_(1, channels.index, False)
    assert bool((keys[:, :128].transpose(1, 2)[dropped] == 0).all())
    if bits == (0, 0):
        exact_keys = k[0, :, :128].to(dtype).masked_fill(dropped[:, None], 0)
        assert torch.equal(keys[:, :128], exact_keys)
    assert torch.equal(keys[:, 128:], k[0, :, 128:].to(dtype))


@pytest.mark.parametrize("bits", [(0, 0), (4, 8), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_stores_the_same(bits: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 200, 32, generator=g) for heads in (2, 2, 2))
    read = []
    for backend in BACKENDS:
        layer = Layer(backend, kvsieve.Full(), dtype=dtype)
        layer.feed(q, k, v)
        layer.pack(192, think.heaviest_channels(q[0], k[0], 20, "pairs", rope(32)), Packing(20, *bits))
        moves = layer.planner.keep(0, 0, [i for i in range(200) if i % 7])
        layer.store.apply(moves)
        read.append(layer.store.read(layer.planner.runs(0, 0)))
        assert layer.planner.resident(0, 0) == 171
    for k, v in read[1:]:
        assert torch.allclose(k.float(), read[0][0].float(), atol=2e-2)
        assert torch.allclose(v.float(), read[0][1].float(), atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_the_formula(backend: str) -> None:
    heads, dim, kept, count, recent = 2, 128, 78, 2048, 64
    layer = Layer(backend, kvsieve.Full(), dtype=torch.bfloat16)
    x = torch.randn(1, heads, count, dim)
    layer.feed(x, x, x)
    full = layer.store.bytes_held
    assert full == 2 * 2 * count * dim * heads
    layer.pack(count - recent, think.heaviest_channels(x[0], x[0], kept, "pairs", rope(dim)), Packing(kept))
    layer.store.apply(layer.planner.tidy())
    layer.store.free_unused(layer.planner.blocks_in_use(), layer.planner.packed_in_use())
    held = layer.store.held()
    assert held.keys + held.plain_keys == 2 * ((count - recent) * kept + recent * dim) * heads
    assert held.values + held.plain_values == full // 2
    assert layer.store.bytes_held == held.keys + held.plain_keys + full // 2 + 2 * heads * kept
