"""One token, and a prompt, through one sliding layer: beside transformers' own layer and attention, with equal outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvsieve.backends.base import AttendCall
from kvsieve.runtime.part import Forward, LayerInput
from kvsieve.runtime.sliding import SlidingLayers
from rounds import interleaved, record
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

HEADS, KV_HEADS, DIM = 8, 4, 256  # gemma2's and gemma3's
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Pair:
    """Both layers, given the same queries, keys and values."""

    def __init__(self, window: int, batch: int, softcap: float | None, dtype: torch.dtype) -> None:
        self.window, self.batch, self.dtype = window, batch, dtype
        self.call = AttendCall(DIM**-0.5, softcap)
        self.module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False)
        self.clear()

    def clear(self) -> None:
        none: Any = None
        self.mine, self.theirs, self.seen = SlidingLayers({0: self.window}, none), DynamicSlidingWindowLayer(self.window), 0

    def make(self, width: int) -> list[torch.Tensor]:
        return [torch.randn(self.batch, width, h, DIM, dtype=self.dtype).transpose(1, 2) for h in (HEADS, KV_HEADS, KV_HEADS)]

    def kvsieve(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        width, rows = q.shape[2], self.batch
        forward = Forward([width] * rows, width, [self.seen] * rows)
        self.mine.begin(forward)
        out = self.mine.attend(LayerInput(0, q, k, v, self.call, forward))
        assert out is not None
        self.mine.commit(forward)()
        self.seen += width
        return out

    def stock(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        width, past = q.shape[2], self.theirs.cumulative_length
        length, offset = self.theirs.get_mask_sizes(width)
        k, v = self.theirs.update(k, v)
        mask = None
        if width > 1:
            at, keys = past + torch.arange(width)[:, None], offset + torch.arange(length)[None]
            mask = ((keys <= at) & (keys > at - self.window))[None, None]
        if self.call.softcap is None:
            return sdpa_attention_forward(self.module, q, k, v, mask, scaling=self.call.scale)[0]
        if mask is not None:
            mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
        return eager_attention_forward(self.module, q, k, v, mask, scaling=self.call.scale, softcap=self.call.softcap)[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(("window", "prompt", "batch"), [(512, 2048, 1), (1024, 1024, 4), (4096, 1024, 1)])
def test_a_token_and_a_prompt(benchmark: Any, window: int, prompt: int, batch: int, softcap: float | None, dtype: str) -> None:
    pair = Pair(window, batch, softcap, DTYPES[dtype])
    tolerance = 1e-4 if dtype == "f32" else 3e-2
    text = pair.make(prompt)
    torch.testing.assert_close(pair.kvsieve(*text), pair.stock(*text), rtol=0, atol=tolerance)
    token = pair.make(1)
    torch.testing.assert_close(pair.kvsieve(*token), pair.stock(*token), rtol=0, atol=tolerance)
    one = interleaved({"kvsieve": lambda: pair.kvsieve(*token), "stock": lambda: pair.stock(*token)})

    def first(run: Any) -> None:
        pair.clear()
        run(*text)

    whole = interleaved({"kvsieve": lambda: first(pair.kvsieve), "stock": lambda: first(pair.stock)}, 3, repeat=False)
    record(
        benchmark,
        lambda: pair.kvsieve(*token),
        one,
        window=window,
        batch=batch,
        softcap=softcap,
        dtype=dtype,
        token_ratio=round(one["kvsieve"] / one["stock"], 3),
        prompt_ratio=round(whole["kvsieve"] / whole["stock"], 3),
    )
