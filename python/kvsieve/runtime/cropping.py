"""What refusals to crop have in common: how far a crop can be exact, and what goes further."""

from __future__ import annotations

__all__ = ["GO_BACK", "SPARE"]

SPARE = 64
"""Tokens that can be forgotten exactly: so many queries are kept beyond those that are looked at."""

GO_BACK = "take a mark before (stream.mark()) and go back to it (stream.rewind(mark))"
"""The end of every message that refuses a crop."""
