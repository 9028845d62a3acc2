"""InfLLM without a model: the published example, a twin key by key, closed forms, and attention to pieces beside its definition."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from typing import Any

import kvsieve
import pytest
import torch
from fetched import FetchingLayer, Numbers, infllm, rope
from kvsieve.backends import get
from kvsieve.backends.base import AttendCall
from kvsieve.backends.pieces import attend_pieces
from kvsieve.backends.ranking import suitability
from kvsieve.errors import UnsupportedError
from kvsieve.methods.infllm import InfLLMSelection
from kvsieve.policy.select import Piece
from kvsieve.policy.specs import make_planner
from kvsieve.runtime.summaries import Bounds, Table
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_qkv(seed: int, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, batch: int = 1) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, length, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    return q * 1.5, k, v


def cut(qkv: QKV, lo: int, hi: int) -> QKV:
    q, k, v = (x[:, :, lo:hi] for x in qkv)
    return q, k, v


def feed(layer: FetchingLayer, qkv: QKV, sizes: list[int]) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Out ``[B, H, T, Dv]``, and what the last queries of each call chose."""
    outs, chosen, at = [], [], 0
    for size in sizes:
        outs.append(layer.feed(*cut(qkv, at, at + size)))
        chosen.append(layer.chosen())
        at += size
    return torch.cat(outs, 1).transpose(1, 2), chosen


def policy(n: Numbers, query_block: int) -> Any:
    some: dict[str, Any] = {"representatives": n.r_k} if n.summary == "representatives" else {}
    return kvsieve.InfLLM(
        n.n_local, n.topk, n.bs, sinks=n.n_init, per_head=n.per_head, query_block=query_block, summary=n.summary, **some
    )


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


# ------------------------------------------------------------------------------------------------------------ the worked example


def worked() -> QKV:
    """Queries, keys and values of the worked example; its one KV head twice, for it has representatives for each query head."""
    t, c = torch.arange(24.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)[None]
    q = torch.stack([torch.sin(0.37 * (t + 1) * (c + 1) + h) for h in range(2)])
    k, v = torch.cos(0.23 * (t + 1) * (c + 1)), torch.cos(0.11 * (t + 1) * (c + 2))
    return q[None], k.expand(1, 2, -1, -1).contiguous(), v.expand(1, 2, -1, -1).contiguous()


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)])
def test_the_worked_example(backend: str, dtype: torch.dtype) -> None:
    n = Numbers(n_local=6, n_init=2, bs=3, topk=2, r_k=1)
    q, k, v = (x.to(dtype) for x in worked())
    layer = FetchingLayer(backend, policy(n, 4), AttendCall(0.5, rope=rope(4)))
    out, chosen = feed(layer, (q, k, v), [4, 4, 4, 4, 4, 1, 1, 1, 1])
    starts = [[2 + 3 * block for block in heads[0]] for heads in chosen]
    assert starts == [[], [], [], [2], [2, 5], [5, 11], [5, 11], [2, 5], [2, 8]]
    for head, at, want in (
        (0, 5, (0.56337, 0.15718, -0.20346, -0.40797)),
        (0, 23, (0.22533, 0.28141, -0.26016, 0.08384)),
        (1, 23, (0.08367, 0.20689, -0.22887, 0.22994)),
        (1, 19, (-0.38856, 0.08953, 0.14657, -0.2111)),
    ):
        assert out[0, head, at].tolist() == pytest.approx(want, abs=1e-4)
    whole = FetchingLayer(backend, policy(n, 4), AttendCall(0.5, rope=rope(4)))
    once, _ = feed(whole, (q, k, v), [20, 1, 1, 1, 1])
    assert off(once, out) < 1e-6, "a forward is cut at multiples of the query block"


