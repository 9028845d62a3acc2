"""What the CUDA backend must do under every policy, as functions of a device: under the emulator on the CPU, and on a GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import tiny
import torch
from drive import Layer, forwards, pad_left
from kvsieve.facts import LayerRope
from kvsieve.methods import think
from kvsieve.policy.storage import Packing

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
            if tested.stored_keys == "post_rope":
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
    memory = PACKINGS[policy]() if policy in PACKINGS else tiny.POLICIES[policy](40)
    with kvsieve.stream(made, memory, "cuda") as stream:
        stream.feed(prompt[:, :-1])
        want = stream.generate(prompt[:, -1:], max_new_tokens=new, do_sample=False, end_turn=False)[:, 1:]
        kept = stream.kept()
    with kvsieve.stream(made, memory, "cuda") as stream:
        stream.feed(prompt[:, :-1])
        decoder = GraphDecoder(stream)
        assert torch.equal(decoder.greedy(prompt[:, -1:], new), want)
        for mine, theirs in zip(stream.kept(), kept):
            assert mine.positions.tolist() == theirs.positions.tolist()
            torch.testing.assert_close(torch.tensor(mine.scores), torch.tensor(theirs.scores), equal_nan=True)
        assert decoder.captures <= (2 if policy == "full" or policy in UNBOUNDED else 1)
        packed = [stream._engine.planner.num_packed(row) for row in range(2)]
        assert (min(packed) > 0) == (policy in PACKINGS)
        more = stream.generate(tiny.ids(2, 3, 5).to(device), max_new_tokens=4, do_sample=False)  # and on without a graph
        assert more.shape == (2, 7)


# ---------------------------------------------------------------------------------------------------------------- packed storage

PACKINGS: dict[str, Callable[[], Any]] = {
    "thin": lambda: kvsieve.ThinK(0.5, recent=8, observe=8),
    "thin_single": lambda: kvsieve.ThinK(0.4, recent=8, observe=8, channels="single"),
    "thin_zero": lambda: kvsieve.ThinK(0.5, recent=8, observe=8, mode="zero"),
    "thin_flush": lambda: kvsieve.ThinK(0.4, recent=8, observe=8, flush_every=5),
    "codes_8": lambda: kvsieve.Quantized(8, group=16, residual=8),
    "codes_4": lambda: kvsieve.Quantized(4, group=16, residual=8),
    "codes_2": lambda: kvsieve.Quantized(2, group=8, residual=8),
    "codes_of_keys": lambda: kvsieve.Quantized(4, group=16, residual=8, value_bits=0),
    "thin_codes": lambda: kvsieve.ThinK(0.25, recent=8, observe=8) | kvsieve.Quantized(8, group=16, residual=8),
    "sirllm_thin": lambda: kvsieve.SirLLM(48, sinks=2, recent=8) | kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=4),
    "sirllm_codes": lambda: kvsieve.SirLLM(48, sinks=2, recent=8) | kvsieve.Quantized(8, group=16, residual=8),
    "streaming_thin": lambda: kvsieve.StreamingLLM(48, sinks=2) | kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=4),
    "lm_infinite_thin": lambda: kvsieve.LMInfinite(46, sinks=2) | kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=4),
}
"""Policies that pack, by name."""

UNBOUNDED = [name for name in PACKINGS if name.startswith(("thin", "codes"))]


def packing_tolerance(policy: str, device: torch.device) -> float:
    """Of logits. What differs in the last bit may fall to another code, which the emulator's sums do not happen to do."""
    return 5e-2 if "codes" in policy and device.type == "cuda" else 1e-4


