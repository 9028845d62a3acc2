"""How transformers' `generate` chooses a token and sees the end of an answer, for loops that are not its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import check_flag, integer
from kvsieve.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.model.generation import Settings

__all__ = ["Sampler"]


class Sampler:
    """The next token of one row, by what `generate` would be asked for.

    Args:
        width: tokens that are given before the first one is sampled.
        kwargs: arguments of `generate`; settings: what they come to.

    Raises:
        UnsupportedError: for arguments that are none of `generate`'s settings. ArgumentError: for a length that is reached already.
    """

    def __init__(
        self, model: PreTrainedModel, width: int, device: torch.device, kwargs: dict[str, Any], settings: Settings
    ) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        known = {
            name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria", "tokenizer")
        }
        try:
            config, left = model._prepare_generation_config(known.pop("generation_config", None), **known)
        except (TypeError, ValueError, AttributeError, RuntimeError) as err:  # transformers compares what it is given, tensors too
            raise ArgumentError(f"an answer of a batch cannot have these settings: {str(err).partition(chr(10))[0][:200]}") from err
        left = {name: value for name, value in left.items() if name in known}
        if left:
            raise UnsupportedError(f"an answer of a batch does not know {', '.join(sorted(left))}")
        most = settings.get("max_new_tokens")
        if most is None and settings.get("max_length") is not None:
            config.max_length = integer("max_length", settings.get("max_length"), 1)
        else:
            config.max_length = width + integer("max_new_tokens", 20 if most is None else most, 1)
        if config.max_length <= width:
            raise ArgumentError(f"max_length={config.max_length} is reached already by the {width} tokens that are given")
        model._prepare_special_tokens(config, True, device=device)
        self._sample = config.do_sample is not None and check_flag("do_sample", config.do_sample)
        self._processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=width,
            logits_processor=LogitsProcessorList(kwargs.get("logits_processor") or ()),
            device=str(device),
            model_kwargs={},
        )
        self._criteria = model._get_stopping_criteria(
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(kwargs.get("stopping_criteria") or ()),
            tokenizer=kwargs.get("tokenizer"),
        )

    def next(self, ids: torch.Tensor, logits: torch.Tensor, random: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The token ``[1]`` after ``ids`` ``[1, n]``, and the scores ``[1, V]`` that it was chosen by."""
        scores = self._processors(ids, logits.to(torch.float32, copy=True))
        if not self._sample:
            return scores.argmax(-1), scores
        return torch.multinomial(scores.softmax(-1), 1, generator=random)[:, 0], scores

    def over(self, ids: torch.Tensor, scores: torch.Tensor) -> bool:
        """Whether ``ids`` are the end of the answer."""
        return bool(self._criteria(ids, scores).all())
