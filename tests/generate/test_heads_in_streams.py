"""Streams under a rule per head: chunks, turns, forks, crops, rows that end early, assisted decoding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, heads, pad_left, same_memory, snapshot
from kvsieve.budget import BLOCK
from kvsieve.errors import KvsieveError, StateError, UnsupportedError
from kvsieve.runtime.head_eviction import HeadEviction
from naive_heads import NaiveHeads

# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
RULE = pytest.mark.parametrize("policy", tiny.PER_HEAD)


def fed(backend: str, policy: Any, ids: torch.Tensor, chunks: list[int], **kwargs: Any) -> tuple[torch.Tensor, list[list[int]]]:
    with kvsieve.stream(tiny.model(), policy, backend) as stream:
        logits = forwards(tiny.model(), stream.cache, ids, chunks, **kwargs)
        return logits, heads(stream)


# ------------------------------------------------------------------------------------------------------------ chunks of a prompt


@BACKEND
@RULE
@pytest.mark.parametrize("chunks", [[60], [39, 21], [7], [1, 38, 21], [13, 26, 1, 20]])
def test_where_a_prompt_is_cut_does_not_matter_while_only_the_last_piece_overflows(
    policy: str, chunks: list[int], backend: str
) -> None:
    """Pieces that fit the budget let nothing go, so the choice is made once, after the same 60 tokens."""
    made = tiny.POLICIES[policy](40 if sum(chunks[:-1]) <= 40 and len(chunks) > 1 else 56)
    model, ids = tiny.model(), tiny.ids(1, 60)
    want, kept = fed(backend, made, ids, [60])
    if chunks == [7]:
        chunks = [7] * 8 + [4]  # eight sevens are 56
    got, mine = fed(backend, made, ids, chunks)
    assert mine == kept
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids).logits, atol=1e-4, rtol=0)


@BACKEND
@RULE
def test_with_room_for_everything_it_is_full_bit_for_bit(policy: str, backend: str) -> None:
    ids = tiny.ids(2, 60)
    chunks = [40, 1, 4, 1, 14]
    want, _ = fed(backend, kvsieve.Full(), ids, chunks)
    for budget in (60, 500):
        got, kept = fed(backend, tiny.POLICIES[policy](budget), ids, chunks)
        # Prefill of both is the same call; few queries of H2O go through the pass that hands out probabilities too.
        assert torch.equal(got, want)
        assert kept == [list(range(60))] * 4


@BACKEND
@RULE
def test_prompts_in_chunks_over_the_budget_follow_the_lists(policy: str, backend: str) -> None:
    """Every chunk overflows: what the first choice evicted is gone for the second."""
    settings = {"snapkv": {"observe": 4, "kernel": 3}, "h2o": {"recent": 4, "sinks": 2}}[policy]
    naive, ids = NaiveHeads(tiny.model(), policy, 24, **settings), tiny.ids(1, 90, 3)
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](24), backend) as stream:
        stream.feed(ids, chunk=30)
        for lo in range(0, 90, 30):
            naive.forward(ids[:, lo : lo + 30])
        assert heads(stream) == [kept for layer in naive.held.values() for kept in layer]


# --------------------------------------------------------------------------------------------------------------------- decoding


@BACKEND
@RULE
def test_decoding_holds_at_most_a_block_more_and_always_what_it_must(policy: str, backend: str) -> None:
    budget, model = 20, tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 12))
        acts, last = 0, 12
        for at in range(140):
            forward(model, stream.cache, tiny.ids(1, 1, at))
            kept = heads(stream)
            seen = 13 + at
            assert len({len(k) for k in kept}) == 1
            count = len(kept[0])
            assert count <= budget + BLOCK - 1
            assert count == stream.stats().resident
            acts += count < last
            last = count
            for k in kept:
                assert k == sorted(set(k))
                assert k[-4:] == list(range(seen - 4, seen))
                assert policy != "h2o" or k[:2] == [0, 1]
        assert acts == 2
        stream.end_turn()
        assert {len(k) for k in heads(stream)} == {budget}


@BACKEND
@RULE
def test_turns_and_what_is_held(policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        gone: list[set[int]] = [set() for _ in range(4)]
        before: list[set[int]] = [set() for _ in range(4)]
        for at in range(6):
            stream.generate(tiny.ids(1, 20, at), max_new_tokens=9, do_sample=False)
            now = [set(k) for k in heads(stream)]
            for head, kept in enumerate(now):
                assert not kept & gone[head], "what was evicted came back"
                gone[head] |= before[head] - kept
                assert len(kept) == min(32, stream.seen)
            before = now
        token = stream._engine.facts.bytes_per_token
        assert stream.stats().bytes_held <= (32 + 5 * BLOCK) * token


# ------------------------------------------------------------------------------------------------------ forks, rows, rollback


@BACKEND
@RULE
def test_each_fork_chooses_for_itself(policy: str, backend: str) -> None:
    """Parent and forks hold the same blocks when they begin to choose; each then equals the stream that it would have been."""
    model, ids = tiny.model(), tiny.ids(1, 50)
    tails = [tiny.ids(1, n, n) for n in (40, 30, 90)]

    def alone(tail: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
            forward(model, stream.cache, ids)
            return forwards(model, stream.cache, tail, [20, 1]), snapshot(stream)

    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        forward(model, stream.cache, ids)
        with stream.fork() as first, stream.fork() as second:
            for one, tail in zip((first, stream, second), tails):
                got = forwards(model, one.cache, tail, [20, 1])
                want, held = alone(tail)
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
                mine = snapshot(one)
                assert mine.keys() == held.keys()
                for name in (n for n in mine if n.startswith(("chosen", "since"))):
                    assert torch.equal(mine[name], held[name])
            assert heads(first) != heads(second)


@BACKEND
@RULE
def test_rows_are_selected_and_repeated_with_what_they_saw(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(3, 50)
    with kvsieve.stream(model, tiny.POLICIES[policy](30), backend) as stream:
        forward(model, stream.cache, ids)
        held = [heads(stream, row) for row in range(3)]
        stream.cache.batch_select_indices(torch.tensor([2, 0]))
        stream.cache.batch_repeat_interleave(2)
        assert [heads(stream, row) for row in range(4)] == [held[2], held[2], held[0], held[0]]
        stream.cache.reorder_cache(torch.tensor([3, 1, 0, 0]))
        order = [0, 2, 2, 2]
        assert [heads(stream, row) for row in range(4)] == [held[r] for r in order]
        tails = tiny.ids(4, 90, 7)
        got = forwards(model, stream.cache, tails, [30, 1, 40, 1])
        for row, source in enumerate(order):
            with kvsieve.stream(model, tiny.POLICIES[policy](30), backend) as alone:
                forward(model, alone.cache, ids[source : source + 1])
                want = forwards(model, alone.cache, tails[row : row + 1], [30, 1, 40, 1])
                torch.testing.assert_close(got[row], want[0], atol=1e-4, rtol=0)
                assert heads(alone) == heads(stream, row)


@BACKEND
@RULE
@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_that_died_saw_nothing(policy: str, layer: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.model(), tiny.ids(2, 150)

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    made = tiny.POLICIES[policy](24)
    with kvsieve.stream(model, made, backend) as stream, kvsieve.stream(model, made, backend) as twin:
        for one in (stream, twin):
            forwards(model, one.cache, ids[:, :50], [45, 1])
        held = snapshot(stream)
        for width in (1, 5, 40):
            with monkeypatch.context() as patch:
                patch.setattr(model.model.layers[layer].mlp, "forward", dies)
                with pytest.raises(RuntimeError, match="out of memory"):
                    forward(model, stream.cache, ids[:, 60 : 60 + width])
            now = snapshot(stream)
            assert held.keys() == now.keys()
            assert all(torch.equal(held[name], now[name]) for name in held)
        got, want = (forwards(model, one.cache, ids[:, 50:], [30, 1, 40, 1]) for one in (stream, twin))
        assert torch.equal(got, want)
        assert same_memory(stream, twin)


# ------------------------------------------------------------------------------------------------------------------------ crops


@BACKEND
@pytest.mark.parametrize("decoded", [0, 20, 90])
def test_a_crop_is_exact_or_refused(decoded: int, backend: str) -> None:
    """Exact: as if the tokens had never been read, whichever are evicted later. Refused: nothing has changed."""
    model, ids, more = tiny.model(), tiny.ids(1, 60 + decoded), tiny.ids(1, 50, 4)
    policy, exact = kvsieve.SnapKV(40, observe=8, kernel=3), []
    with kvsieve.stream(model, policy, backend) as stream:
        forwards(model, stream.cache, ids[:, :30], [30])
        stream.end_turn()
        forwards(model, stream.cache, ids[:, 30:], [30, 1])
        for count in (1, 5, 9, 19, 25, 40, 55):
            left = 60 + decoded - count
            with stream.fork() as fork:
                try:
                    fork.cache.crop(-count)
                except KvsieveError:
                    assert same_memory(stream, fork)
                    continue
                with kvsieve.stream(model, policy, backend) as twin:
                    forwards(model, twin.cache, ids[:, : min(left, 30)], [30])
                    twin.end_turn()
                    if left > 30:
                        forwards(model, twin.cache, ids[:, 30:left], [30, 1])
                    # Three tokens later heads choose by the queries of tokens before and after what was forgotten.
                    got, want = (forwards(model, one.cache, more, [1, 2, 30, 1]) for one in (fork, twin))
                    assert heads(fork) == heads(twin)
                    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
                exact.append(count)
    # After 60 tokens, and after each whole block that follows, tokens were evicted; what came after can be forgotten.
    assert exact == {0: [], 20: [1, 5, 9, 19], 90: [1, 5, 9, 19, 25]}[decoded]


@BACKEND
@RULE
def test_a_crop_to_what_is_not_known_any_more_is_refused(policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        forward(model, stream.cache, tiny.ids(2, 60))
        held, mark = snapshot(stream), stream.mark()
        for count in (1, 4, 5, 20, 59):
            with pytest.raises(KvsieveError, match="take a mark before"):
                stream.cache.crop(-count)
        now = snapshot(stream)
        assert all(torch.equal(now[name], held[name]) for name in held)
        assert stream.seen == 60
        forwards(model, stream.cache, tiny.ids(2, 9, 2), [1])
        stream.rewind(mark)
        now = snapshot(stream)
        assert all(torch.equal(now[name], held[name]) for name in held)
        stream.cache.crop(-60)
        assert (stream.seen, stream.stats().resident) == (0, 0)
        got = forward(model, stream.cache, tiny.ids(2, 30))
        with torch.no_grad():
            torch.testing.assert_close(got, model(tiny.ids(2, 30)).logits, atol=1e-4, rtol=0)


@BACKEND
def test_sums_of_attention_cannot_forget_what_a_token_gave(backend: str) -> None:
    """Even while everything is still held: who is evicted later depends on them."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(40), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 20))
        with pytest.raises(StateError, match="take a mark before"):
            stream.cache.crop(-1)


