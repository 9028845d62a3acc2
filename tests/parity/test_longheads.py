"""LongHeads: the worked summary, a twin key by key, and what it promises of every length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy
from fetched import FetchingLayer, rope
from kvsieve.backends.base import AttendCall
from kvsieve.errors import PolicyError, StateError
from kvsieve.facts import LayerRope
from kvsieve.methods.longheads import LongHeadsSelection
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.summaries import ChunkAttention
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def summary(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: LayerRope, scale: float) -> torch.Tensor:
    """Of one chunk: ``q`` ``[group, w, D]``, ``k``, ``v`` ``[w, D]``; in float64."""
    at = torch.arange(k.shape[0])
    q, k = turn.rotate(q.double(), at), turn.rotate(k.double(), at)
    u = ((q @ k.T * scale).softmax(-1) @ v.double()).mean((0, 1))
    return (k @ u * scale).softmax(0) @ k


def twin(qkv: Any, calls: list[int], n: int, w: int, turn: LayerRope, scale: float) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Float64 ``[H, T, D]``, and of each call the chunks that each KV head read last. Queries of a chunk in one call share them."""
    q, k, v = (x.double() for x in qkv)
    heads, kv_heads = q.shape[0], k.shape[0]
    group, out, found, st = heads // kv_heads, torch.zeros_like(q), [], 0
    for size in calls:
        last: list[list[int]] = []
        for lo in sorted({st, *range(st // w * w + w, st + size, w)}):
            hi, g = min(st + size, lo // w * w + w), lo // w
            last = []
            for head in range(kv_heads):
                mine = q[head * group : (head + 1) * group]
                scores = {}
                for c in range(1, g - 1):
                    chunk = slice(c * w, c * w + w)
                    c_g = summary(mine[:, chunk], k[head, chunk], v[head, chunk], turn, scale)
                    scores[c] = float(mine[:, lo:hi].mean(1).sum(0) @ c_g)
                best = sorted(scores, key=lambda c, s=scores: (-s[c], c))[: n - 3]  # type: ignore[misc]
                last.append(sorted({*best, *([0, g - 1] if g else []), g}))
                before = [t for c in last[-1][:-1] for t in range(c * w, c * w + w)]
                for i in range(lo, hi):
                    read = [*before, *range(g * w, i + 1)]
                    at = torch.arange(len(read))
                    queries, keys = turn.rotate(mine[:, i : i + 1], at[-1:]), turn.rotate(k[head, read], at)
                    p = (queries @ keys.T * scale).softmax(-1)
                    out[head * group : (head + 1) * group, i] = (p @ v[head, read])[:, 0]
                    assert len(read) <= n * w
        found.append(last)
        st += size
    return out, found


def random_qkv(seed: int, length: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, length, 8, generator=generator) for h in (heads, kv_heads, kv_heads))
    return 1.5 * q, k, v


def read_by(layer: FetchingLayer) -> list[list[int]]:
    """Chunks that each KV head's last query read."""
    last = layer.part.read[0][0]
    assert last is not None
    chunk = layer.part.rule.block
    spans = [last.read(head) for head in range(layer.store.read([])[0].shape[0])]
    return [sorted({t // chunk for lo, hi in mine for t in range(lo, hi)}) for mine in spans]


def test_the_worked_summary() -> None:
    rule = LongHeadsSelection(6, 2)
    turn = LayerRope(torch.ones(1, dtype=torch.float64), "half")
    q, k, v = (torch.tensor(x)[None] for x in ([[1.0, 0], [0, 1]], [[1.0, 0], [1, 1]], [[1.0, 2], [3, 4]]))
    found = ChunkAttention(rule).of_chunk(q, k, v, AttendCall(2**-0.5, rope=turn))
    assert found[0].tolist() == pytest.approx([0.0250, 1.0354], abs=1e-4)
    assert summary(q, k[0], v[0], turn, 2**-0.5).tolist() == pytest.approx([0.0250, 1.0354], abs=1e-4)


@BACKEND
@pytest.mark.parametrize(("heads", "kv_heads", "n", "w"), [(2, 2, 4, 4), (4, 2, 5, 3), (3, 1, 3, 4)])
def test_a_layer_is_the_twin(heads: int, kv_heads: int, n: int, w: int, backend: str) -> None:
    q, k, v = random_qkv(n, 66, heads, kv_heads)
    calls, turn = [37, *[1] * 15, 5, 1, 8], rope(8, "interleaved")
    want, chunks = twin((q[0], k[0], v[0]), calls, n, w, turn, 0.3)
    layer = FetchingLayer(backend, kvsieve.LongHeads(n * w, w), AttendCall(0.3, rope=turn))
    at = 0
    for size, read in zip(calls, chunks):
        got = layer.feed(*(x[:, :, at : at + size] for x in (q, k, v)))[0].transpose(0, 1)
        assert float((got - want[:, at : at + size]).abs().max()) < 1e-5 * float(want.abs().max())
        assert read_by(layer) == read
        at += size
    state = layer.part.rows[0][0]
    assert len(state.table) == 66 // w
    assert sum(piece.shape[1] for piece in state.queries) == 66 % w


@BACKEND
def test_every_length_reads_no_more_than_its_context(backend: str) -> None:
    """What is read of any length, one token after another: the first chunk, the newest, all within the context; each once."""
    n, w = 4, 4
    q, k, v = random_qkv(1, 20 * n * w, 2, 2)
    layer = FetchingLayer(backend, kvsieve.LongHeads(n * w, w), AttendCall(0.3, rope=rope(8)))
    for i in range(20 * n * w):
        layer.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
        last = layer.part.read[0][0]
        assert last is not None
        for head in range(2):
            tokens = [t for lo, hi in last.read(head) for t in range(lo, hi)]
            assert tokens == sorted(set(tokens))
            assert len(tokens) == min(i + 1, (n - 1) * w + i % w + 1)
            assert {0, i // w, max(i // w - 1, 0)} <= {t // w for t in tokens}
            assert tokens[-1] == i
        assert all(piece.distance < n * w for piece in last.choice.pieces)


@BACKEND
def test_a_text_of_which_all_chunks_fit_is_the_full_cache(backend: str) -> None:
    model, ids, answers = tiny.model(), tiny.ids(1, 60), []
    for policy in (kvsieve.Full(), kvsieve.LongHeads(64, 8)):
        with kvsieve.stream(model, policy, backend) as stream:
            answers.append(forwards(model, stream.cache, ids, [37, 1]))
    assert float((answers[0] - answers[1]).abs().max()) <= 1e-4 * float(answers[0].abs().max())


@BACKEND
@pytest.mark.parametrize("length", [3, 8, 9, 40])
def test_prompts_of_any_length_go_on(length: int, backend: str) -> None:
    """As the stock model while all chunks are read, and on from there."""
    model, prompt = tiny.model(), tiny.ids(1, length)
    with kvsieve.stream(model, kvsieve.LongHeads(24, 8), backend) as stream:
        told = stream.generate(prompt, max_new_tokens=20, do_sample=False)
        assert stream.seen == length + 19
    assert told.shape == (1, length + 20)
    fits = max(length + 1, 24) if length <= 24 else length
    assert torch.equal(told[:, :fits], greedy(model, prompt, 20)[:, :fits])


@BACKEND
def test_a_crop_within_a_chunk_is_exact_and_refused_beyond(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, kvsieve.LongHeads(24, 8), backend) as stream:
        forwards(model, stream.cache, ids[:, :45], [40, 1])
        mark = stream.mark()
        want = forwards(model, stream.cache, ids[:, 45:], [1])
        stream.rewind(mark)
        stream.cache.crop(-4)
        got = forwards(model, stream.cache, ids[:, 41:], [1])
        assert float((got[:, 4:] - want).abs().max()) <= 1e-5 * float(want.abs().max())
        stream.rewind(mark)
        with pytest.raises(StateError, match="cannot forget 6 tokens"):
            stream.cache.crop(-6)


@BACKEND
def test_a_session_file_keeps_the_open_chunk(tmp_path: Any, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.LongHeads(24, 8), backend) as stream:
        forwards(model, stream.cache, tiny.ids(2, 45), [40, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(2, 20, 3), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend=backend) as loaded:
        assert torch.equal(forwards(model, loaded.cache, tiny.ids(2, 20, 3), [1]), want)


def test_summaries_know_their_chunk_alone() -> None:
    tables = []
    for seed in range(2):
        q, k, v = random_qkv(0, 40, 4, 2)
        other = random_qkv(9 + seed, 40, 4, 2)
        for x, y in zip((q, k, v), other):
            x[:, :, :16], x[:, :, 24:] = y[:, :, :16], y[:, :, 24:]
        layer = FetchingLayer("reference", kvsieve.LongHeads(24, 8), AttendCall(0.3, rope=rope(8)))
        layer.feed(q, k, v)
        tables.append(layer.part.rows[0][0].table.data)
    assert torch.equal(tables[0][:, 2], tables[1][:, 2])
    assert not torch.equal(tables[0][:, 1], tables[1][:, 1])


def test_numbers_that_cannot_be_are_refused() -> None:
    for context, chunk in ((100, 64), (128, 64), (0, 64), (192, 0)):
        with pytest.raises(PolicyError, match="must be"):
            kvsieve.LongHeads(context, chunk)
    with pytest.raises(PolicyError, match=r"up to 8192 tokens side by side.*such as 2048"):
        kvsieve.stream(tiny.model(), kvsieve.LongHeads(8192)).__enter__()
    assert repr(kvsieve.LongHeads(2048)) == "LongHeads(context=2048)"
    assert kvsieve.methods.parse("longheads(64, chunk=16)") == kvsieve.LongHeads(64, 16)
    facts = SimpleNamespace(layers=[SimpleNamespace(key_dim=8, value_dim=4)], trained_length=None, ranks=None)
    with pytest.raises(kvsieve.errors.UnsupportedModelError, match="of other sizes"):
        Fetching.of(SimpleNamespace(policy=kvsieve.LongHeads(96, 32), facts=facts))  # type: ignore[arg-type]


@BACKEND
def test_a_decoded_token_chooses_for_itself(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.LongHeads(32, 8), backend) as stream:
        stream.feed(tiny.ids(1, 90))
        forward(model, stream.cache, tiny.ids(1, 1, 3))
        for layer in stream.trace():
            assert not layer.dense
            assert layer.scored == 2 * 9
            assert layer.read == 2 * (24 + 91 % 8)
