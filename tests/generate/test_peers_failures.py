"""Promises that evicting caches tend to break, one test each, for every policy."""

from __future__ import annotations

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, pad_left, positions

EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
BOUNDED = pytest.mark.parametrize("policy", tiny.BOUNDED)
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


def limit(policy: str, budget: int) -> int:
    """Most tokens of a row in steady state."""
    return budget - 1 if policy == "lm_infinite" else budget


@BACKEND
@EVERY
def test_a_padded_batch_is_right_at_half_the_budget(policy: str, backend: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, 64, 1)[0], tiny.ids(1, 40, 2)[0]]
    ids, mask = pad_left(rows)
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        together = greedy(model, ids, 8, attention_mask=mask, past_key_values=stream.cache)[:, 64:]
    for row, text in enumerate(rows):
        with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as solo:
            alone = greedy(model, text[None], 8, past_key_values=solo.cache)[0, len(text) :]
        assert together[row].tolist() == alone.tolist()


@BACKEND
@EVERY
def test_no_token_of_a_second_turn_is_fed_twice(policy: str, backend: str) -> None:
    """A second `generate` over the whole text feeds only what the cache has not seen."""
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        first = greedy(model, ids, 5, past_key_values=stream.cache)
        assert stream.seen == 64
        whole = torch.cat([first, tiny.ids(1, 10, 3)], 1)
        fed: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda m, a, o: fed.append(o.shape[1]))
        try:
            second = greedy(model, whole, 5, past_key_values=stream.cache)
        finally:
            hook.remove()
        assert fed == [11, 1, 1, 1, 1]
        assert stream.seen == 64 + 11 + 4
        assert second.shape == (1, 80)
        assert all(0 <= p < 79 for p in positions(stream)[0])


@BACKEND
@EVERY
def test_every_chunk_of_a_chunked_prefill_is_evicted(policy: str, backend: str) -> None:
    model, counts = tiny.model(), []
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        for lo in range(0, 200, 40):
            forward(model, stream.cache, tiny.ids(1, 40, lo))
            counts.append(len(positions(stream)[0]))
    if policy in tiny.BOUNDED:
        assert counts == [limit(policy, 32)] * 5 if policy != "chain" else counts == [32] * 5
    else:
        assert counts == [40, 80, 120, 160, 200]


@BACKEND
@EVERY
def test_bytes_are_really_freed(policy: str, backend: str) -> None:
    model, budget, chunk = tiny.model(), 256, 200
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        token = stream._engine.facts.bytes_per_token
        assert token == 2 * 2 * 32 * 4
        peak = 0
        for lo in range(0, 1200, chunk):
            forward(model, stream.cache, tiny.ids(1, chunk, lo))
            stats = stream.stats()
            peak = max(peak, stats.bytes_held)
            assert stats.bytes_held == sum(store.bytes_held for store in stream._engine.stores.values())
            assert stats.bytes_held >= stats.resident * token
            if policy in tiny.BOUNDED:
                # The reference frees blocks from the end only; it may hold a few that lie before one in use.
                slack = 64 if backend == "cpu" else 4 * 64
                assert stats.bytes_held <= (budget + slack + chunk) * token
        forwards(model, stream.cache, tiny.ids(1, 70, 1), [1])
        before = stream.stats().bytes_held
        stream.end_turn()
        stats = stream.stats()
        assert stats.bytes_full == 1270 * token
        if policy in tiny.BOUNDED:
            assert stats.resident == limit(policy, budget)
            # In steady state: whole blocks, one more for the sinks' block and one for the block being filled, of each memory.
            slack = 128 * len(stream.policy.memories) if backend == "cpu" else 5 * 64
            assert stats.bytes_held <= (budget + slack) * token
            assert stats.bytes_held <= before
            assert stats.bytes_held < stats.bytes_full / 2
        else:
            assert stats.resident == 1270
        stream.reset()
        assert stream.stats().bytes_held == 0


