"""RefreshKV: streams beside a naive twin, numbers worked by hand, the invariants of its sets."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import Layer, forward, forwards, pad_left
from kvsieve.backends import attention_scores
from kvsieve.backends.base import AttendCall, HeadSets
from kvsieve.methods.refresh_kv import RefreshSelection
from kvsieve.runtime.recycling import cosine
from refresh_twin import Twin, part_of, read_by
from tiny import BACKENDS
from torch.nn.functional import max_pool1d, scaled_dot_product_attention

BACKEND = pytest.mark.parametrize("backend", BACKENDS)

GQA = (
    {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4},
    {"num_attention_heads": 4, "num_key_value_heads": 1},
)


# ---------------------------------------------------------------------------------------------------------------------- the twin


@pytest.mark.slow
@BACKEND
@pytest.mark.parametrize("similarity", [None, 0.3, 0.6])
@pytest.mark.parametrize(("seed", "shape"), list(enumerate(GQA)))
def test_a_stream_is_the_twin(seed: int, shape: dict[str, Any], similarity: float | None, backend: str) -> None:
    """A prompt, tokens one by one past several full steps, a chunk, and more: logits, sets and full steps."""
    model = tiny.model(seed=seed, **shape)
    budget, stride, kernel = ((20, 4, 3), (9, 3, 1), (33, 5, 7), (5, 7, 5))[seed]
    twin, ids = Twin(model, budget, stride, similarity, kernel), tiny.ids(1, 130, seed)
    with kvsieve.stream(model, kvsieve.RefreshKV(budget, stride, similarity, kernel), backend) as stream:
        at = 0
        for size in (16 + seed * 11, *[1] * 23, 9, *[1] * 14, 20, *[1] * 9):
            before = [None if layer.recycled is None else [list(head) for head in layer.recycled] for layer in twin.layers]
            full = [layer.full for layer in twin.layers]
            want = twin.forward(ids[0, at : at + size])
            got = forward(model, stream.cache, ids[:, at : at + size])[0]
            at += size
            assert float((got - want).abs().max()) <= 2e-4 * float(want.abs().max()), f"token {at}"
            if size == 1 and at > budget:
                wanted = [
                    None if layer.full > f or mine is None else [sorted([*head, at - 1]) for head in mine]
                    for layer, mine, f in zip(twin.layers, before, full)
                ]
                assert read_by(stream) == wanted, f"token {at}"
        assert list(part_of(stream).full_steps.values()) == [layer.full for layer in twin.layers]
        assert stream._engine.planner.positions(0, 0).tolist() == list(range(at))


@BACKEND
def test_layers_decide_for_themselves(backend: str) -> None:
    """A bound between the similarities of two layers: one takes a full step and the other does not, at one and the same step."""
    model, ids = tiny.model(), tiny.ids(1, 60, 3)
    trial = Twin(model, 12, 4, -1.0, 3)
    for piece in (ids[0, :50], *ids[0, 50:54].split(1)):
        trial.forward(piece)
    first = sorted(layer.similarities[0] for layer in trial.layers)
    bound = (first[0] + first[1]) / 2
    twin = Twin(model, 12, 4, bound, 3)
    with kvsieve.stream(model, kvsieve.RefreshKV(12, 4, bound, 3), backend) as stream:
        for piece in (ids[:, :50], *ids[:, 50:].split(1, 1)):
            want, got = twin.forward(piece[0]), forward(model, stream.cache, piece)[0]
            assert float((got - want).abs().max()) <= 2e-4 * float(want.abs().max())
            if stream.seen == 54:
                full = [heads is None for heads in read_by(stream)]
                assert full == [layer.full > 0 for layer in twin.layers]
                assert any(full)
                assert not all(full)
        assert list(part_of(stream).full_steps.values()) == [layer.full for layer in twin.layers]


# --------------------------------------------------------------------------------------------------------- numbers worked by hand

A1 = (0.05, 0.02, 0.30, 0.03, 0.10, 0.20, 0.25, 0.05)
A2 = (0.40, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.30)


def chosen(kernel: int, *heads: tuple[float, ...]) -> tuple[list[int], list[int]]:
    """What a group of heads chooses of 4, and in which order it goes."""
    tokens, order = RefreshSelection(4, kernel=kernel).choose(torch.tensor(heads).amax(0)[None])
    return tokens[0].tolist(), tokens[0][order[0].argsort()].tolist()


def test_the_worked_numbers() -> None:
    assert chosen(1, A1, A2) == ([0, 2, 6, 7], [6, 7, 2, 0])
    assert chosen(3, A1, A2)[0] == [0, 1, 2, 7]
    assert chosen(1, A1)[0] == [2, 4, 5, 6]
    reference = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]).mean(0)
    near = torch.tensor([[1, 0.2, 0.9, 0], [0.1, 1, 0, 0.8]]).mean(0)
    far = torch.tensor([[0.0, 1, -1, 0], [1, 0, 0, 1]]).mean(0)
    assert cosine(reference, near) == pytest.approx(0.9877, abs=5e-5)
    assert cosine(reference, far) == pytest.approx(0.5)


def test_what_is_chosen_is_the_top_by_pooled_own_and_age() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        n, budget, kernel = 1 + case % 40, 1 + case % 13, 1 + 2 * (case % 4)
        # Few distinct scores, zeros among them, as of probabilities that underflow.
        scores = torch.randint(0, 4, (3, n), generator=generator).float() * 1e-3
        tokens, order = RefreshSelection(budget, kernel=kernel).choose(scores)
        pooled = max_pool1d(scores, kernel, 1, kernel // 2)
        for head in range(3):
            ranked = sorted(range(n), key=lambda i, h=head: (float(pooled[h, i]), float(scores[h, i]), -i))  # type: ignore[misc]
            assert tokens[head][order[head].argsort()].tolist() == ranked[-budget:]
            assert tokens[head].tolist() == sorted(ranked[-budget:])
        if kernel > 1:
            # The highest of a group and of neighbours: in either order.
            assert torch.equal(max_pool1d(scores.amax(0, keepdim=True), kernel, 1, kernel // 2), pooled.amax(0, keepdim=True))
    nan = torch.tensor([[0.1, torch.nan, 0.3]])
    assert RefreshSelection(2, kernel=1).choose(nan)[0].tolist() == [[0, 2]]


@BACKEND
def test_the_schedule_of_the_figure(backend: str) -> None:
    """A prompt of 5, 3 tokens, a stride of 3: steps 1, 2, 4 are partial, 3 is full."""
    with kvsieve.stream(tiny.model(), kvsieve.RefreshKV(3, stride=3, similarity=None), backend) as stream:
        stream.feed(tiny.ids(1, 5))
        full = []
        for token in tiny.ids(1, 4, 2).split(1, 1):
            forward(tiny.model(), stream.cache, token)
            full.append([heads is None for heads in read_by(stream)])
        assert full == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]


# ----------------------------------------------------------------------------------------------------------------------- schedule


@BACKEND
@pytest.mark.parametrize(("stride", "similarity", "count"), [(4, None, 5), (1, None, 22), (30, None, 0), (4, -1.0, 0), (4, 2.0, 5)])
def test_full_steps_are_counted(stride: int, similarity: float | None, count: int, backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.RefreshKV(16, stride, similarity), backend) as stream:
        forwards(tiny.model(), stream.cache, tiny.ids(1, 62), [40, 1])
        assert set(part_of(stream).full_steps.values()) == {count}


@BACKEND
def test_what_the_budget_holds_is_the_full_cache_bit_for_bit(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    answers = []
    for policy in (kvsieve.Full(), kvsieve.RefreshKV(60), kvsieve.RefreshKV(8, stride=1, similarity=2.0)):
        with kvsieve.stream(model, policy, backend) as stream:
            answers.append(forwards(model, stream.cache, ids, [40, 1]))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2]), "every step is a full one"


@BACKEND
def test_sets_keep_their_size_and_lose_the_lowest_first(backend: str) -> None:
    """Without a full step: what was chosen goes one by one, from the lowest score, and then the oldest of what came since."""
    budget, model = 12, tiny.model()
    with kvsieve.stream(model, kvsieve.RefreshKV(budget, stride=100, similarity=None), backend) as stream:
        stream.feed(tiny.ids(1, 40))
        choices = [part_of(stream).rows[0].layers[index] for index in range(2)]
        going = [[c.tokens[h][c.order[h].argsort()].tolist() for h in range(2)] for c in choices]
        for step, token in enumerate(tiny.ids(1, 30, 2).split(1, 1)):
            forward(model, stream.cache, token)
            whole = [[head + list(range(40, 40 + step)) for head in heads] for heads in going]
            assert read_by(stream) == [[sorted([*head[-budget:], 40 + step]) for head in heads] for heads in whole]
            assert [part_of(stream).rows[0].layers[index] for index in range(2)] == choices
        assert stream._engine.planner.resident(0, 0) == 70


@BACKEND
@pytest.mark.parametrize("chunk", [1, 16, 40])
def test_the_last_piece_of_a_prompt_is_read_whole_though_it_is_one_token(chunk: int, backend: str) -> None:
    """Of a batch, so that its rows end at other places of a piece."""
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (49, 33)]
    ids, mask = pad_left(rows)
    with kvsieve.stream(model, kvsieve.RefreshKV(16, stride=1, similarity=-1.0), backend) as stream:
        stream.feed(ids, attention_mask=mask, chunk=chunk)
        assert [state.held for state in part_of(stream).rows] == [49, 33]
        assert set(part_of(stream).full_steps.values()) <= {0}
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        got = forward(model, stream.cache, tiny.ids(2, 1, 5), mask)
        assert all(sets is not None for sets in part_of(stream).read[0])
    for row, text in enumerate(rows):
        with kvsieve.stream(model, kvsieve.RefreshKV(16, stride=1, similarity=-1.0), backend) as stream:
            forward(model, stream.cache, text[None])
            want = forward(model, stream.cache, tiny.ids(2, 1, 5)[row : row + 1])
            assert float((got[row] - want[0]).abs().max()) <= 1e-4 * float(want.abs().max())


@BACKEND
@pytest.mark.parametrize("returned", [1, 3])
def test_answers_begin_with_the_token_that_the_full_cache_would_give(returned: int, backend: str) -> None:
    """A turn is read whole, also where it is cut before its last token because several answers are wanted."""
    model, first = tiny.model(), []
    for policy in (kvsieve.Full(), kvsieve.RefreshKV(8, similarity=-1.0)):
        with kvsieve.stream(model, policy, backend) as stream:
            how = {"do_sample": returned > 1, "top_k": 1, "num_return_sequences": returned}
            out = stream.generate(tiny.ids(1, 60), max_new_tokens=3, output_logits=True, return_dict_in_generate=True, **how)
            first.append(out.logits[0])
    assert torch.allclose(*first, atol=1e-4 * float(first[0].abs().max()))


@BACKEND
def test_a_text_that_grows_past_the_budget_chooses_then(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.RefreshKV(24, similarity=-1.0), backend) as stream:
        stream.feed(tiny.ids(1, 20))
        for at, token in enumerate(tiny.ids(1, 8, 2).split(1, 1), 21):
            forward(tiny.model(), stream.cache, token)
            assert part_of(stream).rows[0].held == (25 if at > 24 else 0)
        assert set(part_of(stream).full_steps.values()) == {1}


# ----------------------------------------------------------------------------------------------------------------------- backends


def random_sets(generator: torch.Generator, heads: int, rest: int, count: int) -> HeadSets:
    tokens = torch.stack([torch.randperm(rest, generator=generator)[:count].sort().values for _ in range(heads)])
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(heads)])
    return HeadSets(tokens, order, count // 3, rest)


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_rows_with_sets_beside_rows_without(width: int, dtype: torch.dtype, backend: str) -> None:
    """Of four rows one reads sets, one reads everything, one has nothing new, and one sets again: against torch's attention."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the CPU backend holds no float64")
    generator = torch.Generator().manual_seed(width)
    heads, kv_heads, dim, old = 6, 2, 16, 150
    make = [torch.randn(4, h, old + width, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]
    sinks = torch.randn(heads, generator=generator) if width == 3 else None
    layer = Layer(backend, kvsieve.RefreshKV(40), scale=0.3, softcap=None if width == 1 else 5.0, sinks=sinks)
    layer.feed(*(x[:, :, :old] for x in make))
    lens = [1, width, 0, 1]
    q, k, v = (x[:, :, old:] for x in make)
    sets = [random_sets(generator, kv_heads, 120, 33), None, None, random_sets(generator, kv_heads, old, 20)]
    step = layer.planner.begin(lens, width, True, layer.backend.capabilities.needs_parts)
    out, scores = layer.store.run_with_sets(q, k, v, step, layer.call, sets)
    layer.planner.commit()
    assert [score is None for score in scores] == [True, False, True, True]
    for row, count in enumerate(lens):
        assert not out[row, : width - count].any(), "pads get nothing"
        keys, values = (torch.cat([x[row, :, :old], x[row, :, old + width - count :]], 1).double() for x in make[1:])
        for head in range(heads if count else 0):
            mine = head // (heads // kv_heads)
            logits = q[row, head, width - count :].double() @ keys[mine].T * 0.3
            logits = logits if width == 1 else 5.0 * torch.tanh(logits / 5.0)
            seen = torch.ones(count, old + count, dtype=torch.bool).tril(old)
            if (own := sets[row]) is not None:
                seen[:] = False
                seen[0, own.read(mine, old + 1)] = True
            logits = logits.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().expand(count, 1)], 1)
            p = logits.softmax(-1)[:, : old + count]
            off = (out[row, width - count :, head].double() - p @ values[mine]).abs().max()
            assert float(off) <= (2e-2 if dtype == torch.bfloat16 else 2e-6), (row, head)
            if (score := scores[row]) is not None:
                assert bool((score[mine] >= p[-1] - 1e-6).all())
    got = scores[1]
    assert got is not None
    keys = torch.cat([make[1][1, :, :old], k[1]], 1)
    want = attention_scores.highest_of_last(q[1, :, -1], keys, layer.call)
    torch.testing.assert_close(got.double(), want.double(), atol=2e-6, rtol=0)


