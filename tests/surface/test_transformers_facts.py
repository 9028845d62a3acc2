"""What `model/` and `cache.py` rely on in transformers. When a release changes one of these, this file says which."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.model import configs, masks, support
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, masking_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def test_a_cache_layer_must_define_what_ours_defines() -> None:
    assert CacheLayerMixin.__abstractmethods__ == {
        "get_mask_sizes",
        "get_max_length",
        "get_seq_length",
        "lazy_initialization",
        "update",
    }


def test_generate_acts_on_a_cache_through_the_methods_ours_overrides() -> None:
    acts = {"reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "activate_past_recording"}
    from kvsieve.model.cache import StreamCache

    assert acts <= {name for name, _ in inspect.getmembers(Cache, inspect.isfunction)}
    assert acts <= set(vars(StreamCache))


def test_update_gets_keys_values_and_the_layer() -> None:
    """From 5.24 on what the layer was called with as well, under the name `kwargs`."""
    seen: list[tuple[Any, ...]] = []

    class Spy(DynamicCache):  # type: ignore[misc]
        def update(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((len(args), set(kwargs)))
            return super().update(*args, **kwargs)

    model = tiny.model()
    model(tiny.ids(1, 3), past_key_values=Spy(config=model.config))
    assert seen in ([(3, set())] * 2, [(3, {"kwargs"})] * 2)


def test_crop_takes_tokens_to_remove_as_a_negative_number() -> None:
    model = tiny.model()
    cache = DynamicCache(config=model.config)
    model(tiny.ids(1, 5), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 3


def test_layer_types_tell_full_from_sliding() -> None:
    types, kwargs = support.layer_types(tiny.config("gemma2"))
    assert types == ["sliding_attention", "full_attention", "full_attention"]
    assert kwargs[0] == {"sliding_window": 24}
    assert DynamicSlidingWindowLayer(**kwargs[0]).get_seq_length() == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_what_the_attention_and_mask_functions_receive(family: str) -> None:
    """Queries `[B, H, q, D]`, keys of the KV heads, `scaling`, `position_ids`; the padding only through the mask function."""
    attention: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        attention.append({"shapes": (query.shape, key.shape), "mask": attention_mask, **kwargs})
        return query.transpose(1, 2).contiguous(), None

    def mask(**kwargs: Any) -> Any:
        masks.append(kwargs)
        return kwargs["attention_mask"]

    AttentionInterface.register("kvsieve_test", attend)
    AttentionMaskInterface.register("kvsieve_test", mask)
    import transformers

    model = getattr(transformers, f"{tiny.FAMILIES[family][0]}ForCausalLM")._from_config(tiny.config(family))
    model.set_attn_implementation("kvsieve_test")
    padding = torch.tensor([[0, 0, 1, 1, 1]])
    model(tiny.ids(1, 5), attention_mask=padding, position_ids=torch.arange(5)[None])
    assert attention[-1]["shapes"] == ((1, 4, 5, 16), (1, 2, 5, 16))
    assert {"scaling", "position_ids"} <= set(attention[-1])
    assert all(torch.equal(m["attention_mask"].long(), padding) for m in masks)
    sliding = [m.get("local_size") for m in masks]
    assert sliding.count(None) == 1
    assert [s for s in sliding if s is not None] == ([24] if family != "llama" else [])
    if family == "gemma2":
        assert attention[-1]["softcap"] == model.config.attn_logit_softcapping
    if family == "gpt_oss":
        assert attention[-1]["s_aux"].shape == (4,)


def test_models_that_do_not_dispatch_keep_their_implementation() -> None:
    import transformers

    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)
    model = transformers.BloomForCausalLM(config)
    before = model.config._attn_implementation
    model.set_attn_implementation("kvsieve_test")
    assert model.config._attn_implementation == before


def test_logits_to_keep_says_how_many_candidates_are_verified() -> None:
    """Assisted decoding asks for one row more than it has candidates, then crops, always."""
    widths: list[tuple[int, Any]] = []
    crops: list[int] = []
    model = tiny.model()

    class Spy(DynamicCache):  # type: ignore[misc]
        def crop(self, count: int) -> None:
            crops.append(count)
            super().crop(count)

    hook = model.register_forward_pre_hook(
        lambda m, a, k: widths.append((k["input_ids"].shape[1], k.get("logits_to_keep"))), with_kwargs=True
    )
    text = tiny.ids(1, 6).repeat(1, 4)
    model.generate(text, past_key_values=Spy(config=model.config), prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    hook.remove()
    assert widths[0] == (24 + widths[0][1] - 1, widths[0][1])
    assert all(width == keep for width, keep in widths[1:])
    assert len(crops) == len(widths)
    assert all(count <= 0 for count in crops)


def test_new_tokens_go_on_when_the_mask_covers_what_was_seen() -> None:
    """generate with only the new ids continues a cache if, and only if, the mask covers the past as well."""
    model, text = tiny.model(), tiny.ids(1, 20)
    want = model.generate(text, max_new_tokens=5, do_sample=False)[:, 20:]
    cache = DynamicCache(config=model.config)
    model(text[:, :12], past_key_values=cache)
    got = model.generate(text[:, 12:], attention_mask=torch.ones(1, 20), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, 8:], want)


def test_hooks_that_are_always_called_get_no_output_after_a_failure() -> None:
    seen: list[Any] = []
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_hook(lambda m, a, k, out: seen.append(out), with_kwargs=True, always_call=True)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3))
    assert seen == [None]


def test_opening_a_stream_registers_one_name() -> None:
    before = set(ALL_ATTENTION_FUNCTIONS.keys())
    with kvsieve.stream(tiny.model(), kvsieve.Full()):
        assert set(ALL_ATTENTION_FUNCTIONS.keys()) - before <= {configs.ATTENTION_NAME}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_attention_modules_look_their_implementation_up_in_their_configuration(family: str) -> None:
    """When they run, not when they are made: a view in place of the configuration is enough to be asked."""
    model = copy.deepcopy(tiny.model(family))
    asked: list[int] = []

    class View(type(model.config)):  # type: ignore[misc]
        @property
        def _attn_implementation(self) -> str:
            asked.append(1)
            return "eager"

    view = object.__new__(View)
    object.__setattr__(view, "__dict__", vars(model.config))
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and "config" in vars(m)]
    for layer in layers:
        layer.config = view
    with torch.no_grad():
        model(tiny.ids(1, 4))
    assert len(asked) >= model.config.num_hidden_layers


def test_masks_are_made_of_functions_that_can_be_told_apart() -> None:
    kinds = masks._leaves()
    assert sorted(kinds.values()) == ["and", "blocks", "causal", "or", "sliding"]
    assert masks.kind_of(masking_utils.sliding_window_causal_mask_function(4)) == "sliding"


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_the_mask_function_gets_the_configuration_and_plain_functions(family: str) -> None:
    got: list[dict[str, Any]] = []
    AttentionMaskInterface.register("kvsieve_test", lambda **kwargs: got.append(kwargs))
    AttentionInterface.register("kvsieve_test", lambda module, q, k, v, mask, **kwargs: (q.transpose(1, 2).contiguous(), None))
    model = copy.deepcopy(tiny.model(family))
    model.set_attn_implementation("kvsieve_test")
    with torch.no_grad():
        model(tiny.ids(1, 4))
    assert {type(kwargs["config"]) for kwargs in got} == {type(model.config)}
    assert {masks.kind_of(kwargs["mask_function"]) for kwargs in got} <= {"causal", "sliding"}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_the_cache_argument_has_a_name_in_the_forward(family: str) -> None:
    assert support.cache_name(tiny.model(family)) in ("past_key_values", "cache")


def test_a_forward_takes_positions() -> None:
    """A probe passes them, so that models of several axes do not work out, and remember, their own."""
    model = tiny.model()
    text = tiny.ids(1, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(text, position_ids=torch.arange(4)[None]).logits, model(text).logits)
