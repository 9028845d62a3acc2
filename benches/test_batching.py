"""Conversations answered together beside one after the other: tokens a second of a model of SmolLM2-135M's shape.

Each conversation holds 2,000 tokens when the measurement begins. Together a step is one forward for all of them, sampling
included; one by one each reads the weights for itself. The tokens of both must be the same. The bound is reading: weights once, and
keys and values of each conversation. The continuous batching of transformers stands beside them, with prompts of 2,000 tokens.
"""

from __future__ import annotations

import time
from typing import Any

import kvsieve
import pytest
import torch
from kvsieve.bench.decode import fill
from kvsieve.bench.subject import layers_of, model, token, weight_bytes
from rounds import interleaved, read_bandwidth, record

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
    runs = {"together": batch.step, "one_by_one": lambda: [token(made, stream.cache) for stream in one_by_one]}
    medians = interleaved(runs, rounds=5, repeat=False)
    assert len(batch.answers) == count, "all are being answered still"
    rates = {name: count / medians[name] for name in ("together", "one_by_one")}
    rate = read_bandwidth()  # by itself: what it reads would take the place of weights in the caches
    # Weights once, keys and values of everybody, and nothing else.
    rates["bound"] = count * rate / (weight_bytes(made) + count * HELD * layers_of(made).token_bytes(4))
    record(
        benchmark,
        batch.step,
        medians,
        policy=policy,
        conversations=count,
        times=round(medians["one_by_one"] / medians["together"], 3),
        read_gb_a_second=round(rate / 1e9, 2),
        tokens_a_second={name: round(rate, 2) for name, rate in rates.items()},
    )
    for stream in (*one_by_one, *together):
        stream.close()


STEPS = 12
"""Tokens that each conversation says by transformers; the first forwards, which read prompts, do not count."""


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_continuous_batching_of_transformers(benchmark: Any, count: int) -> None:
    """Its own threads work: CPU time of the process, from where every conversation has begun to the end."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    made = model(torch.float32)
    torch.set_num_threads(1)
    prompts = torch.randint(100, 40_000, (count, HELD), generator=torch.Generator().manual_seed(3))
    asked = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left to itself it takes most of the memory.
    room = ContinuousBatchingConfig(num_blocks=count * (HELD // 256 + 2))
    said: dict[str, list[int]] = {}
    marks: dict[int, float] = {}
    with made.continuous_batching_context_manager(generation_config=asked, continuous_batching_config=room) as manager:
        manager.add_requests(inputs=prompts.tolist(), max_new_tokens=STEPS, streaming=True)
        for output in manager:
            said[output.request_id] = list(output.generated_tokens)
            least = min(map(len, said.values())) if len(said) == count else 0
            marks.setdefault(least, time.process_time())
            if least == STEPS:
                break
    if count == 1:
        with kvsieve.stream(made, kvsieve.Full()) as stream:
            own = stream.generate(prompts, max_new_tokens=SAID, do_sample=False, eos_token_id=None)[0, HELD:].tolist()
        assert said["req_0"][:SAID] == own
    begun = min(at for at in marks if at > 1)
    seconds = (marks[STEPS] - marks[begun]) / (STEPS - begun)
    benchmark.extra_info.update(conversations=count, tokens_a_second={"continuous_batching": round(count / seconds, 2)})
    benchmark.pedantic(lambda: None)
