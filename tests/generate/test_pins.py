"""Pinned tokens stay, evicted ones are gone, under every policy: by what is held, and by what queries see of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import Layer, attention, forward, forwards, greedy, pad_left, same_memory, snapshot
from kvsieve.errors import BudgetError, PolicyError, RangeError, StateError, UnsupportedError
from kvsieve.facts import LayerRope
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import EvictionRule, Residents
from kvsieve.policy.position import Original
from kvsieve.runtime import by_position, pinning
from transformers import DynamicCache

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
BUDGET = 48


def heads(stream: kvsieve.Stream, row: int = 0) -> Iterator[list[int]]:
    """What each head of each layer holds of a row."""
    for layer in stream._engine.facts.layers:
        for head in range(layer.num_kv_heads):
            yield stream.kept(layer.index, head)[row].positions.tolist()


def holds(stream: kvsieve.Stream, tokens: set[int], row: int = 0) -> bool:
    """Whether every head of a row holds ``tokens``."""
    return all(tokens <= set(held) for held in heads(stream, row))


def lacks(stream: kvsieve.Stream, tokens: set[int], row: int = 0) -> bool:
    """Whether no head of a row holds any of ``tokens``."""
    return all(not tokens & set(held) for held in heads(stream, row))


# ----------------------------------------------------------------------------------------------------------------- what is held


@BACKEND
@EVERY
def test_pinned_tokens_stay_within_the_budget(policy: str, backend: str) -> None:
    model, wanted = tiny.model(), {*range(7), *range(20, 26)}
    with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
        stream.pin(0, 7)
        stream.feed(tiny.ids(1, 30))
        stream.pin(20, 26)
        for seed in range(6):
            stream.generate(tiny.ids(1, 90, seed), **HOW)
            assert holds(stream, wanted)
            if policy in tiny.BOUNDED:
                assert stream.stats().resident <= BUDGET
        assert stream.pins == [[(0, 7), (20, 26)]]
        stream.unpin(2, 24)
        assert stream.pins == [[(0, 2), (24, 26)]]
        stream.generate(tiny.ids(1, 200, 7), **HOW)
        assert holds(stream, {0, 1, 24, 25})
        if policy not in ("full", "lm_infinite_middle", "sirllm", "chain", *tiny.PER_HEAD):
            assert lacks(stream, set(range(2, 24)))


@BACKEND
@EVERY
def test_evicted_tokens_never_come_back(policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
        stream.feed(tiny.ids(1, 40))
        stream.pin(8, 20)
        seen = stream.seen
        stream.evict(10, 30)
        assert lacks(stream, set(range(10, 30)))
        assert holds(stream, {8, 9, *range(30, 40)})
        assert (stream.seen, stream.pins) == (seen, [[(8, 10)]])
        before = snapshot(stream)
        stream.evict(10, 30)
        assert all(torch.equal(now, before[name]) for name, now in snapshot(stream).items())
        for seed in range(3):
            stream.generate(tiny.ids(1, 70, seed), **HOW)
            assert lacks(stream, set(range(10, 30)))
            assert holds(stream, {8, 9})
            if policy in tiny.BOUNDED:
                assert stream.stats().resident <= BUDGET
        stream.evict(0, stream.seen)
        assert all(not held for held in heads(stream))
        stream.generate(tiny.ids(1, 70, 5), **HOW)


@BACKEND
def test_a_token_that_is_read_again_for_its_logits_keeps_its_pin(backend: str) -> None:
    """And so do those that come after it, and were pinned before they came."""
    model, text = tiny.model(), tiny.ids(1, 30)
    with kvsieve.stream(model, tiny.POLICIES["sirllm"](BUDGET), backend) as stream:
        stream.feed(text[:, :20])
        stream.cache.crop(-3)
        stream.pin(14, 25)
        stream.feed(text[:, 17:19])
        assert stream.pins == [[(14, 25)]]
        stream.cache.crop(-1)
        stream.pin(17, 25)
        forward(model, stream.cache, text[:, 18:])
        assert stream.pins == [[(14, 25)]]


@BACKEND
def test_evicting_gives_memory_back(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as stream:
        stream.feed(tiny.ids(1, 2000))
        before = stream.stats().bytes_held
        for start in range(0, 1900, 100):
            stream.evict(start + 3, start + 99)
        assert stream.stats().resident == 2000 - 19 * 96
        assert stream.stats().bytes_held < before / 4


@BACKEND
@pytest.mark.parametrize("policy", tiny.PER_HEAD)
def test_heads_that_lose_different_numbers_keep_equally_many(policy: str, backend: str) -> None:
    model, sinks = tiny.model(), 2 if policy == "h2o" else 0
    with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
        stream.pin(5, 9)
        stream.generate(tiny.ids(1, 200), **HOW)
        before = list(heads(stream))
        lost = {stop: {sum(12 <= p < stop for p in held) for held in before} for stop in range(20, 150)}
        stop = next(stop for stop, counts in lost.items() if len(counts) > 1)
        stream.evict(12, stop)
        after = list(heads(stream))
        left = [[p for p in held if not 12 <= p < stop] for held in before]
        assert {len(held) for held in after} == {min(map(len, left))}
        for old, new in zip(left, after):
            assert set(new) <= set(old)
            assert {p for p in old if p < sinks or 5 <= p < 9 or p >= stream.seen - 4} <= set(new)


class Oldest(EvictionRule):
    """Keeps the sinks, the oldest and the newest, whatever is pinned."""

    budget, sinks, recent = 24, 1, 3

    def keep(self, residents: Residents) -> list[int]:
        n = len(residents.positions)
        self.told = residents.positions[residents.pinned].tolist()
        return [*range(20), *range(n - 4, n)]


def test_a_rule_of_ones_own_cannot_drop_what_is_pinned() -> None:
    rule = Oldest()
    with kvsieve.stream(tiny.model(), Memory(evict=rule, position=Original()), "reference") as stream:
        stream.feed(tiny.ids(1, 24))
        stream.feed(tiny.ids(1, 8), chunk=8)
        stream.reset()
        stream.pin(28, 32)
        stream.feed(tiny.ids(1, 60), chunk=6)
        assert rule.told == [28, 29, 30, 31]
        kept = stream.kept()[0].positions.tolist()
        assert {0, 28, 29, 30, 31, 57, 58, 59} <= set(kept)
        assert len(kept) == 24
        # The oldest made room, from the one behind the sinks on.
        assert kept[1:3] == [5, 6]


@pytest.mark.parametrize("score", ["surprisal", "published"])
@pytest.mark.parametrize("pack", [None, "think", "quantized"])
def test_scores_and_packed_blocks(score: Any, pack: str | None) -> None:
    packs = {"think": kvsieve.ThinK(0.5, recent=4, observe=4), "quantized": kvsieve.Quantized(8, group=8, residual=8)}
    policy: Any = kvsieve.SirLLM(BUDGET, sinks=2, recent=4, score=score)
    with kvsieve.stream(tiny.model(), policy | packs[pack] if pack else policy, "cpu") as stream:
        stream.generate(tiny.ids(1, 40), **HOW)
        stream.pin(5, 30)
        for seed in range(4):
            stream.generate(tiny.ids(1, 80, seed), **HOW)
            assert holds(stream, {0, 1, *range(5, 30)})
            assert stream.stats().resident <= BUDGET
        stream.evict(8, 20)
        assert (stream.stats().compressed > 0) == (pack is not None)
        stream.generate(tiny.ids(1, 80, 9), **HOW)
        assert holds(stream, {*range(5, 8), *range(20, 30)})
        assert lacks(stream, set(range(8, 20)))


# -------------------------------------------------------------------------------------------------- what queries see, by definition

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


# ------------------------------------------------------------------------------------------------------------------- life of a pin


@BACKEND
@EVERY
def test_a_padded_row_equals_its_solo_run(policy: str, backend: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, 40)[0], tiny.ids(1, 31, 2)[0]]
    more = [tiny.ids(1, 60, 3)[0], tiny.ids(1, 55, 4)[0]]

    def run(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
            stream.pin(0, 5)
            stream.feed(*first, chunk=100)
            stream.pin(12, 18)
            stream.evict(20, 26)
            stream.feed(*second, chunk=100)
            told = stream.generate(tiny.ids(1, 4, 8).expand(first[0].shape[0], -1), **HOW)
            return told, [list(heads(stream, row)) for row in range(first[0].shape[0])]

    told, held = run(pad_left(rows), pad_left(more))
    for row in range(2):
        alone, mine = run(*((x[row][None], torch.ones(1, len(x[row]), dtype=torch.long)) for x in (rows, more)))
        assert torch.equal(told[row], alone[0])
        assert held[row] == mine[0]


@EVERY
def test_forks_marks_rows_crops_and_files_keep_pins(policy: str, tmp_path: Any) -> None:
    model, budget = tiny.model(), 2 * BUDGET if policy == "chain" else BUDGET
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), "cpu") as stream:
        stream.feed(tiny.ids(2, 30))
        stream.pin(3, 9)
        stream.pin(10, 12, rows=1)
        stream.pin(28, 34, rows=[0])
        pinned = [[(3, 9), (28, 34)], [(3, 9), (10, 12)]]
        mark = stream.mark()
        with stream.fork() as child:
            stream.unpin(0, 9)
            assert child.pins == pinned
            assert stream.pins == [[(28, 34)], [(10, 12)]]
        stream.rewind(mark)
        assert stream.pins == pinned
        stream.cache.reorder_cache(torch.tensor([1, 0]))
        assert stream.pins == pinned[::-1]
        stream.cache.reorder_cache(torch.tensor([1, 0]))
        if policy == "h2o":
            with pytest.raises(StateError, match="sums"):
                stream.cache.crop(-1)
        else:
            stream.cache.crop(-1)
            assert stream.pins == [[(3, 9), (28, 29)], [(3, 9), (10, 12)]]
        stream.rewind(mark)
        stream.save(tmp_path / "pinned.safetensors")
        with kvsieve.load(tmp_path / "pinned.safetensors", model, "cpu") as loaded:
            assert loaded.pins == pinned
            assert same_memory(loaded, stream)
            loaded.feed(tiny.ids(2, 200, 3))
            stream.feed(tiny.ids(2, 200, 3))
            assert same_memory(loaded, stream)
            assert holds(loaded, {*range(3, 9), *range(28, 34)}, 0)
            assert holds(loaded, {*range(3, 9), 10, 11}, 1)
        stream.reset()
        stream.feed(tiny.ids(2, 30))
        assert stream.pins == [[], []]


def test_what_is_pinned_before_the_first_token_is_saved_and_reset(tmp_path: Any) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES["streaming"](BUDGET), "cpu") as stream:
        stream.pin(4, 20)
        stream.pin(30, 32, rows=1)
        stream.unpin(6, 9)
        stream.save(tmp_path / "early.safetensors")
        with kvsieve.load(tmp_path / "early.safetensors", tiny.model(), "cpu") as loaded:
            loaded.feed(tiny.ids(2, 10))
            assert loaded.pins == [[(4, 6), (9, 20)], [(4, 6), (9, 20), (30, 32)]]
        with pytest.raises(BudgetError):
            stream.pin(40, 80, rows=3)
        stream.reset()
        stream.feed(tiny.ids(2, 10))
        assert stream.pins == [[], []]


@BACKEND
@EVERY
def test_beams_and_candidates_keep_pins(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 10).repeat(1, 6)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
        stream.generate(ids, num_beams=3, max_new_tokens=20, do_sample=False)
        stream.reset()
        stream.pin(4, 9)
        stream.pin(70, 76)
        stream.generate(ids, num_beams=3, max_new_tokens=20, do_sample=False)
        assert holds(stream, {*range(4, 9), *range(70, 76)})
        assert stream.pins == [[(4, 9), (70, 76)]]
    told = []
    for extra in ({}, {"prompt_lookup_num_tokens": 4}):
        with kvsieve.stream(model, tiny.POLICIES[policy](BUDGET), backend) as stream:
            stream.pin(4, 9)
            stream.pin(70, 76)
            told.append(greedy(model, ids, 24, past_key_values=stream.cache, **extra))
            assert holds(stream, {*range(4, 9), *range(70, 76)})
            assert stream.pins == [[(4, 9), (70, 76)]]
    assert torch.equal(*told), how


@EVERY
def test_a_text_is_pinned_as_it_comes(policy: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](BUDGET), "cpu") as stream:
        engine = stream._engine
        stream.pin(5, 7)
        with by_position.coming(engine, [12, 6], [0, 0]):
            stream.feed(*pad_left([tiny.ids(1, 12)[0], tiny.ids(1, 6)[0]]))
        assert stream.pins == [[(0, 12)], [(0, 7)]]

        def interrupted() -> None:
            with by_position.coming(engine, [9, 9], [0, 0]):
                stream.feed(tiny.ids(2, 4))
                raise KeyError

        with pytest.raises(KeyError):
            interrupted()
        assert stream.pins == [[(0, 16)], [(0, 10)]]
        before = snapshot(stream)
        if policy in tiny.BOUNDED:
            with pytest.raises(BudgetError), by_position.coming(engine, [2, 40], [0, 0]):
                pytest.fail("refused before anything is read")
        assert stream.pins == [[(0, 16)], [(0, 10)]]
        assert all(torch.equal(now, before[name]) for name, now in snapshot(stream).items())


@BACKEND
def test_what_flowed_down_a_chain_comes_back(backend: str) -> None:
    policy = kvsieve.LMInfinite(20, 2, middle_top_k=3, middle_from_layer=0)
    with kvsieve.stream(tiny.model(), policy, backend) as stream:
        stream.feed(tiny.ids(1, 90))
        planner = stream._engine.planner
        keys = {index: store.read(planner.runs(1, 0))[0].clone() for index, store in stream._engine.stores.items()}
        below = planner.positions(1, 0).tolist()
        assert 40 in below
        stream.pin(40, 46)
        assert {*range(40, 46)} <= set(planner.positions(0, 0).tolist())
        assert planner.resident(0, 0) <= 21
        assert not {*range(40, 46)} & set(planner.positions(1, 0).tolist())
        assert sorted([*planner.positions(0, 0), *planner.positions(1, 0)]) == list(range(90))
        for index, store in stream._engine.stores.items():
            now, at = store.read(planner.runs(0, 0))[0], planner.positions(0, 0).tolist()
            assert torch.equal(now[:, at.index(40)], keys[index][:, below.index(40)])
        stream.unpin(40, 46)
        assert {*range(40, 46)} <= set(planner.positions(1, 0).tolist())


# ----------------------------------------------------------------------------------------------------------------- what is refused


def unchanged(stream: kvsieve.Stream, call: Any, error: type[Exception], match: str | None = None) -> None:
    """``call`` raises, and nothing is changed by it."""
    before, pinned = snapshot(stream), stream.pins
    with pytest.raises(error, match=match):
        call()
    assert stream.pins == pinned
    assert all(torch.equal(now, before[name]) for name, now in snapshot(stream).items())


@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_a_budget_that_cannot_hold_the_pins_is_refused(policy: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](BUDGET), "cpu") as stream:
        stream.feed(tiny.ids(2, 20))
        spec = stream.policy.specs(1)[0].evict
        sinks, recent = spec.sinks, spec.recent
        budget = spec.budget or sinks + spec.window
        most = budget - sinks - recent - 1
        stream.pin(sinks, sinks + most - 1, rows=1)
        message = rf"row 1: a budget of {budget} tokens cannot hold {sinks} sinks, {most + 1} pinned and {recent} recent"
        unchanged(stream, lambda: stream.pin(sinks, sinks + most + 1), BudgetError, message.replace("row 1", "row 0"))
        unchanged(stream, lambda: stream.pin(sinks, sinks + most + 1, rows=1), BudgetError, message)
        stream.pin(sinks, sinks + most)
        stream.generate(tiny.ids(2, 100, 1), **HOW)
        assert holds(stream, set(range(sinks + most)) if policy != "snapkv" else set(range(most)))


@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_tokens_that_are_gone_cannot_be_pinned(policy: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](BUDGET), "cpu") as stream:
        stream.feed(tiny.ids(1, 30))
        stream.evict(10, 12)
        unchanged(stream, lambda: stream.pin(8, 14), StateError, r"row 0: 2 .*(10..12|tokens 8 to 14)")
        stream.pin(8, 10)
        stream.feed(tiny.ids(1, 300, 1))
        start = next(start for start in range(30, 300) if not holds(stream, {*range(start, start + 9)}))
        unchanged(stream, lambda: stream.pin(start, start + 9), StateError, "no longer held")


def test_ranges_and_rows_that_are_none() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        with pytest.raises(RangeError, match="the stream has seen none"):
            stream.evict(0, 1)
        stream.feed(tiny.ids(2, 20))
        wrong: list[tuple[Any, Any]] = [(-1, 3), (4, 4), (5, 2), (1.0, 2), (0, True), ("0", 3), (0, 2**60), (None, 3)]
        for call in (stream.pin, stream.unpin, stream.evict):
            for start, stop in wrong:
                unchanged(stream, lambda call=call, at=(start, stop): call(*at), RangeError)
            for rows in (2, -1, [0, 2], [], True, "0"):
                unchanged(stream, lambda call=call, rows=rows: call(0, 3, rows=rows), RangeError)
        unchanged(stream, lambda: stream.evict(18, 21), RangeError, "the model has read 20")
        stream.cache.crop(-3)
        unchanged(stream, lambda: stream.evict(15, 18), RangeError, "the model has read 17")
    with pytest.raises(StateError, match="closed"):
        stream.pin(0, 1)


def test_what_cannot_be_exact_is_refused() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.InfLLM(64, block=8, representatives=1, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 100))
        stream.pin(3, 9)
        unchanged(stream, lambda: stream.evict(3, 9), UnsupportedError, "InfLLM")
    with kvsieve.stream(tiny.model("gemma2"), kvsieve.Full(), "cpu") as stream:
        stream.feed(tiny.ids(1, 100))
        unchanged(stream, lambda: stream.evict(70, 78), UnsupportedError, "row 0: tokens 77 to 78 .* window of 24")
        stream.evict(70, 77)
        assert lacks(stream, set(range(70, 77)))


def test_a_mask_cannot_evict_but_evicting_can() -> None:
    """The refusal of a mask that hides tokens names the call that does it."""
    model, ids = tiny.model(), tiny.ids(1, 20)
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        forward(model, stream.cache, ids)
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, 5:9] = 0
        with pytest.raises(kvsieve.KvsieveError, match=r"stream\.evict"):
            forward(model, stream.cache, tiny.ids(1, 1), mask)
        stream.evict(5, 9)
        forward(model, stream.cache, tiny.ids(1, 1))
        assert stream.kept()[0].positions.tolist() == [*range(5), *range(9, 21)]


def test_with_pinned_makes_room_from_the_oldest() -> None:
    stays = np.array([False, False, True, False, True, False])
    assert pinning.with_pinned([0, 1, 3, 5], {0, 5}, stays, 4) == [0, 2, 4, 5]
    assert pinning.with_pinned([0, 1, 3, 5], {0, 5}, stays, 5) == [0, 2, 3, 4, 5]
    assert pinning.with_pinned([0, 1], set(), np.zeros(6, np.bool_), 4) == [0, 1]
    assert issubclass(BudgetError, PolicyError)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_what_is_fed_or_asked_can_be_pinned_as_it_comes(policy: str, backend: str) -> None:
    """The new tokens of a turn are pinned, not the answer, nor the end of the answer before, which is read with them."""
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](60), backend) as stream:
        stream.feed(*pad_left([tiny.ids(1, 9)[0], tiny.ids(1, 4)[0]]), pin=True)
        assert stream.pins == [[(0, 9)], [(0, 4)]]
        stream.generate(tiny.ids(2, 20), **HOW)
        lengths = [len(row) for row in stream.ids]
        stream.generate(tiny.ids(2, 6, 3), pin=True, **HOW)
        want = [[(0, 9), (lengths[0], lengths[0] + 6)], [(0, 4), (lengths[1], lengths[1] + 6)]]
        assert stream.pins == want
        for seed in range(3):
            stream.generate(tiny.ids(2, 70, seed), **HOW)
        assert stream.pins == want
        for row, ranges in enumerate(want):
            assert holds(stream, {at for lo, hi in ranges for at in range(lo, hi)}, row)
        told = [row.tolist() for row in stream.ids]
        with pytest.raises(BudgetError):
            stream.feed(tiny.ids(2, 70), pin=True)
        assert (stream.pins, [row.tolist() for row in stream.ids]) == (want, told)


@BACKEND
def test_a_row_that_the_first_input_does_not_have_is_refused_by_it(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES["streaming"](BUDGET), backend) as stream:
        stream.pin(3, 9, rows=2**50)
        stream.pin(4, 6, rows=[1])
        with pytest.raises(PolicyError, match=f"row {2**50} of 2"):
            stream.feed(tiny.ids(2, 12))
        assert (stream.seen, stream.pins) == (0, [])
        stream.unpin(0, 9, rows=2**50)
        stream.feed(tiny.ids(2, 12))
        assert stream.pins == [[], [(4, 6)]]
