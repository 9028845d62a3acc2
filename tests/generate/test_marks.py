"""Going back: a mark is exact for every policy and kind of layer, can be used again, and costs what has changed since."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from conversation_model import interrupts
from drive import forward, forwards, greedy, pad_left, same_memory, snapshot
from kvsieve.errors import CacheMismatchError, StateError

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}

SYSTEMS: dict[str, Any] = {
    **{name: lambda name=name: tiny.POLICIES[name](24) for name in tiny.POLICIES},
    "hip": lambda: kvsieve.HiP(16, block=2, sinks=2, window=8, dense_layers=0, refresh=3),
    "quest": lambda: kvsieve.Quest(16, candidates=4, sinks=64, window=64),
    "think": lambda: kvsieve.ThinK(0.5, recent=4, observe=4),
    "quantized": lambda: kvsieve.Quantized(8, group=8, residual=8),
    "sirllm_think": lambda: tiny.POLICIES["sirllm"](40) | kvsieve.ThinK(0.5, recent=4, observe=4),
    "sirllm_hip": lambda: tiny.POLICIES["sirllm"](60) | kvsieve.HiP(16, block=2, sinks=2, window=8, dense_layers=0),
}
EVERY = pytest.mark.parametrize("system", list(SYSTEMS))


def answers(stream: kvsieve.Stream, rows: int) -> list[torch.Tensor]:
    """What the stream says next, over two turns that evict, search and pack."""
    return [stream.generate(tiny.ids(rows, n, n), **HOW) for n in (9, 70)]


@BACKEND
@EVERY
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_after_rewinding_everything_is_as_at_the_mark(family: str, system: str, backend: str) -> None:
    model, rows = tiny.model(family), [tiny.ids(1, 150)[0], tiny.ids(1, 131, 2)[0]]
    with kvsieve.stream(model, SYSTEMS[system](), backend) as stream:
        stream.generate(*pad_left(rows), **HOW)
        mark, told = stream.mark(), [row.clone() for row in stream.ids]
        held = snapshot(stream)
        with stream.fork() as twin:
            want = answers(twin, 2)
        for _ in range(2):
            got = answers(stream, 2)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
            stream.rewind(mark)
            assert mark.seen == stream.seen == 155
            assert all(torch.equal(a, b) for a, b in zip(stream.ids, told))
            now = snapshot(stream)
            assert held.keys() == now.keys()
            assert all(torch.equal(now[name], held[name]) for name in held)


@BACKEND
@EVERY
def test_an_interrupted_turn_is_undone(system: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, SYSTEMS[system](), backend) as stream:
        stream.generate(tiny.ids(1, 150), **HOW)
        mark = stream.mark()
        calls = []

        def hook(module: Any, args: Any, output: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        for at in (0, 1):
            calls.clear()
            handle = model.model.layers[at].register_forward_hook(hook)
            with pytest.raises(KeyboardInterrupt):
                stream.generate(tiny.ids(1, 9, 3), **HOW)
            handle.remove()
            stream.rewind(mark)
        got = answers(stream, 1)
    with kvsieve.stream(model, SYSTEMS[system](), backend) as twin:
        twin.generate(tiny.ids(1, 150), **HOW)
        want = answers(twin, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@BACKEND
@EVERY
def test_marks_of_marks_rows_and_nothing(system: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, SYSTEMS[system](), backend) as stream:
        empty = stream.mark()
        stream.feed(tiny.ids(1, 140))
        one = stream.mark()
        stream.cache.batch_repeat_interleave(3)
        stream.feed(tiny.ids(3, 20, 4))
        three = stream.mark()
        stream.rewind(one)
        assert len(stream.ids) == 1
        stream.feed(tiny.ids(1, 5, 6))
        stream.rewind(three)
        assert [len(row) for row in stream.ids] == [160] * 3
        stream.rewind(empty)
        assert (stream.seen, stream.ids) == (0, [])
        del one, three
        stream.reset()
        assert stream.stats().bytes_held == 0
        stream.feed(tiny.ids(2, 140))
        with kvsieve.stream(model, SYSTEMS[system](), backend) as twin:
            twin.feed(tiny.ids(2, 140))
            assert same_memory(stream, twin)


def test_a_mark_costs_what_changed_since() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(1, 64 * 20))
        held = stream.stats().bytes_held
        marks = [stream.mark() for _ in range(5)]
        assert stream.stats().bytes_held == held
        stream.feed(tiny.ids(1, 64, 2))
        assert stream.stats().bytes_held == held // 20 * 21
        stream.rewind(marks[0])
        assert stream.stats().bytes_held == held


def test_marks_of_others_are_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full()) as stream, kvsieve.stream(model, kvsieve.Full()) as other:
        stream.feed(tiny.ids(1, 9))
        for mark in (other.mark(), None, 7):
            with pytest.raises(StateError, match="mark"):
                stream.rewind(mark)  # type: ignore[arg-type]
        assert stream.seen == 9


@BACKEND
@pytest.mark.parametrize("policy", ["streaming", "lm_infinite", "sirllm", "chain"])
@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_crop_to_before_an_eviction_is_refused_and_changes_nothing(count: int, policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 60), [50, 1])
        stream.end_turn()
        held, told = snapshot(stream), stream.ids
        with pytest.raises(CacheMismatchError, match="evicted"):
            stream.cache.crop(-count)
        now = snapshot(stream)
        assert all(torch.equal(now[name], held[name]) for name in held)
        assert torch.equal(stream.ids[0], told[0])
        stream.cache.crop(-60)
        assert (stream.seen, stream.stats().resident) == (0, 0)


@pytest.mark.parametrize("pads", [0, 3])
def test_a_crop_of_a_padded_batch_counts_columns(pads: int) -> None:
    """What is taken back are columns; a row that has pads there loses fewer tokens."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        mask = torch.ones(2, 16, dtype=torch.long)
        ids = tiny.ids(2, 16)
        forward(model, stream.cache, ids[:, :8], mask[:, :8])
        mask[1, 8 : 8 + pads] = 0
        forward(model, stream.cache, ids[:, 8:], mask)
        stream.cache.crop(-8)
        assert [row.tolist() for row in stream.ids] == ids[:, :8].tolist()
        assert [stream._engine.planner.seen(row) for row in range(2)] == [8, 8]