@BACKEND
def test_equal_heads_of_a_group_choose_as_one_head(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 3, 90, 16, generator=generator) for _ in range(3))
    found = []
    for group in (1, 4):
        layer = Layer(backend, kvsieve.RefreshKV(10), scale=0.5)
        many = q.repeat_interleave(group, 1)
        layer.feed(many[:, :, :89], k[:, :, :89], v[:, :, :89])
        step = layer.planner.begin([1], 1, True, layer.backend.capabilities.needs_parts)
        _, (scores,) = layer.store.run_with_sets(many[:, :, 89:], k[:, :, 89:], v[:, :, 89:], step, layer.call, [None])
        assert scores is not None
        found.append(RefreshSelection(10).choose(scores))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@BACKEND
def test_where_few_tokens_have_all_the_mass_a_partial_step_is_a_full_one(backend: str) -> None:
    """Seven keys are near the query: what a head reads gives the full step's answer, up to the mass that it leaves out."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 4, 1, 16, generator=generator)
    k, v = (torch.randn(1, 2, 200, 16, generator=generator) for _ in range(2))
    for head in range(2):
        near = torch.randperm(199, generator=generator)[:7]
        k[0, head, near] = 2 * (query[0, 2 * head] + query[0, 2 * head + 1])
    layer = Layer(backend, kvsieve.RefreshKV(8), scale=1.5)
    layer.feed(query.expand(-1, -1, 199, -1), k[:, :, :199], v[:, :, :199])
    outs, sets = [], None
    for _ in range(2):
        step = layer.planner.begin([1], 1, True, layer.backend.capabilities.needs_parts)
        out, scores = layer.store.run_with_sets(query, k[:, :, 199:], v[:, :, 199:], step, layer.call, [sets])
        outs.append(out)
        if scores[0] is not None:
            mass = scores[0].sort(descending=True).values
            assert bool((mass[:, 8:].sum(1) <= 1e-3).all())
            tokens, order = RefreshSelection(8, kernel=1).choose(scores[0])
            sets = HeadSets(tokens, order, 0, 199)
    assert float((outs[0] - outs[1]).abs().max()) <= 2e-3 * float(v.norm(dim=-1).max())
    assert not torch.equal(*outs)


def test_scores_add_up_over_one_head() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
    scores = attention_scores.highest_of_last(q, k, AttendCall(0.7))
    eye = torch.eye(30).expand(1, 2, 30, 30)
    want = scaled_dot_product_attention(q[None, :, None], k[None], eye, scale=0.7)[0, :, 0]
    torch.testing.assert_close(scores, want)
    assert scores.sum(1).tolist() == pytest.approx([1.0, 1.0])
