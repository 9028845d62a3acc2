"""One conversation, whatever is done to it: what its ids are, refused calls, interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, greedy, ids_of, joined, pad_left, snapshot, solo
from kvsieve.errors import KvsieveError
from transformers import LogitsProcessor, LogitsProcessorList

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
ROOMY = [name for name in tiny.POLICIES if name != "lm_infinite_middle"]
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


# --------------------------------------------------------------------------------------------------------------------- ids


@BACKEND
@pytest.mark.parametrize("policy", ROOMY)
def test_the_ids_of_the_conversation_are_kept(policy: str, backend: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, 30)[0], tiny.ids(1, 12, 2)[0]]
    ids, mask = pad_left(rows)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        assert stream.ids == []
        stream.feed(ids, mask, chunk=7)
        assert ids_of(stream) == [row.tolist() for row in rows]
        out = stream.generate(tiny.ids(2, 4, 5), **HOW)
        told = [row.tolist() + out[at].tolist() for at, row in enumerate(rows)]
        assert ids_of(stream) == told
        assert [len(row) - 1 for row in told] == [stream._engine.planner.seen(row) for row in range(2)]
        with stream.fork() as child:
            child.feed(tiny.ids(2, 3, 9))
            assert ids_of(child) == [row + tiny.ids(2, 3, 9)[at].tolist() for at, row in enumerate(told)]
        assert ids_of(stream) == told
        stream.cache.reorder_cache(torch.tensor([1, 0]))
        assert ids_of(stream) == told[::-1]
        stream.reset()
        assert stream.ids == []


def test_ids_of_plain_forwards_crops_and_the_callers_own_generate() -> None:
    model, text = tiny.model(), tiny.ids(1, 20)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        out = model.generate(text, past_key_values=stream.cache, **HOW)
        assert ids_of(stream) == [out[0, :-1].tolist()]
        forward(model, stream.cache, out[:, -1:])
        assert ids_of(stream) == out.tolist()
        stream.cache.crop(-4)
        assert ids_of(stream) == [out[0, :-4].tolist()]


# ----------------------------------------------------------------------------------------------------------------- refused calls

SLIPS = {
    "typo": {"max_new_token": 6},
    "beams": {"num_beams": 3, "num_return_sequences": 5, **HOW},
    "greedy sequences": {"num_return_sequences": 2, **HOW},
    "chunk of a later step": {"max_length": 3, "do_sample": False},
}


@BACKEND
@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("slip", list(SLIPS))
def test_a_refused_call_changes_nothing(slip: str, policy: str, backend: str) -> None:
    model, first, second = tiny.model(), tiny.ids(1, 40), tiny.ids(1, 7, 1)
    answers = []
    for slips in (False, True):
        with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
            stream.generate(first, **HOW)
            told = ids_of(stream)
            if slips:
                with pytest.raises((ValueError, TypeError)):
                    stream.generate(second, **SLIPS[slip])
                with pytest.raises(KvsieveError):
                    stream.feed(second, chunk=0)
                assert ids_of(stream) == told
                assert stream.seen == 45
            answers.append(stream.generate(second, **HOW, return_dict_in_generate=True, output_logits=True))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert torch.equal(answers[0].logits[0], answers[1].logits[0])


@BACKEND
@pytest.mark.parametrize("slip", ["unread", "typo", "pins", "interrupt"])
def test_a_call_that_fails_after_a_crop_leaves_the_last_token_where_it_was(slip: str, backend: str) -> None:
    """That token is to be read again, for its logits; it must not be said and unread meanwhile, or a crop would forget two."""
    model, text, more = tiny.model(), tiny.ids(1, 20), tiny.ids(1, 7, 1)
    calls: dict[str, Any] = {
        "unread": lambda: stream.feed(more, unread=torch.zeros(1, 2)),
        "typo": lambda: stream.generate(more, max_new_token=6),
        "pins": lambda: stream.feed(tiny.ids(1, 60, 1), pin=True),
        "interrupt": lambda: stream.generate(more, **HOW),
    }
    with kvsieve.stream(model, tiny.POLICIES["sirllm"](32), backend) as stream:
        stream.feed(text)
        stream.cache.crop(-3)
        held = snapshot(stream)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt) if slip == "interrupt" else None
        with pytest.raises((ValueError, KeyboardInterrupt)):
            calls[slip]()
        if handle is not None:
            handle.remove()
        assert (stream.seen, ids_of(stream)) == (17, [text[0, :17].tolist()])
        now = snapshot(stream)
        assert held.keys() == now.keys()
        assert all(torch.equal(now[name], held[name]) for name in held)
        stream.cache.crop(-1)
        assert ids_of(stream) == [text[0, :16].tolist()]


@pytest.mark.parametrize("slip", list(SLIPS))
def test_a_refused_first_call_reads_nothing_of_a_long_prompt(slip: str) -> None:
    model, long = tiny.model(), tiny.ids(1, 700)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        with pytest.raises((ValueError, TypeError)):
            stream.generate(long, **SLIPS[slip])
        assert (stream.seen, stream.ids) == (0, [])
        assert torch.equal(stream.generate(long, **HOW), torch.cat([long, torch.tensor(solo(model, [long[0]]))], 1))


# ------------------------------------------------------------------------------------------------------------------- interruptions


class Interrupt(LogitsProcessor):
    """Ctrl-C while the token after ``count`` is chosen."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.count == 0:
            raise KeyboardInterrupt
        self.count -= 1
        return scores