@BACKEND
@pytest.mark.parametrize("policy", ["sirllm", "chain"])
def test_scores_after_a_crop_are_those_of_the_text_that_stayed(policy: str, backend: str) -> None:
    """The logits before the next token are gone with the tokens that were forgotten: the stream reads the last one again."""
    model, text, other = tiny.model(), tiny.ids(1, 40), tiny.ids(1, 9, 8)
    found = []
    for back in (0, 7):
        with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
            stream.feed(text)
            if back:
                stream.feed(tiny.ids(1, back, 3))
                stream.cache.crop(-back)
            stream.feed(other)
            assert stream.ids[0].tolist() == torch.cat([text, other], 1)[0].tolist()
            found.append(torch.from_numpy(stream.kept()[0].scores))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@BACKEND
@pytest.mark.parametrize("policy", ["sirllm", "chain"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_callers_generate_that_dies_after_a_crop_is_undone(policy: str, at: int, backend: str) -> None:
    """The first of its forwards reads the last token again."""
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        stream.feed(tiny.ids(1, 40))
        stream.cache.crop(-3)
        mark, held, text = stream.mark(), snapshot(stream), torch.cat([stream.ids[0][None], tiny.ids(1, 5, 8)], 1)
        with stream.fork() as twin:
            want = greedy(model, text, 4, past_key_values=twin.cache)
            after = snapshot(twin)
        with interrupts(model, at, 0):
            greedy(model, text, 4, past_key_values=stream.cache)
        stream.mark()
        assert same(snapshot(stream), held) == (at == 1)
        stream.rewind(mark)
        assert same(snapshot(stream), held)
        assert torch.equal(greedy(model, text, 4, past_key_values=stream.cache), want)
        assert same(snapshot(stream), after)


@BACKEND
@pytest.mark.parametrize("system", ["sirllm", "h2o", "streaming", "quest"])
def test_assisted_decoding_that_dies_in_its_midst_is_undone(system: str, backend: str) -> None:
    """Wherever it dies: candidates may be read in pieces, each a forward."""
    model, text = tiny.model(), torch.cat([tiny.ids(1, 9, 4)] * 5, 1)
    with kvsieve.stream(model, SYSTEMS[system](), backend) as stream:
        mark, forwards_of = stream.mark(), []
        handle = model.model.layers[1].register_forward_hook(lambda *_: forwards_of.append(1))
        want = greedy(model, text, 8, past_key_values=stream.cache, prompt_lookup_num_tokens=4)
        handle.remove()
        after = snapshot(stream)
        assert len(forwards_of) > 3
        for at in range(1, len(forwards_of) + 1):
            stream.rewind(mark)
            with interrupts(model, at, 1):
                greedy(model, text, 8, past_key_values=stream.cache, prompt_lookup_num_tokens=4)
            stream.mark()
        stream.rewind(mark)
        assert torch.equal(greedy(model, text, 8, past_key_values=stream.cache, prompt_lookup_num_tokens=4), want)
        assert same(snapshot(stream), after)
