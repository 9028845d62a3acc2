"""How many tokens of a prompt are read at a time."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import greedy
from kvsieve.runtime.chunks import MAX_CHUNK, WHOLE_CHUNK, chunk_of

LONG = {"max_position_embeddings": 16_384}


def chunk(policy: Any, family: str = "llama", **config: Any) -> int:
    with kvsieve.stream(tiny.model(family, **{**LONG, **config}), policy) as stream:
        return chunk_of(stream._engine)


def test_the_full_cache_reads_many_tokens_at_a_time() -> None:
    assert chunk(kvsieve.Full()) == WHOLE_CHUNK > MAX_CHUNK


@pytest.mark.parametrize("trained", [48, 1024, 4096, 6000])
def test_no_more_than_half_of_the_trained_length(trained: int) -> None:
    assert chunk(kvsieve.Full(), max_position_embeddings=trained) == min(trained // 2, WHOLE_CHUNK)


@pytest.mark.parametrize(
    "policy",
    [
        kvsieve.Quest(64, sinks=0, window=64),
        kvsieve.HiP(64),
        kvsieve.ThinK(0.5),
        kvsieve.Quantized(4, group=16),
        kvsieve.InfLLM(window=256, blocks=2, block=64, summary="bounds"),
        kvsieve.SelectiveV(16),
        kvsieve.SirLLM(4096),
        kvsieve.StreamingLLM(4096),
        kvsieve.StreamingLLM(2048) >> kvsieve.Full(),
    ],
    ids=lambda policy: repr(policy).partition("(")[0],
)
def test_where_anything_depends_on_it_pieces_are_shorter(policy: Any) -> None:
    assert chunk(policy) == MAX_CHUNK


def test_they_are_where_a_layer_slides() -> None:
    assert chunk(kvsieve.Full(), "gemma2") == MAX_CHUNK


@pytest.mark.parametrize(("budget", "want"), [(16, 16), (100, 50), (1023, 511), (1024, 512)])
def test_a_small_budget_makes_them_short(budget: int, want: int) -> None:
    assert chunk(kvsieve.SirLLM(budget, sinks=2, recent=4)) == want


def test_a_long_prompt_in_long_pieces_is_the_stock_models() -> None:
    model, ids = tiny.model(**LONG), tiny.ids(1, WHOLE_CHUNK + 300)
    lengths: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        lengths.clear()
        stream.feed(ids[:, :-1])
        assert lengths == [WHOLE_CHUNK, 299]
        handle.remove()
        got = stream.generate(ids[:, -1:], do_sample=False, max_new_tokens=4)
    torch.testing.assert_close(got[0, 1:], greedy(model, ids, 4)[0, -4:])
