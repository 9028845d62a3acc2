"""Which models a stream serves, and what to pass in place of one that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvsieve.errors import UnsupportedModelError
from kvsieve.model.parallel import ranks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy

__all__ = ["NEWEST", "OLDEST", "cache_name", "layer_types", "look_through", "refuse", "stored_keys", "versions"]

OLDEST, NEWEST = "5.16.0", "5.24.0"
"""The releases of transformers that are tested; newer ones are verified when a stream opens."""

_MAX_WRAPPERS = 8


def versions() -> str:
    """Both versions and the supported range, for an error message."""
    import transformers

    from kvsieve._core import __version__

    return f"kvsieve {__version__} with transformers {transformers.__version__} (tested with {OLDEST} to {NEWEST})"


def look_through(model: Any) -> PreTrainedModel:
    """The transformers model inside of wrappers that change nothing about its forward.

    `torch.compile`'s wrapper and adapters that live inside the base model are looked through.

    Raises:
        UnsupportedModelError: for anything else that is not a transformers model; the message says what to pass.
    """
    from transformers import PreTrainedModel

    for _ in range(_MAX_WRAPPERS):
        if isinstance(model, PreTrainedModel):
            return model
        members = getattr(model, "__dict__", {}).get("_modules", {})
        if "_orig_mod" in members:
            model = members["_orig_mod"]
        elif callable(getattr(type(model), "get_base_model", None)):
            model = _base_of_adapter(model)
        else:
            break
    name = type(model).__name__
    if name in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise UnsupportedModelError(f"a stream needs the model itself, got it inside {name}; pass its .module")
    raise UnsupportedModelError(f"a stream needs a transformers PreTrainedModel first and a policy second, got {name} first")


def _base_of_adapter(model: Any) -> Any:
    """What an adapter's model wraps, if the adapter lives inside of it."""
    name = type(model).__name__
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{name} adds learned prompts ahead of the text, which a stream does not see; pass model.get_base_model() "
                "to stream without them"
            )
    base = model.get_base_model()
    if base is model:
        raise UnsupportedModelError(f"a stream needs the model inside this {name}; pass what model.get_base_model() wraps")
    return base


def refuse(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be served, by what its configuration says.

    Raises:
        UnsupportedModelError: the message names the model and the reason.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; streams serve decoder-only models")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; pass the causal-LM model, not its base")
    ranks_of(model)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} uses multi-head latent attention, whose cache is not keys and values per head")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers, which bypasses the cache")
    types, kwargs = layer_types(config)
    if "chunked_attention" in types:
        raise UnsupportedModelError(
            f"{name} has chunked attention, where a token sees only its own chunk; streams serve full and sliding attention"
        )
    other = sorted({t for t in types if t not in ("full_attention", "sliding_attention")})
    if other:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(other)}; streams serve full and sliding attention")
    if "full_attention" not in types:
        width = kwargs[0].get("sliding_window")
        raise UnsupportedModelError(
            f"every layer of this {name} already slides over {width} tokens, which bounds its cache; nothing is left to budget"
        )


def layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of every layer of a text configuration, and what the stock cache layer of it needs."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, kwargs = get_layer_types_and_kwargs(config)
    if isinstance(kwargs, dict):
        # Before heterogeneous configurations: one set of arguments for all layers.
        kwargs = [kwargs if kind == "sliding_attention" else {} for kind in types]
    return list(types[: config.num_hidden_layers]), list(kwargs[: config.num_hidden_layers])


def cache_name(model: PreTrainedModel) -> str:
    """The name of the cache argument of the model's forward: releases call it `past_key_values`, `cache` or otherwise.

    Raises:
        UnsupportedModelError: if the forward has none.
    """
    import inspect

    parameters = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values", "layer_past"):
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise UnsupportedModelError(f"{type(model).__name__} takes no cache, so no stream can open on it; {versions()}")


def stored_keys(name: str, policy: Policy, facts: ModelFacts) -> str:
    """How keys are stored, if this model's positions allow the policy at all."""
    if not policy.moves:
        return policy.stored_keys
    if facts.dynamic_rope:
        raise UnsupportedModelError(
            f"{name} scales its rotary frequencies with the length (dynamic NTK), so {policy!r} cannot re-place its keys"
        )
    if not facts.has_rope and not _mixes_positions(facts):
        raise UnsupportedModelError(f"{name} has no rotary positions, so {policy!r} cannot re-place its keys; use kvsieve.Full()")
    return "pre_rope" if facts.longrope else policy.stored_keys


def _mixes_positions(facts: ModelFacts) -> bool:
    """Whether layers without rotation are meant: full attention without positions beside sliding layers that have them."""
    return len(facts.layers) < len(facts.layer_types)
