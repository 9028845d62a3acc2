"""An installed wheel works: a small model with random weights says under a stream what it says without one.

python smoke.py        needs kvsieve and its dependencies, nothing else: no file of the repository, no network, no GPU
"""

from __future__ import annotations

import kvsieve
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 97, (1, 40))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=256)) as stream:
        found = stream.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        stats = stream.stats()
    if stats.backend != "cpu":
        raise SystemExit(f"the stream ran on the backend {stats.backend!r}, not on the compiled one")
    if not torch.equal(found[:, -20:], expected[:, -20:]):
        raise SystemExit(
            f"under a budget above the length, the tokens are {found[0, -20:].tolist()}, not {expected[0, -20:].tolist()}"
        )
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=24)) as stream:
        stream.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        stats = stream.stats()
    print(f"kvsieve {kvsieve.__version__}: the stock cache's tokens; under a budget of 24: {stats}")


if __name__ == "__main__":
    main()
