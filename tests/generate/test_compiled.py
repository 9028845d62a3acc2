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


# Two layers where what is compiled may go on from one into the next; one layer forwarded whole is `method` and `whole`.
CASES = [(forward, 2), (method, 1), (whole, 1), (layers, 2), (wrapped_layers, 1), (decoder, 1), (attention, 1)]


@pytest.mark.parametrize(("compiled", "count"), CASES)
@torch.no_grad()
def test_compiled(compiled: Callable[[Any], Any], count: int) -> None:
    """Used without a stream, under one, and without again; where the whole forward is compiled, with raw keys and scores too.

    A forward that is refused leaves the next one right.
    """
    model = compiled(copy.deepcopy(tiny.model(num_hidden_layers=count)))
    both = torch.cat([TEXT, MORE], 1)
    want = tiny.model(num_hidden_layers=count)(both).logits
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)
    policy = {forward: kvsieve.SirLLM(400), layers: kvsieve.LMInfinite(400)}.get(compiled, kvsieve.Full())
    with kvsieve.stream(model, policy) as stream:
        got = [model(TEXT, past_key_values=stream.cache).logits]
        if compiled is whole:
            with pytest.raises(kvsieve.errors.CacheMismatchError):
                model(tiny.ids(2, 3), past_key_values=stream.cache)
        got.append(model(MORE, past_key_values=stream.cache).logits)
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
        assert stream.seen == 17
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)
