"""What the demo is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What the demo runs. Counts are tokens unless they say otherwise.

    Attributes:
        seconds: for the whole demo; `tokens`, `dialogues` and the memories are chosen to fit, where they are not given.
        tokens: how much of the text every memory reads, however long that takes.
        dialogues: shopping lists, however long they take.
    """

    out: Path = Path("out/demo")
    text: Path | None = None
    seconds: float = 180.0
    tokens: int | None = None
    budget: int = 1024
    dialogues: int | None = None
    new_tokens: int = 40
    chunk: int = 512
    seed: int = 0
    dtype: str | None = None
    threads: int | None = None
    backend: str | None = None

    def quick(self) -> Settings:
        """A fraction of everything: seconds rather than minutes, and no claim in the numbers."""
        return replace(self, tokens=min(self.tokens or 3072, 3072), dialogues=1, new_tokens=16)

    @property
    def shopping_budget(self) -> int:
        """Half the budget: the dialogues are short, and less than half of each must fit."""
        return self.budget // 2
