"""Attention masks that say more than pads, and models that see images: obeyed, or a typed error before anything is stored."""

from __future__ import annotations

import functools
from typing import Any

import kvsieve
import pytest
import tiny
import torch
import transformers
from kvsieve.errors import PaddingError, UnsupportedError, UnsupportedModelError
from kvsieve.model.masks import kind_of
from transformers import masking_utils

IMAGE = 120
TEXT = tiny.ids(1, 12)


# -------------------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_told_apart_by_what_they_are_made_of() -> None:
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(8)
    blocks = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    text = masking_utils.blockwise_overlay(torch.full((1, 4), -1))
    both, either = masking_utils.and_masks, masking_utils.or_masks
    assert kind_of(causal) == "causal"
    assert kind_of(masking_utils.sliding_window_causal_mask_function(8)) == "sliding"
    assert kind_of(either(causal, text)) == "causal"
    assert kind_of(both(either(causal, text), window)) == "sliding"
    for other in (
        either(causal, blocks),
        both(either(causal, blocks), window),
        masking_utils.bidirectional_mask_function,
        either(causal, lambda *args: True),
        both(causal, lambda *args: True),
        either(causal, window),
    ):
        assert kind_of(other) == "other"


CAUSAL = torch.ones(6, 12, dtype=torch.bool).tril(6)
MASKS = {
    "bool": CAUSAL[None, None],
    "float": torch.zeros(1, 1, 6, 12).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "a tree": CAUSAL.clone().index_fill_(1, torch.tensor([8]), False)[None, None],
    "by layer type": {"full_attention": CAUSAL[None, None], "sliding_attention": CAUSAL[None, None]},
}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", list(MASKS))
@torch.no_grad()
def test_a_mask_of_four_dimensions_is_refused_and_changes_nothing(name: str, family: str) -> None:
    model = tiny.model(family)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model(TEXT[:, :6], past_key_values=stream.cache)
        with pytest.raises(PaddingError, match="mask"):
            model(TEXT[:, 6:], past_key_values=stream.cache, attention_mask=MASKS[name])
        assert stream.seen == 6
        got = model(TEXT[:, 6:], past_key_values=stream.cache).logits
    torch.testing.assert_close(got, model(TEXT).logits[:, 6:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_mask_that_hides_earlier_tokens_is_refused_and_changes_nothing() -> None:
    model, mask = tiny.model(), torch.ones(1, 12, dtype=torch.long)
    mask[:, 2:4] = 0
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model(TEXT[:, :6], past_key_values=stream.cache)
        with pytest.raises(PaddingError, match=r"mask|pad"):
            model(TEXT[:, 6:], past_key_values=stream.cache, attention_mask=mask)
        assert stream.seen == 6


# ------------------------------------------------------------------------------------------------------------------ vision-language

_SHAPE = tiny._SHAPE
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_PIXELS = {**_VISION, "image_size": 16, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(projection_dim=32, **_PIXELS)
    text = transformers.LlamaConfig(**_SHAPE)
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-1
    )


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**_SHAPE, **tiny.MIXED, "sliding_window": 64},
        vision_config=_PIXELS,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config={**_SHAPE, "rope_parameters": _MROPE},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=123,
        vision_start_token_id=121,
        vision_end_token_id=122,
    )


def _smolvlm() -> Any:
    text = transformers.LlamaConfig(**_SHAPE)
    return transformers.SmolVLMConfig(text_config=text, vision_config=_PIXELS, image_token_id=IMAGE)


MODELS = {
    "Llava": (_llava, "LlavaForConditionalGeneration", 16),
    "Gemma3": (_gemma3, "Gemma3ForConditionalGeneration", 4),
    "Qwen2VL": (_qwen2_vl, "Qwen2VLForConditionalGeneration", 16),
    "SmolVLM": (_smolvlm, "SmolVLMForConditionalGeneration", 0),
}


@functools.cache
def seeing(name: str) -> Any:
    """A tiny random model that sees images, its weights large enough for attention to matter."""
    make, model_class, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(make()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model


def with_image(name: str) -> dict[str, Any]:
    """A prompt of text, an image, and text."""
    tokens = MODELS[name][2]
    ids = torch.cat([tiny.ids(1, 6) % 100, torch.full((1, tokens), IMAGE), tiny.ids(1, 8, 2) % 100], 1)
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "input_ids": ids}
    generator = torch.Generator().manual_seed(6)
    if name == "Qwen2VL":
        ids[0, 5], ids[0, 22] = 121, 122
        extra = {"image_grid_thw": torch.tensor([[1, 8, 8]]), "mm_token_type_ids": (ids == IMAGE).long()}
        return inputs | extra | {"pixel_values": torch.randn(64, 96, generator=generator)}
    if name == "Gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs | {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


