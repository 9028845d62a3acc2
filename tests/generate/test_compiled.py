"""Compiled models under a stream: whatever is compiled, the answers are those of the model as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import kvsieve
import pytest
import tiny
import torch

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
pytestmark = pytest.mark.slow

TEXT, MORE = tiny.ids(1, 12), tiny.ids(1, 5, 1)


def forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def method(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def wrapped_layers(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def decoder(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


def attention(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager")
    return model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = [(forward, 1), (forward, 2), (method, 1), (whole, 1), (layers, 2), (wrapped_layers, 1), (decoder, 1), (attention, 1)]


@pytest.mark.parametrize(("compiled", "count"), CASES)
@torch.no_grad()
def test_compiled(compiled: Callable[[Any], Any], count: int) -> None:
    """Used without a stream, under one, and without again; where the whole forward is compiled, with raw keys and scores too."""
    model = compiled(copy.deepcopy(tiny.model(num_hidden_layers=count)))
    both = torch.cat([TEXT, MORE], 1)
    want = tiny.model(num_hidden_layers=count)(both).logits
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)
    policy = {forward: kvsieve.SirLLM(400), layers: kvsieve.LMInfinite(400)}.get(compiled, kvsieve.Full())
    with kvsieve.stream(model, policy) as stream:
        got = [model(part, past_key_values=stream.cache).logits for part in (TEXT, MORE)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
        assert stream.seen == 17
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_refused_forward_of_a_compiled_model_leaves_the_next_one_right() -> None:
    model = whole(copy.deepcopy(tiny.model(num_hidden_layers=1)))
    want = tiny.model(num_hidden_layers=1)(torch.cat([TEXT, MORE], 1)).logits[:, 12:]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model(TEXT, past_key_values=stream.cache)
        with pytest.raises(kvsieve.errors.CacheMismatchError):
            model(tiny.ids(2, 3), past_key_values=stream.cache)
        torch.testing.assert_close(model(MORE, past_key_values=stream.cache).logits, want, atol=1e-4, rtol=0)
