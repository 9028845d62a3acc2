"""Pieces of a row's text on the CUDA backend beside their definition, as functions of a device: emulated, and on a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import kvsieve
import tiny
import torch
from backend_cases import close, on
from drive import forwards, pad_left
from fetched import FetchingLayer, rope
from kvsieve._core import Residents
from kvsieve.backends.base import AttendCall
from kvsieve.backends.pieces import attend_pieces
from kvsieve.policy.select import Piece
from kvsieve.runtime.fetching import Fetching

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Case = tuple[torch.dtype, int, int, int, int]
"""Dtype, channels of a key and of a value, query heads of a KV head, queries."""

CASES: list[Case] = [
    *((torch.float32, 16, 16, group, count) for group in (1, 2, 4, 6) for count in (1, 2, 40)),
    (torch.float32, 16, 24, 3, 1),
    (torch.float32, 16, 24, 3, 17),
    (torch.bfloat16, 64, 64, 3, 1),
    (torch.bfloat16, 128, 128, 4, 1),
    (torch.bfloat16, 64, 64, 3, 150),
    (torch.float16, 128, 128, 16, 1),
    (torch.float16, 64, 64, 2, 64),
]
"""Few enough to compile for the CPU: each way through the kernel, and the matrices of every dtype."""


def random_pieces(rng: random.Random, first: int, count: int, kv_heads: int, near: bool) -> list[Piece]:
    """Disjoint pieces for each head, the queries' own tokens among them; if ``near``, first what all see at true distances."""
    cuts = sorted(rng.sample(range(1, first), rng.randint(2, 6)))
    spans = list(zip([0, *cuts], [*cuts, first]))
    lo = spans.pop()[0] if near else first
    found = [Piece(lo, first + count, first - lo, within=rng.choice([None, 7, first]))]
    heads = rng.choice([[None], [None, *range(kv_heads)], list(range(kv_heads))])
    for lo, hi in spans:
        head = rng.choice(heads)
        if rng.random() < 0.5:
            found.append(Piece(lo, hi, rng.choice([0, 9, 300]), fixed=True, nearest=rng.choice([0, 3, 80]), head=head))
        else:
            found.append(Piece(lo, hi, hi - lo - 1 + rng.choice([0, 5, 700]), within=rng.choice([None, 50]), head=head))
    return found if near else rng.sample(found, len(found))


