"""What kvsieve relies on in transformers' `generate`: names, settings, criteria and streamers.

A turn of a stream is one call of ``model.generate``. It is given either only the tokens that the model has not read (which costs no
more after a million tokens than after ten), or the whole conversation where something in the call looks at it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import MOST_ROWS, integer
from kvsieve.errors import StateError
from kvsieve.model.ids import token_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Settings", "StreamerProxy", "Watch", "driven_by_generate", "stopping_list"]

_STATELESS = frozenset(
    (
        *("max_new_tokens", "min_new_tokens", "max_time", "eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("renormalize_logits", "remove_invalid_values", "num_beams", "num_return_sequences", "early_stopping", "length_penalty"),
        *("use_cache", "cache_implementation", "low_memory", "disable_compile", "compile_config"),
        *("transformers_version", "trust_remote_code"),
        *("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "is_assistant"),
    )
)
"""Settings that do not look at the tokens of the conversation, nor count from its beginning."""

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "token_healing": False,
}
"""Values of other settings that do nothing."""

_ARGUMENTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "negative_prompt_ids", "custom_generate")
"""Arguments of `generate` that may look at the tokens of the conversation."""

_OTHER_ARGUMENTS = ("streamer", "tokenizer", "assistant_tokenizer", "generation_config", "assistant_model", "synced_gpus")


def driven_by_generate(model: torch.nn.Module) -> bool:
    """Whether a caller's `model.generate` is running on this thread: the newest token that it samples is not fed to the model."""
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


class Settings:
    """The settings of one call of `generate`, as transformers resolves them: keywords, then the `GenerationConfig` that was passed,
    then the model's own.

    Attributes:
        ends: token ids that end a row.

    Raises:
        ArgumentError: for ends, beams or sequences that are no numbers.
        StateError: for a cache that the call names.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, kwargs
        self._passed = kwargs.get("generation_config")
        self.ends = self._ends()
        if self._asked("cache_implementation") is not None:
            raise StateError("a stream is the cache of its turns: leave cache_implementation out, and choose a policy instead")

    def get(self, name: str) -> Any:
        """The value in force; None if nothing sets it."""
        if name in self._kwargs:
            return self._kwargs[name]
        value = None if self._passed is None else getattr(self._passed, name, None)
        return getattr(self._model.generation_config, name, None) if value is None else value

    def _asked(self, name: str) -> Any:
        """The value that the call itself sets, by a keyword or its `GenerationConfig`, and that is not the model's own; None if it
        sets none."""
        value = self._kwargs.get(name)
        value = getattr(self._passed, name, None) if value is None else value
        return None if value == getattr(self._model.generation_config, name, None) else value

    def _ends(self) -> list[int]:
        ends = self.get("eos_token_id")
        return [] if ends is None else token_list("eos_token_id", ends)

    @property
    def copies(self) -> int:
        """Rows that `generate` makes of each prompt: beams or sequences."""
        return max(self._count(name) for name in ("num_beams", "num_return_sequences"))

    @property
    def beams(self) -> bool:
        """Whether rows are reordered while they are generated."""
        return self._count("num_beams") > 1

    def _count(self, name: str) -> int:
        value = self.get(name)
        return 1 if value is None else integer(name, value, 1, MOST_ROWS)

    @property
    def assisted(self) -> bool:
        """Whether candidates are verified."""
        lookup, early = self.get("prompt_lookup_num_tokens"), self.get("assistant_early_exit")
        return self._kwargs.get("assistant_model") is not None or bool(lookup) or bool(early)

    @property
    def looks_back(self) -> bool:
        """Whether something in the call looks at the whole conversation, or counts from its beginning."""
        if any(self._kwargs.get(name) is not None for name in _ARGUMENTS):
            return True
        names = {*vars(self._model.generation_config), *self._kwargs, *(() if self._passed is None else vars(self._passed))}
        for name in names - _STATELESS:
            value = self.get(name)
            if (
                name.startswith("_")
                or value is None
                or name in ("streamer", "tokenizer", "generation_config", "assistant_model", "synced_gpus")
            ):
                continue
            if name == "max_length" and self.get("max_new_tokens") is not None:
                continue
            if name not in _NEUTRAL or value != _NEUTRAL[name]:
                return True
        return False

    @property
    def ends_rows(self) -> bool:
        """Whether a row may end before the call does, other than by an end token."""
        return bool(self._kwargs.get("stopping_criteria")) or self.get("stop_strings") is not None

    def stoppers(self) -> list[Callable[..., torch.Tensor]]:
        """Criteria of transformers' own that end one row and not the others: those that `generate` makes, or a caller's in their
        place."""
        from transformers.generation import EosTokenCriteria, StopStringCriteria

        kinds = (EosTokenCriteria, StopStringCriteria)
        found = [one for one in self._kwargs.get("stopping_criteria") or () if type(one) in kinds]
        given = {type(one) for one in found}
        if self.ends and EosTokenCriteria not in given:
            found.append(EosTokenCriteria(self.ends))
        strings, tokenizer = self.get("stop_strings"), self._kwargs.get("tokenizer")
        if strings is not None and tokenizer is not None and StopStringCriteria not in given:
            found.append(StopStringCriteria(tokenizer, strings))
        return found


class Watch:
    """A criterion that ends nothing: it tells what was sampled, and which rows are at their end."""

    def __init__(self, heard: Callable[[torch.Tensor, torch.Tensor | None], None], stoppers: Iterable[Callable[..., Any]]) -> None:
        self._heard, self._stoppers = heard, list(stoppers)
        self.overheard: list[torch.Tensor] = []
        """What a caller's own criteria said at this step."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nobody = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ended: torch.Tensor | None = None
        if input_ids.shape[0] > 1:
            ended = nobody.clone()
            for said in [*self.overheard, *(stopper(input_ids, scores, **kwargs) for stopper in self._stoppers)]:
                ended |= torch.as_tensor(said, dtype=torch.bool, device=ended.device)
        self.overheard = []
        self._heard(input_ids, ended)
        return nobody


class _Overheard:
    """A caller's criterion, whose answers the watch hears as well."""

    def __init__(self, criterion: Any, watch: Watch) -> None:
        self._criterion, self._watch = criterion, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        said = self._criterion(*args, **kwargs)
        self._watch.overheard.append(said)
        return said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)


def stopping_list(given: Iterable[Any] | None, watch: Watch, *, alone: bool) -> Any:
    """A caller's criteria and the watch, which comes last.

    Transformers' own criteria stay what they are, since `generate` tells them by type, and so do those of a row that is ``alone``,
    whose end is the end of the call.
    """
    from transformers import StoppingCriteriaList

    own = [one if alone or type(one).__module__.startswith("transformers.") else _Overheard(one, watch) for one in given or ()]
    return StoppingCriteriaList([*own, watch])


class StreamerProxy:
    """A streamer that is told this turn's prompt, whatever `generate` was given, and whose tokens count as delivered."""

    def __init__(self, streamer: Any, prompt: torch.Tensor, delivered: Callable[[torch.Tensor], None]) -> None:
        self._streamer, self._prompt, self._delivered = streamer, prompt, delivered
        self._first = True

    def put(self, value: torch.Tensor) -> None:
        """Pass tokens on; instead of what `generate` begins with, this turn's prompt."""
        if self._first:
            self._first = False
            self._streamer.put(self._prompt.cpu())
            return
        self._delivered(value)
        self._streamer.put(value)

    def end(self) -> None:
        """Pass the end on."""
        self._streamer.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)
