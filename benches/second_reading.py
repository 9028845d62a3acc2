"""Perplexity of a text's second reading, with a bank that read it before and without: SmolLM2-135M behind a small window.

python benches/second_reading.py [tokens] [window]
"""

from __future__ import annotations

import math
import sys

import kvsieve
import torch
from kvsieve.evals.models import load_smollm2
from kvsieve.evals.texts import read_text

CHUNK = 256
"""Tokens of a forward: what one reads it does not find."""

SKIP = 3000
"""Where in the text it begins."""


@torch.no_grad()
def surprisals(model: object, policy: kvsieve.policy.Policy, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first: ``[n - 1]``."""
    logps = []
    with kvsieve.stream(model, policy) as stream:  # type: ignore[arg-type]
        for piece in ids.split(CHUNK, 1):
            logps.append(model(input_ids=piece, past_key_values=stream.cache, use_cache=True).logits.float().log_softmax(-1))  # type: ignore[operator]
    return -torch.cat(logps, 1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


def main(count: int = 2048, window: int = 512) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    every = tokenizer(read_text(), return_tensors="pt")["input_ids"]
    ids, other = every[:, SKIP : SKIP + count], every[:, SKIP + 2 * count : SKIP + 3 * count]
    alone = surprisals(model, kvsieve.StreamingLLM(window), ids)
    print(f"StreamingLLM({window}): perplexity {math.exp(float(alone.mean())):.3f}", flush=True)
    layers = model.config.num_hidden_layers
    for chosen in (None, range(layers // 3, 2 * layers // 3)):
        for name, read in (("the text", ids), ("another text", other)):
            bank = kvsieve.MemoryBank(layers=chosen)
            bank.ingest(model, read, window=window)
            for bias, per_head in ((0.0, True), (0.0, False), *([(-2.0, True)] if chosen is None else ())):
                policy = kvsieve.StreamingLLM(window) >> bank.like(read_only=True, bias=bias, per_head=per_head)
                change = surprisals(model, policy, ids) - alone
                nats, error = float(change.mean()), float(change.std()) / len(change) ** 0.5
                perplexity = math.exp(float(alone.mean()) + nats)
                told = f"{bank!r} of {name}, bias={bias}, per_head={per_head}"
                print(f"{told}: {perplexity:.3f}, {nats:+.3f} ± {error:.3f} nats", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