@BACKEND
@RULE
def test_a_row_that_ended_early_forgets_what_it_was_padded_with(policy: str, backend: str) -> None:
    """One row stops soon, the other goes on over a block: filler pushed tokens out, and every head holds equally many."""
    model, how = tiny.model(), {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    ids, mask = pad_left([tiny.ids(1, 30)[0], tiny.ids(1, 24, 2)[0]])
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        short, other = stream.generate(ids, mask, **how)[:, 30:].tolist()
    at = next(i for i, token in enumerate(short) if token not in other and token not in short[:i])
    end = short[at]
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        out = stream.generate(ids, mask, eos_token_id=end, **how)
        assert at < 20, "the row did not end early: nothing was tested"
        assert out[:, 30:].tolist() == [short[: at + 1] + [0] * (99 - at), other]
        seen = [stream._engine.planner.seen(row) for row in range(2)]
        assert seen == [30 + at + 1, 24 + 99]
        for row in range(2):
            kept = heads(stream, row)
            assert len({len(k) for k in kept}) == 1
            assert len(kept[0]) <= 20
            assert all(k == sorted(set(k)) and max(k, default=0) < seen[row] for k in kept)
            assert policy != "h2o" or all(k[:2] == [0, 1] for k in kept)
        # What is read through the table is what the positions say: keys were written once and never changed.
        again = stream.generate(tiny.ids(2, 5, 3), max_new_tokens=4, do_sample=False)
        assert again.shape == (2, 9)
        assert all(len({len(k) for k in heads(stream, row)}) == 1 for row in range(2))


@BACKEND
def test_after_filler_every_head_keeps_its_best(backend: str) -> None:
    """Head by head: what a head held of the tokens that are left, the one with fewest decides how many."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(20, recent=10, sinks=1), backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 100), [30, 1])
        before = {(x, h): stream.kept(x, h)[0] for x in range(2) for h in range(2)}
        keys = {x: stream._engine.stores[x].read(stream._engine.planner.runs(0, 0))[0] for x in range(2)}
        since = stream._engine.parts.the(HeadEviction).rows[0].since
        left = since - 4
        stream._engine.crop_rows([100 - left])
        count = min(int((kept.positions < left).sum()) for kept in before.values())
        for (layer, head), was in before.items():
            kept = stream.kept(layer, head)[0]
            open_to_choice = [i for i, p in enumerate(was.positions.tolist()) if p < left]
            ranked = sorted(open_to_choice, key=lambda i: (i >= 1, -float(was.scores[i]), i))[:count]
            best = sorted(ranked)
            assert kept.positions.tolist() == was.positions[best].tolist()
            assert kept.scores.tolist() == was.scores[best].tolist()
            now = stream._engine.stores[layer].read(stream._engine.planner.runs(0, 0))[0]
            assert torch.equal(now[head], keys[layer][head][best])
        assert stream._engine.planner.seen(0) == left


def test_crops_that_ask_too_much_change_nothing() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(20), "cpu") as stream:
        forward(model, stream.cache, tiny.ids(2, 50))
        held = snapshot(stream)
        for counts in ([51, 0], [0, 51]):
            with pytest.raises(ValueError, match="has seen only 50"):
                stream._engine.crop_rows(counts)
        with pytest.raises(ValueError, match="has seen only 50"):
            stream.cache.crop(-51)
        now = snapshot(stream)
        assert all(torch.equal(now[name], held[name]) for name in held)


# ------------------------------------------------------------------------------------------------------------ assisted decoding


@BACKEND
@RULE
@pytest.mark.parametrize("budget", [30, 100])
def test_assisted_decoding_leaves_what_plain_decoding_leaves(policy: str, budget: int, backend: str) -> None:
    """Tokens, who is kept, and what was seen: rejected candidates have added no attention scores."""
    model = tiny.model()
    ids = torch.cat([tiny.ids(1, 9, 4)] * 7, 1)
    made = tiny.POLICIES[policy](budget)
    with kvsieve.stream(model, made, backend) as plain, kvsieve.stream(model, made, backend) as assisted:
        want = greedy(model, ids, 70, past_key_values=plain.cache)
        got = greedy(model, ids, 70, past_key_values=assisted.cache, prompt_lookup_num_tokens=5)
        assert torch.equal(got, want)
        a, b = snapshot(plain), snapshot(assisted)
        assert heads(plain) == heads(assisted)
        for name in (n for n in a if n.startswith(("accumulated", "queries"))):
            torch.testing.assert_close(b[name], a[name], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------------------ files


@BACKEND
@RULE
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_file_holds_what_was_seen(family: str, policy: str, backend: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        forwards(model, stream.cache, tiny.ids(2, 50), [40, 1])
        stream.cache.batch_repeat_interleave(2)  # rows that share one state
        stream.save(tmp_path / "stream")
        with kvsieve.load(tmp_path / "stream", model, backend) as loaded:
            assert same_memory(stream, loaded)
            stream.end_turn()  # before any forward: attention scores need what the file says of each layer's attention
            loaded.end_turn()
            assert same_memory(stream, loaded)
            more = tiny.ids(4, 78, 5)
            a, b = (forwards(model, one.cache, more, [10, 1, 40, 1]) for one in (stream, loaded))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
            assert [heads(stream, row) for row in range(4)] == [heads(loaded, row) for row in range(4)]


def test_a_rule_of_ones_own_is_not_written(tmp_path: Path) -> None:
    from kvsieve.methods.h2o import HeavyHitters

    own = kvsieve.Memory(evict=HeavyHitters(24))
    with kvsieve.stream(tiny.model(), own, "reference") as stream:
        forward(tiny.model(), stream.cache, tiny.ids(1, 50))
        with pytest.raises(UnsupportedError, match="cannot be written as text"):
            stream.save(tmp_path / "stream")
