"""Tiny random models of every family the tests cover, and the one table of policies that drives them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import kvsieve
import torch
from kvsieve.model.hooks import Attachment
from systems import arguments_of

# On tensors this small a second thread only costs; on a busy machine, several times the whole run.
torch.set_num_threads(1)

VOCAB = 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What each family adds to the common shape. Mixed layer types where the family has them, and then two that a stream serves.
MIXED = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 24,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {**MIXED, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {**MIXED, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": None, "head_dim": None}),
    "olmo2": ("Olmo2", {}),
    "cohere2": ("Cohere2", {**MIXED, "logit_scale": 0.25}),
    "ministral": ("Ministral", MIXED),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]}),
    "gpt_oss": ("GptOss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", {}),
}


def config(family: str, **changes: Any) -> Any:
    """A tiny configuration of ``family``."""
    import transformers

    name, extra = FAMILIES[family]
    values = {**_SHAPE, **extra, **changes}
    values = {k: v for k, v in values.items() if not (k in ("num_key_value_heads", "head_dim") and v is None)}
    stem = {"Gemma3": "Gemma3Text"}.get(name, name)
    return getattr(transformers, f"{stem}Config")(**values)


def fresh(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with the weights of :func:`model`, that a test may change."""
    import transformers

    name = FAMILIES[family][0]
    torch.manual_seed(seed)
    made = getattr(transformers, f"{name}ForCausalLM")._from_config(config(family, **changes), dtype=dtype).eval()
    for p in made.parameters():
        # Random weights give nearly flat logits; larger ones make attention and argmax matter.
        if p.dim() > 1:
            p.data.mul_(4.0)
    if getattr(made.config, "attn_logit_softcapping", None):
        # Older releases choose `sdpa` by themselves, which leaves the cap on attention logits out.
        made.set_attn_implementation("eager")
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made


_examined: dict[Any, dict[Any, Any]] = {}
"""What opening a stream found out about the models that are :func:`shared`, by the modes it was opened under."""


@functools.cache
def model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model, the same for the same arguments. Do not change it.

    A stream that opens on a model runs some tokens through it, which costs more than most tests do after it. As nobody changes this
    model, what the first stream found serves those that follow under the same modes. `fresh` and copies are examined every time.
    """
    return shared(fresh(family, dtype, seed, **changes))


def shared(made: Any) -> Any:
    """``made``, which all tests of a process share from now on and nobody changes: it is examined once."""
    _examined[made] = {}
    return made


def is_shared(made: Any) -> bool:
    """Whether this is a model that all tests of a process share and nobody changes."""
    return made in _examined


_examine = Attachment._examine


@functools.wraps(_examine)
def _examine_once(attachment: Attachment) -> None:
    of_model, known = attachment.model, _examined.get(attachment.model)
    if known is None:
        return _examine(attachment)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), of_model.training
    if modes not in known:
        _examine(attachment)
        known[modes] = attachment.facts
    # Another object each time: a cache knows by it on which stream's model it was made.
    attachment._facts = dataclasses.replace(known[modes])


Attachment._examine = _examine_once  # type: ignore[method-assign]


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


POLICIES: dict[str, Any] = {
    "full": lambda budget: kvsieve.Full(),
    "streaming": lambda budget: kvsieve.StreamingLLM(budget=budget, sinks=2),
    "lm_infinite": lambda budget: kvsieve.LMInfinite(window=budget - 2, sinks=2),
    "lm_infinite_middle": lambda budget: kvsieve.LMInfinite(window=budget - 2, sinks=2, middle_top_k=3, middle_from_layer=1),
    "sirllm": lambda budget: kvsieve.SirLLM(budget=budget, sinks=2, recent=4),
    "snapkv": lambda budget: kvsieve.SnapKV(budget, observe=4, kernel=3),
    "h2o": lambda budget: kvsieve.H2O(budget, recent=4, sinks=2),
    "chain": lambda budget: kvsieve.StreamingLLM(budget // 2, sinks=2) >> kvsieve.SirLLM(budget // 2, sinks=0, recent=0),
}
"""Every policy by name, as a function of the tokens it may hold. An eviction system without a row is tried with
the settings of its row in the registry, whose first argument is its budget."""

_rows = [repr(make(64)) for make in POLICIES.values()]
for _system in kvsieve.methods.SYSTEMS:
    if _system.does == "evicts" and not any(row.startswith(f"{_system.name}(") for row in _rows):
        POLICIES[_system.page] = functools.partial(_system.make, **arguments_of(_system)[1])

BOUNDED = [name for name, make in POLICIES.items() if make(64).memories[-1].roles.evict.evicts]
"""The policies whose memory is bounded."""

PER_HEAD = [name for name, make in POLICIES.items() if make(64).memories[0].roles.evict.per_head]
"""The policies under which the heads of a row hold different tokens."""

BACKENDS = ["reference", "cpu"]
