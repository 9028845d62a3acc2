"""A context that is read twice (JRT-Prompt, Arora et al., 2024, arXiv 2407.05483).

    question, context, context, question

A memory with a budget chooses what to keep before it knows what will be asked. When the context comes the second time, it knows.
"""

from __future__ import annotations

from typing import Any

import torch

from kvsieve import generate as turns
from kvsieve.checks import told
from kvsieve.errors import CacheMismatchError, StateError
from kvsieve.runtime import by_position
from kvsieve.runtime.selection import Selection

__all__ = ["read_twice"]


def read_twice(stream: turns.Reader, context: Any, question: Any, keep: str) -> None:
    """See :meth:`kvsieve.Stream.read_twice`."""
    if not isinstance(keep, str) or keep not in ("both", "second"):
        raise StateError(f"keep must be 'both' or 'second', got {told(keep)}")
    engine, asked, texts = stream.engine, _accept(stream, question, "question"), _accept(stream, context, "context")
    if len(asked) != len(texts):
        raise CacheMismatchError(f"the question has {len(asked)} rows, the context {len(texts)}; give each row both")
    with turns.waiting(stream, asked, None) as before:
        whole = [[old, ask, text.to(ask.device), text.to(ask.device), ask] for old, ask, text in zip(before, asked, texts)]
        rows = [torch.cat(parts) for parts in whole]
        if keep == "both":
            return turns.feed(stream, rows, stream.chunk)
        selection = engine.parts.find(Selection)
        if selection is not None:
            selection.check_evict(0, 0, 1)
        seen = engine.blocks.seen or [0] * len(rows)
        starts = [at + len(old) + len(ask) for at, old, ask in zip(seen, before, asked)]
        state = engine.state()
        try:
            turns.feed(stream, rows, stream.chunk)
            for row, (start, text) in enumerate(zip(starts, texts)):
                by_position.evict(engine, start, start + len(text), row)
        except BaseException:
            engine.rewind(state)
            raise
    return None


def _accept(stream: turns.Reader, text: Any, name: str) -> list[torch.Tensor]:
    """The tokens of each row."""
    ids, others = turns.unpack(text, {})
    rows = turns.accept(stream, ids, others.pop("attention_mask", None), name)
    turns.refuse_others(others)
    return rows
