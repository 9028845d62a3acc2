"""What the tests of joined documents share: texts, streams that read them, the stock model under the mask that says the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import kvsieve
import tiny
import torch

PAST, QUESTION = tiny.ids(1, 70, 1), tiny.ids(1, 5, 9)
DOCUMENTS = [tiny.ids(1, count, 20 + count) for count in (2, 140, 31)]


def documents(base: kvsieve.Stream, texts: Sequence[torch.Tensor]) -> list[kvsieve.Stream]:
    """A fork of ``base`` for each text, which has read it."""
    forks = []
    for text in texts:
        forks.append(base.fork())
        forks[-1].feed(text)
    return forks


@torch.no_grad()
def read(stream: kvsieve.Stream, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits ``[B, n, V]`` of the next tokens, at positions from ``start`` on."""
    positions = torch.arange(start, start + ids.shape[1])[None]
    return stream.model(input_ids=ids, position_ids=positions, past_key_values=stream.cache, use_cache=True).logits


def layout(past: int, lengths: Sequence[int], last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[n]`` and which token sees which, bool ``[n, n]``: of what came before, the past, its own document, or all."""
    part = [0] * past + [at + 1 for at, count in enumerate(lengths) for _ in range(count)] + [-1] * last
    positions = [*range(past), *(past + i for count in lengths for i in range(count))]
    positions += [past + max(lengths, default=0) + i for i in range(last)]
    query, key = torch.tensor(part)[:, None], torch.tensor(part)[None]
    sees = ((key == 0) | (key == query) | (query == -1)).tril()
    return torch.tensor(positions), sees


@torch.no_grad()
def stock(past: torch.Tensor, texts: Sequence[torch.Tensor], last: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The stock model's logits ``[1, n, V]`` of ``last``, under a mask over the whole sequence."""
    model = copy.deepcopy(tiny.model(**changes))
    model.set_attn_implementation("eager")
    positions, sees = layout(past.shape[1], [text.shape[1] for text in texts], last.shape[1])
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    ids = torch.cat([past, *texts, last], 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions[None], use_cache=False).logits
    return logits[:, -last.shape[1] :]


START = PAST.shape[1] + max(text.shape[1] for text in DOCUMENTS)
"""Where text goes on behind ``PAST`` and ``DOCUMENTS``."""
