"""Token ids, masks of them and row indices that callers pass: checked once, before anything of them reaches the model.

An id that the model has no embedding for is an ``IndexError`` deep inside of torch on a CPU. On a GPU it is an assertion, after
which the process cannot use the GPU any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvsieve.checks import MOST_ROWS, integer, plain, told
from kvsieve.errors import ArgumentError, RangeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

__all__ = [
    "check_device",
    "check_forward",
    "check_ids",
    "check_known",
    "check_mask",
    "is_known",
    "number_of",
    "row_indices",
    "token_list",
    "vocabulary",
]

MOST_IDS = 2**28
"""Token ids of one call; a tensor that says that it has more is a slip, and would take gigabytes once it is copied."""

_INTEGERS = (torch.int64, torch.int32)


def check_ids(ids: Any, name: str, *, empty: bool = False) -> torch.Tensor:
    """``ids`` as int64 ``[B, n]``, neither of which is 0, or, where it may be ``empty``, no ``B``.

    Raises:
        ShapeError: for anything else than a dense int64 or int32 tensor of such a shape that holds its numbers.
    """
    if not isinstance(ids, torch.Tensor):
        raise ShapeError(f"{name} must be an integer tensor of shape [batch, tokens], got {type(ids).__name__}")
    if ids.is_nested or ids.layout is not torch.strided or ids.is_meta:
        kind = "nested" if ids.is_nested else "on the device meta, and holds nothing" if ids.is_meta else str(ids.layout)
        raise ShapeError(f"{name} must be a dense integer tensor of shape [batch, tokens], this one is {kind}")
    if ids.dim() != 2 or ids.dtype not in _INTEGERS:
        raise ShapeError(f"{name} must be an integer tensor of shape [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[0] == 0 or (ids.shape[1] == 0 and not empty):
        raise ShapeError(f"the prompt is empty: {name} have shape {tuple(ids.shape)}")
    if ids.shape[0] > MOST_ROWS or ids.numel() > MOST_IDS:
        raise ShapeError(
            f"{name} have shape {tuple(ids.shape)}; a call takes at most {MOST_ROWS} rows and {MOST_IDS} ids, so feed a longer "
            "text in several"
        )
    return ids.long()


def check_device(model: PreTrainedModel, ids: torch.Tensor, name: str) -> None:
    """Refuse ids on another device than the model's embedding.

    Raises:
        ShapeError: saying where they belong.
    """
    weight = getattr(_embedding(model), "weight", None)
    # What accelerate has dispatched moves its inputs by itself.
    if isinstance(weight, torch.Tensor) and not weight.is_meta and weight.device != ids.device and not hasattr(model, "_hf_hook"):
        raise ShapeError(f"{name} are on {ids.device}, the model on {weight.device}; pass {name}.to(model.device)")


def check_known(model: PreTrainedModel, ids: torch.Tensor, name: str) -> None:
    """Refuse ids (int64, ``[n]`` or ``[B, n]``) that the model has no embedding for.

    On a GPU, a single token of each row is not looked at: its caller would have to wait for it at every step.

    Raises:
        RangeError: naming one of them.
    """
    size = vocabulary(model)
    if size is None or ids.numel() == 0 or (ids.device.type != "cpu" and ids.shape[-1] == 1):
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low >= 0 and high < size:
        return
    unknown = sorted(set(ids[(ids < 0) | (ids >= size)].tolist()) - _placeholders(model))
    if unknown:
        raise RangeError(
            f"{name} hold {unknown[0]}, and this {type(model).__name__} knows the tokens 0 to {size - 1}; is the tokenizer another "
            "model's?"
        )


def check_mask(mask: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    """``mask``, which says of each of ``ids`` whether it is a token.

    Raises:
        ShapeError: for what is no dense tensor of that shape.
    """
    fits = isinstance(mask, torch.Tensor) and not mask.is_nested and mask.shape == ids.shape
    if not fits or mask.layout is not torch.strided or mask.is_meta or mask.is_quantized:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) and not mask.is_nested else type(mask).__name__
        raise ShapeError(f"attention_mask must be a dense tensor of the shape of {name}, {tuple(ids.shape)}, got {shape}")
    return mask  # type: ignore[no-any-return]


def check_forward(model: PreTrainedModel, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """Refuse a forward over no token, over one that the model does not know, or with logits of no columns.

    Args:
        ids: ``input_ids`` as they were passed; what is no plain tensor of integers is left to the model. On a GPU, so are forwards
            over one token of each row: to look at them would be to wait for them.
        kwargs: the forward's arguments.

    Raises:
        ShapeError, RangeError, ArgumentError: before anything has changed.
    """
    keep = kwargs.get("logits_to_keep", 1)
    if not (isinstance(keep, int) or (isinstance(keep, torch.Tensor) and keep.dim() == 1)):
        raise ArgumentError(f"logits_to_keep must be an int, or a tensor of columns, got {told(keep)}")
    if not isinstance(ids, torch.Tensor) or ids.dtype not in _INTEGERS or ids.is_nested or ids.dim() == 0:
        return
    check_known(model, check_ids(ids if ids.dim() == 2 else ids[None].flatten(1), "input_ids"), "input_ids")


def is_known(model: PreTrainedModel, token: int) -> bool:
    """Whether the model has an embedding for ``token``, as far as that can be told."""
    size = vocabulary(model)
    return size is None or 0 <= token < size


def vocabulary(model: PreTrainedModel) -> int | None:
    """How many tokens the model has an embedding for; None where that is not known."""
    size = getattr(_embedding(model), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _embedding(model: PreTrainedModel) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _placeholders(model: PreTrainedModel) -> set[int]:
    """Ids that stand for images and the like: the model puts something else in their place before it looks at its embedding."""
    config = model.config
    if config.get_text_config(decoder=True) is config:
        return set()
    named = {name: value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    return {value for value in named.values() if isinstance(value, int)}


def number_of(given: torch.Tensor) -> Any:
    """The one integer that a tensor holds; the tensor where it holds something else."""
    plain_one = not given.is_nested and given.layout is torch.strided and not given.is_meta and not given.is_quantized
    return given.item() if plain_one and given.numel() == 1 else given


def token_list(name: str, tokens: Any) -> list[int]:
    """One token id or several, as a list.

    Raises:
        ArgumentError: for anything else than ints, alone, in a list or tuple, or in a dense tensor.
    """
    if isinstance(tokens, torch.Tensor):
        dense = not tokens.is_nested and tokens.layout is torch.strided and not tokens.is_meta and not tokens.is_quantized
        if not dense or tokens.dim() > 1 or tokens.numel() > MOST_ROWS:
            raise ArgumentError(f"{name} must be a token id, or a list of some, got {told(tokens)}")
        tokens = tokens.tolist()
    several = tokens if isinstance(tokens, list | tuple) else [tokens]
    return [integer(name, token, -(2**63), 2**63 - 1) for token in several]


def row_indices(name: str, index: Any, num_rows: int, *, from_end: bool = False, mask: bool = False) -> list[int]:
    """Rows of a stream, in any order and any number of times.

    Args:
        index: integers ``[n]``, a tensor or a sequence.
        num_rows: how many there are.
        from_end: whether -1 is the last one.
        mask: whether bools ``[num_rows]`` may say of each row whether it is meant.

    Raises:
        RangeError: for anything else, or none.
    """
    if isinstance(index, torch.Tensor):
        if (
            index.is_nested
            or index.layout is not torch.strided
            or index.is_meta
            or index.is_quantized
            or index.dim() != 1
            or index.numel() > MOST_ROWS
        ):
            raise RangeError(f"{name} must be a dense tensor of shape [rows], at most {MOST_ROWS} of them, got {told(index)}")
        index = index.tolist()
    elif hasattr(index, "tolist"):
        index = index.tolist()
    if not isinstance(index, list | tuple | range) or not 0 < len(index) <= MOST_ROWS:
        raise RangeError(f"{name} must name 1 to {MOST_ROWS} rows, got {told(index)}")
    given = [plain(row) for row in index]
    if mask and all(isinstance(row, bool) for row in given):
        if len(given) != num_rows or not any(given):
            raise RangeError(
                f"{name} must say of each of {num_rows} rows whether it stays, and of one that it does, got {told(given)}"
            )
        return [at for at, stays in enumerate(given) if stays]
    least = -num_rows if from_end else 0
    found = [integer(name, row, least, num_rows - 1, RangeError, "rows of the stream, each ") for row in given]
    return [row % num_rows for row in found]
