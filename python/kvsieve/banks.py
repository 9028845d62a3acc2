"""Banks and models: a stream that opens with a bank says which model it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvsieve.bank.entries import BankLayer
from kvsieve.errors import StateError
from kvsieve.model import fingerprint
from kvsieve.model.parallel import refuse_files
from kvsieve.runtime.bank import Banking
from kvsieve.runtime.exclusive import exclusive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.runtime.engine import Engine

__all__ = ["identity_of", "lead", "remember", "tokenizer_of"]


def lead(engine: Engine, model: PreTrainedModel) -> None:
    """The engine's rows are what its bank holds, if it has one.

    Raises:
        CacheMismatchError: if the bank belongs to another model. UnsupportedError: on a model that is spread over processes.
        StateError: if another stream writes it.
    """
    part = engine.parts.find(Banking)
    if part is not None:
        refuse_files(engine.facts, "a bank")
        layers = [BankLayer(x.index, x.num_kv_heads, x.key_dim, x.value_dim, x.dtype) for x in engine.facts.layers]
        part.lead(part.rule.book.bind(layers, identity_of(engine, model)))


def identity_of(engine: Engine, model: PreTrainedModel) -> dict[str, Any]:
    """What tells a model from others."""
    ropes = [layer.rope for layer in engine.facts.layers]
    return {
        "model class": type(model).__name__,
        "layers": list(engine.facts.layer_types),
        "rotary positions": [None if r is None else [r.inv_freq.tolist(), r.layout, r.factor] for r in ropes],
        "weights or configuration": fingerprint.weights(model),
    }


def tokenizer_of(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others."""
    return {"tokenizer": fingerprint.tokenizer(tokenizer)}


@exclusive
def remember(engine: Engine) -> None:
    """All that the engine's rows still hold goes to its bank; it then holds nothing.

    Raises:
        StateError: without a bank that it writes.
    """
    part = engine.parts.find(Banking)
    if part is None:
        raise StateError("this stream has no bank; open one with a policy such as StreamingLLM(1024) >> MemoryBank()")
    engine.idle()
    part.remember()
    engine.reset()
