"""How a model turns hidden states into logits: its head, and what it does to what the head returns."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["Head", "find_head"]


class Head:
    """Maps hidden states ``[n, hidden]`` after the final norm to logits ``[n, V]``, with the head in use when it is called."""

    def __init__(self, model: PreTrainedModel, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._model, self._after = weakref.ref(model), after

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        model = self._model()
        if model is None:
            raise StateError("the model of this stream is gone; keep it for as long as the stream scores tokens")
        return self._after(model.get_output_embeddings()(hidden))


def find_head(model: PreTrainedModel, config: Any, hidden: torch.Tensor, logits: torch.Tensor) -> Head | None:
    """The way from ``hidden`` ``[n, hidden]`` to ``logits`` ``[n, V]``, found by trying; None if it is not known."""
    cap, scale, divisor = (getattr(config, n, None) for n in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    candidates: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if cap:
        candidates.append(lambda x: torch.tanh(x / cap) * cap)
    if scale:
        candidates.append(lambda x: x * scale)
    if divisor:
        candidates.append(lambda x: x / divisor)
    candidates.append(lambda x: x)
    heads = [Head(model, after) for after in candidates]
    # The closest one: small logits look alike with and without a cap, and another head may make large ones.
    errors = [float((head(hidden).double() - logits.double()).abs().nan_to_num().max()) for head in heads]
    best = min(range(len(heads)), key=errors.__getitem__)
    return heads[best] if errors[best] <= 1e-2 * float(logits.double().abs().nan_to_num().max()) else None
