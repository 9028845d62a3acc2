"""Page bounds of what is stored: no key that attention reads scores more than its block's bound, whatever it is stored as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kvsieve.backends.reference.definition import bound_scores, group_scores, outwards
from kvsieve.backends.reference.storage import PackedBlock
from kvsieve.budget import BLOCK
from kvsieve.policy.storage import Channels, Packing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(k: torch.Tensor, packing: Packing, rng: np.random.Generator) -> torch.Tensor:
    """Keys ``[Hkv, n, D]`` as attention reads them, of which the first are packed, in blocks of any length, and others not."""
    heads, count, dim = k.shape
    index = torch.from_numpy(np.stack([np.sort(rng.permutation(dim)[: packing.key_kept]) for _ in range(heads)]))
    channels, found, at = Channels(index, (0,) * heads), [], 0
    upto = int(rng.integers(0, count + 1))
    while at < upto:
        size = int(min(rng.integers(1, BLOCK + 1), upto - at))
        one = PackedBlock.empty(packing, channels, k.new_zeros(0, heads, BLOCK, dim), k.new_zeros(0, heads, BLOCK, dim))
        one.write(0, k[:, at : at + size], k[:, at : at + size])
        found.append(one.read(0, size, dim)[0].float())
        at += size
    return torch.cat([*found, k[:, upto:].float()], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_no_key_scores_more_than_its_bound(bits: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(bits)
    for round_ in range(25):
        heads, group, dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([8, 24, 64]))
        count, window = int(rng.integers(140, 700)), int(rng.integers(64, 100))
        torch.manual_seed(round_)
        scale = 10.0 ** rng.integers(-3, 3, dim)
        k = (torch.randn(heads, count, dim) * torch.from_numpy(scale).float() + 5 * torch.randn(heads, 1, dim)).to(dtype)
        q = torch.randn(heads * group, 3, dim).to(dtype).float()
        packing = Packing(int(rng.integers(1, dim + 1)), bits, 0, int(rng.choice([8, 16, 32, 64])))
        keys = stored(k, packing, rng)
        at = [count - 3, count - 2, count - 1]
        scores, bounds = group_scores(q, keys, at, window), bound_scores(q, keys, at, window, dtype=dtype)
        whole = count // BLOCK
        best = scores[:, : whole * BLOCK].reshape(heads, whole, BLOCK).max(2)
        seen = np.isfinite(best)
        assert seen.any()
        off = np.abs(bounds[seen]) * 1e-12
        assert (bounds[seen] + off >= best[seen]).all()
        # And what is no code is not rounded: the bound is then of the greatest and least numbers themselves.
        if not bits or dtype == torch.float32:
            blocks = keys[:, : whole * BLOCK].double().reshape(heads, whole, 1, BLOCK, dim)
            wide = q.double().reshape(heads, 1, group * 3, 1, dim)
            exact = torch.maximum(wide * blocks.amax(3, keepdim=True), wide * blocks.amin(3, keepdim=True)).sum(-1)[..., 0]
            np.testing.assert_allclose(bounds[:, 0], exact.amax(2)[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_outwards(dtype: torch.dtype) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    above, below = outwards(x, dtype, up=True), outwards(x, dtype, up=False)
    number, limit = ~x.isnan(), torch.finfo(dtype).max
    assert bool((above.isnan() & below.isnan() | number).all())
    assert bool((above.float()[number] >= x[number].clamp(max=limit)).all())
    assert bool((below.float()[number] <= x[number].clamp(min=-limit)).all())
    finite = x.isfinite()
    assert bool(above[finite].isfinite().all() & below[finite].isfinite().all())
    same = finite & (x.to(dtype).float() == x)
    assert torch.equal(above[same].float(), x[same])
    assert torch.equal(below[same].float(), x[same])
    # To the neighbour, and no further.
    other = finite & ~same & (x.abs() < limit)
    if bool(other.any()):
        nearest = x.to(dtype).float()
        assert bool(((above.float() == nearest) | (below.float() == nearest))[other].all())
