"""Models that are spread over processes by transformers' tensor parallelism: each process holds some of the heads of every layer.

What every head decides for itself needs nothing, and neither does what follows from logits, which all processes have. What the
heads of a layer decide together is agreed by a sum over the processes (:class:`kvsieve.facts.Ranks`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from kvsieve.errors import StateError, UnsupportedError, UnsupportedModelError
from kvsieve.facts import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.facts import ModelFacts

__all__ = ["check_same", "ranks_of", "refuse_files"]


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The processes that share ``model``; None if it is whole.

    Raises:
        UnsupportedModelError: if they do not divide its KV heads.
    """
    size = getattr(model, "_tp_size", None) or 1
    mesh: Any = getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None:
        return None
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % size:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {heads} KV heads, which {size} processes do not divide; a stream needs whole heads in each"
        )
    return Ranks(mesh.get_group() if mesh.ndim == 1 else mesh["tp"].get_group(), size)


def check_same(facts: ModelFacts, what: str) -> None:
    """All processes open the same stream.

    Args:
        what: the stream, in words that are the same for the same stream.

    Raises:
        StateError: in all of them, if they do not.
    """
    if facts.ranks is not None and not facts.ranks.agree(hashlib.sha256(what.encode()).digest(), facts.layers[0].device):
        raise StateError(f"the {facts.ranks.size} processes of this model open different streams; this one's is {what}")


def refuse_files(facts: ModelFacts, what: str) -> None:
    """Refuse what would write or read one process's heads as if they were all.

    Raises:
        UnsupportedError: on a model that is spread over processes.
    """
    if facts.ranks is not None:
        raise UnsupportedError(f"{what} holds all heads of a model, and this one is spread over {facts.ranks.size} processes")