@torch.no_grad()
def read(model: Any, cache: Any, inputs: dict[str, Any], more: torch.Tensor) -> torch.Tensor:
    """Logits of a first forward and of text after it."""
    first = model(**inputs, past_key_values=cache).logits
    return torch.cat([first, model(input_ids=more, past_key_values=cache).logits], 1)


ROOMY = {
    "full": kvsieve.Full(),
    "snapkv": kvsieve.SnapKV(400),
    "streaming": kvsieve.StreamingLLM(400),
    "sirllm": kvsieve.SirLLM(400),
    "lm_infinite": kvsieve.LMInfinite(400),
}


@pytest.mark.parametrize("policy", list(ROOMY))
@pytest.mark.parametrize("name", list(MODELS))
def test_text_is_read_as_without_a_stream(name: str, policy: str) -> None:
    model, more = seeing(name), tiny.ids(1, 5, 3) % 100
    text = {"input_ids": tiny.ids(1, 20, 4) % 100, "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    if name == "Gemma3":
        text["token_type_ids"] = torch.zeros(1, 20, dtype=torch.long)
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        got = read(model, stream.cache, text, more)
        assert stream.seen == 25
    text_config = model.config.get_text_config()
    want = read(model, transformers.DynamicCache(config=text_config), text, more)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", list(ROOMY))
@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Qwen2VL"])
def test_an_image_is_read_as_without_a_stream_or_refused_before_anything_is_stored(name: str, policy: str) -> None:
    model, more, inputs = seeing(name), tiny.ids(1, 5, 3) % 100, with_image(name)
    right = name == "Llava" or (name == "Qwen2VL" and policy in ("full", "snapkv"))
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        if not right:
            with pytest.raises(UnsupportedError, match="image"):
                read(model, stream.cache, inputs, more)
            assert stream.seen == 0
            return
        got = read(model, stream.cache, inputs, more)
    want = read(model, transformers.DynamicCache(config=model.config.get_text_config()), inputs, more)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_an_image_whose_forward_died_was_never_read() -> None:
    """Or text alone would be refused for the sake of an image that the stream does not hold."""
    model, text = seeing("Qwen2VL"), tiny.ids(1, 7, 3) % 100
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        attention = [module for module in model.modules() if type(module).__name__ == "Qwen2VLAttention"][-1]
        broken = attention.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**with_image("Qwen2VL"), past_key_values=stream.cache)
        broken.remove()
        stream.feed(text)
        assert stream.seen == 7
        got = stream.generate(text, max_new_tokens=3, do_sample=False, eos_token_id=None)
        stream.reset()
        model(**with_image("Qwen2VL"), past_key_values=stream.cache)
        with pytest.raises(UnsupportedError, match="three axes"):
            stream.feed(text, unread=text[:, :0])
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(text)
        assert torch.equal(stream.generate(text, max_new_tokens=3, do_sample=False, eos_token_id=None), got)


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL"])
def test_generate_with_an_image(name: str) -> None:
    model, how = seeing(name), {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(**with_image(name), **how)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert torch.equal(model.generate(**with_image(name), past_key_values=stream.cache, **how), want)
        assert torch.equal(model.generate(**with_image(name), **how), want)  # without the stream's cache, inside the block
    assert torch.equal(model.generate(**with_image(name), **how), want)


def test_attention_of_the_parts_stays_what_it_was_set_to() -> None:
    model = seeing("Llava")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with kvsieve.stream(model, kvsieve.Full()):
        inside = [c._attn_implementation for c in (model.config.text_config, model.config.vision_config)]
        tower = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config") and "CLIP" in type(m).__name__}
    assert inside == ["eager", "sdpa"]
    assert tower == {"sdpa"}
    assert model.config.text_config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")


def test_chunked_attention_is_refused_by_name() -> None:
    extra = {"intermediate_size_mlp": 96, "num_hidden_layers": 4, "num_local_experts": 2, "attention_chunk_size": 32}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**_SHAPE, **extra}))
    with pytest.raises(UnsupportedModelError, match=r"Llama4ForCausalLM.*chunked"):
        kvsieve.stream(model, kvsieve.Full())
