"""Decoding by compiled code beside decoding without: a whole token of SmolLM2-135M that holds 2,000 tokens of text.

Two forks of one stream go on with the same tokens. Eager products are torch's, compiled ones the core's where those are better.
Beside them stand the products alone, by both, and reading their weights once, which no compiler saves: that is the bound. The
second measurement is what a layer and a token cost beside attention: the model is replaced by nothing, and the core is called but
does nothing; beside it the same with the core, over 64 to 164 tokens.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve import _core
from kvsieve._core import decode
from kvsieve.bench.subject import load, model, text_ids, token
from kvsieve.model.attention import attention_forward
from kvsieve.model.linears import product
from rounds import interleaved, record
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

HELD = 2000
SAID = 12
"""Tokens that are compared before anything is measured."""


@pytest.fixture(scope="module")
def compiled() -> Any:
    made = copy.deepcopy(model(torch.float32, "smollm2"))
    kvsieve.compile(made)
    return made


@pytest.mark.parametrize("policy", ["full()", "sirllm(1024)"])
@torch.no_grad()
def test_whole_token(benchmark: Any, compiled: Any, policy: str) -> None:
    decoder, code = compiled.get_decoder(), compiled.get_decoder()._compiled_call_impl
    _, tokenizer = load("smollm2", torch.float32)
    weights = [weight for weight in decoder.layers.parameters() if weight.dim() == 2] + [compiled.lm_head.weight]
    inputs = {weight.shape[1]: torch.randn(1, weight.shape[1]) for weight in weights}
    flat = [weight.detach().view(-1).numpy() for weight in weights]
    head = compiled.lm_head._compiled_call_impl

    def products() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def core_products() -> None:
        for weight in weights:
            product(inputs[weight.shape[1]], weight, None)

    def reading() -> None:
        for numbers in flat:
            _core.read(numbers)

    with kvsieve.stream(compiled, kvsieve.methods.parse(policy), "cpu") as stream:
        stream.feed(text_ids("smollm2", tokenizer, HELD))
        forks = {name: stream.fork() for name in ("eager", "compiled")}

        def one(name: str) -> torch.Tensor:
            decoder._compiled_call_impl, compiled.lm_head._compiled_call_impl = (code, head) if name == "compiled" else (None, None)
            return token(compiled, forks[name].cache)

        for _ in range(SAID):
            torch.testing.assert_close(one("compiled"), one("eager"), atol=1e-3, rtol=1e-3)
        alone = {"products": products, "core_products": core_products, "reading": reading}
        runs = {**{name: (lambda name=name: one(name)) for name in forks}, **alone}
        medians = interleaved(runs, rounds=25, repeat=False)
        record(
            benchmark,
            runs["compiled"],
            medians,
            policy=policy,
            held=HELD,
            times=round(medians["eager"] / medians["compiled"], 3),
            bound=round(medians["eager"] / medians["reading"], 3),
        )
        decoder._compiled_call_impl, compiled.lm_head._compiled_call_impl = code, head
        for fork in forks.values():
            fork.close()


@pytest.mark.parametrize("policy", ["full()", "sirllm(1024)"])
@torch.no_grad()
def test_beside_attention(benchmark: Any, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    made = copy.deepcopy(model(torch.float32))
    modules = [layer.self_attn for layer in made.model.layers]
    q, k, v = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 1, 64), torch.randn(1, 3, 1, 64)
    hidden, logits, ids = torch.randn(1, 1, 576), torch.randn(1, 1, made.config.vocab_size), torch.tensor([[7]])
    clock, layers, tokens = time.thread_time_ns, list[float](), list[float]()

    def decoder(cache: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        before = clock()
        for index, module in enumerate(modules):
            cache.update(k, v, index)
            attention_forward(module, q, k, v, None, scaling=0.125, position_ids=position_ids)
        layers.append((clock() - before) / len(modules) / 1e3)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)

    def head(cache: Any = None, **kwargs: Any) -> Any:
        made.model(cache=cache, **kwargs)
        return CausalLMOutputWithPast(logits=logits, cache=cache)

    with kvsieve.stream(made, kvsieve.methods.parse(policy), "cpu") as stream:
        stream.feed(torch.arange(3, 67)[None])
        made.forward, made.model.forward = head, decoder

        def one() -> None:
            before = clock()
            made(input_ids=ids, position_ids=torch.tensor([[stream.seen]]), cache=stream.cache)
            tokens.append((clock() - before) / 1e3)

        for _ in range(100):
            one()
        with_core = round(statistics.median(layers), 1)
        layers.clear(), tokens.clear()
        # The core is called, takes what it is lent, and declines for the dtype of one: it stores nothing, computes nothing.
        other = torch.empty(1, 1, 9, 64, dtype=torch.bfloat16)
        monkeypatch.setattr("kvsieve.backends.cpu.store.decode", lambda *args, **named: not decode(*args[:-1], other, **named))
        for _ in range(400):
            one()
        assert stream.seen == 564
        found = {"a_layer_us": layers, "a_token_us": tokens}
        facts = {name: round(statistics.median(some), 1) for name, some in found.items()}
        record(benchmark, one, {}, policy=policy, least_us=round(min(layers), 1), with_core_us=with_core, **facts)
