"""What the CUDA backend must do under every policy, as functions of a device: under the emulator on the CPU, and on a card."""

from __future__ import annotations

import copy
import random
from typing import Any

import kvsieve
import tiny
import torch
from drive import Layer, forwards, pad_left
from kvsieve.rope import LayerRope

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """By the largest difference beside the largest value."""
    error = (got.cpu().double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)
    assert float(error) <= tolerance, f"off by {float(error):.2e} of the largest value"


def layer(policy: str, dtype: torch.dtype, device: torch.device, size: int = 16, seeds: int = 2) -> None:
    """One layer through prompts, single tokens and chunks, beside the reference in float64: outputs, residents, stored numbers."""
    for seed in range(seeds):
        rng = random.Random(seed)
        rows, heads, group = rng.choice([1, 2, 3]), 2, 2
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        rope = LayerRope(frequencies, rng.choice(["half", "interleaved"]), 1.2)
        extra: dict[str, Any] = {"rope": rope, "scale": size**-0.5, "softcap": rng.choice([None, 5.0])}
        sinks = torch.randn(heads * group, generator=torch.Generator().manual_seed(seed)) if seed == 1 else None
        made = tiny.POLICIES[policy](24)
        tested = Layer("cuda", made, **extra, sinks=None if sinks is None else sinks.to(device))
        exact = Layer("reference", made, **extra, sinks=sinks)
        generator = torch.Generator().manual_seed(seed)
        first = rng.choice([5, 40, 300])
        begin = (first, [rng.randint(1, first) for _ in range(rows)])
        for width, lens in [begin, *((n, [n] * rows) for n in (1, 1, 17, 1, 5, 40, 1, 70, 1))]:
            q, k, v = (torch.randn(rows, h, width, size, generator=generator) for h in (heads * group, heads, heads))
            if tested.frame == "rotated":
                seen = [exact.planner.seen(r) if exact.planner.num_rows else 0 for r in range(rows)]
                exact.rope = rope
                q, k = (exact.rotated(x, [s - (width - n) for s, n in zip(seen, lens)]) for x in (q, k))
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            scores = [torch.rand(n, generator=generator).numpy() for n in lens] if made.needs_surprisal else None
            tested.rope = exact.rope = None  # keys are in the layer's frame already
            got = tested.feed(q.to(device), k.to(device), v.to(device), lens, scores)
            close(got, exact.feed(q.double(), k.double(), v.double(), lens, scores), TOLERANCE[dtype])
            assert got.dtype == dtype
            for row, n in enumerate(lens):
                assert got[row, : width - n].abs().sum() == 0, "a pad's output is not zero"
            for memory in range(tested.planner.num_memories):
                for row in range(rows):
                    assert tested.positions(row, memory) == exact.positions(row, memory)
                    held, same = (one.store.read(one.planner.runs(memory, row)) for one in (tested, exact))
                    assert all(torch.equal(x.cpu().double(), y) for x, y in zip(held, same))


def on(model: Any, device: torch.device) -> Any:
    """A model on ``device``; the one given stays where it is."""
    return model if device.type == "cpu" else copy.deepcopy(model).to(device)


def model(family: str, policy: str, device: torch.device) -> None:
    """Logits of a left-padded batch, and who is kept, beside the reference on the CPU."""
    ids, mask = pad_left([tiny.ids(1, 80, 1)[0], tiny.ids(1, 61, 2)[0]])
    logits, kept = {}, {}
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        made = on(tiny.model(family), where)
        with kvsieve.stream(made, tiny.POLICIES[policy](30), backend) as stream:
            logits[backend] = forwards(made, stream.cache, ids.to(where), [50, 17, 5, 1], mask.to(where)).cpu()
            heads = [(layer.index, head) for layer in stream._engine.facts.layers for head in range(layer.num_kv_heads)]
            kept[backend] = [k.positions.tolist() for where in heads for k in stream.kept(*where)]
            assert stream.stats().backend == backend
    assert kept["cuda"] == kept["reference"]
    for row in range(2):
        real = mask[row].bool()
        a, b = (logits[name][row, real] for name in ("cuda", "reference"))
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def graph(policy: str, device: torch.device, new: int) -> None:
    """Replays give the tokens, the residents and the scores of plain decoding."""
    from kvsieve.graphs import GraphDecoder

    made, prompt = on(tiny.model(), device), tiny.ids(2, 50).to(device)
    with kvsieve.stream(made, tiny.POLICIES[policy](40), "cuda") as stream:
        stream.feed(prompt[:, :-1])
        want = stream.generate(prompt[:, -1:], max_new_tokens=new, do_sample=False, end_turn=False)[:, 1:]
        kept = stream.kept()
    with kvsieve.stream(made, tiny.POLICIES[policy](40), "cuda") as stream:
        stream.feed(prompt[:, :-1])
        decoder = GraphDecoder(stream)
        assert torch.equal(decoder.greedy(prompt[:, -1:], new), want)
        for mine, theirs in zip(stream.kept(), kept):
            assert mine.positions.tolist() == theirs.positions.tolist()
            torch.testing.assert_close(torch.tensor(mine.scores), torch.tensor(theirs.scores), equal_nan=True)
        assert decoder.captures <= (2 if policy == "full" else 1)
        more = stream.generate(tiny.ids(2, 3, 5).to(device), max_new_tokens=4, do_sample=False)  # and on without a graph
        assert more.shape == (2, 7)
