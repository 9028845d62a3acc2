"""The policies that are tried within a budget of bytes: one kind each, as a function of the tokens that it may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CANDIDATES", "Candidate"]

EXACT, CODES, FEW_CODES = "", "quantized(8, when='prefill')", "quantized(4, when='prefill')"
"""How tokens are stored: as they come, in 8 bits, in 4. A text is compressed while it is read, and never held as it came."""


@dataclass(frozen=True)
class Candidate:
    """A kind of policy.

    Attributes:
        name: for people.
        text: its text, for so many tokens in memory; None if that is too few for it.
        stored: how it stores them: a storage rule as text, or empty.
        holds_all: whether it holds every token of the text in memory, and so fits only texts that short.
    """

    name: str
    text: Callable[[int], str | None]
    stored: str = EXACT
    holds_all: bool = False


def _window(make: str, stored: str = EXACT) -> Callable[[int], str | None]:
    """An eviction policy with room for its sinks and newest tokens."""
    rest = f" | {stored}" if stored else ""
    return lambda tokens: None if tokens < 128 else make.format(tokens=tokens, window=tokens - 4) + rest


def _all(make: str) -> Callable[[int], str | None]:
    return lambda tokens: make


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("everything", _all("full()"), holds_all=True),
    Candidate("newest tokens", _window("streamingllm({tokens})")),
    Candidate("newest tokens in 8 bits", _window("streamingllm({tokens})", CODES), CODES),
    Candidate("surprising tokens", _window("sirllm({tokens})")),
    Candidate("surprising tokens in 8 bits", _window("sirllm({tokens})", CODES), CODES),
    Candidate("tokens attended to", _window("snapkv({tokens})")),
    Candidate("tokens attended to, accumulated", _window("h2o({tokens})")),
    Candidate("newest tokens at true positions", _window("lminfinite({window})")),
    Candidate("everything in 8 bits", _all(f"full() | {CODES}"), CODES, holds_all=True),
    Candidate("everything in 4 bits", _all(f"full() | {FEW_CODES}"), FEW_CODES, holds_all=True),
    Candidate("everything, the best pages read", _all("quest(1024)"), holds_all=True),
    Candidate("everything in 8 bits, the best pages read", _all(f"quest(1024) | {CODES}"), CODES, holds_all=True),
    Candidate("newest tokens in 4 bits", _window("streamingllm({tokens})", FEW_CODES), FEW_CODES),
)
"""In the order in which they are tried: what most people would use comes first, so that a short time is well spent."""