def packed_layer(dtype: torch.dtype, bits: tuple[int, int], frame: str, device: torch.device) -> None:
    """Packed, thinned out by moves, read back, decoded over: as the reference, to the last bit where numbers are stored."""
    size, heads, group = 32, 2, 2
    rope = LayerRope(10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size), "half")
    memory = kvsieve.SirLLM(400, sinks=2, recent=8) if frame == "pre_rope" else kvsieve.Full()
    layers = [Layer(name, memory, rope=rope if frame == "pre_rope" else None, scale=0.2) for name in ("cuda", "reference")]
    generator = torch.Generator().manual_seed(bits[0])
    q, k, v = (torch.randn(1, h, 330, size, generator=generator).to(dtype) for h in (heads * group, heads, heads))
    packing = Packing(20, *bits, 16)
    scored = torch.rand(330, generator=generator).numpy() if memory.needs_surprisal else None
    at = 0
    for width in (200, 1, 1, 90, 1, 20, 1, 1):
        now, outs = slice(at, at + width), []
        for layer, where in zip(layers, (device, torch.device("cpu"))):
            given = (x[:, :, now].to(where) for x in (q, k, v))
            outs.append(layer.feed(*given, scores=None if scored is None else [scored[now]]).cpu())
        close(outs[0], outs[1].double(), TOLERANCE[dtype])
        at += width
        if at in (200, 292):
            chosen = think.heaviest_channels(q[0, :, :200], k[0, :, :200], 20, "pairs", rope) if at == 200 else None
            for layer in layers:
                first = layer.planner.runs(0, 0)[0][0]
                layer.pack(layer.planner.resident(0, 0) - 10, first if chosen is None else chosen, packing)
        if at in (201, 293):
            kept = [i for i in range(layers[0].planner.resident(0, 0)) if i % 7 or i < 20]
            for layer in layers:
                layer.store.apply(layer.planner.keep(0, 0, kept))
                layer.store.free_unused(layer.planner.blocks_in_use(), layer.planner.packed_in_use())
        held, want = (layer.store.read(layer.planner.runs(0, 0)) for layer in layers)
        for mine, theirs in zip(held, want):
            assert torch.equal(mine.cpu(), theirs.to(dtype))
    for layer in layers:  # what was read is written back, at full width
        runs = layer.planner.runs(0, 0)
        layer.store.write(runs, *(x.to(dtype) for x in layer.store.read(runs)))
    held, want = (layer.store.read(layer.planner.runs(0, 0)) for layer in layers)
    for mine, theirs in zip(held, want):
        assert torch.equal(mine.cpu(), theirs.to(dtype))


def packed_model(family: str, policy: str, device: torch.device) -> None:
    """Logits of a left-padded batch over packed tokens, who is kept and who is packed, beside the reference on the same device."""
    ids, mask = pad_left([tiny.ids(1, 110, 1)[0], tiny.ids(1, 88, 2)[0]])
    logits, facts = {}, {}
    made = on(tiny.model(family), device)
    for backend in ("cuda", "reference"):
        with kvsieve.stream(made, PACKINGS[policy](), backend) as stream:
            logits[backend] = forwards(made, stream.cache, ids.to(device), [50, 30, 1, 1, 1, 1, 1, 1, 12, 1], mask.to(device)).cpu()
            planner = stream._engine.planner
            packed = [planner.num_packed(row) for row in range(2)]
            facts[backend] = [k.positions.tolist() for k in stream.kept()], packed
            assert min(packed) > 0
            held, engine = stream.stats(), stream._engine
            assert held.bytes_held == sum(store.bytes_held for store in engine.stores.values()) + engine.bytes_of_parts
    assert facts["cuda"] == facts["reference"]
    for row in range(2):
        real = mask[row].bool()
        a, b = (logits[name][row, real] for name in ("cuda", "reference"))
        assert float((a - b).abs().max()) <= packing_tolerance(policy, device) * float(b.abs().max())


def packed_loops(policy: str, device: torch.device, folder: Path) -> None:
    """A fork that writes, beams, going back, a file, a reset: the reference's tokens."""
    model, made = on(tiny.model(), device), PACKINGS[policy]
    tokens = {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(model, made(), backend) as stream:
            stream.feed(tiny.ids(1, 70).to(device))
            found = [stream.generate(tiny.ids(1, 3, 8).to(device), max_new_tokens=4, do_sample=False)]
            with stream.fork() as child:
                found.append(child.generate(tiny.ids(1, 40, 3).to(device), max_new_tokens=6, do_sample=False))
            found.append(stream.generate(tiny.ids(1, 9, 4).to(device), max_new_tokens=6, num_beams=3, do_sample=False))
            mark = stream.mark()
            found.append(stream.generate(tiny.ids(1, 20, 7).to(device), max_new_tokens=5, do_sample=False))
            stream.rewind(mark)
            stream.save(folder / backend)
            found.append(stream.generate(tiny.ids(1, 20, 6).to(device), max_new_tokens=5, do_sample=False))
        with kvsieve.load(folder / backend, model, backend=backend) as stream:
            found.append(stream.generate(tiny.ids(1, 5, 5).to(device), max_new_tokens=5, do_sample=False))
            stream.reset()
            assert stream.stats().bytes_held == 0
        tokens[backend] = torch.cat(found, 1)
    assert torch.equal(tokens["cuda"], tokens["reference"])
