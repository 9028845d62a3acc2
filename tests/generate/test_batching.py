"""Conversations that are answered together: each says what it would say alone, whoever joins, leaves or streams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import kvsieve
import pytest
import tiny
import torch
from batching_cases import LENGTHS, Streamer, greedy, opened, prompt
from kvsieve.errors import ArgumentError
from systems import OF_EVERY_KIND, SYSTEMS
from tiny import BACKENDS

MOST = (9, 4, 14)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name in OF_EVERY_KIND])
def test_each_answer_is_that_of_its_stream_alone(name: str) -> None:
    """Two turns each; texts of different lengths, which end at different times."""
    model, system = tiny.model(), SYSTEMS[name]
    alone, streams, batch = [], [opened(system.make()) for _ in LENGTHS], kvsieve.Batch(model)
    for at, most in enumerate(MOST):
        with opened(system.make()) as stream:
            said = [stream.generate(ids, **greedy(most))[:, ids.shape[1] :] for ids in (prompt(at), tiny.ids(1, 5, 90 + at))]
            alone.append((said, stream.seen, [kept.positions.tolist() for kept in stream.kept()]))
    answers = [batch.add(stream, prompt(at), **greedy(MOST[at])) for at, stream in enumerate(streams)]
    batch.run()
    second = [batch.add(stream, tiny.ids(1, 5, 90 + at), **greedy(MOST[at])) for at, stream in enumerate(streams)]
    batch.run()
    for stream, first, later, (said, seen, kept) in zip(streams, answers, second, alone):
        assert torch.equal(first.result()[None], said[0])
        assert torch.equal(later.result()[None], said[1])
        assert stream.seen == seen
        assert [row.positions.tolist() for row in stream.kept()] == kept
        assert stream.ids[0].tolist()[-len(later.ids) :] == later.ids.tolist()
        stream.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_side_by_side(backend: str) -> None:
    """Also those that store keys in different ways, and so do not share a forward."""
    policies = [kvsieve.Full(), kvsieve.StreamingLLM(32), kvsieve.SirLLM(48, recent=8), kvsieve.SnapKV(48, observe=8)]
    want = []
    for at, policy in enumerate(policies):
        with opened(policy, backend) as stream:
            want.append(stream.generate(prompt(at % 3), **greedy(8))[0, LENGTHS[at % 3] :])
    batch, streams = kvsieve.Batch(tiny.model()), [opened(policy, backend) for policy in policies]
    answers = [batch.add(stream, prompt(at % 3), **greedy(8)) for at, stream in enumerate(streams)]
    batch.run()
    assert [answer.ids.tolist() for answer in answers] == [ids.tolist() for ids in want]
    for stream in streams:
        stream.close()


def test_who_comes_late_joins_and_who_is_done_leaves() -> None:
    model = tiny.model()
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    streams = [opened(kvsieve.StreamingLLM(48)) for _ in LENGTHS]
    batch = kvsieve.Batch(model)
    first = batch.add(streams[0], prompt(1), **greedy(12))
    over = [*batch.step(), *batch.step()]
    late = batch.add(streams[1], prompt(2), **greedy(4))
    assert late.waits
    assert not over
    for found in batch:
        over += found
    handle.remove()
    assert over == [late, first]
    assert max(rows) == 2
    assert rows[-1] == 1
    assert (len(first.ids), len(late.ids)) == (12, 4)
    for stream in streams:
        stream.close()


def test_prompts_are_read_in_pieces_between_the_others_tokens() -> None:
    with opened(kvsieve.SirLLM(64, recent=8)) as talking, opened(kvsieve.SirLLM(64, recent=8)) as reading:
        batch = kvsieve.Batch(tiny.model())
        first = batch.add(talking, prompt(1), **greedy(40))
        batch.step()
        late = batch.add(reading, prompt(0), **greedy(2))
        said = [len(first.ids)]
        while late.waits:
            batch.step()
            said.append(len(first.ids))
        assert len(said) > 4, "the prompt is longer than a piece"
        assert said == list(range(said[0], said[0] + len(said))), "a token for each piece"
        batch.run()


def test_no_more_at_a_time_than_asked_for() -> None:
    model, rows = tiny.model(), []
    streams = [opened(kvsieve.Full()) for _ in range(4)]
    batch = kvsieve.Batch(model, most=2)
    answers = [batch.add(stream, prompt(1), **greedy(3)) for stream in streams]
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    batch.run()
    handle.remove()
    assert max(rows) == 2
    assert all(len(answer.ids) == 3 for answer in answers)
    for stream in streams:
        stream.close()


SETTINGS = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalty": {"do_sample": False, "repetition_penalty": 1.7},
    "ends": {"do_sample": False, "eos_token_id": list(range(0, tiny.VOCAB, 3))},
    "least": {"do_sample": False, "eos_token_id": list(range(0, tiny.VOCAB, 3)), "min_new_tokens": 6},
    "processor": {"do_sample": False, "logits_processor": [lambda ids, scores: scores.roll(int(ids[0, -1]) % 7, -1)]},
    "criterion": {"do_sample": False, "stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] % 11 == 0])]},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_settings_of_generate(name: str) -> None:
    """In the second turn, where what looks back sees both."""
    want = []
    for at in range(3):
        with opened(kvsieve.SirLLM(64, recent=8)) as stream:
            stream.generate(prompt(at), **greedy(3))
            torch.manual_seed(at)
            ids = tiny.ids(1, 6, at)
            want.append((stream.generate(ids, max_new_tokens=12, **SETTINGS[name])[0, 6:].tolist(), stream.ids[0].tolist()))
    streams, batch = [opened(kvsieve.SirLLM(64, recent=8)) for _ in want], kvsieve.Batch(tiny.model())
    for at, stream in enumerate(streams):
        batch.add(stream, prompt(at), **greedy(3))
    batch.run()
    answers = [
        batch.add(stream, tiny.ids(1, 6, at), seed=at, max_new_tokens=12, **SETTINGS[name]) for at, stream in enumerate(streams)
    ]
    batch.run()
    assert [(answer.ids.tolist(), stream.ids[0].tolist()) for answer, stream in zip(answers, streams)] == want
    for stream in streams:
        stream.close()


def test_streamers_are_told_what_those_of_generate_are() -> None:
    alone, together = Streamer(), Streamer()
    with opened(kvsieve.Full()) as stream:
        stream.generate(prompt(2), streamer=alone, **greedy(5))
    with opened(kvsieve.Full()) as stream:
        batch = kvsieve.Batch(tiny.model())
        batch.add(stream, prompt(2), streamer=together, **greedy(5))
        batch.run()
    assert together.given == alone.given
    assert together.ended == alone.ended == 1


def test_prompts_read_but_for_one_token_join_at_once() -> None:
    """In the forward of those that are being answered; no more than may be answered at a time."""
    model, policy = tiny.model(), kvsieve.SirLLM(64, recent=8)
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    streams, batch, answers = [opened(policy) for _ in range(5)], kvsieve.Batch(model, most=4), []
    with opened(policy) as stream:
        stream.feed(prompt(2)[:, :-1])
        want = stream.generate(prompt(2)[:, -1:], **greedy(6))[0, 1:].tolist()
    for stream in streams:
        stream.feed(prompt(2)[:, :-1])
        answers.append(batch.add(stream, prompt(2)[:, -1:], **greedy(6)))
    rows.clear()
    batch.step()
    batch.step()
    assert rows == [4, 4]
    assert [len(answer.ids) for answer in answers] == [2, 2, 2, 2, 0]
    batch.run()
    handle.remove()
    assert [answer.result().tolist() for answer in answers] == [want] * 5
    for stream in streams:
        stream.close()


def test_probabilities_are_those_of_the_model() -> None:
    """Before temperature, and of the tokens that were said; asked for by one answer, not by the other."""
    model = tiny.model()
    with opened(kvsieve.Full()) as one, opened(kvsieve.Full()) as other:
        batch = kvsieve.Batch(model)
        asked = batch.add(one, prompt(2), logprobs=3, seed=5, max_new_tokens=8, do_sample=True, temperature=2.5)
        with pytest.raises(ArgumentError, match="logprobs"):
            batch.add(other, prompt(2), logprobs=-1, **greedy(2))
        silent = batch.add(other, prompt(2), **greedy(8))
        batch.run()
        with torch.no_grad():
            logits = model(torch.cat([prompt(2), asked.ids[None]], 1)).logits[0, LENGTHS[2] - 1 : -1]
        want = logits.log_softmax(-1)
        assert silent.logprobs == []
        assert len(asked.logprobs) == 8
        for token, found, logs in zip(asked.ids.tolist(), asked.logprobs, want):
            best = logs.topk(3)
            assert found.token == pytest.approx(float(logs[token]), abs=1e-4)
            assert [number for number, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_another_thread_may_step() -> None:
    with opened(kvsieve.Full()) as stream:
        batch = kvsieve.Batch(tiny.model())
        answer = batch.add(stream, prompt(2), **greedy(4))
        batch.step()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(batch.run).result()
        assert len(answer.result()) == 4