def test_the_twin_gives_the_worked_example() -> None:
    q, k, v = worked()
    found = infllm((q[0], k[0], v[0]), [4] * 5 + [1] * 4, Numbers(6, 2, 3, 2, 1), rope(4), 0.5)
    assert found.r[0, :6].tolist() == pytest.approx([2.1658, 1.4408, 1.3070, 1.1400, 1.0357, 0.8067], abs=1e-4)
    assert found.r[1, :6].tolist() == pytest.approx([2.3109, 1.5362, 1.3007, 1.0717, 0.8472, 0.6010], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------------ the twin

SHAPES = (
    (Numbers(6, 2, 3, 2, 1), 4, 4, 2),
    (Numbers(9, 0, 4, 1, 2), 5, 2, 2),
    (Numbers(5, 3, 2, 3, 2, per_head=True), 8, 6, 2),
    (Numbers(4, 1, 5, 2, 3, per_head=True), 1, 2, 1),
    (Numbers(7, 2, 3, 0, 1), 3, 4, 1),
    (Numbers(6, 2, 3, 2, 1, summary="mean"), 4, 4, 2),
    (Numbers(5, 0, 2, 3, 1, per_head=True, summary="mean"), 8, 6, 2),
    (Numbers(6, 2, 3, 2, 1, summary="bounds"), 4, 6, 3),
    (Numbers(7, 1, 4, 2, 1, per_head=True, summary="bounds"), 8, 4, 2),
    (Numbers(5, 3, 1, 4, 1, per_head=True, summary="bounds"), 1, 2, 1),
)


@BACKEND
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_a_layer_is_the_twin(case: int, backend: str) -> None:
    n, query_block, heads, kv_heads = SHAPES[case]
    q, k, v = random_qkv(case, 60, heads, kv_heads)
    calls = [40, *[1] * 7, 3, 1, 1, 8]
    blocks, at = [], 0
    for size in calls:
        ends = [*range((at // query_block + 1) * query_block, at + size, query_block), at + size]
        blocks += [hi - lo for lo, hi in zip([at, *ends[:-1]], ends)]
        at += size
    want = infllm((q[0], k[0], v[0]), blocks, n, rope(8, "interleaved", 1.1), 0.3)
    layer = FetchingLayer(backend, policy(n, query_block), AttendCall(0.3, rope=rope(8, "interleaved", 1.1)))
    got, chosen = feed(layer, (q, k, v), calls)
    assert off(got[0], want.out) < 1e-5
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    last = dict(zip(ends, want.chosen))
    assert chosen == [last[sum(calls[: i + 1])] for i in range(len(calls))]
    state = layer.part.rows[0][0]
    base = n.n_init + len(state.table) * n.bs
    assert base <= 60 - n.n_local < base + n.bs
    if n.summary == "representatives":
        torch.testing.assert_close(state.scores.double(), want.r[:, base:], atol=1e-5, rtol=0)
    else:
        assert not state.nbytes, "only representatives need attention"


@BACKEND
def test_ragged_rows_are_as_alone(backend: str) -> None:
    """Of three rows one is shorter, and one pauses."""
    n = Numbers(6, 2, 3, 2, 1)
    q, k, v = random_qkv(5, 48, batch=3)
    layer = FetchingLayer(backend, policy(n, 4), AttendCall(0.3, rope=rope(8)))
    outs: list[list[torch.Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for lens in ([30, 30, 17], [1, 0, 1], [1, 1, 1], [6, 6, 0], [1, 1, 1], [1, 0, 1]):
        width = max(lens)
        rows = [
            [torch.nn.functional.pad(x[r, :, at[r] : at[r] + m], (0, 0, width - m, 0)) for x in (q, k, v)]
            for r, m in enumerate(lens)
        ]
        out = layer.feed(*(torch.stack(x) for x in zip(*rows)), lens)
        for r, m in enumerate(lens):
            assert not out[r, : width - m].any(), "pads get nothing"
            outs[r].append(out[r, width - m :])
            at[r] += m
    for r, calls in enumerate(([30, 1, 1, 6, 1, 1], [30, 1, 6, 1], [17, 1, 1, 1, 1])):
        alone = FetchingLayer(backend, policy(n, 4), AttendCall(0.3, rope=rope(8)))
        one = (q[r : r + 1], k[r : r + 1], v[r : r + 1])
        want, _ = feed(alone, cut(one, 0, sum(calls)), calls)
        assert off(torch.cat(outs[r]).transpose(0, 1), want[0]) < 1e-5


# ------------------------------------------------------------------------------------------------------------------ closed forms


def closed(qkv: QKV, window: int, beyond: Any, scale: float = 0.3) -> torch.Tensor:
    """Float64 ``[H, T, Dv]``: true distances inside the window, ``window - 1`` for what ``beyond(i, t)`` says outside it."""
    q, k, v = (x[0].double() for x in qkv)
    turn, count, group = rope(8), q.shape[1], q.shape[0] // k.shape[0]
    at = torch.arange(count)
    near = turn.rotate(q, at) @ turn.rotate(k, at).repeat_interleave(group, 0).transpose(1, 2)
    far = turn.rotate(q, torch.full((count,), window - 1)) @ k.repeat_interleave(group, 0).transpose(1, 2)
    distance = at[:, None] - at[None, :]
    read = torch.tensor([[beyond(i, t) for t in range(count)] for i in range(count)])
    seen = (distance >= 0) & ((distance < window) | read)
    logits = torch.where(distance < window, near, far).masked_fill(~seen, -torch.inf) * scale
    return logits.softmax(-1) @ v.repeat_interleave(group, 0)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 1e-5)])
@pytest.mark.parametrize(("sinks", "block", "count", "query_block"), [(0, 4, 1, 4), (3, 7, 2, 16), (1, 2, 2, 5)])
def test_all_blocks_are_a_closed_form(
    sinks: int, block: int, count: int, query_block: int, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Whatever sinks, blocks, representatives and query blocks are: everything is read, in the window or at its edge."""
    qkv = random_qkv(1, 60)
    n = Numbers(10, sinks, block, 100, count)
    layer = FetchingLayer(backend, policy(n, query_block), AttendCall(0.3, rope=rope(8)))
    q, k, v = (x.to(dtype) for x in qkv)
    got, _ = feed(layer, (q, k, v), [33, 1, 1, 20, 1, 4])
    assert off(got[0], closed(qkv, 10, lambda i, t: True)) < tolerance


@BACKEND
def test_without_blocks_there_are_sinks_and_what_no_block_has(backend: str) -> None:
    qkv, window, sinks, block = random_qkv(2, 50), 8, 3, 4
    layer = FetchingLayer(backend, policy(Numbers(window, sinks, block, 0, 1), 1), AttendCall(0.3, rope=rope(8)))
    got, _ = feed(layer, qkv, [50])

    def beyond(i: int, t: int) -> bool:
        return t < sinks or t >= sinks + max(i - sinks - window, 0) // block * block

    assert off(got[0], closed(qkv, window, beyond)) < 1e-5


@BACKEND
def test_calls_that_end_with_a_query_block_change_nothing(backend: str) -> None:
    qkv, n = random_qkv(3, 72), Numbers(12, 2, 4, 2, 2)
    answers = []
    for calls in ([72], [8] * 9, [24, 8, 40]):
        layer = FetchingLayer(backend, policy(n, 8), AttendCall(0.3, rope=rope(8)))
        answers.append(feed(layer, qkv, calls)[0])
    assert all(off(answer, answers[0]) < 1e-6 for answer in answers)


def test_how_many_blocks_there_are() -> None:
    rule = InfLLMSelection()
    assert [rule.num_blocks(seen) for seen in (0, 4224, 4351, 4352, 8192, 100000)] == [0, 0, 0, 1, 31, 748]
    layer = FetchingLayer("reference", policy(Numbers(6, 2, 3, 2, 1), 4), AttendCall(0.3, rope=rope(8)))
    qkv = random_qkv(4, 40)
    for seen in range(40):
        layer.feed(*cut(qkv, seen, seen + 1))
        assert len(layer.part.rows[0][0].table) == max(seen + 1 - 2 - 6, 0) // 3


@BACKEND
@pytest.mark.parametrize("summary", ["representatives", "bounds"])
def test_a_planted_key_is_found(summary: str, backend: str) -> None:
    """All keys are small but one, which is what the last queries look for: its block is fetched, by representatives or bounds."""
    q, k, v = random_qkv(6, 80)
    window = 10
    last = rope(8).rotate(q[0, :, -1:], torch.tensor([window - 1]))
    k = 0.1 * k
    k[0, :, 31] = 6 * last[:, 0].view(2, 2, 8).mean(1)
    for per_head in (False, True):
        layer = FetchingLayer(backend, policy(Numbers(window, 2, 4, 1, 1, per_head, summary), 8), AttendCall(0.3, rope=rope(8)))
        _, chosen = feed(layer, (q, k, v), [79, 1])
        assert chosen[-1] == [[(31 - 2) // 4]] * 2


@BACKEND
def test_one_head_that_chooses_for_itself_is_all_of_them(backend: str) -> None:
    qkv, answers = random_qkv(7, 60, heads=2, kv_heads=1), []
    for per_head in (False, True):
        layer = FetchingLayer(backend, policy(Numbers(8, 2, 3, 2, 1, per_head), 4), AttendCall(0.3, rope=rope(8)))
        answers.append(feed(layer, qkv, [40, *[1] * 20]))
    assert torch.equal(answers[0][0], answers[1][0])
    assert answers[0][1] == answers[1][1]


@BACKEND
def test_equal_scores_are_taken_from_the_front(backend: str) -> None:
    """Equal keys: the first tokens of a block stand for it, and the first blocks are fetched."""
    q, k, v = random_qkv(8, 60)
    k = k[:, :, :1].expand_as(k).contiguous()
    layer = FetchingLayer(backend, policy(Numbers(8, 2, 3, 2, 1), 1), AttendCall(0.0, rope=None))
    _, chosen = feed(layer, (q, k, v), [40, 1, 1])
    assert chosen[-1] == [[0, 1]] * 2


@BACKEND
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_a_block_with_a_nan_is_not_fetched(summary: str, per_head: bool, backend: str) -> None:
    """Where it has a NaN in a key of one head: by that head, or by none. Fewer blocks are fetched where no others are left."""
    q, k, v = random_qkv(9, 60)
    n = Numbers(8, 2, 4, 11, 1, per_head, summary)
    k[0, 1, 23] = torch.nan
    layer = FetchingLayer(backend, policy(n, 1), AttendCall(0.3, rope=rope(8)))
    _, chosen = feed(layer, (q, k, v), [59, 1])
    num, bad = (59 - 10) // 4, (23 - 2) // 4
    assert num == 12
    rest = [block for block in range(num) if block != bad]
    assert chosen[-1][1] == rest
    assert len(chosen[-1][0]) == 11
    assert per_head or chosen[-1][0] == rest


def test_bounds_are_never_below_what_a_key_of_the_block_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        kv_heads, group, block, far = 1 + seed % 3, 1 + seed % 2, 1 + seed % 5, 7 * seed
        rule: Any = kvsieve.InfLLM(far + 1, 1, block, summary="bounds").select
        k = torch.randn(kv_heads, 6 * block, 8, generator=generator)
        q = torch.randn(kv_heads * group, 3, 8, generator=generator)
        call = AttendCall(1.0, rope=rope(8, ["half", "interleaved"][seed % 2]))
        kind = Bounds(rule)
        found = (kind.of_keys(k, 6, call) * kind.asked(q, kv_heads)[:, None]).sum(-1)
        turned = rope(8, ["half", "interleaved"][seed % 2]).rotate(q, torch.full((3,), far))
        logits = turned.view(kv_heads, group * 3, 8) @ k.transpose(1, 2)
        best = logits.view(kv_heads, group * 3, 6, block).amax(3).sum(1)
        assert bool((found >= best - 1e-4).all())


# ---------------------------------------------------------------------------------------------------------------- pieces, tables


def random_pieces(rng: random.Random, first: int, count: int, kv_heads: int, near: bool) -> list[Piece]:
    """Disjoint pieces for each head, the queries' own tokens among them; if ``near``, first what all see at true distances."""
    cuts = sorted(rng.sample(range(1, first), rng.randint(2, 6)))
    spans = list(zip([0, *cuts], [*cuts, first]))
    lo = spans.pop()[0] if near else first
    found = [Piece(lo, first + count, first - lo, within=rng.choice([None, 7, first]))]
    for lo, hi in spans:
        head = rng.choice([None, *range(kv_heads)])
        if rng.random() < 0.5:
            found.append(Piece(lo, hi, rng.choice([0, 9, 300]), fixed=True, nearest=rng.choice([0, 3]), head=head))
        else:
            found.append(Piece(lo, hi, hi - lo - 1 + rng.choice([0, 5, 700]), within=rng.choice([None, 50]), head=head))
    return found if near else rng.sample(found, len(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5, 150])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_on_the_cpu_are_those_of_the_definition(seed: int, count: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed * 7 + count)
    kv_heads, group, dim, length = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([8, 16]), 330
    q, k, v = random_qkv(seed, length, kv_heads * group, kv_heads, dim)
    q, k, v = (x.to(dtype) for x in (q, k, v[..., : dim - 2 * (seed == 3)]))
    sinks = torch.randn(kv_heads * group) if seed in (1, 2) else None
    softcap = 4.0 if seed in (2, 4) else None
    turn = None if seed == 5 else rope(dim, rng.choice(["half", "interleaved"]), 1.2)
    call = AttendCall(0.3, softcap, sinks, turn)
    layer = FetchingLayer("cpu", kvsieve.InfLLM(length), call)
    layer.feed(q, k, v)
    scored = seed % 2 == 0
    first = rng.randint(40, length - count)
    pieces = random_pieces(rng, first, count, kv_heads, scored)
    residents = residents_of(layer)
    mine = q[0, :, first : first + count]
    got = layer.store.attend_pieces(mine, first, residents, pieces, call, scored, told=True)

    def read(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        return k[0, :, lo:hi].double(), v[0, :, lo:hi].double()

    want = attend_pieces(mine.double(), first, pieces, read, call, scored, told=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.out.dtype == dtype
    assert off(got.out, want.out) < tolerance
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)
    if scored:
        assert got.scores is not None
        assert want.scores is not None
        assert off(got.scores, want.scores) < tolerance
    assert got.mass is not None
    assert want.mass is not None
    assert got.mass.shape == want.mass.shape == (sum(piece.hi - piece.lo for piece in pieces[1:]),)
    assert off(got.mass, want.mass) < tolerance
    # To be told of it changes no answer.
    untold = layer.store.attend_pieces(mine, first, residents, pieces, call, scored)
    assert untold.mass is None
    assert torch.equal(untold.out, got.out)
    assert torch.equal(untold.lse, got.lse)


def residents_of(layer: FetchingLayer) -> Any:
    """Where the tokens of the only row lie, found as a step finds them."""
    from kvsieve._core import Residents

    planner = layer.blocks.planner
    step = planner.begin([1], 1, True, True)
    residents = Residents(step, 0)
    planner.rollback()
    return residents


def test_residents_are_found_by_number() -> None:
    layer = FetchingLayer("cpu", kvsieve.InfLLM(64), AttendCall(0.3))
    layer.feed(*random_qkv(0, 150))
    residents, runs = residents_of(layer), layer.blocks.planner.runs(0, 0)
    slots = [(block, slot) for block, lo, hi in runs for slot in range(lo, hi)]
    assert len(residents) == 151
    for lo, hi in ((0, 150), (63, 65), (64, 128), (10, 10), (149, 150), (0, 1)):
        found = [(block, slot) for block, a, b in residents.runs(lo, hi) for slot in range(a, b)]
        assert found == slots[lo:hi]


@pytest.mark.parametrize("width", [1, 3, 40])
def test_residents_alone_are_those_that_spans_and_parts_tell(width: int) -> None:
    """Also where the last block is shared, and is copied by the step, and of a row that gets nothing."""
    from kvsieve._core import Residents

    planner = make_planner(kvsieve.InfLLM(64).specs(1), "pre_rope")
    planner.begin([150, 70], 150, True, False)
    planner.commit()
    step = planner.begin_residents([width, 0], width)
    assert step.parts() == []
    assert step.spans() is None
    planner.rollback()
    for planned, lens in itertools.product((planner, planner.fork()), ([width, width - 1], [0, width])):
        found = []
        for begin in (
            partial(planned.begin, lens, width, True, False),
            partial(planned.begin, lens, width, True, True),
            partial(planned.begin_residents, lens, width),
        ):
            step = begin()
            rows = [Residents(step, row) for row, count in enumerate(lens) if count]
            found.append([(len(x), x.runs(0, len(x)), x.runs(60, 130)) for x in rows])
            planned.rollback()
        assert found[0] == found[1] == found[2]
    for policy in (kvsieve.StreamingLLM(64), kvsieve.LMInfinite(64)):
        with pytest.raises(UnsupportedError, match="keeps and shows all"):
            make_planner(policy.specs(1), policy.stored_keys).begin_residents([1], 1)


@BACKEND
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 8), (2, 64), (4, 128), (3, 80)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_summaries_are_compared_alike_however_they_are_cut(
    backend: str, per_head: bool, kv_heads: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal ones are equally good: the first of them is found."""
    generator = torch.Generator().manual_seed(size)
    data = torch.randn(kv_heads, 300, size, generator=generator)
    data[:, 200:] = data[:, :100]
    q = torch.randn(2 * kv_heads, 3, size, generator=generator)
    store = get(backend).make_store(torch.zeros(1, kv_heads, 1, size), torch.zeros(1, kv_heads, 1, size))
    asked = q.sum(1).view(kv_heads, 2, size).sum(1)
    data[:, 7], data[:, 9, 0], data[:, 11, -1] = -torch.inf * asked.sign(), torch.nan, torch.inf * asked[:, -1].sign()
    products = (data.double() * asked[:, None].double()).sum(-1)
    judged = (products if per_head else products.sum(0, keepdim=True)).nan_to_num(nan=-torch.inf)
    whole = suitability([data.transpose(0, 1)], asked, per_head)
    for slab, piece in ((1024, 1 << 18), (128, 1 << 18), (64, 4 * kv_heads * size * 7), (1024, 1)):
        monkeypatch.setattr("kvsieve.runtime.summaries.SLAB", slab)
        monkeypatch.setattr("kvsieve.runtime.summaries.PIECE", piece)
        table = Table.of(data)
        for lo, hi in ((0, 300), (3, 290)):
            pieces = list(table.pieces(lo, hi))
            assert torch.equal(suitability(pieces, asked, per_head).nan_to_num(7.0), whole[:, lo:hi].nan_to_num(7.0))
            for most in (1, 16, 100):
                # In float64 the lowest numbers come first among equals; minus infinity and nan are nothing.
                order = judged[:, lo:hi].sort(dim=-1, descending=True, stable=True)
                want = [
                    sorted(number for number, value in zip(numbers[:most], values) if value > -math.inf)
                    for numbers, values in zip(order.indices.tolist(), order.values.tolist())
                ]
                assert store.best_summaries(pieces, asked, most, per_head) == want
    few = list(Table.of(data[:, 7:12]).pieces(0, 5))
    assert all(row == [1, 3, 4] for row in store.best_summaries(few, asked, 5, per_head)), "two are worth nothing"


@pytest.mark.parametrize("slab", [1024, 16])
def test_tables_grow_and_their_forks_do_not_see_each_other(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsieve.runtime.summaries.SLAB", slab)
    generator = torch.Generator().manual_seed(0)
    rng, tables = random.Random(0), [(Table.of(torch.zeros(2, 0, 3)), torch.zeros(2, 0, 3))]
    for _ in range(300):
        table, data = tables[rng.randrange(len(tables))]
        if rng.random() < 0.2:
            count = rng.randint(0, len(table))
            grown, data = table.first(count), data[:, :count]
        else:
            more = torch.randn(2, rng.randint(1, 5), 3, generator=generator)
            grown, data = table.then(more), torch.cat([data, more], 1)
        tables.append((grown, data))
        assert all(torch.equal(t.data, d) for t, d in tables)
        assert len(grown) == data.shape[1]
        lo = rng.randint(0, len(grown))
        pieces = [piece.transpose(0, 1) for piece in grown.pieces(lo, len(grown))]
        assert torch.equal(torch.cat([data[:, :lo], *pieces], 1), data)
    held = [Table.of(torch.zeros(1, 1, 4))]
    for _ in range(1000):
        held.append(held[-1].then(torch.zeros(1, 1, 4)))
    # All of them are alive, so that no two slabs have one number.
    sizes = {number: size // 16 for table in held for number, size in table.memory.items()}
    doubled = [16, 34, 70, 142, 286, 574, 1024]
    assert sorted(sizes.values()) == (doubled if slab == 1024 else [16] * 63), "its memory doubles, and then comes in slabs"
