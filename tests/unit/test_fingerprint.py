"""Fingerprints: the same for the same weights however they lie, another one for any other weights, rotation or vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.model import fingerprint


def int8(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def test_two_copies_of_the_same_weights_are_the_same() -> None:
    model = tiny.model()
    want = fingerprint.weights(model)
    assert len(want) == 64
    assert fingerprint.weights(tiny.fresh()) == want
    assert fingerprint.weights(offloaded(copy.deepcopy(model))) == want
    with kvsieve.stream(model, kvsieve.StreamingLLM(64)) as stream:
        stream.feed(tiny.ids(1, 20))
        assert fingerprint.weights(model) == want
    assert fingerprint.weights(int8(copy.deepcopy(model))) == fingerprint.weights(int8(copy.deepcopy(model)))


def scaled(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_parameter(name).data.mul_(1.001)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attention weight": scaled("model.layers.1.self_attn.k_proj.weight"),
    "a norm": scaled("model.norm.weight"),
    "the head": scaled("lm_head.weight"),
    "the last element": lambda model: model.lm_head.weight.data[-1, -1].add_(1.0),
    "the dtype": lambda model: model.to(torch.bfloat16),
    "the rotation's base": lambda model: model.config.rope_parameters.update(rope_theta=20000.0),
    "frequencies in place": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "int8": int8,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_other_weights_are_others(change: str) -> None:
    model = copy.deepcopy(tiny.model())
    changed = CHANGES[change](model)
    assert fingerprint.weights(changed if isinstance(changed, torch.nn.Module) else model) != fingerprint.weights(tiny.model())


def test_int8_weights_of_another_model_are_others() -> None:
    models = [int8(copy.deepcopy(tiny.model(seed=seed))) for seed in (0, 1)]
    assert fingerprint.weights(models[0]) != fingerprint.weights(models[1])


def test_frequencies_that_follow_the_length_do_not_count() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.fresh(rope_parameters=rope, max_position_embeddings=32)
    before = fingerprint.weights(model)
    with torch.no_grad():
        model(tiny.ids(1, 64))
    assert fingerprint.weights(model) == before


def tokenizer(words: list[str], **special: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)


def test_tokenizers() -> None:
    words = ["<unk>", "a", "b", "c"]
    want = fingerprint.tokenizer(tokenizer(words))
    again = tokenizer(words, pad_token="<unk>")
    padded = tokenizer(words)
    padded.backend_tokenizer.enable_padding(length=8)
    assert fingerprint.tokenizer(tokenizer(words)) == want == fingerprint.tokenizer(padded)
    assert fingerprint.tokenizer(tokenizer(["<unk>", "b", "a", "c"])) != want
    assert fingerprint.tokenizer(again) != want
