"""torch's modes around a stream: autocast, inference mode, gradients, train mode."""

from __future__ import annotations

import copy
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.errors import KvsieveError, StateError, UnsupportedError
from transformers import DynamicCache

TEXT, MORE = tiny.ids(1, 40, 1), tiny.ids(1, 5, 2)
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
POLICIES: dict[str, Any] = {
    **{name: tiny.POLICIES[name](400) for name in ("full", "streaming", "lm_infinite", "sirllm", "snapkv", "h2o")},
    "hip": kvsieve.HiP(400),
    "quest": kvsieve.Quest(400),
}
"""Policies with room for the whole text, whose answers are the stock model's."""
EVERY = pytest.mark.parametrize("policy", list(POLICIES))


def two(model: Any, cache: Any) -> torch.Tensor:
    """Logits of the second of two forwards."""
    model(TEXT, past_key_values=cache)
    return model(MORE, past_key_values=cache).logits.detach()


@torch.no_grad()
def stock(model: Any) -> torch.Tensor:
    return two(model, DynamicCache(config=model.config))


# ----------------------------------------------------------------------------------------------------------------------- autocast


@EVERY
@BACKEND
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_autocast_agrees_with_the_stock_cache(policy: str, backend: str, weights: torch.dtype) -> None:
    """Opened inside or outside; within three times what autocast itself costs."""
    model = tiny.model(dtype=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = stock(model)
    allowed = 3 * float((want.float() - stock(tiny.model())).abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16), kvsieve.stream(model, POLICIES[policy], backend) as stream:
        inside = two(model, stream.cache)
        stored = stream.stats().bytes_held
    with kvsieve.stream(model, POLICIES[policy], backend) as stream:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outside = two(model, stream.cache)
        assert stream.stats().bytes_held == stored
        assert model(MORE, past_key_values=stream.cache).logits.dtype == weights
    for got in (inside, outside):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.float(), want.float(), atol=allowed, rtol=0)


# ----------------------------------------------------------------------------------------------------------------- inference mode


@EVERY
@BACKEND
def test_inference_mode_and_normal_mode_take_turns(policy: str, backend: str) -> None:
    model = tiny.model()
    want = stock(model)
    with torch.inference_mode():
        stream = kvsieve.stream(model, POLICIES[policy], backend)
        model(TEXT, past_key_values=stream.cache)
    with stream, torch.no_grad():
        torch.testing.assert_close(model(MORE, past_key_values=stream.cache).logits, want, atol=1e-4, rtol=0)
        with torch.inference_mode():
            child = stream.fork()
            model(MORE[:, :1], past_key_values=child.cache)
            child.end_turn()
        with child:
            got = model(MORE[:, 1:2], past_key_values=child.cache).logits
        with torch.inference_mode():
            model(MORE[:, :1], past_key_values=stream.cache)
        torch.testing.assert_close(model(MORE[:, 1:2], past_key_values=stream.cache).logits, got, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------- gradients


@EVERY
@BACKEND
def test_forwards_with_gradients_on_are_right_and_backward_is_refused(policy: str, backend: str) -> None:
    model = copy.deepcopy(tiny.model())
    with kvsieve.stream(model, POLICIES[policy], backend) as stream:
        model(TEXT, past_key_values=stream.cache)
        out = model(MORE, labels=MORE, past_key_values=stream.cache)
        torch.testing.assert_close(out.logits.detach(), stock(model), atol=1e-4, rtol=0)
        with pytest.raises(UnsupportedError, match=r"gradients.*torch\.no_grad\(\)"):
            out.loss.backward()
        assert model.model.layers[0].self_attn.v_proj.weight.grad is None


def test_a_prefix_that_had_gradients_is_not_left_out_in_silence() -> None:
    """The second piece needs none itself, but a soft prompt before it does."""
    model = copy.deepcopy(tiny.model()).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    soft = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model(inputs_embeds=soft, past_key_values=stream.cache)
        loss = model(MORE, labels=MORE, past_key_values=stream.cache).loss
        with pytest.raises(UnsupportedError, match="gradients"):
            loss.backward()


def test_gradients_that_do_not_touch_attention_are_right() -> None:
    grads = []
    for streamed in (False, True):
        model = copy.deepcopy(tiny.model()).requires_grad_(False)
        model.lm_head.requires_grad_(True)
        with kvsieve.stream(model, kvsieve.Full()) as stream:
            cache = stream.cache if streamed else DynamicCache(config=model.config)
            model(TEXT, past_key_values=cache)
            model(MORE, labels=MORE, past_key_values=cache).loss.backward()
        grads.append(model.lm_head.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


# ---------------------------------------------------------------------------------------------------------------------- train mode


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("grad", [True, False])
def test_gradient_checkpointing_reads_all_or_is_refused(grad: bool, family: str) -> None:
    model = copy.deepcopy(tiny.model(family))
    want = stock(model)
    model.train()
    model.gradient_checkpointing_enable()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        refusal, got = "", None
        try:
            with torch.set_grad_enabled(grad):
                got = two(model, stream.cache)
        except KvsieveError as err:
            refusal = str(err)
        if got is None:
            assert "checkpointing" in refusal
            assert "eval()" in refusal
            assert stream.seen == 0
        else:
            assert not grad
            assert stream.seen == 45
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        model.eval()
        stream.reset()
        with torch.no_grad():
            torch.testing.assert_close(two(model, stream.cache), want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_attention_dropout_is_refused_and_opening_leaves_train_mode() -> None:
    model = copy.deepcopy(tiny.model(attention_dropout=0.3))
    model.train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert [m.training for m in model.modules()] == before
        assert torch.equal(torch.get_rng_state(), generator)
        with pytest.raises(StateError, match=r"dropout of 0\.3.*eval\(\)"):
            model(TEXT, past_key_values=stream.cache)
        assert stream.seen == 0
        model.eval()
        torch.testing.assert_close(two(model, stream.cache), stock(model), atol=1e-4, rtol=0)
