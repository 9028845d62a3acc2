"""One of the processes of a model that is spread over several: `python tests/ranks.py FOLDER RANK SIZE`. test_ranks.py starts them.

Every system reads a text, then some tokens; their logits go to FOLDER/logits-RANK.pt, and what should have been refused to
FOLDER/refused-RANK.json. The model is the one in FOLDER/model. At last the processes but the first end without a word.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import kvsieve
import systems
import tiny
import torch
from kvsieve.runtime.recycling import Recycling

WITH_FILES = ("memory_bank", "memory_bank_of_scores")
TEXT, MORE = tiny.ids(1, systems.PROMPT), tiny.ids(1, 6, 1)


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    """``[6, V]``, token by token, after a text in two pieces."""
    with kvsieve.stream(model, systems.SYSTEMS[name].of_rows(1)) as stream:
        for piece in (TEXT[:, :200], TEXT[:, 200:]):
            model(piece, past_key_values=stream.cache)
        return torch.stack([model(MORE[:, at : at + 1], past_key_values=stream.cache).logits[0, -1] for at in range(MORE.shape[1])])


@torch.no_grad()
def queries(model: Any) -> torch.Tensor:
    """The mean queries of RefreshKV's layers, by which all heads decide together: ``[layers, D]``."""
    with kvsieve.stream(model, systems.SYSTEMS["refresh_kv"].make()) as stream:
        stream.feed(TEXT)
        part = stream._engine.parts.find(Recycling)
        assert part is not None
        return torch.stack([choice.query for choice in part.rows[0].layers.values() if choice.query is not None])


def said(call: Any) -> str:
    """What a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path, rank: int, size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, tp_plan="auto").eval()
    refused = {}
    if (folder / "odd").exists():
        odd = LlamaForCausalLM.from_pretrained(folder / "odd", dtype=torch.float32, tp_plan="auto").eval()
        refused["odd"] = said(lambda: kvsieve.stream(odd, kvsieve.Full()))
    names = [name for name in systems.SYSTEMS if name not in WITH_FILES]
    torch.save({name: logits(model, name) for name in names} | {"queries": queries(model)}, folder / f"logits-{rank}.pt")
    for name in WITH_FILES:
        refused[name] = said(lambda name=name: kvsieve.stream(model, systems.SYSTEMS[name].of_rows(1)))  # type: ignore[misc]
    refused["other policies"] = said(lambda: kvsieve.stream(model, kvsieve.StreamingLLM(64 + rank)))
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(TEXT)
        refused["save"] = said(lambda: stream.save(folder / "stream.safetensors"))
        if rank:
            os._exit(0)
        refused["a process died"] = said(lambda: stream.feed(TEXT))
        refused["held then"] = str(stream.seen)
    (folder / "refused.json").write_text(json.dumps(refused))
    os._exit(0)  # nobody is left to say goodbye to


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
