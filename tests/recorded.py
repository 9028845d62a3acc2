"""A recording as the tests read it, by its description and without the page; and a tokenizer with hostile words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from kvsieve.files.recording_file import COLUMNS, read, unpack

MOST = 1 << 24

WORDS = [
    "</script><script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "<!--",
    "]]>",
    "&lt;",
    "\n",
    "é🌊",
    " ",
    "\u2028",
    "sea",
]


class Words:
    """Stands for a tokenizer. Some of its words would be HTML, if they were read as such."""

    def decode(self, ids: Any) -> str:
        return "".join(WORDS[int(i) % len(WORDS)] for i in ids)


class Recorded:
    """A recording, unpacked."""

    def __init__(self, path: Path) -> None:
        self.told = read(path)
        self.tokens: list[str] = self.told["tokens"]
        self.steps = {name: unpack(self.told["steps"][name], dtype, MOST) for name, dtype in COLUMNS.items()}
        self.holds = {held["layer"]: held for held in self.told["holds"]}

    def held(self, step: int, layer: int | None = None, head: int = 0) -> list[int]:
        """Positions that a head holds after a step."""
        held, count = self.holds[layer], len(self.tokens)
        left = unpack(held["left"], "<i4", MOST).reshape(held["heads"], count)[head]
        now = (left < 0) | (left > step)
        for at, position, when, there in unpack(held["again"], "<i4", MOST).reshape(-1, 4):
            if at == head and when <= step:
                now[position] = bool(there)
        now[self.steps["seen"][step] :] = False
        return np.flatnonzero(now).tolist()

    def scores(self, step: int, layer: int | None = None, head: int = 0) -> dict[int, float]:
        """Scores of positions after a step."""
        told = self.holds[layer]["scores"]
        if told is None:
            return {}
        kinds = {"head": "<i4", "step": "<i4", "position": "<i4", "score": "<f4"}
        columns = [unpack(told[name], kind, MOST) for name, kind in kinds.items()]
        return {int(p): float(s) for at, when, p, s in zip(*columns) if at == head and when <= step}

    def selected(self, step: int, layer: int, head: int) -> list[tuple[int, int]] | None:
        """Ranges that a head selected at a step; None where it read everything."""
        (lane,) = [one for one in self.told["reads"]["of"] if one["layer"] == layer and one["head"] in (None, head)]
        steps, counts, ranges = (unpack(lane[name], "<i4", MOST) for name in ("step", "count", "ranges"))
        at = int(np.searchsorted(steps, step, "right")) - 1
        if counts[at] < 0:
            return None
        first = int(np.maximum(counts[:at], 0).sum())
        edges = np.cumsum(ranges[2 * first : 2 * (first + counts[at])])
        return [(int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2)]
