"""Fingerprints of a model's weights and of a tokenizer, so that a session goes on only where it was written.

Two loads of the same weights have the same fingerprint; a fine-tune, another rotation or another quantization has another one. Only
an evenly spaced sample of each tensor is read, which is cheap: a fine-tune that moves a tensor moves it nearly everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import told
from kvsieve.errors import ArgumentError
from kvsieve.model.configs import original

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["tokenizer", "weights"]

SAMPLE = 8192
"""Elements of each tensor that are read."""


def weights(model: PreTrainedModel) -> str:
    """A fingerprint of ``model``: names, shapes, dtypes and samples of all parameters and buffers, and its rotary parameters.

    Packed weights of quantized modules, tensor subclasses and offloaded weights are read as well.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in sorted(_tensors(model), key=lambda item: item[0]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_sample(tensor))
    config = original(model.config).get_text_config(decoder=True)
    told = {name: value for name, value in vars(config).items() if any(part in name for part in _DECIDES) and name[0] != "_"}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


_DECIDES = (
    *(
        "rope",
        "rotary",
        "eps",
        "hidden_act",
        "activation",
        "scalar",
        "scaling",
        "scale",
        "softcap",
        "multiplier",
        "experts_per_tok",
    ),
    *("norm_topk", "sliding_window", "layer_types", "logit_"),
)
"""Parts of names of settings that decide what equal weights compute. Not all settings: releases add some, with defaults."""


def tokenizer(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer: its vocabulary, special tokens and, of a fast one, its merges and normalizers.

    Returns:
        64 hexadecimal digits.

    Raises:
        ArgumentError: for what is no tokenizer.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)) or not hasattr(tokenizer, "special_tokens_map"):
        raise ArgumentError(f"tokenizer must be one of transformers', with a vocabulary, got {told(tokenizer)}")
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # How a call pads and truncates is remembered there too, and is no part of what tokens mean.
        digest.update(json.dumps({k: v for k, v in state.items() if k not in ("padding", "truncation")}, sort_keys=True).encode())
    return digest.hexdigest()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that decides what the model says, by name; tied ones under each of their names."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (name.endswith("inv_freq") and _follows_length(module)):
                yield from _plain(f"{path}.{name}", _loaded(module, name, tensor))
        packed = getattr(module, "_packed_params", None)
        if packed is not None and callable(getattr(packed, "_weight_bias", None)):
            for name, tensor in zip(("weight", "bias"), packed._weight_bias()):
                if tensor is not None:
                    yield from _plain(f"{path}.{name}", tensor)


def _follows_length(module: Any) -> bool:
    """Whether a rotary module changes its frequencies with the length it has seen; the configuration tells them then."""
    types = getattr(module, "rope_type", None)
    return bool({"dynamic", "longrope"} & set(types.values() if isinstance(types, dict) else (types,)))


def _loaded(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values where they are offloaded; the empty one if they cannot be read."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    for weights_map in (getattr(one, "weights_map", None) for one in hooks):
        if tensor.is_meta and weights_map is not None and name in weights_map:
            return weights_map[name]  # type: ignore[no-any-return]
    return tensor


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor is made of: integers and their scales, where it is quantized."""
    if tensor.is_quantized:
        yield f"{name}.int", tensor.int_repr()
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = tensor.q_per_channel_scales() if per_channel else torch.tensor(tensor.q_scale(), dtype=torch.float64)
        yield f"{name}.scale", scale
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        inner, _ = flatten()
        for part in inner:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
        return
    yield name, tensor


def _sample(tensor: torch.Tensor) -> bytes:
    """The bytes of evenly spaced elements, the last one among them."""
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1)
    step = max(1, (flat.numel() - 1) // SAMPLE)
    picked = torch.cat([flat[::step], flat[-1:]]).contiguous().cpu()
    return bytes(picked.view(torch.uint8).numpy().data)
