"""Models, dtypes and backends that cannot be served are refused by name, and left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
import transformers
from drive import forward, forwards, greedy
from kvsieve.errors import BackendError, UnsupportedModelError

# ------------------------------------------------------------------------------------------------------- dtypes and backends


def test_a_backend_that_cannot_run_here_says_so() -> None:
    model = tiny.model()
    for name, match in (("cuda", "CUDA"), ("abacus", "known: reference, cpu")):
        with pytest.raises(BackendError, match=match):
            kvsieve.stream(model, kvsieve.Full(), name)
    assert model.config._attn_implementation != "kvsieve"


def test_a_dtype_the_backend_does_not_hold_is_refused() -> None:
    model = copy.deepcopy(tiny.model()).to(torch.float64)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert stream.stats().backend == "reference"
        torch.testing.assert_close(forwards(model, stream.cache, tiny.ids(1, 20), [15, 1]), model(tiny.ids(1, 20)).logits.detach())
    with pytest.raises(BackendError, match="float64"), kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        forward(model, stream.cache, tiny.ids(1, 5))


# ------------------------------------------------------------------------------------------------------------ unsupported models

SMALL: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = dict(
    **SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
GPT: dict[str, Any] = dict(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)

# Attention that bypasses the interface is found either when it is set, or when no layer calls it.
ELSEWHERE = r"(:| does not dispatch|, layer 0:) .*(AttentionInterface|no rotation explains)"
"""Attention that goes another way; of GPT-J and CodeGen, which dispatch it from 5.24 on, the rotation does."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (
        lambda: _made("Bloom", hidden_size=32, n_layer=2, n_head=4, **SMALL),
        f"BloomForCausalLM{ELSEWHERE}",
    ),
    "gptj": (lambda: _made("GPTJ", **GPT), f"GPTJForCausalLM{ELSEWHERE}"),
    "codegen": (lambda: _made("CodeGen", **GPT), f"CodeGenForCausalLM{ELSEWHERE}"),
    "falcon": (
        lambda: _made("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SMALL),
        f"FalconForCausalLM{ELSEWHERE}",
    ),
    "mpt": (lambda: _made("Mpt", d_model=32, n_heads=4, n_layers=2, **SMALL), f"MptForCausalLM{ELSEWHERE}"),
    "gpt_neo": (
        lambda: _made(
            "GPTNeo",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
            **SMALL,
        ),
        f"GPTNeoForCausalLM{ELSEWHERE}",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "deepseek_v3": (
        lambda: _made(
            "DeepseekV3",
            **{**LLAMA, "num_key_value_heads": 4},
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=4,
            moe_intermediate_size=16,
        ),
        "DeepseekV3ForCausalLM uses multi-head latent attention",
    ),
    "gemma3n": (
        lambda: transformers.Gemma3nForCausalLM(
            transformers.Gemma3nTextConfig(
                **{**LLAMA, "intermediate_size": [48] * 4},
                num_kv_shared_layers=2,
                layer_types=["sliding_attention", "full_attention"] * 2,
                vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8,
                altup_num_inputs=2,
                laurel_rank=4,
                activation_sparsity_pattern=[0.0] * 4,
            )
        ),
        "Gemma3nForCausalLM shares keys and values between layers",
    ),
    "mistral_all_sliding": (
        lambda: _made("Mistral", **LLAMA, sliding_window=32),
        "every layer of this MistralForCausalLM already slides over 32 tokens",
    ),
    "base_model": (lambda: tiny.model().model, "LlamaModel has no language-model head"),
}


def _made(name: str, **values: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**values)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_that_cannot_be_served_is_refused_by_name(name: str) -> None:
    make, match = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    before, hooks = model.config._attn_implementation, _hooks(model)
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "reference")
    assert isinstance(caught.value, NotImplementedError)
    assert model.config._attn_implementation == before
    assert _hooks(model) == hooks
    if name not in ("t5", "base_model"):
        with torch.no_grad():
            assert model(tiny.ids(1, 10) % 60).logits.isfinite().all()


def test_what_is_no_model_is_refused() -> None:
    for thing in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
            kvsieve.stream(thing, kvsieve.Full(), "reference")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_frequencies_that_depend_on_the_length_cannot_be_re_placed(policy: str) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = transformers.LlamaForCausalLM(tiny.config("llama", rope_parameters=rope)).eval()
    before = model.config._attn_implementation
    if not tiny.POLICIES[policy](64).moves:
        with kvsieve.stream(model, tiny.POLICIES[policy](64), "reference") as stream:
            assert torch.equal(greedy(model, tiny.ids(1, 20), 5, past_key_values=stream.cache), greedy(model, tiny.ids(1, 20), 5))
    else:
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*dynamic NTK"):
            kvsieve.stream(model, tiny.POLICIES[policy](64), "reference")
    assert model.config._attn_implementation == before


def test_models_without_positions_take_only_policies_that_do_not_move() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = tiny.ids(1, 20) % 60
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no rotary positions"):
        kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "reference")
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        torch.testing.assert_close(forwards(model, stream.cache, ids, [15, 1]), model(ids).logits.detach(), atol=1e-4, rtol=0)
