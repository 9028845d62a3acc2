"""Pinned tokens stay and evicted ones are gone, under every policy: by what is held, in every loop and after every change."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, greedy, heads, holds, lacks, pad_left, same_memory, snapshot
from kvsieve.errors import BudgetError, StateError
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import EvictionRule, Residents
from kvsieve.policy.position import Original
from kvsieve.runtime import by_position

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
BUDGET = 48


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
