"""What queries see of pinned and evicted tokens, by definition: key by key, and against stock attention under a mask."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import Layer, attention, forward, forwards
from kvsieve.facts import LayerRope
from transformers import DynamicCache

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
BUDGET = 48

ROPE = LayerRope(1.0 / 100.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16), "half")
WINDOW, SINKS = 20, 3


def seen_from(kind: str, query: int, pinned: set[int], gone: set[int], ceiling: int) -> tuple[list[int], list[int]]:
    """Positions that a query sees and their distances, as the documentation says it."""
    near = (WINDOW if kind == "lm_infinite" else WINDOW + 1) - len({p for p in pinned if p >= SINKS})
    seen = [p for p in range(query + 1) if p not in gone and (p < SINKS or p in pinned or query - p < near)]
    if kind == "streaming":
        return seen, [len(seen) - 1 - rank for rank in range(len(seen))]
    return seen, [query - p if query - p < near else ceiling for p in seen]


@BACKEND
@pytest.mark.parametrize("chunks", [[1], [3, 9], [70], [16, 40]])
@pytest.mark.parametrize("kind", ["streaming", "lm_infinite"])
def test_windows_see_what_is_defined_key_by_key(kind: str, chunks: list[int], backend: str) -> None:
    length, generator = 120, torch.Generator().manual_seed(3)
    policy = {
        "streaming": kvsieve.StreamingLLM(WINDOW + SINKS, sinks=SINKS),
        "lm_infinite": kvsieve.LMInfinite(WINDOW, SINKS, ceiling=17),
    }[kind]
    q = torch.randn(1, 4, length, 16, generator=generator)
    k, v = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
    layer = Layer(backend, policy, rope=ROPE, scale=0.3)
    layer.planner.pin(None, 1, 6, False)
    layer.planner.pin([0], 30, 36, False)
    pinned, gone = {*range(1, 6), *range(30, 36)}, set()
    at, sizes = 0, [*chunks, *[chunks[-1]] * length]
    while at < length:
        if at >= 60 and not gone:
            moves = layer.planner.evict([0], 37, 55)
            layer.store.apply(moves)
            gone = set(range(37, 55))
        size = min(sizes.pop(0), length - at)
        part = slice(at, at + size)
        out = layer.feed(q[:, :, part], k[:, :, part], v[:, :, part])
        for i in range(size):
            seen, distances = seen_from(kind, at + i, pinned, gone, 17)
            keys, values = (x[0, :, seen].transpose(0, 1) for x in (k, v))
            want = attention(q[0, :, at + i], keys, values, torch.tensor(distances), ROPE, 0.3)
            torch.testing.assert_close(out[0, i].double(), want, rtol=0, atol=2e-5)
        at += size
        held = layer.positions()
        assert set(held) >= {p for p in pinned if p < at}
        assert len(held) <= WINDOW + SINKS


@BACKEND
def test_a_middle_does_not_hold_what_is_pinned(backend: str) -> None:
    """Pinned tokens are seen at the ceiling; a top-k of one would choose them a second time if it were offered them."""
    policy = kvsieve.LMInfinite(8, 2, middle_top_k=1, middle_from_layer=0, ceiling=8)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    for size in (1, 40):
        layer = Layer(backend, policy, rope=ROPE, scale=0.5)
        layer.planner.pin(None, 10, 14, False)
        # The pinned keys are what the last query likes best by far.
        k[0, :, 10:14] = 3.0 * ROPE.rotate(q[0, :, -1:].double(), torch.tensor([4])).float()
        for at in range(0, 40, size):
            out = layer.feed(*(x[:, :, at : at + size] for x in (q, k, v)))
        seen = [0, 1, 10, 11, 12, 13, *range(36, 40)]
        for head in range(2):
            middle = [p for p in range(40) if p not in seen]
            logits = ROPE.rotate(q[0, head, -1:].double(), torch.tensor([4])) @ k[0, head, middle].double().T
            best = middle[int(logits.argmax())]
            shown = [*seen, best]
            distances = [8] * 6 + [39 - p for p in range(36, 40)] + [4]
            keys, values = k[0, head : head + 1, shown].transpose(0, 1), v[0, head : head + 1, shown].transpose(0, 1)
            want = attention(q[0, head : head + 1, 39], keys, values, torch.tensor(distances), ROPE, 0.5)
            torch.testing.assert_close(out[0, -1, head : head + 1].double(), want, rtol=0, atol=2e-5)


@BACKEND
@pytest.mark.parametrize("policy", ["streaming", "lm_infinite"])
def test_where_a_text_is_cut_changes_nothing(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 150)
    found = []
    for chunks in ([150], [1], [30, 7], [64]):
        with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
            stream.pin(4, 12)
            stream.pin(60, 80)
            found.append(forwards(model, stream.cache, ids, chunks))
            assert stream.kept()[0].positions.tolist()[:30] == [0, 1, *range(4, 12), *range(60, 80)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-4)


@BACKEND
def test_full_without_a_message_is_stock_attention_under_a_mask(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 140)
    mask = torch.ones_like(ids)
    stock = DynamicCache(config=model.config)
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        forward(model, stream.cache, ids[:, :100])
        stream.evict(20, 45)
        stream.evict(70, 71, rows=1)
        got = forwards(model, stream.cache, ids[:, 100:], [17, 1])
    forward(model, stock, ids[:, :100])
    mask[:, 20:45] = 0
    mask[1, 70] = 0
    at = torch.arange(140)[None].expand(2, -1)
    with torch.no_grad():
        want = model(input_ids=ids[:, 100:], attention_mask=mask, position_ids=at[:, 100:], past_key_values=stock).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_selections_go_on_over_what_is_left(kind: str) -> None:
    """On both backends, with keys as the model rotated them and with keys that are rotated on read."""
    model, ids = tiny.model(), tiny.ids(1, 330)
    how: dict[str, Any] = {"sinks": 8, "window": 16, "dense_layers": 0}
    found = []
    for extend in (False, 4000):
        hip = kvsieve.HiP(16, block=2, extend=extend, **how)
        staged = kvsieve.InfiniteHiP(stages=((16, 64), (4, 16)), refresh=(4, 1), extend=extend, wide_layers=0, **how)
        for backend in tiny.BACKENDS:
            with kvsieve.stream(model, hip if kind == "hip" else staged, backend) as stream:
                forward(model, stream.cache, ids[:, :300])
                stream.evict(30, 100)
                stream.evict(220, 230)
                found.append(forwards(model, stream.cache, ids[:, 300:], [20, 1]))
                for layer in stream.trace():
                    read = {token for head in layer.rows[0] for lo, hi in head.read.tolist() for token in range(lo, hi)}
                    assert not layer.dense
                    assert not read & {*range(30, 100), *range(220, 230)}
                    assert read >= {*range(8), *range(315, 330)}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-4)
