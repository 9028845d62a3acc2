"""What goes wrong in a batch is the trouble of one answer: the others go on."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from batching_cases import LENGTHS, Streamer, greedy, opened, prompt
from kvsieve.errors import ArgumentError, CacheMismatchError, RangeError, ShapeError, StateError, UnsupportedError
from systems import PROMPT


def test_one_that_fails_leaves_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In attention, when its token should count, and in a processor of its own."""
    with opened(kvsieve.SirLLM(48, recent=8)) as stream:
        want = stream.generate(prompt(2), **greedy(24))[0, LENGTHS[2] :].tolist()

    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > LENGTHS[2] + 2:
            raise ValueError("broken processor")
        return scores

    streams, batch = [opened(kvsieve.SirLLM(48, recent=8)) for _ in range(4)], kvsieve.Batch(tiny.model())
    processors: list[Any] = [None, None, [breaks], None]
    answers = [batch.add(one, prompt(2), logits_processor=given, **greedy(24)) for one, given in zip(streams, processors)]
    while any(answer.waits for answer in answers):
        batch.step()
    said = len(answers[0].ids), len(answers[1].ids)
    for stream, call in ((streams[0], "attend"), (streams[1], "complete")):

        def fails(*args: Any, call: str = call, **kwargs: Any) -> Any:
            raise MemoryError(f"no room in {call}")

        monkeypatch.setattr(stream._engine, call, fails)
    batch.run()
    monkeypatch.undo()
    assert answers[3].result().tolist() == want
    for answer, kind, count in (
        (answers[0], MemoryError, said[0]),
        (answers[1], MemoryError, said[1]),
        (answers[2], ValueError, 3),
    ):
        with pytest.raises(kind):
            answer.result()
        assert answer.ids.tolist() == want[:count]
    for stream, answer in zip(streams[:2], answers):
        assert stream.ids[0].tolist() == [*prompt(2)[0].tolist(), *answer.ids.tolist()]
        later = batch.add(stream, prompt(1), **greedy(2))
        batch.run()
        assert len(later.result()) == 2, "the stream goes on"
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["attend", "complete", "_commit"])
def test_an_interrupt_loses_nothing(where: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it comes between the tokens of two streams, or just when one of them counts."""
    want = []
    for at in range(3):
        with opened(kvsieve.StreamingLLM(48)) as stream:
            want.append(stream.generate(prompt(at), **greedy(8))[0, LENGTHS[at] :].tolist())
    streams, batch = [opened(kvsieve.StreamingLLM(48)) for _ in want], kvsieve.Batch(tiny.model())
    answers = [batch.add(stream, prompt(at), **greedy(8)) for at, stream in enumerate(streams)]
    while any(answer.waits for answer in answers):
        batch.step()
    call, left = getattr(streams[1]._engine, where), [1]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0] and when == "before":
            raise KeyboardInterrupt
        found = call(*args, **kwargs)
        if not left[0]:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(streams[1]._engine, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    batch.run()
    assert [answer.result().tolist() for answer in answers] == want
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("piece", [0, 2])
@pytest.mark.parametrize("where", ["attend", "_commit"])
def test_a_prompt_whose_reading_is_interrupted_goes_on(where: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(kvsieve.SirLLM(64, recent=8)) as stream:
        want = stream.generate(prompt(0), **greedy(4))[0, PROMPT:].tolist()
    with opened(kvsieve.SirLLM(64, recent=8)) as stream:
        batch = kvsieve.Batch(tiny.model())
        answer = batch.add(stream, prompt(0), **greedy(4))
        for _ in range(piece):
            batch.step()
        assert answer.waits
        call = getattr(stream._engine, where)

        def stopped(*args: Any, **kwargs: Any) -> Any:
            if where == "_commit":
                call(*args, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr(stream._engine, where, stopped)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
        monkeypatch.undo()
        batch.run()
        assert answer.result().tolist() == want


def test_an_interrupt_while_tokens_are_sampled_costs_nobody_one() -> None:
    with opened(kvsieve.StreamingLLM(48)) as stream:
        want = stream.generate(prompt(2), **greedy(8))[0, LENGTHS[2] :].tolist()
    left = [5]

    def interrupted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return scores

    streams, batch = [opened(kvsieve.StreamingLLM(48)) for _ in range(3)], kvsieve.Batch(tiny.model())
    answers = [batch.add(one, prompt(2), logits_processor=[interrupted], **greedy(8)) for one in streams]
    with pytest.raises(KeyboardInterrupt):
        batch.run()
    batch.run()
    assert [answer.result().tolist() for answer in answers] == [want] * 3
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("change", ["close", "reset", "rewind"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_changed_fails_and_the_others_go_on(change: str, begun: bool) -> None:
    with opened(kvsieve.StreamingLLM(48)) as stream:
        want = stream.generate(prompt(2), **greedy(8))[0, LENGTHS[2] :].tolist()
    streams, batch = [opened(kvsieve.StreamingLLM(48)) for _ in range(2)], kvsieve.Batch(tiny.model())
    streams[0].feed(tiny.ids(1, 3, 5))
    mark = streams[0].mark()
    answers = [batch.add(one, prompt(2), **greedy(8)) for one in streams]
    while begun and any(answer.waits for answer in answers):
        batch.step()
    {"close": streams[0].close, "reset": streams[0].reset, "rewind": lambda: streams[0].rewind(mark)}[change]()
    batch.run()
    assert answers[1].result().tolist() == want
    if change != "rewind" or begun:
        with pytest.raises(StateError, match="closed before" if change == "close" else "changed before"):
            answers[0].result()
    if change != "close":
        assert streams[0].generate(prompt(1), **greedy(2)).shape == (1, 3), "the stream goes on"
    for stream in streams:
        stream.close()


def test_what_goes_wrong_at_the_end_of_an_answer_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, batch = [opened(kvsieve.StreamingLLM(48)) for _ in range(2)], kvsieve.Batch(tiny.model())
    answers = [batch.add(one, prompt(1), **greedy(4)) for one in streams]

    def fails() -> None:
        raise MemoryError("no room at the end")

    monkeypatch.setattr(streams[0], "end_turn", fails)
    batch.run()
    with pytest.raises(MemoryError):
        answers[0].result()
    assert len(answers[1].result()) == 4
    for stream in streams:
        stream.close()


def test_a_streamer_may_cancel_another_answer() -> None:
    streams, batch = [opened(kvsieve.StreamingLLM(48)) for _ in range(2)], kvsieve.Batch(tiny.model())
    answers: list[Any] = []

    class Cancels(Streamer):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.given) == 4:
                batch.cancel(answers[1])

    heard = Streamer()
    answers.append(batch.add(streams[0], prompt(1), streamer=Cancels(), **greedy(8)))
    answers.append(batch.add(streams[1], prompt(1), streamer=heard, **greedy(8)))
    batch.run()
    assert len(answers[0].ids) == 8
    assert heard.ended == 1
    assert [one for given in heard.given[1:] for one in given] == answers[1].ids.tolist()
    assert streams[1].ids[0].tolist() == [*prompt(1)[0].tolist(), *answers[1].ids.tolist()]
    for stream in streams:
        stream.close()


def test_cancelled_answers_keep_what_was_said() -> None:
    streams = [opened(kvsieve.SirLLM(64, recent=8)) for _ in range(3)]
    batch = kvsieve.Batch(tiny.model())
    talking = batch.add(streams[0], prompt(1), **greedy(20))
    for _ in range(4):
        batch.step()
    reading, waiting = batch.add(streams[1], prompt(0), **greedy(4)), batch.add(streams[2], prompt(2), **greedy(4))
    batch.step()
    for answer in (talking, reading, waiting):
        batch.cancel(answer)
        batch.cancel(answer)
        assert answer.done
    assert not batch.answers
    assert streams[0].ids[0].tolist() == [*prompt(1)[0].tolist(), *talking.result().tolist()]
    for answer in (reading, waiting):
        with pytest.raises(StateError, match="cancelled before its first token"):
            answer.result()
    assert 0 < streams[1].seen < PROMPT
    assert not streams[2].seen
    for stream in streams:
        assert len(stream.generate(prompt(1), **greedy(2))[0]) == 3
        stream.close()


def test_a_stream_of_a_batch_is_nobody_elses() -> None:
    with opened(kvsieve.Full()) as stream, opened(kvsieve.Full()) as other:
        batch = kvsieve.Batch(tiny.model())
        answer = batch.add(stream, prompt(1), **greedy(6))
        with pytest.raises(StateError, match="in the batch already"):
            batch.add(stream, prompt(1), **greedy(6))
        batch.step()
        with pytest.raises(StateError, match="a turn of this stream is under way"):
            stream.feed(prompt(1))
        with pytest.raises(StateError, match="not over"):
            answer.result()
        waits = batch.add(other, prompt(1), **greedy(6))
        with pytest.raises(StateError, match="a turn of this stream is under way"):
            other.feed(prompt(1))
        with pytest.raises(StateError, match="a turn of this stream is under way"):
            kvsieve.Batch(tiny.model()).add(other, prompt(1), **greedy(6))
        batch.run()
        assert answer.result().tolist() == waits.result().tolist()
        with pytest.raises(StateError, match="not of this batch"):
            kvsieve.Batch(tiny.model()).cancel(batch.add(stream, prompt(1), **greedy(6)))


def test_what_a_batch_does_not_serve_is_refused() -> None:
    batch = kvsieve.Batch(tiny.model())
    with opened(kvsieve.Full()) as stream, kvsieve.stream(tiny.model("qwen2"), kvsieve.Full()) as foreign:
        for arguments, error in (
            ({"num_beams": 2}, UnsupportedError),
            ({"num_return_sequences": 2, "do_sample": True}, UnsupportedError),
            ({"prompt_lookup_num_tokens": 2}, UnsupportedError),
            ({"return_dict_in_generate": True}, UnsupportedError),
            ({"pixel_values": torch.zeros(1)}, UnsupportedError),
            ({"streamer": 3}, ArgumentError),
            ({"seed": "x"}, ArgumentError),
            ({"max_new_tokens": 0}, ValueError),
            ({"max_new_tokens": None, "max_length": 1}, ArgumentError),
            ({"end_turn": 2}, ArgumentError),
        ):
            with pytest.raises(error):
                batch.add(stream, prompt(1), **{"max_new_tokens": 2, **arguments})
        with pytest.raises(RangeError):
            batch.add(stream, torch.tensor([[10**6]]), max_new_tokens=2)
        with pytest.raises(ShapeError):
            batch.add(stream, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=2)
        with pytest.raises(CacheMismatchError, match="one sequence"):
            batch.add(stream, tiny.ids(2, 3), max_new_tokens=2)
        with pytest.raises(CacheMismatchError, match="another model"):
            batch.add(foreign, prompt(1), max_new_tokens=2)
        with pytest.raises(ArgumentError, match="takes streams"):
            batch.add(stream.cache, prompt(1), max_new_tokens=2)  # type: ignore[arg-type]
        assert not batch.answers
        assert not stream.seen
        assert len(stream.generate(prompt(1), **greedy(2))[0]) == 3
    with pytest.raises(ArgumentError, match="most"):
        kvsieve.Batch(tiny.model(), most=0)