@BACKEND
@BOUNDED
def test_a_smaller_budget_holds_fewer_bytes(policy: str, backend: str) -> None:
    model, held = tiny.model(), []
    for budget in (800, 400, 128):
        with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
            for lo in range(0, 900, 300):
                forward(model, stream.cache, tiny.ids(1, 300, lo))
            stream.end_turn()
            held.append(stream.stats().bytes_held)
    assert held[0] > held[1] > held[2]


@BACKEND
def test_storing_what_was_evicted_never_grows_without_end(backend: str) -> None:
    """Steady decoding: what is held stays within a constant of the budget, block after block."""
    model, ids = tiny.model(), tiny.ids(1, 450)
    for policy in ("streaming", "sirllm"):
        with kvsieve.stream(model, tiny.POLICIES[policy](64), backend) as stream:
            token = stream._engine.facts.bytes_per_token
            sizes = []
            for lo in range(450):
                forward(model, stream.cache, ids[:, lo : lo + 1])
                sizes.append(stream.stats().bytes_held)
            assert max(sizes) <= (64 + 3 * 64) * token
            assert max(sizes[:225]) == max(sizes[225:])


@BACKEND
@EVERY
def test_assisted_decoding_changes_no_token(policy: str, backend: str) -> None:
    model, ids = tiny.model(), torch.cat([tiny.ids(1, 12, 4)] * 5, 1)
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        want = greedy(model, ids, 16, past_key_values=stream.cache)
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        assert torch.equal(greedy(model, ids, 16, past_key_values=stream.cache, prompt_lookup_num_tokens=4), want)


@BACKEND
@EVERY
def test_the_length_reported_is_what_was_seen(policy: str, backend: str) -> None:
    model = tiny.model("gemma2")
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        assert stream.cache.get_seq_length() == 0
        forward(model, stream.cache, tiny.ids(1, 50))
        forward(model, stream.cache, tiny.ids(1, 1))
        for layer in (1, 2):
            assert stream.cache.get_seq_length(layer) == 51
            assert stream.cache.layers[layer].get_mask_sizes(3) == (54, 0)
        assert stream.cache.get_max_length() in (-1, None) or stream.cache.layers[1].get_max_length() == -1
        assert bool(stream.cache)


@BACKEND
@BOUNDED
def test_nothing_evicted_ever_comes_back(policy: str, backend: str) -> None:
    model, gone, before = tiny.model(), set(), set()
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        for lo, width in enumerate([30, 1, 1, 9, 70, 1, 1, 1, 40] + [1] * 70):
            forward(model, stream.cache, tiny.ids(1, width, lo))
            now = set(positions(stream)[0])
            assert not now & gone
            gone |= before - now
            before = now
            assert max(now) == stream.seen - 1
    assert gone


@BACKEND
@EVERY
def test_stored_keys_and_values_never_change(policy: str, backend: str) -> None:
    """What is moved between blocks arrives bit for bit: no key is rotated in place, none drifts."""
    model = tiny.model()
    first = torch.full((2, 400, 32), torch.nan)
    with kvsieve.stream(model, tiny.POLICIES[policy](48), backend) as stream:
        for lo, width in enumerate([40, 20, 1, 1, 30] + [1] * 70):
            forward(model, stream.cache, tiny.ids(1, width, lo))
            planner = stream._engine.planner
            for memory in range(planner.num_memories):
                keys, values = stream._engine.stores[1].read(planner.runs(memory, 0))
                for head in range(len(keys)):
                    at = stream.kept(1, head)[0] if policy in tiny.PER_HEAD else None
                    positions = planner.positions(memory, 0) if at is None else at.positions
                    places, now = torch.from_numpy(positions.astype("int64")), torch.cat([keys[head], values[head]], -1)
                    new = first[head, places].isnan().all(-1)
                    first[head, places[new]] = now[new]
                    assert torch.equal(first[head, places], now)
