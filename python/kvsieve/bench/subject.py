"""The model whose whole tokens are measured, and what its caches are filled with.

Unless one is named it has SmolLM2-135M's shape and random weights, and its caches hold random numbers: the time of a token does
not depend on what they are. A named model reads a text first: random keys are far from any text to it, and magnify rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import kvsieve
from kvsieve.bench.caches import STOCK, make_cache
from kvsieve.bench.options import RANDOM, Shape
from kvsieve.errors import BenchError
from kvsieve.evals.texts import read_text
from kvsieve.facts import LayerRope
from kvsieve.model.support import cache_name
from kvsieve.quantized_weights import Int4Linear, Int8Linear

__all__ = [
    *("CHUNK", "LAYERS", "SHAPE", "VOCABULARY", "Layers", "Pair", "layers_of", "load", "model", "past", "text_ids", "token"),
    *("unrotated", "weight_bytes", "wide"),
]

LAYERS, SHAPE, VOCABULARY = 30, Shape(9, 3, 64), 49152

CHUNK = 512
"""Tokens of a forward while a text is read."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Layers(NamedTuple):
    """What a model's caches hold: so many layers, of so many KV heads with keys and values of so many channels."""

    layers: int = LAYERS
    kv_heads: int = SHAPE.kv_heads
    dim: int = SHAPE.dim

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * Shape(self.kv_heads, self.kv_heads, self.dim).token_bytes(itemsize)


@functools.lru_cache(maxsize=1)
def load(name: str, dtype: torch.dtype, weights: str | None = None) -> tuple[Any, Any]:
    """The model in ``dtype``, and its tokenizer; None of random weights, which are the same every time.

    Args:
        name: ``random``, ``smollm2``, a local folder, or a GGUF file. Raises as ``kvsieve.evals.models.load_model``.
        weights: linear layers in few bits; raises as ``quantize_weights``.
    """
    if weights is not None:
        from kvsieve.quantized_weights import quantize_weights

        made, tokenizer = load.__wrapped__(name, dtype)
        quantize_weights(made, weights)
        return made, tokenizer
    if name != RANDOM:
        from kvsieve.evals.models import load_model

        return load_model(name, dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SHAPE.heads * SHAPE.dim,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval(), None


def model(dtype: torch.dtype, name: str = RANDOM, weights: str | None = None) -> Any:
    """The model of :func:`load`."""
    return load(name, dtype, weights)[0]


@functools.lru_cache(maxsize=1)
def wide(dtype: torch.dtype, name: str = RANDOM, weights: str | None = None) -> Any:
    """The same weights, computing in float32."""
    narrow = model(dtype, name, weights)
    if dtype == torch.float32:
        return narrow
    if name == RANDOM:
        return copy.deepcopy(narrow).float()
    # A model that was read from GGUF refuses to be cast; read anew it gets the weights as they were rounded.
    made = load.__wrapped__(name, torch.float32)[0]
    with torch.no_grad():
        for mine, theirs in zip(made.parameters(), narrow.parameters()):
            mine.copy_(theirs)
    return made


def layers_of(made: Any) -> Layers:
    """What the caches of a model hold.

    Raises:
        BenchError: for a model whose layers are not alike: a cache of it cannot be filled without reading a text.
        UnsupportedModelError: for one that a stream does not serve.
    """
    with kvsieve.stream(made, kvsieve.Full(), backend="cpu") as stream:
        attachment = stream._attachment
        assert attachment is not None
        facts = attachment.facts
    kinds = {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in facts.layers}
    heads, dim, value_dim = next(iter(kinds))
    if len(kinds) > 1 or dim != value_dim or len(facts.layers) < len(facts.layer_types):
        raise BenchError("the layers of this model are not alike: `kvsieve bench policies` reads a text by it instead")
    return Layers(len(facts.layers), heads, dim)


@functools.lru_cache(maxsize=1)
def past(
    length: int,
    dtype: torch.dtype,
    layers: Layers = Layers(),  # noqa: B008
    name: str = RANDOM,
    weights: str | None = None,
) -> list[Pair]:
    """Keys and values ``[Hkv, length, D]`` of every layer: those of a text that a named model has read, or random ones.

    A text's keys are rotated, as transformers holds them.
    """
    if name != RANDOM:
        return read(name, length, dtype, weights)
    generator = torch.Generator().manual_seed(1)
    shape = (layers.kv_heads, length, layers.dim)

    def made() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [(made(), made()) for _ in range(layers.layers)]


def read(name: str, length: int, dtype: torch.dtype, weights: str | None = None) -> list[Pair]:
    """What transformers' full cache holds after ``length`` tokens of a text."""
    made, tokenizer = load(name, dtype, weights)
    cache = make_cache(STOCK, made.config, length)
    with torch.no_grad():
        ids = text_ids(name, tokenizer, length)
        for start in range(0, length, CHUNK):
            made(ids[:, start : start + CHUNK], **{cache_name(made): cache}, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def text_ids(name: str, tokenizer: Any, length: int) -> torch.Tensor:
    """The first tokens ``[1, length]`` of Python's own reference pages; random ones for random weights.

    Raises:
        BenchError: for more tokens than there are.
    """
    if name == RANDOM:
        return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(2))
    ids = tokenizer(read_text(None)[: 12 * length], return_tensors="pt", verbose=False)["input_ids"][:, :length]
    if ids.shape[1] < length:
        raise BenchError(f"the text has {ids.shape[1]:,} tokens; ask for a --length of so many at most")
    return torch.as_tensor(ids)


def unrotated(k: torch.Tensor, positions: Sequence[int], rope: LayerRope | None) -> torch.Tensor:
    """Keys ``[Hkv, n, D]`` as they were before ``rope`` rotated them by ``positions``."""
    if rope is None:
        return k
    turned = rope.rotate(k.double(), -torch.tensor(positions), factor=False)
    turned[..., : rope.rotary_dim] /= rope.factor
    return turned.to(k.dtype)


def weight_bytes(made: Any) -> int:
    """Bytes of weights that a token reads: all, but of a table of embeddings that is not the head too, which gives one row."""
    tables = made.get_input_embeddings().weight, getattr(made.get_output_embeddings(), "weight", None)
    read = sum(p.nbytes for p in made.parameters()) + sum(_packed_bytes(name, module) for name, module in made.named_modules())
    return int(read - (0 if tables[0] is tables[1] else tables[0].nbytes))


def _packed_bytes(name: str, module: torch.nn.Module) -> int:
    """Bytes of weights in few bits, which are no parameters, and of their scales: those that a token reads."""
    if not isinstance(module, Int4Linear | Int8Linear) or name.endswith(".many"):
        return 0
    return sum(buffer.nbytes for buffer in module.buffers(recurse=False))


def token(made: Any, cache: Any) -> torch.Tensor:
    """One token's forward: logits ``[1, 1, V]``. Without a cache it attends to itself alone."""
    with torch.no_grad():
        given = {"use_cache": False} if cache is None else {cache_name(made): cache}
        logits: torch.Tensor = made(torch.tensor([[7]]), **given).logits
    return logits
