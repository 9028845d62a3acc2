"""The real text that is read by default: the reference pages that every Python brings along."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_text"]


def read_text(path: Path | None = None) -> str:
    """A file's text, or that of Python's own reference pages, some 113,000 of SmolLM2's tokens."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
