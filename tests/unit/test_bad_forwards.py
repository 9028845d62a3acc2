"""Forwards that a stream cannot follow fail by name, and change nothing; a NaN spoils no more than it must."""

from __future__ import annotations

import copy
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forward, forwards, positions
from kvsieve.errors import CacheMismatchError, ShapeError, StateError

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


# ------------------------------------------------------------------------------------------------------------------------- NaN


@BACKEND
def test_tokens_with_nan_scores_go_first_and_poison_nothing(backend: str) -> None:
    """One word's row of the head is NaN from the start: its logits are, and with them every score."""
    model = copy.deepcopy(tiny.model())
    clean = tiny.ids(1, 60)
    with kvsieve.stream(model, kvsieve.SirLLM(budget=80, sinks=2, recent=4), backend) as stream:
        forward(model, stream.cache, clean[:, :30])
        known = stream.kept()[0].scores[:30].copy()
        weight = model.lm_head.weight.data.clone()
        model.lm_head.weight.data[7] = torch.nan
        forward(model, stream.cache, clean[:, 30:])
        model.lm_head.weight.data.copy_(weight)
        # Token 30 was scored by the clean carry; those after it by rows with a NaN.
        scores = stream.kept()[0].scores
        assert np.array_equal(scores[:30], known)
        assert np.isnan(scores[31:60]).all()
        forward(model, stream.cache, tiny.ids(1, 40, 3))
        kept = positions(stream)[0]
        assert len(kept) == 80
        assert set(range(31)) <= set(kept)
        assert set(range(62, 100)) <= set(kept), "clean tokens outrank those without a score"
        stream.reset()
        again = forwards(model, stream.cache, clean, [30, 1])
        torch.testing.assert_close(again, model(clean).logits.detach(), atol=1e-4, rtol=0)
        assert np.isfinite(stream.kept()[0].scores).all()


@BACKEND
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_a_nan_in_one_row_stays_in_that_row(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 40)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream, torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        want = forwards(model, stream.cache, ids, [20, 1])
        stream.reset()
        hook = model.model.layers[1].register_forward_hook(lambda m, a, o: _poison(o))
        try:
            got = forwards(model, stream.cache, ids, [20, 1])
        finally:
            hook.remove()
        assert embeds.isfinite().all()
    assert torch.isnan(got[1]).any()
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=0)


def _poison(output: Any) -> Any:
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    hidden[1] = torch.nan
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


# ------------------------------------------------------------------------------------------------------------ rows and positions


@BACKEND
def test_another_batch_size_is_refused(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(2, 20))
        before = positions(stream)
        with pytest.raises(CacheMismatchError, match=r"2 sequences.* 3"):
            forward(model, stream.cache, tiny.ids(3, 5))
        assert positions(stream) == before
        got = forward(model, stream.cache, tiny.ids(2, 5, 1))
    want = model(torch.cat([tiny.ids(2, 20), tiny.ids(2, 5, 1)], 1)).logits[:, 20:].detach()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@BACKEND
def test_positions_that_do_not_go_on_are_refused(backend: str) -> None:
    """A second turn without a mask over everything seen would be told positions from 0."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 20))
        with pytest.raises(CacheMismatchError, match="position"), torch.no_grad():
            model(tiny.ids(1, 5), position_ids=torch.arange(5)[None], past_key_values=stream.cache)
        assert stream.seen == 20
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


# ------------------------------------------------------------------------------------------------------ a model that changes


@BACKEND
def test_a_model_moved_to_another_dtype_is_refused(backend: str) -> None:
    for fed in (False, True):
        model = copy.deepcopy(tiny.model())
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            if fed:
                forward(model, stream.cache, tiny.ids(1, 20))
            model.to(torch.bfloat16)
            with pytest.raises(ShapeError, match=r"float32.*(bfloat16|16-bit)"):
                forward(model, stream.cache, tiny.ids(1, 5))
            model.to(torch.float32)
            assert forward(model, stream.cache, tiny.ids(1, 5)).dtype == torch.float32
            assert stream.seen == 20 * fed + 5


# ------------------------------------------------------------------------------------------------------ calls that cannot score


@BACKEND
def test_embeddings_are_fine_unless_tokens_are_scored(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    with torch.no_grad():
        embeds, want = model.get_input_embeddings()(ids), model(ids).logits
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            got = model(inputs_embeds=embeds, past_key_values=stream.cache).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
            with pytest.raises(StateError, match="input_ids, not inputs_embeds"):
                model(inputs_embeds=embeds, past_key_values=stream.cache)
            torch.testing.assert_close(forward(model, stream.cache, ids), want, atol=1e-4, rtol=0)


@BACKEND
def test_the_base_model_is_fine_unless_tokens_are_scored(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            got = model.model(ids, past_key_values=stream.cache).last_hidden_state
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            assert stream.seen == 20
        with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
            with pytest.raises(StateError, match="causal LM, not its base model"):
                model.model(ids, past_key_values=stream.cache)
            assert forward(model, stream.cache, ids).shape[1] == 20
            with pytest.raises(StateError, match="causal LM, not its base model"):
                model.model(ids, past_key_values=stream.cache)
            assert stream.seen == 20


@BACKEND
def test_probabilities_are_never_materialised(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        with pytest.raises(StateError, match="output_attentions"), torch.no_grad():
            model(tiny.ids(1, 5), past_key_values=stream.cache, output_attentions=True)
        assert stream.seen == 0
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


def test_a_cache_that_is_not_used_is_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        with pytest.raises(StateError, match="use_cache"), torch.no_grad():
            model(tiny.ids(1, 5), past_key_values=stream.cache, use_cache=False)
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


def test_another_attention_set_inside_the_block_is_the_models_and_not_the_streams() -> None:
    model, text = copy.deepcopy(tiny.model()), tiny.ids(1, 5)
    want = tiny.model()(text).logits
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        model.set_attn_implementation("eager")
        torch.testing.assert_close(forward(model, stream.cache, text), want)
        assert stream.seen == 5
        assert model(text, output_attentions=True).attentions[0].shape == (1, 4, 5, 5)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}


@BACKEND
@pytest.mark.parametrize("amount", [1, -21, -100])
def test_a_crop_beyond_what_was_seen_is_refused(amount: int, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 20))
        with pytest.raises(ValueError):  # noqa: PT011
            stream.cache.crop(amount)
        assert stream.seen == 20
        stream.cache.crop(0)
        stream.cache.crop(-20)
        assert stream.seen == 0
