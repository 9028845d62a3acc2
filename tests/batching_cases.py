"""What the tests of a batch share: prompts, streams, how they are asked, and a streamer that remembers."""

from __future__ import annotations

from typing import Any

import kvsieve
import tiny
import torch
from systems import PROMPT

LENGTHS = (PROMPT, 1, 70)


def prompt(at: int) -> torch.Tensor:
    return tiny.ids(1, LENGTHS[at], 60 + at)


def opened(policy: Any, backend: str = "cpu") -> kvsieve.Stream:
    return kvsieve.stream(tiny.model(), policy, backend)


def greedy(most: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": most, "do_sample": False, **more}


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1
