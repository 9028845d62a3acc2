"""The last token of each row, read again where a crop took the logits away that the next token's score needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve.errors import CacheMismatchError, StateError
from kvsieve.model.support import cache_name
from kvsieve.runtime.batch import Batch, positions_of
from kvsieve.runtime.surprisal import SurprisalScores
from kvsieve.runtime.turn import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.model.cache import StreamCache
    from kvsieve.runtime.engine import Engine

__all__ = ["read_again", "without_last"]


def without_last(engine: Engine) -> list[torch.Tensor]:
    """Forget each row's last token, if the logits that follow it are not known, and return them, int64 ``[1]`` each."""
    transcript, planner, scores = engine.transcript, engine.planner, engine.parts.find(SurprisalScores)
    if scores is None or scores.tail is not None or not transcript.rows:
        return []
    if min(transcript.seen()) < 1 or min(transcript.tokens_in_last(1)) < 1:
        return []
    try:
        engine.check_crop(1, to_read_again=True)
    except (CacheMismatchError, StateError):
        return []
    rows = transcript.rows
    known = [planner.scores(0, row)[-1] if planner.resident(0, row) else np.nan for row in range(planner.num_rows)]
    engine.crop(1, to_read_again=True)
    scores.first = np.array(known, np.float32)
    transcript.rows = tuple(replace(now, unread=row.unread) for now, row in zip(transcript.rows, rows))
    return [row.ids.last() for row in rows]


def read_again(model: PreTrainedModel, cache: StreamCache) -> None:
    """Before a caller's own forward: the tokens are forgotten and read at once."""
    engine = cache.engine
    scores = engine.parts.find(SurprisalScores)
    before = engine.state() if scores is not None and scores.tail is None and engine.columns else None
    last = without_last(engine)
    if before is None or not last:
        return
    batch = Batch.of(last)
    engine.transcript.turn = Turn(1, batch.counts, 1)
    try:
        with torch.no_grad():
            model(input_ids=batch.ids, position_ids=positions_of(engine, batch), use_cache=True, **{cache_name(model): cache})
    except BaseException:
        engine.return_to(before)
        raise
    finally:
        engine.transcript.turn = None
