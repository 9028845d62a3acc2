"""Tokenizers that need no model, and `kvsieve eval` on the tiny one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import kvsieve
import tiny
import torch
from kvsieve.evals import harness, results
from kvsieve.evals.task import Question
from kvsieve.evals.tasks import TASKS

__all__ = ["POLICIES", "Chunky", "Letters", "evaluate", "settings", "stock_choice"]

POLICIES = ("full()", "streamingllm(64)")


class Letters:
    """A tokenizer with one token a letter, and one that begins a text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None, **_: Any) -> dict[str, Any]:
        ids = [3 if letter == "\n" else 4 + (ord(letter) - 32) for letter in text]
        ids = [self.bos_token_id, *ids] if add_special_tokens else ids
        return {"input_ids": torch.tensor([ids]) if return_tensors == "pt" else ids}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        wanted = [int(one) for one in ids if not (skip_special_tokens and int(one) < 3)]
        return "".join("\n" if one == 3 else chr(28 + one) if one > 3 else "~" for one in wanted)


class Chunky(Letters):
    """Up to three letters a token, and none that begins a text."""

    bos_token_id = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        return {"input_ids": [self.known.setdefault(one, len(self.known)) for one in re.findall(r"\s|\w{1,3}|[^\w\s]", text)]}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        known = list(self.known)
        return "".join(known[one] for one in ids)


def settings(**changes: Any) -> harness.Settings:
    return harness.Settings(**{"task": "kv-turns", "policies": POLICIES, "lengths": (400,), "cases": 2, "chunk": 96, **changes})


def evaluate(task: str, **changes: Any) -> list[results.CaseResult]:
    policies = [kvsieve.methods.parse(text) for text in POLICIES]
    return list(harness.evaluate(tiny.model(), Letters(), TASKS[task], policies, settings(task=task, **changes)))


def stock_choice(context: Sequence[int], question: Question) -> tuple[int, ...]:
    """The option of the highest mean log-probability a token after the context, by the tiny model without a stream."""
    means = []
    for option in question.options:
        ids = torch.tensor([[*context, *question.ids, *option]])
        with torch.no_grad():
            losses = (
                tiny.model()(ids).logits[0, -len(option) - 1 : -1].float().log_softmax(-1).gather(1, ids[0, -len(option) :, None])
            )
        means.append(float(losses.mean()))
    return question.options[means.index(max(means))]
