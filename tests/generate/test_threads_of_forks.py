"""One prefix, answered in several threads: each fork answers as it does alone; one stream serves one thread at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.errors import StateError

pytestmark = pytest.mark.slow
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
POLICIES: dict[str, Callable[[], Any]] = {
    "full": kvsieve.Full,
    "streaming": lambda: kvsieve.StreamingLLM(32, sinks=2),
    "sirllm": lambda: kvsieve.SirLLM(32, sinks=2, recent=4),
    "snapkv": lambda: kvsieve.SnapKV(32, observe=4, kernel=3),
    "codes": lambda: kvsieve.Full() | kvsieve.Quantized(8, group=16),
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@BACKEND
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.usefixtures("switching")
def test_forks_of_one_prefix_in_threads_answer_as_alone(policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, POLICIES[policy](), backend) as stream:
        stream.feed(tiny.ids(1, 130))

        def answers(number: int) -> list[list[int]]:
            found = []
            with stream.fork() as fork:
                for turn in range(3):
                    prompt = tiny.ids(1, 5 + number, 50 + number + turn)
                    found.append(fork.generate(prompt, do_sample=False, max_new_tokens=4)[0].tolist())
                    if turn == 1:
                        mark = fork.mark()
                        fork.generate(tiny.ids(1, 9, 3), do_sample=False, max_new_tokens=3)
                        fork.rewind(mark)
            return found

        wanted = [answers(number) for number in range(4)]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(answers, range(4))) == wanted
        assert answers(0) == wanted[0]


@BACKEND
def test_another_thread_is_refused_while_a_turn_runs(backend: str) -> None:
    """Nothing of the turn that runs is disturbed, and afterwards the stream is everybody's."""
    model, prompt, refused = tiny.model(), tiny.ids(1, 40), []
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        want = stream.generate(prompt, do_sample=False, max_new_tokens=6)
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:

        def others() -> None:
            for act in (stream.mark, stream.fork, lambda: stream.feed(prompt), lambda: stream.cache.crop(-1)):
                try:
                    act()
                except StateError as error:
                    refused.append("in use by thread" in str(error))
            assert stream.stats().seen == stream.seen

        class AtEachToken:
            def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                thread = threading.Thread(target=others)
                thread.start()
                thread.join()
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        got = stream.generate(prompt, do_sample=False, max_new_tokens=6, stopping_criteria=[AtEachToken()])
        assert torch.equal(got, want)
        assert refused == [True] * 24
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(stream.mark()))
        thread.start()
        thread.join()
        assert done
        stream.rewind(done[0])


def test_another_thread_is_refused_from_the_first_line_of_a_call_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first forward too, and for the end of a turn: both had slipped in, and the stream held neither thread's text."""
    from kvsieve import generate as turns

    model, refused, done = tiny.model(), [], turns.feed
    with kvsieve.stream(model, kvsieve.StreamingLLM(64), "cpu") as stream:
        stream.feed(tiny.ids(1, 9))

        def other() -> None:
            for call in (lambda: stream.feed(tiny.ids(1, 3)), stream.end_turn, stream.mark):
                try:
                    call()
                except StateError as error:
                    refused.append("in use by thread" in str(error))

        def feed(*args: Any) -> None:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            done(*args)

        monkeypatch.setattr(turns, "feed", feed)
        stream.feed(tiny.ids(1, 5, 1))
        monkeypatch.undo()
        assert refused == [True, True, True]
        assert stream.ids[0].tolist() == torch.cat([tiny.ids(1, 9), tiny.ids(1, 5, 1)], 1)[0].tolist()
        refused.clear()
        other()
        assert refused == [], "nobody is at work"
