"""A KV cache with a budget around `generate`. Takes a name on the Hugging Face Hub or a local folder:

python examples/quickstart.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

import kvsieve
from transformers import AutoModelForCausalLM, AutoTokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer("The history of the sea is the history of people who crossed it. " * 100, return_tensors="pt")
with kvsieve.stream(model, kvsieve.SirLLM(budget=256)) as stream:
    ids = stream.generate(**inputs, max_new_tokens=15, do_sample=False)
    print(tokenizer.decode(ids[0, -15:]))
    stats = stream.stats()
    print(f"{stats.seen} tokens seen, {stats.resident} held: {stats.bytes_held / 2**20:.0f} of {stats.bytes_full / 2**20:.0f} MiB")
