"""Documents that were read side by side and joined: against the stock model under the mask that says the same."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import greedy, pad_left, snapshot
from joined_documents import DOCUMENTS, PAST, QUESTION, START, documents, layout, read, stock
from kvsieve.errors import CacheMismatchError
from transformers import DynamicCache

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def test_the_layout_is_the_published_one() -> None:
    positions, sees = layout(3, [2, 4, 1], 2)
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 7, 8]
    assert sees[5].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert sees[10].nonzero().flatten().tolist() == list(range(11))


@BACKEND
@pytest.mark.parametrize("past", [0, 1, 64, 70])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=["gqa", "mha", "mqa"])
def test_joined_documents_are_the_masked_sequence(past: int, changes: dict[str, Any], backend: str) -> None:
    """Read key by key behind a few tokens, and part by part behind many."""
    model, begin, text = tiny.model(**changes), PAST[:, :past], tiny.ids(1, 50, 10)
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        if past:
            base.feed(begin)
        joined = base.join(documents(base, DOCUMENTS))
        got = torch.cat([read(joined, text[:, :5], past + 140), read(joined, text[:, 5:], past + 145)], 1)
        assert torch.equal(joined.ids[0], torch.cat([begin, *DOCUMENTS, text], 1)[0])
    torch.testing.assert_close(got, stock(begin, DOCUMENTS, text, **changes), **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3", "olmo2", "starcoder2"])
def test_other_families(family: str) -> None:
    with kvsieve.stream(tiny.model(family), kvsieve.Full(), "cpu") as base:
        base.feed(PAST)
        got = read(base.join(documents(base, DOCUMENTS)), QUESTION, START)
    torch.testing.assert_close(got, stock(PAST, DOCUMENTS, QUESTION, family=family), atol=1e-4, rtol=1e-4)


@BACKEND
def test_no_order_matters(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        orders = list(itertools.permutations(forks))
        plain = [read(base.join(order), QUESTION, START) for order in orders]
        canonical = [base.join(order, canonical=True) for order in orders]
        ids = {tuple(joined.ids[0].tolist()) for joined in canonical}
        same = [read(joined, QUESTION, START) for joined in canonical]
    assert len(orders) == 6
    assert len(ids) == 1
    for got in plain:
        torch.testing.assert_close(got, plain[0], **CLOSE)
    for got in same:
        assert torch.equal(got, same[0])
    torch.testing.assert_close(same[0], plain[0], **CLOSE)


@BACKEND
def test_one_document_and_none_are_plain_text(backend: str) -> None:
    model, text = tiny.model(), DOCUMENTS[1]
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        base.feed(PAST)
        one = base.join(documents(base, [text]))
        none = base.join([])
        empty = base.join([base.fork(), *documents(base, [text])])
        answers = [stream.generate(QUESTION, **HOW) for stream in (one, none, empty)]
    whole = greedy(model, torch.cat([PAST, text, QUESTION], 1), 6)
    assert torch.equal(answers[0], whole[:, -11:])
    assert torch.equal(answers[2], answers[0])
    assert torch.equal(answers[1], greedy(model, torch.cat([PAST, QUESTION], 1), 6)[:, -11:])
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        nothing = base.join([])
        assert torch.equal(nothing.generate(QUESTION, **HOW), greedy(model, QUESTION, 6))


@BACKEND
def test_every_document_holds_the_keys_of_a_prefill_of_its_own(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        held, at = snapshot(joined), 70
    for text in DOCUMENTS:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=torch.cat([PAST, text], 1), past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            mine = held[f"keys.{index}.0.0"][:, at : at + text.shape[1]]
            torch.testing.assert_close(mine, layer.keys[0, :, 70:], **CLOSE)
            torch.testing.assert_close(held[f"values.{index}.0.0"][:, at : at + text.shape[1]], layer.values[0, :, 70:], **CLOSE)
        at += text.shape[1]


@BACKEND
def test_rows_of_a_padded_batch_are_their_solo_runs(backend: str) -> None:
    model = tiny.model()
    pasts = [tiny.ids(1, count, count)[0] for count in (9, 3)]
    texts = [[tiny.ids(1, count, 50 + count)[0] for count in row] for row in ((5, 17, 2), (80, 1, 30))]
    questions = [tiny.ids(1, count, 90 + count)[0] for count in (4, 7)]
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        base.feed(*pad_left(pasts))
        forks = []
        for pair in zip(*texts):
            forks.append(base.fork())
            forks[-1].feed(*pad_left(list(pair)))
        for canonical in (False, True):
            with base.join(forks, canonical=canonical) as joined:
                got = joined.generate(*pad_left(questions), **HOW)[:, -6:]
                more = joined.generate(tiny.ids(2, 3), **HOW)[:, -6:]
            for row in range(2):
                with kvsieve.stream(model, kvsieve.Full(), backend) as alone:
                    alone.feed(pasts[row][None])
                    solo = alone.join(documents(alone, [text[None] for text in texts[row]]), canonical=canonical)
                    assert torch.equal(solo.generate(questions[row][None], **HOW)[0, -6:], got[row])
                    assert torch.equal(solo.generate(tiny.ids(2, 3)[row : row + 1], **HOW)[0, -6:], more[row])


@BACKEND
@pytest.mark.parametrize(
    "how",
    [{}, {"repetition_penalty": 1.3}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "looks_back", "beams", "candidates"],
)
def test_generating(how: dict[str, Any], backend: str) -> None:
    """Token by token as the masked sequence says; what looks back sees the documents, in pieces or at once."""
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        joined = base.join(forks)
        answer = joined.generate(QUESTION, **HOW, **how)
        said = answer[:, 5:]
        assert torch.equal(joined.ids[0], torch.cat([PAST, *DOCUMENTS, answer], 1)[0])
        logits = stock(PAST, DOCUMENTS, answer)[:, 4:-1]
        if "num_beams" not in how and "repetition_penalty" not in how:
            assert torch.equal(logits.argmax(-1), said)
        again = base.join(forks)
        again.feed(QUESTION[:, :2])
        again.feed(QUESTION[:, 2:4], chunk=1)
        assert torch.equal(again.generate(QUESTION[:, 4:], **HOW, **how)[:, 1:], said)
        # What is said goes on in the next turn.
        more = tiny.ids(1, 4, 77)
        unread = joined._engine.transcript.rows[0].unread[None]
        got = read(joined, torch.cat([unread, more], 1), START + 11 - unread.shape[1])
        torch.testing.assert_close(got[:, -4:], stock(PAST, DOCUMENTS, torch.cat([answer, more], 1))[:, -4:], **CLOSE)


@BACKEND
def test_forks_marks_and_crops(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        mark = joined.mark()
        fork = joined.fork()
        first = joined.generate(QUESTION, **HOW)
        assert torch.equal(fork.generate(QUESTION, **HOW), first)
        joined.rewind(mark)
        before = snapshot(joined)
        joined.feed(QUESTION)
        joined.cache.crop(-5)
        assert all(torch.equal(now, before[name]) for name, now in snapshot(joined).items())
        with pytest.raises(CacheMismatchError, match=r"cannot forget 1 tokens of 243: the first 243 were joined.*at most 0"):
            joined.cache.crop(-1)
        joined.feed(tiny.ids(1, 3))
        with pytest.raises(CacheMismatchError, match="at most 3"):
            joined.cache.crop(-70)
        joined.cache.crop(-3)
        assert torch.equal(joined.generate(QUESTION, **HOW), first)
        joined.rewind(mark)
        assert torch.equal(joined.generate(QUESTION, **HOW), first)
        joined.reset()
        assert torch.equal(joined.generate(PAST, **HOW), greedy(tiny.model(), PAST, 6))


@BACKEND
def test_sets_follow_each_other_and_lie_in_each_other(backend: str) -> None:
    texts = [tiny.ids(1, count, 60 + count) for count in (6, 11)]
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        joined.feed(QUESTION)
        twice = joined.join(documents(joined, texts))
        got = read(twice, QUESTION, START + 5 + 11)
        inner = base.fork()
        inner = inner.join(documents(inner, texts))
        outer = base.join([inner, *documents(base, DOCUMENTS[:1])])
        nested = read(outer, QUESTION, 70 + 11)
        flat = read(base.join(documents(base, [*texts, DOCUMENTS[0]])), QUESTION, 70 + 11)
    torch.testing.assert_close(nested, flat, **CLOSE)
    # By hand: what the second set sees is everything before it, and itself.
    whole = torch.cat([PAST, *DOCUMENTS, QUESTION, *texts, QUESTION], 1)
    positions, sees = layout(70, [2, 140, 31], 5)
    tail, rows = [], torch.zeros(whole.shape[1], whole.shape[1], dtype=torch.bool)
    n = len(positions)
    rows[:n, :n] = sees
    lo = n
    for text in texts:
        hi = lo + text.shape[1]
        rows[lo:hi, :n] = True
        rows[lo:hi, lo:hi] = torch.ones(hi - lo, hi - lo).tril().bool()
        tail += list(range(START + 5, START + 5 + hi - lo))
        lo = hi
    rows[lo:, :lo] = True
    rows[lo:, lo:] = torch.ones(5, 5).tril().bool()
    tail += list(range(START + 16, START + 21))
    model = copy.deepcopy(tiny.model())
    model.set_attn_implementation("eager")
    mask = torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        want = model(input_ids=whole, attention_mask=mask, position_ids=torch.cat([positions, torch.tensor(tail)])[None]).logits
    torch.testing.assert_close(got, want[:, -5:], **CLOSE)


@BACKEND
def test_a_document_read_once_serves_many_questions_and_costs_nothing_more(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        before = base.stats().bytes_held
        pairs = list(itertools.combinations(range(3), 2))
        joined = [base.join([forks[a], forks[b]]) for a, b in pairs]
        assert {stream.stats().bytes_held for stream in joined} == {before}
        for stream, (a, b) in zip(joined, pairs):
            start = 70 + max(DOCUMENTS[a].shape[1], DOCUMENTS[b].shape[1])
            got = read(stream, QUESTION, start)
            torch.testing.assert_close(got, stock(PAST, [DOCUMENTS[a], DOCUMENTS[b]], QUESTION), **CLOSE)
        # What each has read since, and a copy of the block in which a document ends.
        block = 64 * base._engine.facts.bytes_per_token
        assert base.stats().bytes_held <= before + 3 * block
        # The documents live on in what was joined, and nothing is left of them after it.
        whole = base.join(forks)
        for stream in (*forks, *joined):
            stream.close()
        torch.testing.assert_close(read(whole, QUESTION, START), stock(PAST, DOCUMENTS, QUESTION), **CLOSE)
        whole.close()
        base.reset()
        assert base.stats().bytes_held == 0


@BACKEND
def test_a_fork_that_goes_on_changes_nothing_that_was_joined(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        forks = documents(base, DOCUMENTS)
        joined = base.join(forks)
        for at, stream in enumerate([base, *forks]):
            stream.feed(tiny.ids(1, 40, 300 + at))
            stream.evict(0, 20)
        torch.testing.assert_close(read(joined, QUESTION, START), stock(PAST, DOCUMENTS, QUESTION), **CLOSE)


@BACKEND
def test_a_document_joined_twice_is_two_that_say_the_same(backend: str) -> None:
    """Its blocks are there once. What is evicted from one reading is not overwritten in the other."""
    answers = []
    for shared in (True, False):
        with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
            forks = documents(base, [DOCUMENTS[2]] * 2)
            joined = base.join([forks[0], forks[0].fork()] if shared else forks)
            for fork in forks:
                fork.close()
            joined.evict(51, 62)
            joined.feed(tiny.ids(1, 20, 5))
            for start in range(2, 80, 2):
                joined.evict(start, start + 1)
            answers.append(joined.generate(QUESTION, **HOW))
    assert torch.equal(*answers)


@BACKEND
def test_pins_and_evicting_count_the_tokens_of_ids(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(PAST)
        base.pin(0, 10)
        forks = documents(base, DOCUMENTS)
        forks[0].pin(71, 72)
        forks[2].pin(90, 200)
        joined = base.join(forks)
        assert joined.pins == [[(0, 10), (71, 72), (70 + 142 + 20, 70 + 142 + 31)]]
        # The middle document goes.
        joined.evict(72, 72 + 140)
        assert joined.stats().resident == 70 + 2 + 31
        logits = read(joined, QUESTION, START)
    positions, sees = layout(70, [2, 140, 31], 5)
    sees[-5:, 72 : 72 + 140] = False
    model = copy.deepcopy(tiny.model())
    model.set_attn_implementation("eager")
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    ids = torch.cat([PAST, *DOCUMENTS, QUESTION], 1)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=positions[None]).logits[:, -5:]
    torch.testing.assert_close(logits, want, **CLOSE)


@BACKEND
def test_reordered_rows_keep_their_place(backend: str) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), backend) as base:
        base.feed(tiny.ids(2, 9))
        forks = [base.fork(), base.fork()]
        forks[0].feed(*pad_left([tiny.ids(1, 3, 1)[0], tiny.ids(1, 8, 2)[0]]))
        forks[1].feed(tiny.ids(2, 5))
        joined = base.join(forks)
        other = joined.fork()
        other.cache.reorder_cache(torch.tensor([1, 0]))
        answers = joined.generate(tiny.ids(2, 4), **HOW), other.generate(tiny.ids(2, 4).flip(0), **HOW)
        assert torch.equal(answers[0], answers[1].flip(0))


@BACKEND
def test_session_files(backend: str, tmp_path: Any) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as base:
        base.feed(PAST)
        joined = base.join(documents(base, DOCUMENTS))
        joined.save(tmp_path / "joined.safetensors")
        answer = joined.generate(QUESTION, **HOW)
    with kvsieve.load(tmp_path / "joined.safetensors", model, backend) as loaded:
        with pytest.raises(CacheMismatchError, match="were joined"):
            loaded.cache.crop(-1)
        assert torch.equal(loaded.generate(QUESTION, **HOW), answer)
