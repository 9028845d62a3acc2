"""RefreshKV: numbers worked by hand, the invariants of its sets, and a naive twin, written out from the paper, beside streams.

The twin keeps lists: what each head reads, from the lowest score to the newest token, and every key.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import Layer, forward, forwards, pad_left
from kvsieve.backends import attention_scores
from kvsieve.backends.base import AttendCall, HeadSets
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.errors import BackendError, PolicyError, StateError, UnsupportedModelError
from kvsieve.methods.refresh_kv import RefreshSelection
from kvsieve.runtime.recycling import Recycling, cosine
from tiny import BACKENDS
from torch.nn.functional import max_pool1d, scaled_dot_product_attention
from transformers import LlamaForCausalLM

BACKEND = pytest.mark.parametrize("backend", BACKENDS)

GQA = (
    {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4},
    {"num_attention_heads": 4, "num_key_value_heads": 1},
)


# ---------------------------------------------------------------------------------------------------------------------- the twin


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class TwinLayer:
    """Keys and values ``[Hkv, n, D]`` of all tokens; of each head what it reads, the first to go first; the query it chose by."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.recycled: list[list[int]] | None = None
        self.query: torch.Tensor | None = None
        self.similarities: list[float] = []
        self.full = 0


class Twin:
    """A Llama under RefreshKV."""

    def __init__(self, model: Any, budget: int, stride: int, similarity: float | None, kernel: int) -> None:
        self.model, self.budget, self.stride, self.similarity, self.kernel = model, budget, stride, similarity, kernel
        self.layers = [TwinLayer() for _ in model.model.layers]
        self.seen, self.step = 0, 0

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of new tokens ``[n]``."""
        body = self.model.model
        x, n = body.embed_tokens(ids), len(ids)
        cos, sin = (t[0] for t in body.rotary_emb(x[None], torch.arange(self.seen, self.seen + n)[None]))
        self.seen += n
        alone = n == 1 and self.layers[0].recycled is not None and self.seen > self.budget
        self.step = self.step + 1 if alone else 0
        for module, layer in zip(body.layers, self.layers):
            h = module.input_layernorm(x)
            heads = [getattr(module.self_attn, f"{name}_proj")(h).view(n, -1, 16).transpose(0, 1) for name in "qkv"]
            q, k, v = heads
            mean = q[:, -1].mean(0)
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            layer.keys = k if layer.keys is None else torch.cat([layer.keys, k], 1)
            layer.values = v if layer.values is None else torch.cat([layer.values, v], 1)
            full = self.is_full(layer, mean) if alone else True
            answer = self.all_of(layer, q, mean) if full else self.some_of(layer, q)
            layer.full += full and n == 1 and self.seen > self.budget
            x = x + module.self_attn.o_proj(answer.transpose(0, 1).reshape(n, -1))
            x = x + module.mlp(module.post_attention_layernorm(x))
        return self.model.lm_head(body.norm(x))

    def is_full(self, layer: TwinLayer, mean: torch.Tensor) -> bool:
        if self.step % self.stride:
            return False
        if self.similarity is None:
            return True
        assert layer.query is not None
        layer.similarities.append(float(torch.cosine_similarity(mean, layer.query, dim=0)))
        return layer.similarities[-1] <= self.similarity

    def all_of(self, layer: TwinLayer, q: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        group, n = q.shape[0] // layer.keys.shape[0], q.shape[1]
        keys, values = (x.repeat_interleave(group, 0) for x in (layer.keys, layer.values))
        hidden = torch.ones(n, self.seen, dtype=torch.bool).triu(self.seen - n + 1)
        p = (q @ keys.transpose(1, 2) / 4).masked_fill(hidden, -torch.inf).softmax(-1)
        if self.seen > self.budget:
            layer.recycled = [self.best(p[h * group : (h + 1) * group, -1].amax(0)) for h in range(layer.keys.shape[0])]
            layer.query = mean
        return p @ values

    def best(self, raw: torch.Tensor) -> list[int]:
        pooled = max_pool1d(raw[None], self.kernel, 1, self.kernel // 2)[0]
        ranked = sorted(range(self.seen), key=lambda i: (float(pooled[i]), float(raw[i]), -i))
        return ranked[-self.budget :]

    def some_of(self, layer: TwinLayer, q: torch.Tensor) -> torch.Tensor:
        assert layer.recycled is not None
        group, out = q.shape[0] // layer.keys.shape[0], []
        for head in range(q.shape[0]):
            read = sorted([*layer.recycled[head // group], self.seen - 1])
            keys, values = layer.keys[head // group, read], layer.values[head // group, read]
            out.append((q[head] @ keys.T / 4).softmax(-1) @ values)
        for mine in layer.recycled:
            mine.append(self.seen - 1)
            del mine[: max(len(mine) - self.budget, 0)]
        return torch.stack(out)


def part_of(stream: kvsieve.Stream) -> Recycling:
    return stream._engine.parts.the(Recycling)


def read_by(stream: kvsieve.Stream) -> list[list[list[int]] | None]:
    """Of each layer what its heads read in the last forward, or None for everything; of the first row."""
    found: list[list[list[int]] | None] = []
    for index in sorted(part_of(stream).read):
        sets = part_of(stream).read[index][0]
        heads = None if sets is None else [sets.read(head, stream.seen).tolist() for head in range(len(sets.tokens))]
        found.append(heads)
    return found


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


# ------------------------------------------------------------------------------------------------------------- moments, refusals


@BACKEND
def test_a_session_file_goes_on_as_the_stream_would(tmp_path: Path, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.RefreshKV(20, stride=3, similarity=0.5), backend) as stream:
        forwards(model, stream.cache, tiny.ids(2, 44), [40, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(2, 9, 3), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend=backend) as loaded:
        assert torch.equal(forwards(model, loaded.cache, tiny.ids(2, 9, 3), [1]), want)


@BACKEND
def test_a_crop_within_partial_steps_is_exact_and_refused_beyond(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, kvsieve.RefreshKV(20, stride=4, similarity=None), backend) as stream:
        forwards(model, stream.cache, ids[:, :43], [40, 1])
        mark = stream.mark()
        want = forwards(model, stream.cache, ids[:, 43:], [1])
        stream.rewind(mark)
        stream.cache.crop(-2)
        got = forwards(model, stream.cache, ids[:, 41:], [1])
        assert torch.equal(got[:, 2:], want)
        with pytest.raises(StateError, match=r"cannot forget 4 tokens.*at most 0 can be"):
            stream.cache.crop(-4)
        stream.rewind(mark)
        assert torch.equal(forwards(model, stream.cache, ids[:, 43:], [1]), want)


@BACKEND
def test_after_tokens_were_taken_out_heads_choose_anew(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 50)
    with kvsieve.stream(model, kvsieve.RefreshKV(20, similarity=None), backend) as stream:
        forwards(model, stream.cache, ids[:, :42], [40, 1])
        stream.evict(5, 9)
        forward(model, stream.cache, ids[:, 42:43])
        assert read_by(stream) == [None] * 2
        forward(model, stream.cache, ids[:, 43:44])
        sets = part_of(stream).read[0][0]
        assert sets is not None
        assert sets.read(0, 40).shape == (21,)


@BACKEND
def test_a_trace_tells_what_was_read(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.RefreshKV(20, similarity=None), backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 42), [40, 1])
        for layer, heads in zip(stream.trace(), read_by(stream)):
            assert heads is not None
            assert (layer.dense, layer.scored, layer.read) == (False, 0, sum(map(len, heads)))
            for traced, read in zip(layer.rows[0], heads):
                assert np.concatenate([np.arange(*r) for r in traced.read]).tolist() == read
                assert np.concatenate([np.arange(*r) for r in traced.found]).tolist() == [t for t in read if t < 40]
        stream.feed(tiny.ids(1, 5, 3))
        assert all(layer.dense and layer.read == 2 * 47 for layer in stream.trace())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 0}, "budget must be"),
        ({"budget": "1MiB"}, "budget must be"),
        ({"stride": 0}, "stride must be"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"similarity": "high"}, "similarity must be a number"),
        ({"similarity": True}, "similarity must be a number"),
        ({"similarity": float("nan")}, "similarity must be a number"),
    ],
)
def test_numbers_that_are_none_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.RefreshKV(**{"budget": 64, **arguments})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sirllm(64) | refreshkv(64)", "evicts some of them"),
        ("streamingllm(64) | refreshkv(64)", "evicts some of them"),
        ("snapkv(64) | refreshkv(64)", "keeps other tokens for each head"),
        ("hip(64) | refreshkv(64)", "decide select"),
        ("streamingllm(64) >> refreshkv(64)", "one part of a chain"),
        ("refreshkv(64) >> full()", "one part of a chain"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_it_is_built(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.methods.parse(text)
    with pytest.raises(PolicyError, match="goes with Original"):
        kvsieve.RefreshKV(64) | kvsieve.Memory(position=kvsieve.policy.InCache())


def test_a_text_of_it_is_read_back() -> None:
    assert repr(kvsieve.RefreshKV(64)) == "RefreshKV(budget=64)"
    policy = kvsieve.RefreshKV(64, stride=5, similarity=None, kernel=1)
    assert repr(policy) == "RefreshKV(budget=64, stride=5, similarity=None, kernel=1)"
    assert kvsieve.methods.parse(repr(policy)) == policy


def test_a_backend_that_cannot_says_so() -> None:
    without = replace(CUDA, selection=replace(CUDA.selection, recycled=False))
    with pytest.raises(BackendError, match="chose at an earlier step"):
        without.check_recycling()
    CUDA.check_recycling()
    with pytest.raises(BackendError, match=r"compresses some.*leave"):
        CUDA.check_recycling(compressed=True)


def test_models_whose_frequencies_change_go_with_a_fixed_schedule() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = tiny.config("llama", rope_parameters=rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModelError, match="similarity=None"):
        kvsieve.stream(model, kvsieve.RefreshKV(64)).__enter__()
    with kvsieve.stream(model, kvsieve.RefreshKV(64, similarity=None)) as stream:
        stream.feed(tiny.ids(1, 80))
