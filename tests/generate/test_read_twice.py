"""A context that is read twice: the layout of the tokens, what is held, and what the logits say."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, pad_left, snapshot
from kvsieve.errors import CacheMismatchError, ShapeError, StateError, UnsupportedError

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
CONTEXT, QUESTION = tiny.ids(1, 90, 1), tiny.ids(1, 7, 2)
WHOLE = torch.cat([QUESTION, CONTEXT, CONTEXT, QUESTION], 1)


@BACKEND
def test_the_layout(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream, kvsieve.stream(model, kvsieve.Full(), backend) as plain:
        stream.read_twice(CONTEXT, QUESTION)
        assert torch.equal(stream.ids[0], WHOLE[0])
        plain.feed(WHOLE)
        assert torch.equal(stream.generate(QUESTION, **HOW), plain.generate(QUESTION, **HOW))
        # What was said and not read comes first; a tokenizer's answer will do.
        before = stream.ids[0]
        stream.read_twice({"input_ids": CONTEXT, "attention_mask": torch.ones_like(CONTEXT)}, {"input_ids": QUESTION})
        assert torch.equal(stream.ids[0], torch.cat([before, WHOLE[0]]))


@BACKEND
def test_the_first_copy_goes_when_all_is_read(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        stream.feed(tiny.ids(1, 4, 5))
        seen: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
        try:
            stream.read_twice(CONTEXT, QUESTION, keep="second")
        finally:
            hook.remove()
        assert stream.stats().resident == 4 + 7 + 90 + 7
        assert stream.seen == 4 + WHOLE.shape[1]
        held = stream.kept()[0].positions.tolist()
        assert held == [*range(11), *range(101, 198)]
        assert torch.equal(stream.ids[0][4:], WHOLE[0])
        # The logits of the last token are those with both copies.
        with torch.no_grad():
            want = model(torch.cat([tiny.ids(1, 4, 5), WHOLE], 1)).logits[:, -1]
        torch.testing.assert_close(seen[-1], want, atol=1e-4, rtol=1e-4)
        # What follows sees the second copy only.
        with kvsieve.stream(model, kvsieve.Full(), backend) as both:
            both.feed(torch.cat([tiny.ids(1, 4, 5), WHOLE], 1))
            both.evict(11, 101)
            next_ids = tiny.ids(1, 3, 8)
            got, want = forward(model, stream.cache, next_ids), forward(model, both.cache, next_ids)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@BACKEND
@EVERY
@pytest.mark.parametrize("keep", ["both", "second"])
def test_the_budget_holds(policy: str, keep: Any, backend: str) -> None:
    with kvsieve.stream(tiny.model(), tiny.POLICIES[policy](48), backend) as stream:
        stream.read_twice(CONTEXT, QUESTION, keep=keep)
        if policy in tiny.BOUNDED:
            assert stream.stats().resident <= 48
        first = set(range(7, 97))
        for kept in stream.kept(0, 0):
            assert keep == "both" or not first & set(kept.positions.tolist())
        stream.generate(tiny.ids(1, 30, 4), **HOW)
        if policy in tiny.BOUNDED:
            assert stream.stats().resident <= 48


@BACKEND
def test_rows_of_a_batch_are_their_solo_runs(backend: str) -> None:
    model = tiny.model()
    contexts = [tiny.ids(1, count, count)[0] for count in (40, 23)]
    questions = [tiny.ids(1, count, count)[0] for count in (3, 9)]
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        named = [dict(zip(("input_ids", "attention_mask"), pad_left(rows))) for rows in (contexts, questions)]
        stream.read_twice(*named, keep="second")
        got = stream.generate(tiny.ids(2, 3), **HOW)
        for row in range(2):
            with kvsieve.stream(model, kvsieve.Full(), backend) as alone:
                alone.read_twice(contexts[row][None], questions[row][None], keep="second")
                assert alone.stats().resident == 2 * len(questions[row]) + len(contexts[row])
                assert torch.equal(alone.generate(tiny.ids(2, 3)[row : row + 1], **HOW)[0], got[row])


def test_where_eviction_by_position_is_refused_nothing_is_read() -> None:
    cases = [
        (tiny.model(), kvsieve.InfLLM(64, block=8, representatives=1, sinks=2), CONTEXT, "an unbroken text"),
        (tiny.model("gemma3"), kvsieve.Full(), CONTEXT[:, :5], "still within the window of 24 tokens"),
    ]
    for model, policy, context, why in cases:
        with kvsieve.stream(model, policy, "cpu") as stream:
            stream.feed(tiny.ids(1, 9))
            before = snapshot(stream)
            with pytest.raises(UnsupportedError, match=why):
                stream.read_twice(context, QUESTION, keep="second")
            assert stream.seen == 9
            assert all(torch.equal(now, before[name]) for name, now in snapshot(stream).items())
            stream.read_twice(context, QUESTION)
            assert stream.seen == 9 + 2 * (context.shape[1] + 7)
    with kvsieve.stream(tiny.model("gemma3"), kvsieve.Full(), "cpu") as stream:
        stream.read_twice(CONTEXT, QUESTION, keep="second")
        assert stream.stats().resident == 104


def test_wrong_input() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        with pytest.raises(StateError, match="keep must be 'both' or 'second'"):
            stream.read_twice(CONTEXT, QUESTION, keep="first")  # type: ignore[arg-type]
        with pytest.raises(CacheMismatchError, match="the question has 1 rows, the context 2"):
            stream.read_twice(tiny.ids(2, 4), QUESTION)
        with pytest.raises(ShapeError, match="context must be an integer tensor"):
            stream.read_twice("text", QUESTION)  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match="the prompt is empty: question"):
            stream.read_twice(CONTEXT, QUESTION[:, :0])
        assert stream.seen == 0
