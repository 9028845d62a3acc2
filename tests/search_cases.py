"""What sparse attention must do on a GPU, as functions of a device: under the emulator on the CPU, and on a GPU.

Queries and keys are multiples of 1/8, so that scores are exact in any dtype and order, and ties (of which there are many) are ties.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvsieve
import tiny
import torch
from backend_cases import on
from drive import forwards, pad_left
from kernel_blocks import Blocks
from kvsieve import backends
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.ops.residents import Residents, slot_width
from kvsieve.backends.reference.definition import Selection, first_stage, group_scores, kept, region, sparse_attend
from kvsieve.backends.reference.select.hip import hip_search
from kvsieve.backends.reference.select.infinite import infinite_hip_search
from kvsieve.policy.specs import make_planner
from operations import ops

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def hip(**changes: Any) -> Any:
    """A rule such as a role gives."""
    rule = {"kind": "hip", "sinks": 3, "window": 9, "query_block": 16, "query_stride": 1, "representative": "middle"}
    return SimpleNamespace(**{**rule, "budget": 20, "block": 2, "refresh": 4, **changes})


def infinite(**changes: Any) -> Any:
    rule = {"kind": "infinite", "sinks": 3, "window": 9, "query_block": 16, "query_stride": 1, "representative": "first"}
    return SimpleNamespace(**{**rule, "stages": ((16, 96), (4, 32), (2, 12)), "refresh": (8, 4, 2), **changes})


class Row:
    """One row by the definition."""

    def __init__(self, rule: Any, scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None) -> None:
        self.rule, self.scale, self.softcap, self.sinks = rule, scale, softcap, sinks
        self.found: Selection | None = None
        self.k = self.v = torch.empty(0)
        self.seen = self.step = self.searched_at = self.next = 0
        self.searched = self.read = 0
        """Of the last :meth:`feed`."""

    def _due(self, first: int, count: int) -> int | None:
        if count > 1 or first == 0 or self.found is None or self.next != first:
            return 0
        most = self.rule.budget if self.rule.kind == "hip" else self.rule.stages[-1][1]
        if self.found.hi - self.found.lo <= most:
            return 0  # it was read whole, and not searched
        return first_stage(self.step, self.rule.refresh if self.rule.kind == "infinite" else (self.rule.refresh,))

    def _choose(self, q: torch.Tensor, positions: list[int], start: int) -> Selection:
        rule = self.rule
        scores = group_scores(q, self.k, positions, rule.window, rule.query_stride)
        if start == 0:
            lo, hi = region(positions, rule.sinks, rule.window)
        else:
            assert self.found is not None
            lo, hi = self.found.lo, self.found.hi
        if rule.kind == "hip":
            return hip_search(scores, lo, hi, rule.budget, rule.block, rule.representative)
        inputs = self.found.inputs if start and self.found is not None else ()
        return infinite_hip_search(scores, lo, hi, *zip(*rule.stages), rule.representative, start=start, inputs=inputs)

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of new queries ``[H, n, D]``: float64 ``[H, n, Dv]``."""
        first, count, block = self.seen, k.shape[1], self.rule.query_block
        self.k, self.v = (torch.cat([old, new.double()], 1) if first else new.double() for old, new in ((self.k, k), (self.v, v)))
        self.seen, self.searched, self.read = first + count, 0, 0
        outs = []
        for number in range(first // block, (first + count - 1) // block + 1):
            positions = list(range(max(first, number * block), min(first + count, (number + 1) * block)))
            mine = q[:, positions[0] - first : positions[-1] + 1 - first].double()
            start = self._due(positions[0], len(positions))
            if start is not None:
                self.found = self._choose(mine, positions, start)
                self.searched += sum(self.found.reads)
            if start == 0:
                self.step, self.searched_at = 0, positions[-1]
            self.step, self.next = self.step + 1, positions[-1] + 1
            assert self.found is not None
            wider = self.rule.window + positions[-1] - self.searched_at
            visible = kept(self.found, positions, self.seen, self.rule.sinks, wider)
            self.read += int(visible.sum())
            out, lse = sparse_attend(mine, self.k, self.v, visible, self.scale, self.softcap)
            if self.sinks is not None:
                out = out * torch.exp(lse - torch.logaddexp(lse, self.sinks.double()[:, None]))[..., None]
            outs.append(out)
        return torch.cat(outs, 1)

    def check(self, choice: list[Any]) -> None:
        """The choice is the definition's, range for range."""
        assert self.found is not None
        assert len(choice) == len(self.found.starts)
        for head, mine in enumerate(choice):
            assert mine.ranges[:, 0].tolist() == self.found.starts[head].tolist(), f"head {head}"
            assert mine.ranges[:, 1].tolist() == self.found.ends[head].tolist()
            assert (mine.end, mine.reads, mine.rounds) == (self.found.hi, self.found.reads[head], self.found.rounds[head])


def copied(row: Row) -> Row:
    """A row that goes on by itself; what it has is never changed in place."""
    return copy.copy(row)


class SparseLayer:
    """A layer whose rows search, beside the definition of each."""

    def __init__(
        self,
        rule: Any,
        rows: int,
        heads: int,
        group: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.backend: Any = backends.get("cuda")
        self.search = self.backend.make_selection(rule)
        self.planner = make_planner(kvsieve.Full().specs(1), "post_rope")
        self.shape, self.dtype, self.device = (rows, heads, group, size), dtype, torch.device(device)
        self.call = AttendCall(size**-0.5, softcap, None if sinks is None else sinks.to(device))
        self.rows = [Row(rule, size**-0.5, softcap, sinks) for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(seed)
        self.store: Any = None

    def draw(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, heads, group, size = self.shape

        def eighths(heads: int) -> torch.Tensor:
            return (torch.randint(-16, 17, (rows, heads, width, size), generator=self.generator) / 8).to(self.dtype)

        values = torch.randn(rows, heads, width, size, generator=self.generator).to(self.dtype)
        return eighths(heads * group), eighths(heads), values

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int] | None = None) -> torch.Tensor:
        """One forward on the device alone."""
        width = q.shape[2]
        q, k, v = (x.to(self.device) for x in (q, k, v))
        self.store = self.store or self.backend.make_store(k, v)
        step = self.planner.begin([width] * q.shape[0] if lens is None else lens, width, width <= 16, False)
        try:
            out = self.store.run_selected(q, k, v, step, self.call, self.search)
        except BaseException:
            self.planner.rollback()
            raise
        self.planner.commit()
        return out.cpu()

    def feed(self, width: int, lens: list[int] | None = None) -> torch.Tensor:
        """One forward of random tokens, everything compared."""
        q, k, v = self.draw(width)
        lens = [width] * q.shape[0] if lens is None else lens
        out = self.run(q, k, v, lens)
        assert out.dtype == self.dtype
        for row, n in enumerate(lens):
            if n == 0:
                continue
            want = self.rows[row].feed(q[row, :, width - n :], k[row, :, width - n :], v[row, :, width - n :]).transpose(0, 1)
            got = out[row, width - n :].double()
            assert float((got - want).abs().max()) <= TOLERANCE[self.dtype] * max(1.0, float(want.abs().max()))
            assert out[row, : width - n].abs().sum() == 0, "a pad's output is not zero"
            self.rows[row].check(self.search.choice(row))
        fed = [row for row, n in zip(self.rows, lens) if n]
        assert self.search.work == (sum(row.searched for row in fed), sum(row.read for row in fed))
        return out


def layer(kind: str, representative: str, group: int, dtype: torch.dtype, size: int, device: torch.device, seed: int = 0) -> None:
    """Prompts of unequal rows, single tokens, candidates and chunks: choices, counts and outputs are the definition's."""
    rng = random.Random(f"{kind} {representative} {group} {seed}")
    change: dict[str, Any] = {"representative": representative, "sinks": rng.choice([0, 3, 5]), "window": rng.choice([0, 1, 9, 40])}
    change["query_block"], change["query_stride"] = rng.choice([1, 8, 16]), rng.choice([1, 3, 4, 16])
    if kind == "hip":
        change |= {"block": rng.choice([1, 2, 3, 8]), "budget": rng.choice([4, 20, 48]), "refresh": rng.choice([1, 3, 8])}
    rule = hip(**change) if kind == "hip" else infinite(**change)
    rows, heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    sinks = torch.randn(heads * group, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
    softcap = rng.choice([None, 4.0]) if change["window"] else None
    tested = SparseLayer(rule, rows, heads, group, size, dtype, device, softcap, sinks if change["window"] else None, seed)
    first = rng.choice([30, 140])
    tested.feed(first, [first, *(rng.randint(1, first) for _ in range(rows - 1))])
    for width in (1, 1, 1, 5, 1, 25, 1, 1, 1, 1, 1, 1):
        tested.feed(width)


def cases(device: torch.device, seeds: int) -> list[tuple[str, str, int, torch.dtype, int, torch.device, int]]:
    """Arguments for :func:`layer`: every representative and group."""
    ways = [("hip", name) for name in ("middle", "first", "last", "oracle")] + [("infinite", name) for name in ("first", "middle")]
    found = []
    for seed in range(seeds):
        for i, (kind, representative) in enumerate(ways):
            found.append((kind, representative, (1, 3, 4)[(i + seed) % 3], torch.float32, 16, device, seed))
    return found


def uneven(device: torch.device) -> None:
    """Residents in pieces of blocks, as a memory that lost some would have them; values of another size; five heads a group."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    held = Blocks(2, 16, 24, torch.float32, 4, device)
    runs = [(block, *sorted(rng.sample(range(65), 2))) for block in (3, 0, 6, 1, 5, 2)]
    before = [sum(hi - lo for _, lo, hi in runs[:i]) for i in range(len(runs) + 1)]
    spans = torch.tensor([[b, lo | hi << 8, n, 0] for (b, lo, hi), n in zip(runs, before)], dtype=torch.int32)
    starts = torch.tensor([0, len(runs)], dtype=torch.int32)
    k, v = (torch.cat(x, 1) for x in zip(*(held.read(*run) for run in runs)))
    n, window, sinks, budget, block = before[-1], 7, 3, 18, 3
    q = torch.randn(1, 10, 1, 16, generator=generator)
    lo, hi = region([n - 1], sinks, window)
    found = hip_search(group_scores(q[0].double(), k.double(), [n - 1], window), lo, hi, budget, block)
    table = torch.tensor([[0, 0, 1, n - 1, lo, hi, 0, 0, 0, *[-1] * 7]], dtype=torch.int32).to(device)
    slots = torch.zeros(1, 2, slot_width(6), dtype=torch.int32, device=device)
    asked = {"q": q.to(device), "residents": Residents(held.table, starts.to(device), spans.to(device), 1)}
    asked |= {"queries": table, "most_queries": 1, "kv_heads": 2, "window": window, "held": slots, "spare": slots[:0]}
    searched = ops.hip(**asked, stride=1, block=block, most=6, representative=0)
    assert searched.tolist() == [list(found.reads)]
    for head in range(2):
        count = int(slots[0, head, 0])
        assert slots[0, head, 4 : 4 + count].tolist() == found.starts[head].tolist()
    visible = kept(found, [n - 1], n, sinks, window)
    want, _ = sparse_attend(q[0].double(), k.double(), v.double(), visible, 0.25)
    for at, splits in ((torch.zeros(1, 2, dtype=torch.int32, device=device), 3), (None, 1)):
        chosen = {"sinks": sinks, "stage": 0, "length": block, "most": 6}
        out, read = ops.sparse(**asked, **chosen, at=at, value_dim=24, splits=splits, scale=0.25)
        assert read.sum() == visible.sum()
        assert float((out[0, 0].cpu().double() - want[:, 0]).abs().max()) < 1e-5


def filled(rule: Any, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32, size: int = 16) -> SparseLayer:
    """A row of one key-value head that holds ``tokens - 1`` random tokens; its next one is the last."""
    tested = SparseLayer(rule, 1, 1, 1, size, dtype, device)
    tested.planner.restore(tokens - 1, [(tokens - 1, [(list(range(tokens - 1)), [0.0] * (tokens - 1))])])
    tested.store = tested.backend.make_store(*(torch.zeros(1, 1, 1, size, dtype=dtype, device=device) for _ in "kv"))
    tested.store.plain.reserve(sorted({block for block, _, _ in tested.planner.runs(0, 0)}))
    for slab in tested.store.plain.slabs.values():
        for x in slab:
            x.copy_(torch.randint(-16, 17, x.shape, device=device) / 8)
    return tested


def one_query(rule: Any, tokens: int, device: torch.device) -> None:
    """A row whose only query is its last token."""
    torch.manual_seed(0)
    tested = filled(rule, tokens, device)
    row, (k, v) = tested.rows[0], tested.store.read(tested.planner.runs(0, 0))
    row.k, row.v, row.seen = k.cpu().double(), v.cpu().double(), tokens - 1
    tested.feed(1)


READS = {
    "hip": {8192: (4096, 4), 32768: (6144, 6), 131072: (8192, 8), 1048576: (11264, 11)},
    "infinite": {131072: (24496, 3), 1048576: (81840, 3)},
}
"""Representative keys that a query scores and rounds, counted by hand: HiP's 512 of a region of so many tokens in blocks of two;
InfiniteHiP's 2,048 in three stages of so many tokens in all."""


def reads(kind: str, tokens: int, device: torch.device) -> None:
    if kind == "hip":
        rule, tokens, read = hip(sinks=16, window=256, budget=512, block=2, refresh=8), tokens + 16 + 256, 784
        want = READS[kind][tokens - 16 - 256]
    else:
        rule, read = infinite(sinks=256, window=1024, stages=((256, 32768), (32, 8192), (8, 2048)), refresh=(16, 8, 4)), 3328
        want = READS[kind][tokens]
    tested = filled(rule, tokens, device)
    tested.run(*tested.draw(1))
    assert tested.search.work == (want[0], read)
    (head,) = tested.search.choice(0)
    assert (head.reads, head.rounds) == want


def hip_policy(**changes: Any) -> Any:
    known = {"budget": 12, "sinks": 2, "window": 8, "dense_layers": 1, "refresh": 4, "query_block": 16}
    return kvsieve.HiP(**{**known, **changes})


def infinite_policy() -> Any:
    stages = ((16, 48), (4, 24), (2, 8))
    return kvsieve.InfiniteHiP(stages=stages, refresh=(8, 4, 2), sinks=2, window=8, wide=16, wide_layers=1, query_block=16)


POLICIES = {"hip": hip_policy, "hip_first": lambda: hip_policy(representative="first", block=4), "infinite": infinite_policy}
"""Policies of small budgets, for tiny models."""


def model(family: str, policy: Any, device: torch.device) -> None:
    """Logits of a left-padded batch, what was chosen, and what a trace shows of it, beside the reference on the CPU."""
    ids, mask = pad_left([tiny.ids(1, n, n)[0] for n in (140, 75)])
    logits, traces = {}, {}
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        made = on(tiny.model(family), where)
        with kvsieve.stream(made, policy, backend) as stream:
            logits[backend] = forwards(made, stream.cache, ids.to(where), [115, 5, 1], mask.to(where)).cpu()[:, -75:]
            traces[backend] = stream.trace()
    assert any(not layer.dense for layer in traces["reference"])
    for mine, theirs in zip(traces["cuda"], traces["reference"]):
        assert (mine.dense, mine.scored, mine.read) == (theirs.dense, theirs.scored, theirs.read)
    assert float((logits["cuda"] - logits["reference"]).abs().max()) <= 1e-4 * float(logits["reference"].abs().max())


def loops(policy: Any, device: torch.device, folder: Path) -> None:
    """A fork that writes, beams, a crop, a file: the reference's tokens."""
    made, tokens = on(tiny.model(), device), {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(made, policy, backend) as stream:
            stream.feed(tiny.ids(1, 70).to(device))
            found = [stream.generate(tiny.ids(1, 3, 8).to(device), max_new_tokens=6, do_sample=False)]
            with stream.fork() as child:
                found.append(child.generate(tiny.ids(1, 20, 3).to(device), max_new_tokens=6, do_sample=False))
            found.append(stream.generate(tiny.ids(1, 9, 4).to(device), max_new_tokens=6, num_beams=3, do_sample=False))
            stream.cache.crop(-20)
            found.append(stream.generate(tiny.ids(1, 4, 6).to(device), max_new_tokens=6, do_sample=False))
            stream.save(folder / backend)
        with kvsieve.load(folder / backend, made, backend=backend) as stream:
            found.append(stream.generate(tiny.ids(1, 5, 5).to(device), max_new_tokens=6, do_sample=False))
        tokens[backend] = torch.cat(found, 1)
    assert torch.equal(tokens["cuda"], tokens["reference"])
