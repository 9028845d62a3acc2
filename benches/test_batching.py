"""Conversations answered together beside one after the other: tokens a second of a model of SmolLM2-135M's shape.

Each conversation holds 2,000 tokens when the measurement begins. Together a step is one forward for all of them, sampling
included; one by one each reads the weights for itself. The tokens of both must be the same.
"""

from __future__ import annotations

import time
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.bench import measure
from kvsieve.bench.decode import fill
from kvsieve.bench.subject import model, token
from rounds import interleaved, record

HELD = 2000
SAID = 3
"""Tokens that are compared before anything is measured."""


def ready(made: Any, policy: Any, count: int) -> list[kvsieve.Stream]:
    """Streams that have seen 2,000 tokens each, of which all heads and layers are alike."""
    streams = [kvsieve.stream(made, policy) for _ in range(count)]
    for stream in streams:
        fill(stream, list(range(HELD)), HELD, torch.float32)
    return streams


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("policy", ["full()", "streamingllm(2000)"])
def test_together_beside_one_by_one(benchmark: Any, policy: str, count: int) -> None:
    made, parsed = model(torch.float32), kvsieve.methods.parse(policy)
    one_by_one, together, batch = ready(made, parsed, count), ready(made, parsed, count), kvsieve.Batch(made)
    asked = {"do_sample": False, "eos_token_id": None, "end_turn": False}
    answers = []
    for at, (alone, stream) in enumerate(zip(one_by_one, together)):
        ids = torch.tensor([[7 + at]])
        answers.append((batch.add(stream, ids, max_new_tokens=10_000, **asked), alone.generate(ids, max_new_tokens=SAID, **asked)))
    while any(answer.waits or len(answer.ids) < SAID for answer, _ in answers):
        batch.step()
    for answer, said in answers:
        assert answer.ids[:SAID].tolist() == said[0, 1:].tolist()
    medians = interleaved(
        {"together": batch.step, "one_by_one": lambda: [token(made, stream.cache) for stream in one_by_one]}, rounds=5, repeat=False
    )
    assert len(batch.answers) == count, "all are being answered still"
    record(
        benchmark,
        batch.step,
        medians,
        policy=policy,
        conversations=count,
        times=round(medians["one_by_one"] / medians["together"], 3),
        tokens_a_second={name: round(count / seconds, 2) for name, seconds in medians.items()},
    )
    for stream in (*one_by_one, *together):
        stream.close()


READ, FEW, MANY = 512, 2, 34
"""Tokens of a prompt; tokens that are said. The difference of two runs is decoding alone, whatever a prompt takes."""


@pytest.mark.parametrize("count", [1, 8])
def test_beside_continuous_batching_of_transformers(benchmark: Any, count: int) -> None:
    from transformers import GenerationConfig

    made = model(torch.float32)
    prompts = torch.randint(100, 40_000, (count, READ), generator=torch.Generator().manual_seed(3)).tolist()

    def ours(said: int) -> list[list[int]]:
        batch = kvsieve.Batch(made)
        streams = [kvsieve.stream(made, kvsieve.Full()) for _ in prompts]
        asked = {"do_sample": False, "eos_token_id": None, "max_new_tokens": said}
        answers = [batch.add(stream, torch.tensor([ids]), **asked) for stream, ids in zip(streams, prompts)]
        batch.run()
        told = [answer.ids.tolist() for answer in answers]
        for stream in streams:
            stream.close()
        return told

    def theirs(said: int) -> list[list[int]]:
        asked = GenerationConfig(max_new_tokens=said, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = made.generate_batch(inputs=prompts, generation_config=asked, progress_bar=False)
        return [list(found[name].generated_tokens) for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]

    assert [ids[:FEW] for ids in ours(FEW)] == [ids[:FEW] for ids in theirs(FEW)]
    runs = {
        f"{name}_{said}": lambda call=call, said=said: call(said)
        for name, call in (("ours", ours), ("theirs", theirs))
        for said in (FEW, MANY)
    }
    # Both work in threads of their own: this is the time of the wall, on one thread of torch.
    torch.set_num_threads(1)
    medians = {name: timed.median for name, timed in measure.interleaved(runs, 3, clock=time.perf_counter, repeat=False).items()}
    rates = {name: count * (MANY - FEW) / (medians[f"{name}_{MANY}"] - medians[f"{name}_{FEW}"]) for name in ("ours", "theirs")}
    record(
        benchmark,
        runs[f"ours_{FEW}"],
        medians,
        conversations=count,
        prompt=READ,
        decoded_tokens_a_second={name: round(rate, 2) for name, rate in rates.items()},
        times=round(rates["ours"] / rates["theirs"], 3),
    )
