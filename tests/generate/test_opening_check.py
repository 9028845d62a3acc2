"""Opening a stream verifies that a model does under it what it does without: simulated releases that break the seam."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import kvsieve
import pytest
import tiny
import torch
import transformers
from kvsieve.errors import UnsupportedModelError
from kvsieve.model.cache import StreamCache
from kvsieve.model.hooks import examined
from kvsieve.model.support import NEWEST, OLDEST
from transformers import Cache, LlamaForCausalLM, LlamaModel
from transformers.models.llama import modeling_llama

BOTH = rf"kvsieve [\d.]+.* with transformers {transformers.__version__} \(tested with {OLDEST} to {NEWEST}\)"
TEXT, MORE = tiny.ids(1, 12), tiny.ids(1, 5, 1)
HERE = "cache" if "cache" in LlamaModel.forward.__wrapped__.__code__.co_varnames else "past_key_values"
"""What this release calls the argument."""


def as_class(kind: Any) -> Any:
    """A tiny llama whose class, or whose decoder's class, is another release's."""
    model = copy.deepcopy(tiny.model())
    if issubclass(kind, LlamaForCausalLM):
        model.__class__ = kind
    else:
        model.model.__class__ = kind
    return model


def hooks(model: Any) -> list[Any]:
    """Every hook on a model; transformers leaves some of its own."""
    return [list(d.values()) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]


class RenamedAgain(LlamaForCausalLM):
    """A release that calls the argument otherwise, everywhere."""

    def forward(self, input_ids: Any = None, memory: Cache | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **{HERE: memory}, **kwargs)


class RenamedDecoder(LlamaModel):
    """A decoder that takes it under a name of its own."""

    def forward(self, input_ids: Any = None, memory: Cache | None = None, **kwargs: Any) -> Any:
        given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        memory = next((one for one in given if one is not None), memory)
        return super().forward(input_ids, **{HERE: memory}, **kwargs)


@pytest.mark.parametrize("kind", [RenamedAgain, RenamedDecoder])
@torch.no_grad()
def test_the_cache_is_found_whatever_its_argument_is_called(kind: Any) -> None:
    model = as_class(kind)
    name = "memory" if kind is RenamedAgain else HERE
    want = tiny.model()(torch.cat([TEXT, MORE], 1)).logits[:, 12:]
    with kvsieve.stream(model, kvsieve.SirLLM(400)) as stream:
        model(TEXT, **{name: stream.cache})
        torch.testing.assert_close(model(MORE, **{name: stream.cache}).logits, want, atol=1e-4, rtol=0)
        assert stream.seen == 17


@torch.no_grad()
def test_the_cache_is_found_among_positional_arguments() -> None:
    model = copy.deepcopy(tiny.model())
    want = model(torch.cat([TEXT, MORE], 1)).logits[:, 12:]
    with kvsieve.stream(model, kvsieve.SirLLM(400)) as stream:
        model(TEXT, None, None, stream.cache)
        torch.testing.assert_close(model(MORE, None, None, stream.cache).logits, want, atol=1e-4, rtol=0)


class Forgetful(LlamaModel):
    """A decoder that no longer passes the cache on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **{k: v for k, v in kwargs.items() if not isinstance(v, Cache)})
        return out


class Shifted(LlamaModel):
    """A decoder that tells its layers other positions than it is told."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(next((v for v in kwargs.values() if isinstance(v, Cache)), None), kvsieve.model.cache.StreamCache):
            kwargs["position_ids"] = kwargs["position_ids"] * 7
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Forgetful, Shifted])
def test_a_release_that_breaks_the_seam_is_refused_when_the_stream_opens(kind: Any) -> None:
    model = as_class(kind)
    before = hooks(model)
    with pytest.raises(UnsupportedModelError, match=BOTH) as caught:
        kvsieve.stream(model, kvsieve.StreamingLLM(64))
    assert "LlamaForCausalLM" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert hooks(model) == before
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    assert model(TEXT).logits.isfinite().all()


def test_a_release_whose_attention_goes_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def get_interface(self, name: str, default: Any) -> Any:
            return default

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Fixed())
    with pytest.raises(UnsupportedModelError, match=rf"LlamaForCausalLM: layers \[0, 1\] do not dispatch.*{BOTH}"):
        kvsieve.stream(copy.deepcopy(tiny.model()), kvsieve.Full())


def test_a_release_that_no_longer_calls_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "update", lambda self, k, v, layer, **kwargs: (k, v))
    with pytest.raises(UnsupportedModelError, match=BOTH):
        kvsieve.stream(copy.deepcopy(tiny.model()), kvsieve.Full())


def test_an_attention_taken_away_later_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an opening cannot foresee is noticed by the forward itself, with one layer as with several."""
    for layers in (1, 3):
        model = copy.deepcopy(tiny.model(num_hidden_layers=layers))
        with kvsieve.stream(model, kvsieve.Full()) as stream, torch.no_grad():
            model(TEXT, past_key_values=stream.cache)
            with monkeypatch.context() as patch:
                patch.setattr(StreamCache, "update", lambda self, k, v, layer, **kwargs: (k, v))
                with pytest.raises(kvsieve.errors.StateError, match=rf"0 of {layers} layers"):
                    model(MORE, past_key_values=stream.cache)
            assert stream.seen == 12
            want = model(torch.cat([TEXT, MORE], 1)).logits[:, 12:]
            torch.testing.assert_close(model(MORE, past_key_values=stream.cache).logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_coarse_numbers_are_no_reason_to_refuse(family: str, dtype: torch.dtype) -> None:
    """Thirty layers of random weights, with experts in one family: a rounding may choose another expert."""
    mixed = {} if family == "llama" else {"layer_types": ["sliding_attention", "full_attention"] * 15}
    kvsieve.stream(tiny.fresh(family, dtype, num_hidden_layers=30, **mixed), kvsieve.Full()).close()


def test_opening_runs_few_short_forwards() -> None:
    model = copy.deepcopy(tiny.model())
    widths: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    with kvsieve.stream(model, kvsieve.SirLLM(64)):
        assert sum(widths) <= 16
        first = len(widths)
        with kvsieve.stream(model, kvsieve.Full()):
            assert len(widths) == first


def test_who_opens_many_streams_has_the_model_examined_once() -> None:
    """A command with a stream for each text. Afterwards the model is as it was, and examined anew."""
    model = tiny.fresh()
    before, widths = hooks(model), list[int]()
    handle = model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    with examined(model):
        once = len(widths)
        for policy in (kvsieve.Full(), kvsieve.SirLLM(64)):
            with kvsieve.stream(model, policy) as stream:
                stream.feed(TEXT)
        assert len(widths) == once + 2, "a stream reads its text, and nothing before it"
    with kvsieve.stream(model, kvsieve.Full()):
        assert len(widths) == 2 * once + 2
    handle.remove()
    assert hooks(model) == before


@torch.no_grad()
def test_a_cap_on_attention_logits_is_applied_though_sdpa_leaves_it_out() -> None:
    """Opening does not take that for a broken release: a cap so low that it decides what is said."""
    model = tiny.fresh("gemma2", attn_logit_softcapping=0.2)
    want = model(TEXT).logits
    with contextlib.suppress(ValueError):  # newer releases refuse it
        model.set_attn_implementation("sdpa")
    before = model.config._attn_implementation
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        torch.testing.assert_close(model(TEXT, past_key_values=stream.cache).logits, want, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == before
