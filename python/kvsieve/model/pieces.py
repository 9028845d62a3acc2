"""A forward that is read in pieces: the arguments of each, and what is left for the forward under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.model.cache import StreamCache
    from kvsieve.runtime.candidates import Pieces

__all__ = ["read_pieces"]


def read_pieces(model: PreTrainedModel, cache: StreamCache, kwargs: dict[str, Any], pieces: Pieces) -> dict[str, Any]:
    """Read all pieces but the last, and return the arguments for that one, which is left to the forward under way."""
    engine = cache.engine
    reading, turn, seen = engine.candidates, engine.transcript.turn, engine.columns
    before = engine.state() if pieces.verifying else None
    at = None if turn is None else turn.place
    parts = [_piece(kwargs, lo, hi, seen, own=turn is not None) for lo, hi in pieces.bounds]
    if not pieces.verifying and "logits_to_keep" in kwargs:
        parts[-1]["logits_to_keep"] = kwargs["logits_to_keep"]
    reading.begin(pieces.verifying)
    try:
        for part in parts[:-1]:
            if pieces.copies > 1:
                part = {name: _every(value, pieces.copies) for name, value in part.items()}
            reading.piece_read(model(**part), engine.state)
    except BaseException:
        reading.end()
        if before is not None:
            engine.return_to(before)
            if turn is not None and at is not None:
                turn.place = at
        raise
    finally:
        reading.inner = False
    if pieces.copies > 1 and engine.num_rows:
        assert turn is not None
        turn.prompt_state = engine.state()
        cache.batch_repeat_interleave(pieces.copies)
    return parts[-1]


def _piece(kwargs: dict[str, Any], lo: int, hi: int, seen: int, *, own: bool) -> dict[str, Any]:
    """The arguments of a forward over columns ``lo .. hi`` of the input only."""
    part = {**kwargs, "input_ids": kwargs["input_ids"][:, lo:hi]}
    if "logits_to_keep" in kwargs:
        part["logits_to_keep"] = 1
    if isinstance(mask := kwargs.get("attention_mask"), torch.Tensor):
        # Of the stream's own turns the engine knows the pads: only the new columns' are passed on.
        part["attention_mask"] = mask[:, seen + lo : seen + hi] if own else mask[:, : seen + hi]
    if isinstance(positions := kwargs.get("position_ids"), torch.Tensor):
        part["position_ids"] = positions[..., lo:hi]
    return part


def _every(value: Any, copies: int) -> Any:
    return value[::copies] if isinstance(value, torch.Tensor) and value.dim() >= 2 else value
