"""The registered mask function. Without it left padding never reaches the attention function.

A stream's layers take the padding of the new columns, ``[B, q]``; every other layer gets the model's own mask. A mask is more than
padding where a model lets tokens see what comes after them (the tokens of an image): such a mask is recognised by the functions it
is made of, and refused before anything is stored.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from kvsieve.errors import PaddingError, UnsupportedError
from kvsieve.model.configs import original
from kvsieve.model.handoff import state

__all__ = ["check_dimensions", "kind_of", "mask_rows"]

Kind = Literal["causal", "sliding", "never", "other"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def mask_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The padding of the new columns ``[B, q]`` (or None) for a stream's layers, the model's own mask for all others."""
    cache = state.cache
    kind = "causal" if mask_function is None or cache is None else kind_of(mask_function)
    sliding = local_size is not None or kind == "sliding"
    if cache is None or (sliding and not getattr(cache, "serves_sliding", False)):
        return _stock(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            **({} if mask_function is None else {"mask_function": mask_function}),
            **kwargs,
        )
    if kind in ("other", "never"):
        raise UnsupportedError(
            "this forward's attention mask is not plain causal: the model lets some tokens, such as those of an image, see tokens "
            "that come after them, which a stream does not; pass text only, or use the model's own cache"
        )
    if attention_mask is None:
        return None
    cache.engine.check_mask(attention_mask, q_length)
    return attention_mask[:, -q_length:]


def check_dimensions(mask: Any) -> None:
    """Refuse a mask that says more than which tokens are pads.

    Raises:
        PaddingError: for a mask that is not two-dimensional.
    """
    for part in mask.values() if isinstance(mask, dict) else (mask,):
        dims = getattr(part, "ndim", None)
        if dims is not None and dims != 2:
            raise PaddingError(
                f"an attention mask inside a stream has two dimensions, [batch, tokens seen and new], got {dims}; what a token "
                "sees beyond pads is the policy's to decide"
            )


@functools.cache
def _leaves() -> dict[Any, Kind | str]:
    """Code objects of transformers' mask functions, by what they let a token see."""
    from transformers import masking_utils as m

    table: dict[Any, Kind | str] = {
        m.causal_mask_function.__code__: "causal",
        m.sliding_window_overlay(1).__code__: "sliding",
        m.and_masks().__code__: "and",
        m.or_masks().__code__: "or",
    }
    if hasattr(m, "blockwise_overlay"):
        table[m.blockwise_overlay(torch.zeros(1, 1)).__code__] = "blocks"
    return table


def kind_of(function: Any) -> Kind:
    """What a mask function lets a token see: all before it, those within a window before it, nothing, or something else."""
    code = getattr(function, "__code__", None)
    kind = _leaves().get(code, "other")
    if kind in ("causal", "sliding"):
        return kind  # type: ignore[return-value]
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()))) if code else {}
    if kind == "blocks":
        # Tokens of one block see each other; -1 is in no block.
        return "never" if bool((inside["block_sequence_ids"] < 0).all()) else "other"
    if kind not in ("and", "or"):
        return "other"
    parts = {kind_of(part) for part in inside["mask_functions"]}
    if kind == "or":
        parts.discard("never")
        return parts.pop() if len(parts) == 1 else "other"
    if parts == {"causal", "sliding"}:
        return "sliding"
    return parts.pop() if len(parts) == 1 else "other"


def _stock(**kwargs: Any) -> Any:
    """The mask that the model's own configuration names; None for an attention that takes none."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = original(kwargs["config"])._attn_implementation
    if state.watch is not None and state.watch.implementation is not None:
        name = state.watch.implementation
    return ALL_MASK_ATTENTION_FUNCTIONS[name](**kwargs) if name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys() else None
