"""Models in wrappers, with offloaded or quantized weights, with a replaced head: served, or the error says what to pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.errors import PolicyError, UnsupportedModelError

accelerate = pytest.importorskip("accelerate")

TEXT, MORE = tiny.ids(1, 20), tiny.ids(1, 5, 1)
BOTH = torch.cat([TEXT, MORE], 1)
POLICIES = [kvsieve.Full(), kvsieve.SirLLM(400), kvsieve.LMInfinite(400)]


@torch.no_grad()
def streamed(model: Any, policy: Any, backend: str | None = None) -> torch.Tensor:
    """Logits of the second of two forwards under a stream."""
    with kvsieve.stream(model, policy, backend) as stream:
        model(TEXT, past_key_values=stream.cache)
        logits: torch.Tensor = model(MORE, past_key_values=stream.cache).logits
        assert stream.seen == 25
        return logits


@torch.no_grad()
def stock(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(BOTH).logits[:, 20:]
    return logits


# ----------------------------------------------------------------------------------------------------------------------- wrappers


class Adapted(torch.nn.Module):
    """As an adapter's library wraps a model: it lives in the base, forwards and generates by it."""

    def __init__(self, base: Any, prompt_learning: bool | None = None) -> None:
        super().__init__()
        self.base_model = base
        if prompt_learning is not None:
            self.peft_config = {"default": type("Config", (), {"is_prompt_learning": prompt_learning})()}

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(Adapted, id="an adapter"),
        pytest.param(lambda m: Adapted(m, False), id="with its configuration"),
        pytest.param(lambda m: torch.compile(Adapted(m), backend="eager"), id="compiled", marks=pytest.mark.slow),
    ],
)
def test_wrappers_that_change_nothing_are_looked_through(wrap: Callable[[Any], Any], policy: Any) -> None:
    # Of what is compiled every layer takes as long as everything else.
    model = copy.deepcopy(tiny.model(num_hidden_layers=1))
    wrapped = wrap(model)
    with kvsieve.stream(wrapped, policy) as stream, torch.no_grad():
        assert stream.model is model
        wrapped.forward(TEXT, past_key_values=stream.cache)
        torch.testing.assert_close(wrapped.forward(MORE, past_key_values=stream.cache).logits, stock(model), atol=1e-4, rtol=0)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prompt learning": (lambda m: Adapted(m, True), r"get_base_model\(\)"),
    "DataParallel": (torch.nn.DataParallel, r"DataParallel; pass its \.module"),
    "a module of one's own": (lambda m: torch.nn.Sequential(m), "PreTrainedModel first.* got Sequential first"),
    "a string": (lambda m: "HuggingFaceTB/SmolLM2-135M", "got str first"),
    "none": (lambda m: None, "got NoneType first"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_wrappers_are_refused_and_the_error_says_what_to_pass(name: str) -> None:
    wrap, match = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        kvsieve.stream(wrap(copy.deepcopy(tiny.model())), kvsieve.Full())
    assert len(str(caught.value)) < 250


def test_swapped_arguments_do_not_print_the_model() -> None:
    with pytest.raises(PolicyError, match="second, got LlamaForCausalLM") as caught:
        kvsieve.stream(kvsieve.Full(), tiny.model())
    assert len(str(caught.value)) < 200


# ------------------------------------------------------------------------------------------------------------ where the weights are


def offloaded(model: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def dispatched(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("place", [offloaded, dispatched])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_that_come_when_they_are_used(family: str, place: Callable[[Any], Any], policy: Any) -> None:
    model = place(copy.deepcopy(tiny.model(family)))
    torch.testing.assert_close(streamed(model, policy), stock(tiny.model(family)), atol=1e-4, rtol=0)
    torch.testing.assert_close(stock(model), stock(tiny.model(family)))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_dynamic_int8(backend: str, policy: Any) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny.model()), {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        from transformers import DynamicCache

        cache = DynamicCache(config=quantized.config)
        quantized(TEXT, past_key_values=cache)
        want = quantized(MORE, past_key_values=cache).logits
    got = streamed(quantized, policy, backend)
    # The scale of activations follows the largest one, so a rounding may move a step of an int8.
    assert float((got - want).norm() / want.norm()) < 0.03


def test_torchao_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for name in ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig"):
        model = copy.deepcopy(tiny.model())
        quantization.quantize_(model, getattr(quantization, name)())
        for policy in POLICIES:
            torch.testing.assert_close(streamed(model, policy), stock(model), atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------------------------ the head


def other_head() -> torch.nn.Linear:
    head = torch.nn.Linear(64, 128, bias=False)
    torch.nn.init.normal_(head.weight, std=0.2, generator=torch.Generator().manual_seed(3))
    return head


class Around(torch.nn.Module):
    """A head with something added."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.extra = base, other_head()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(hidden) + self.extra(hidden)
        return out


CHANGES: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: None,
    "set_output_embeddings": lambda model: model.set_output_embeddings(other_head()),
    "around lm_head": lambda model: setattr(model, "lm_head", Around(model.lm_head)),
    "in place": lambda model: model.lm_head.weight.data.copy_(other_head().weight.data),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_surprisal_is_of_the_head_in_use(change: str, family: str) -> None:
    model = copy.deepcopy(tiny.model(family))
    with kvsieve.stream(model, kvsieve.SirLLM(400)) as stream:
        CHANGES[change](model)
        model(TEXT, past_key_values=stream.cache, logits_to_keep=1)
        got = torch.from_numpy(stream.kept()[0].scores)[1:]
    want = -model(TEXT).logits.log_softmax(-1)[0, :-1].gather(1, TEXT[0, 1:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
