"""The code of the pages under docs/ runs, block after block, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kvsieve
import tiny
import torch

DOCS = Path(__file__).parents[2] / "docs"


def tokenizer(text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Stands for a tokenizer: one token a letter."""
    ids = torch.tensor([[3 + ord(letter) % (tiny.VOCAB - 3) for letter in text]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_page_on_conversations() -> None:
    page = (DOCS / "conversations.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model = tiny.model()
    scope: dict[str, Any] = {"kvsieve": kvsieve, "model": model, "tokenizer": tokenizer}
    exec(compile(first, "conversations.md", "exec"), scope)
    for code in others:
        with kvsieve.stream(model, kvsieve.SirLLM(budget=1024)) as stream:
            scope |= {"stream": stream, "inputs": tokenizer("Hello!"), "question": tokenizer("And then?")}
            exec(compile(code, "conversations.md", "exec"), scope)
            assert stream.ids or "rewind" in code