def pieces(case: Case, device: torch.device, seeds: int = 6) -> None:
    """Random pieces of a row that lies among others, with and without scores, sinks, a cap and a rotation."""
    dtype, key_dim, value_dim, group, count = case
    for seed in range(seeds):
        rng, generator = random.Random(seed * 7 + count), torch.Generator().manual_seed(seed)
        kv_heads, row, lens = rng.choice([1, 2, 3]), rng.choice([0, 1]), [330, rng.randint(230, 330)]
        q, k, v = (
            torch.randn(2, heads, 330, dim, generator=generator).to(dtype)
            for heads, dim in ((kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        )
        sinks = torch.randn(kv_heads * group, generator=generator) if seed in (1, 2) else None
        turn = None if seed == 5 else rope(key_dim - 4 * (seed == 3), rng.choice(["half", "interleaved"]), 1.2)
        given: dict[str, Any] = {"scale": key_dim**-0.5, "softcap": 4.0 if seed in (2, 4) else None, "rope": turn}
        layer = FetchingLayer("cuda", kvsieve.InfLLM(330), AttendCall(**given))
        layer.store = layer.backend.make_store(k.to(device), v.to(device))
        for at in range(0, 330, 110):  # rows take turns, so that the blocks of one lie between those of the other
            stored = [min(max(n - (330 - at - 110), 0), 110) for n in lens]
            step = layer.blocks.planner.begin(stored, 110, True, False)
            layer.store.append(*(x[:, :, at : at + 110].to(device) for x in (k, v)), step)
            layer.blocks.planner.commit()
        residents = residents_of(layer, row)
        mine = slice(330 - lens[row], None)
        q, k, v = q[row, :, mine], k[row, :, mine], v[row, :, mine]
        first = rng.randint(40, lens[row] - count)
        scored = seed % 2 == 0
        asked = random_pieces(rng, first, count, kv_heads, scored)
        call = AttendCall(**given, sink_logits=sinks)
        there = AttendCall(**given, sink_logits=None if sinks is None else sinks.to(device))
        queries = q[:, first : first + count]
        got = layer.store.attend_pieces(queries.to(device), first, residents, asked, there, scored, told=True)
        read = lambda lo, hi, k=k, v=v: (k[:, lo:hi].double(), v[:, lo:hi].double())  # noqa: E731
        want = attend_pieces(queries.double(), first, asked, read, call, scored, told=True)
        assert got.out.dtype == dtype
        close(got.out, want.out, TOLERANCE[dtype])
        torch.testing.assert_close(got.lse.cpu().double(), want.lse, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-5)
        if scored:
            assert got.scores is not None
            assert want.scores is not None
            close(got.scores, want.scores.double(), max(TOLERANCE[dtype], 2e-5))
        assert got.mass is not None
        assert want.mass is not None
        close(got.mass, want.mass.double(), max(TOLERANCE[dtype], 2e-5))


def residents_of(layer: FetchingLayer, row: int) -> Residents:
    """Where the tokens of a row lie, found as a step finds them."""
    planner = layer.blocks.planner
    step = planner.begin([int(each == row) for each in range(planner.num_rows)], 1, True, False)
    residents = Residents(step, row)
    planner.rollback()
    return residents


POLICIES = {
    "infllm": lambda: kvsieve.InfLLM(24, blocks=2, block=8, representatives=2, sinks=2, query_block=16),
    "infllm_per_head": lambda: kvsieve.InfLLM(24, blocks=2, block=4, representatives=1, sinks=2, per_head=True, query_block=8),
    "longheads": lambda: kvsieve.LongHeads(64, chunk=16),
}
"""Policies of small budgets, for tiny models."""


def layer(policy: str, dtype: torch.dtype, device: torch.device) -> None:
    """Ragged rows through prompts, single tokens and chunks, beside the reference on the same numbers: outputs and choices."""
    size, heads, group = 16, 2, 3
    generator, turn = torch.Generator().manual_seed(1), rope(size, "half", 1.1)
    tested, exact = (FetchingLayer(name, POLICIES[policy](), AttendCall(0.3, rope=turn)) for name in ("cuda", "reference"))
    for lens in ([120, 97, 31], [1, 1, 1], [1, 1, 1], [1, 0, 1], [30, 0, 30], [1, 1, 1], [6, 6, 6], [1, 1, 1]):
        width = max(lens)
        q, k, v = (torch.randn(3, h, width, size, generator=generator).to(dtype) for h in (heads * group, heads, heads))
        got, want = tested.feed(*(x.to(device) for x in (q, k, v)), lens), exact.feed(q, k, v, lens)
        close(got, want.double(), TOLERANCE[dtype])
        for row, n in enumerate(lens):
            assert not got[row, : width - n].any(), "pads get nothing"
            # What differs in the last bit may choose another block.
            if n and dtype == torch.float32:
                assert tested.chosen(row) == exact.chosen(row)


def model(family: str, policy: str, device: torch.device) -> None:
    """Logits of a left-padded batch, what was fetched, and what a trace shows of it, beside the reference on the CPU."""
    ids, mask = pad_left([tiny.ids(1, n, n)[0] for n in (140, 95)])
    logits, fetched, traces = {}, {}, {}
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        made = on(tiny.model(family), where)
        with kvsieve.stream(made, POLICIES[policy](), backend) as stream:
            logits[backend] = forwards(made, stream.cache, ids.to(where), [115, 5, 1], mask.to(where)).cpu()[:, -95:]
            read = stream._engine.parts.the(Fetching).read
            fetched[backend] = {index: [last and last.choice for last in rows] for index, rows in read.items()}
            traces[backend] = [(layer.dense, layer.scored, layer.read) for layer in stream.trace()]
    assert all(choice.compared > 0 for rows in fetched["reference"].values() for choice in rows)
    for index, rows in fetched["reference"].items():
        assert [(mine.compared, mine.blocks) for mine in fetched["cuda"][index]] == [(its.compared, its.blocks) for its in rows]
    assert traces["cuda"] == traces["reference"]
    assert float((logits["cuda"] - logits["reference"]).abs().max()) <= 1e-4 * float(logits["reference"].abs().max())


def loops(policy: str, device: torch.device, folder: Path) -> None:
    """A fork that writes, beams, going back, a file: the reference's tokens."""
    made, tokens = on(tiny.model(), device), {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(made, POLICIES[policy](), backend) as stream:
            stream.feed(tiny.ids(1, 100).to(device))
            found = [stream.generate(tiny.ids(1, 3, 8).to(device), max_new_tokens=5, do_sample=False)]
            with stream.fork() as child:
                found.append(child.generate(tiny.ids(1, 20, 3).to(device), max_new_tokens=5, do_sample=False))
            mark = stream.mark()
            found.append(stream.generate(tiny.ids(1, 9, 4).to(device), max_new_tokens=5, num_beams=3, do_sample=False))
            stream.rewind(mark)
            found.append(stream.generate(tiny.ids(1, 4, 6).to(device), max_new_tokens=5, do_sample=False))
            stream.save(folder / backend)
        with kvsieve.load(folder / backend, made, backend=backend) as stream:
            found.append(stream.generate(tiny.ids(1, 5, 5).to(device), max_new_tokens=5, do_sample=False))
        tokens[backend] = torch.cat(found, 1)
    assert torch.equal(tokens["cuda"], tokens["reference"])