@BACKEND
@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("count", [0, 3])
def test_an_interrupted_turn_leaves_what_was_read(count: int, policy: str, backend: str) -> None:
    model = tiny.model()
    rows, more, last = [tiny.ids(1, 20)[0], tiny.ids(1, 9, 2)[0]], tiny.ids(2, 5, 9), tiny.ids(2, 4, 8)
    said = solo(model, rows)
    texts = [joined(rows[r], said[r][:count], more[r]) for r in range(2)]
    answer = solo(model, texts)
    final = solo(model, [joined(texts[r], answer[r], last[r]) for r in range(2)])
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        with pytest.raises(KeyboardInterrupt):
            stream.generate(*pad_left(rows), logits_processor=LogitsProcessorList([Interrupt(count)]), **HOW)
        assert ids_of(stream) == [joined(rows[r], said[r][:count]).tolist() for r in range(2)]
        assert stream.generate(more, **HOW)[:, 5:].tolist() == answer
        assert stream.generate(last, **HOW)[:, 4:].tolist() == final


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@BACKEND
def test_nothing_of_a_forward_that_died_is_told(backend: str, tmp_path: Path) -> None:
    """What is resident and what is pinned is asked before the stream is used again."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        for seen in (0, 9):
            handle = model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                stream.feed(tiny.ids(1, 5))
            handle.remove()
            assert (stream.seen, stream.stats().resident, len(stream.pins)) == (seen, seen, int(seen > 0))
            assert [len(kept.positions) for kept in stream.kept()] == [seen] * int(seen > 0)
            stream.save(tmp_path / "session")
            with kvsieve.load(tmp_path / "session", model, backend) as again:
                assert (again.seen, again.pins) == (seen, stream.pins)
            stream.feed(tiny.ids(1, 9))


@pytest.mark.parametrize("policy", ROOMY)
def test_an_interrupted_assisted_turn_leaves_verified_tokens_only(policy: str) -> None:
    model, text, more = tiny.model(), torch.cat([tiny.ids(1, 12, 5)] * 3, 1), tiny.ids(1, 5, 9)
    with kvsieve.stream(model, tiny.POLICIES[policy](120)) as stream:
        calls = []

        def hook(module: Any, args: Any, output: Any) -> None:
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt

        handle = model.register_forward_hook(hook)
        try:
            with pytest.raises(KeyboardInterrupt):
                stream.generate(text, prompt_lookup_num_tokens=4, do_sample=False, max_new_tokens=30)
        finally:
            handle.remove()
        told = stream.ids[0]
        want = greedy(model, text, 30)[0]
        assert len(told) >= 36
        assert torch.equal(told, want[: len(told)])
        got = stream.generate(more, **HOW)[0, 5:].tolist()
    assert got == solo(model, [joined(told, more[0])])[0]


def test_a_delivered_token_is_said() -> None:
    """A streamer was given a token that the model has not read when the call is interrupted."""

    class Stops:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()
            if len(self.got) == 20 + 3:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError("never reached")

    model, text, more, streamer = tiny.model(), tiny.ids(1, 20), tiny.ids(1, 5, 9), Stops()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        with pytest.raises(KeyboardInterrupt):
            stream.generate(text, streamer=streamer, **HOW)
        assert ids_of(stream) == [streamer.got]
        assert stream.generate(more, **HOW)[0, 5:].tolist() == solo(model, [joined(streamer.got, more[0])])[0]
