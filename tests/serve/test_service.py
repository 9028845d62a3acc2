"""The model thread: limits, ends, cancels and failures; what happens to one request is nobody else's concern."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import kvsieve
import pytest
import serve_cases as cases
import tiny
import torch
from kvsieve.errors import (
    ArgumentError,
    KvsieveError,
    PromptTooLongError,
    ServiceBusyError,
    ServiceClosedError,
    ServiceError,
    StateError,
    UnsupportedError,
)
from kvsieve.serve.jobs import Job
from kvsieve.serve.service import Service
from serve_cases import Heard, answer, ask, job, rendered

ASKED = [("user", "what is it that lies behind the islands?")]
LONG = [("user", "a long story of the sea and the people on it. " * 8)]
NEVER: dict[str, Any] = {"eos_token_id": None}
"""An answer that has no end of its own."""


class Held:
    """A service whose model thread waits before each turn until it is let go."""

    def __init__(self, policy: Any, **changes: Any) -> None:
        self.service = cases.service(policy, **changes)
        self._turn, self._turns, self._free = self.service._worker.turn, threading.Semaphore(0), False
        self.at_turn = threading.Event()
        self.service._worker.turn = self._wait  # type: ignore[method-assign]
        self.service.start()

    def _wait(self) -> None:
        self.at_turn.set()
        if not self._free:
            self._turns.acquire()
        self._turn()

    def let(self, turns: int) -> None:
        for _ in range(turns):
            self._turns.release()

    def go(self) -> None:
        self._free = True
        self._turns.release()


# ------------------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("chunk", [13, 64])
def test_an_answer_does_not_depend_on_who_else_is_there(chunk: int) -> None:
    """Prompts are cut in the same places, whatever is read and answered between two pieces."""
    policy = kvsieve.SirLLM(48, recent=8)
    asked = [[("user", f"{name} tells " + "of the sea " * (2 + 3 * at))] for at, name in enumerate("abcdef")]
    with cases.service(policy, chunk=chunk) as service:
        alone = [answer(service, one, 6 + at).ids() for at, one in enumerate(asked)]
    with cases.service(policy, chunk=chunk, most=4) as service:
        heard = [ask(service, job(one, 6 + at)) for at, one in enumerate(asked)]
        assert [one.wait().ids() for one in heard] == alone
        assert [one.reason() for one in heard] == ["stop" if ids[-1] == cases.END else "length" for ids in alone]


def test_probabilities_are_the_models_own() -> None:
    with cases.service(kvsieve.Full()) as service:
        heard = answer(service, ASKED, 6, logprobs=2, do_sample=True, temperature=3.0, seed=3)
    text = rendered(ASKED)[0]
    with torch.no_grad():
        logits = tiny.model()(torch.cat([cases.ids_of(text), torch.tensor([heard.ids()])], 1)).logits[0, len(text) - 1 : -1]
    for token, logs in zip(heard.tokens[0], logits.log_softmax(-1)):
        best = logs.topk(2)
        assert token.logprob == pytest.approx(float(logs[token.id]), abs=1e-4)
        assert [one for one, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    with cases.service(kvsieve.Full()) as service:
        assert all(token.logprob is None for token in answer(service, ASKED).tokens[0])
        assert all(token.top == () and token.logprob for token in answer(service, ASKED, logprobs=0).tokens[0])


def test_a_stop_string_ends_an_answer_at_the_token_that_completes_it() -> None:
    with cases.service(kvsieve.Full()) as service:
        whole = answer(service, ASKED, 12, **NEVER)
        text = whole.text()
        at = next(at for at in range(2, 9) if text.index(text[at : at + 2]) == at)
        stopped = answer(service, ASKED, 12, stop=("never said", text[at : at + 2]), **NEVER)
        assert stopped.reason() == "stop"
        assert stopped.ids() == whole.ids()[: at + 2]
        assert stopped.usage().said == at + 2
        # What the client was shown ends before the stop string: that is no state, and the prompt still is one.
        later = answer(service, [*ASKED, ("assistant", text[:at]), ("user", "and then, what came after that?")])
        assert later.usage().cached >= len(rendered(ASKED)[0]) - len("<assistant>")


def test_the_token_of_the_end_is_told_and_is_no_part_of_the_text() -> None:
    with cases.service(kvsieve.Full()) as service:
        third = answer(service, ASKED, 3, **NEVER).ids()[2]
        first = answer(service, ASKED, 12, eos_token_id=third)
        assert first.ids()[-1] == third
        assert first.reason() == "stop"
        assert answer(service, ASKED, 2, eos_token_id=third).reason() == "length"


def test_a_prompt_of_one_token() -> None:
    with cases.service(kvsieve.Full()) as service, kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        want = stream.generate(cases.ids_of("a"), max_new_tokens=4, do_sample=False)[0, 1:].tolist()
        heard = answer(service, "a", 4, **NEVER)
        assert heard.ids() == want
        assert (heard.usage().prompt, heard.usage().read) == (1, 1)


def test_counts_are_those_of_what_happened() -> None:
    with cases.service(kvsieve.Full()) as service:
        first = answer(service, ASKED, 5, **NEVER)
        second = answer(service, [*ASKED, ("assistant", first.text()), *ASKED], 4, **NEVER)
    found = service.snapshot()
    assert found.tokens_read == first.usage().read + second.usage().read
    assert found.tokens_cached == second.usage().cached > 0
    assert found.tokens_said == 9
    assert (found.jobs, found.failed, found.refused, found.errors) == (2, 0, 0, 0)
    assert found.ends == {"length": 2}
    assert found.steps.count == 9
    assert found.waits.count == 2
    assert (found.queued, found.reading, found.answering) == (0, 0, 0)


# -------------------------------------------------------------------------------------------------------------------------- limits


def test_more_than_may_wait_are_refused_at_once() -> None:
    held = Held(kvsieve.Full(), most=1, queue=2)
    first = ask(held.service, job(ASKED))
    assert held.at_turn.wait(30)
    waiting = [ask(held.service, job(ASKED)) for _ in range(2)]
    with pytest.raises(ServiceBusyError, match="2 requests wait"):
        ask(held.service, job(ASKED))
    assert held.service.snapshot().refused == 1
    held.go()
    assert len({tuple(one.wait().ids()) for one in [first, *waiting]}) == 1
    assert answer(held.service, ASKED).ids() == first.ids()
    held.service.close()


def test_no_more_answers_at_a_time_than_may_be() -> None:
    most: list[int] = []
    with cases.service(kvsieve.Full(), most=3) as service:
        step = service._worker._batch.step

        def stepped() -> Any:
            most.append(len(service._worker._batch.answers))
            return step()

        service._worker._batch.step = stepped  # type: ignore[method-assign]
        heard = [ask(service, job(ASKED, 6, n=1 + at % 2, do_sample=True, seed=at, **NEVER)) for at in range(6)]
        assert all(one.wait().error is None for one in heard)
    assert max(most) == 3


def test_a_prompt_that_is_too_long_is_refused_at_once_or_when_it_was_counted() -> None:
    with cases.service(kvsieve.Full(), longest=100) as service:
        with pytest.raises(PromptTooLongError, match="more than 100 tokens"):
            ask(service, job("x" * 93, 8))
        first = answer(service, "x" * 92, 8, **NEVER)
        assert len(first.ids()) == 8
        assert service.snapshot().jobs == 1

        class Words(cases.Letters):
            """Whole texts have fewer tokens than their parts."""

            def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
                return super().__call__(text[:20] if len(text) > 60 else text, add_special_tokens)

        service._texts.tokenizer = Words()
        late = ask(service, Job("ada", "y" * 120, (60,), 0, {"max_new_tokens": 30, "do_sample": False}))
        assert isinstance(late.wait().error, PromptTooLongError)
        # Where nobody said how long the answer is, it takes what the parts leave.
        options = {"max_new_tokens": 30, "do_sample": False, **NEVER}
        for shorter in (False, True):
            late = ask(service, Job("ada", "z" * 90, (45,), 0, options, shorter=shorter)).wait()
            assert isinstance(late.error, PromptTooLongError) is not shorter
        assert (len(late.ids()), late.reason()) == (10, "length")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"n": 0}, ArgumentError),
        ({"n": 33}, ArgumentError),
        ({"shorter": 1}, ArgumentError),
        ({"logprobs": -1}, ArgumentError),
        ({"logprobs": True}, ArgumentError),
        ({"seconds": 0}, ArgumentError),
        ({"seconds": float("nan")}, ArgumentError),
        ({"text": ""}, ArgumentError),
        ({"text": "half \ud800"}, ArgumentError),
        ({"owner": 3}, ArgumentError),
        ({"stop": ("",)}, ArgumentError),
        ({"boundaries": (3, 3)}, ArgumentError),
        ({"boundaries": (9,)}, ArgumentError),
        ({"answered": 9}, ArgumentError),
        ({"options": {"max_new_tokens": 0}}, ArgumentError),
        ({"options": {"temperature": -1.0, "do_sample": True}}, ArgumentError),
        ({"options": {"top_p": -1.0, "do_sample": True}}, ArgumentError),
        ({"options": {"seed": "x"}}, ArgumentError),
        ({"options": {"seed": -1}}, ArgumentError),
        ({"options": {"num_beams": 2}}, UnsupportedError),
        ({"options": {"streamer": 1}}, UnsupportedError),
        ({"options": {"flavour": "sweet"}}, UnsupportedError),
    ],
)
def test_what_cannot_be_is_refused_at_once(change: dict[str, Any], error: type[KvsieveError]) -> None:
    service = shared()
    before = service.snapshot()
    with pytest.raises(error):
        service.submit(Job(**{"owner": "ada", "text": "hello", "options": {}, **change}), Heard())
    assert service.snapshot() == before


_shared: list[Service] = []


def shared() -> Service:
    if not _shared:
        _shared.append(cases.service(kvsieve.Full()))
        _shared[0].start()
    return _shared[0]


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Any:
    yield
    for service in _shared:
        service.close()
    _shared.clear()


def test_arguments_of_a_service_are_checked() -> None:
    for change in ({"memory": 0}, {"most": 0}, {"queue": 0}, {"chunk": 0}, {"longest": 1}, {"durable": 1}, {"disk": 0}):
        with pytest.raises(ArgumentError):
            cases.service(kvsieve.Full(), **change)
    with pytest.raises(ArgumentError, match="durable"):
        cases.service(kvsieve.Full(), durable=True)
    with pytest.raises(ArgumentError, match="a Job"):
        shared().submit("hello", Heard())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------------- ends


def test_a_deadline_cuts_what_is_being_said_read_or_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    held = Held(kvsieve.Full(), most=2)
    talking = ask(held.service, job(ASKED, 500, seconds=10.0, **NEVER))
    reading = ask(held.service, job(LONG, 5, seconds=10.0, owner="bob"))
    waiting = ask(held.service, job(ASKED, 5, seconds=10.0, owner="cat"))
    patient = ask(held.service, job(ASKED, 4, owner="dan"))
    held.let(7)
    assert talking.started.wait(30)
    while held.service.snapshot().tokens_said < 2:
        held.let(1)
        talking.over.wait(0.01)
    now[0] = 11.0
    held.go()
    for heard in (talking, reading, waiting):
        assert heard.wait().reason() == "timeout"
    assert len(talking.ids()) >= 2
    assert waiting.begun is None
    assert waiting.ids() == []
    assert patient.wait().ids() == answer(held.service, ASKED, 4).ids()
    # What was said until then is remembered.
    later = answer(held.service, [*ASKED, ("assistant", talking.text()), *ASKED], 1)
    assert later.usage().cached > len(rendered(ASKED)[0])
    held.service.close()


def test_cancels_at_random_moments_harm_nobody() -> None:
    """Also of jobs that wait, or are over. What is left answers as ever, and nothing stays behind."""
    rng, policy = random.Random(5), kvsieve.SirLLM(48, recent=8)
    with cases.service(policy) as service:
        want = {turns: answer(service, LONG * turns, 12, owner="alone").ids() for turns in (1, 2)}
        settled = len(service._states.holdings.streams)
    with cases.service(policy, most=5, queue=64) as service:
        heard: list[tuple[Heard, int, bool]] = []
        for _ in range(24):
            turns, one = rng.choice((1, 2)), Heard()
            ticket = service.submit(job(LONG * turns, 12, owner=rng.choice("abc")), one)
            cancelled = rng.random() < 0.6
            heard.append((one, turns, cancelled))
            if cancelled:
                one.over.wait(rng.random() * 0.06)
                service.cancel(ticket)
                service.cancel(ticket)
        for one, turns, cancelled in heard:
            assert one.wait().error is None
            ids = one.ids()
            assert one.reason() == "cancelled" if len(ids) < len(want[turns]) else ids == want[turns]
            assert ids == want[turns][: len(ids)]
            assert cancelled or ids == want[turns]
        assert {one.reason() for one, _, _ in heard} > {"cancelled"}
        assert answer(service, LONG, 12, owner="alone").ids() == want[1]
        assert service.snapshot().errors == 0
    assert settled
    assert not service._states.holdings.streams


def test_a_closing_service_takes_nothing_more_and_lets_answers_end() -> None:
    held = Held(kvsieve.Full(), most=1)
    first = ask(held.service, job(ASKED, 6, **NEVER))
    assert held.at_turn.wait(30)
    waiting = ask(held.service, job(ASKED))
    closing = threading.Thread(target=held.service.close)
    closing.start()
    while held.service._closing is None:
        first.over.wait(0.001)
    with pytest.raises(ServiceClosedError):
        ask(held.service, job(ASKED))
    held.go()
    closing.join(60)
    assert isinstance(waiting.wait().error, ServiceClosedError)
    assert len(first.wait().ids()) == 6
    held.service.close()
    with pytest.raises(ServiceClosedError):
        ask(held.service, job(ASKED))


def test_without_grace_answers_are_cut_and_remembered(tmp_path: Any) -> None:
    held = Held(kvsieve.Full(), sessions=tmp_path)
    cut = ask(held.service, job(ASKED, 900, **NEVER))
    held.let(8)
    assert cut.started.wait(30)
    closing = threading.Thread(target=held.service.close, args=(0.0,))
    closing.start()
    while held.service._closing is None:
        cut.over.wait(0.001)
    held.go()
    closing.join(60)
    assert isinstance(cut.wait().error, ServiceClosedError)
    assert cut.ids()
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        later = answer(service, [*ASKED, ("assistant", cut.text()), *ASKED], 1)
        assert later.usage().cached >= len(rendered(ASKED)[0])


def test_a_service_is_started_once() -> None:
    service = cases.service(kvsieve.Full())
    with pytest.raises(ServiceClosedError, match="not started"):
        ask(service, job(ASKED))
    with service, pytest.raises(StateError, match="once"):
        service.start()
    with pytest.raises(StateError, match="once"):
        service.start()
    cases.service(kvsieve.Full()).close()


# ------------------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("where", ["feed", "attend", "complete", "end_turn", "fork"])
def test_a_request_that_fails_fails_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it went on from is as it was."""
    with cases.service(kvsieve.SirLLM(64, recent=8)) as service:
        first = answer(service, LONG)
        past = [*LONG, ("assistant", first.text()), *ASKED]
        want, other = answer(service, past, owner="bob").ids(), answer(service, ASKED, 30, owner="cat", **NEVER).ids()
        opened = service._states.open

        def fails(*_: Any, **__: Any) -> Any:
            raise MemoryError(f"no room in {where}")

        def opens(owner: str, text: str, *reach: int) -> Any:
            stream, state = opened(owner, text, *reach)
            if text.endswith("break it$\n<assistant>"):
                monkeypatch.setattr(stream if where in ("feed", "end_turn", "fork") else stream._engine, where, fails)
            return stream, state

        monkeypatch.setattr(service._states, "open", opens)
        beside = ask(service, job(ASKED, 30, owner="dan", **NEVER))
        broken = ask(service, job([*past, ("assistant", "no"), ("user", "now break it")], n=2, do_sample=True))
        assert isinstance(broken.wait().error, MemoryError)
        assert beside.wait().ids() == other
        monkeypatch.undo()
        assert answer(service, past).ids() == want
        assert service.snapshot().failed == 1
        assert service.snapshot().errors == 0


def test_an_error_of_the_loop_fails_what_runs_and_the_service_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.service(kvsieve.Full()) as service:
        want = answer(service, ASKED).ids()
        worker = service._worker

        def fails() -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(worker._batch, "step", fails)
        heard = [ask(service, job(ASKED, owner=name)) for name in "ab"]
        for one in heard:
            error = one.wait().error
            assert isinstance(error, ServiceError)
            assert str(error.__cause__) == "a bug"
        monkeypatch.undo()
        assert answer(service, ASKED).ids() == want
        assert service.snapshot().errors >= 1


@pytest.mark.parametrize("where", ["begin", "token", "end", "fail"])
def test_a_sink_that_raises_is_nobody_elses_concern(where: str) -> None:
    class Raises(Heard):
        pass

    def raises(*_: Any) -> None:
        raise OSError("the client is gone")

    gone = Raises()
    setattr(gone, where, raises)
    with cases.service(kvsieve.Full(), memory=1_000_000) as service:
        want = answer(service, ASKED, 20, **NEVER).ids()
        service.submit(job([("user", "too long " * 900)] if where == "fail" else ASKED, 20, owner="bob", **NEVER), gone)
        other = ask(service, job(ASKED, 20, owner="cat", **NEVER))
        assert other.wait().ids() == want
        assert answer(service, ASKED, 20, **NEVER).ids() == want
        assert service.snapshot().errors == 0


def test_many_threads_may_submit_and_cancel() -> None:
    policy = kvsieve.StreamingLLM(48)
    found: list[Any] = []

    def use(name: str, service: Service) -> None:
        past = list(ASKED)
        for turn in range(3):
            heard = answer(service, past, owner=name)
            service.cancel(service.submit(job(past, 50, owner=name, **NEVER), Heard()))
            past += [("assistant", heard.text()), ("user", f"turn {turn}")]
        found.append(past)

    with cases.service(policy) as service:
        threads = [threading.Thread(target=use, args=(name, service)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert service.snapshot().errors == 0
    assert len(found) == 4
    assert all(past == found[0] for past in found), "each has said the same to everybody"


def test_a_long_prompt_does_not_keep_short_ones_waiting_nor_they_it() -> None:
    """The fewest tokens left come first, and every fourth piece is the oldest's."""
    held, begun = Held(kvsieve.Full()), list[str]()

    class Notes(Heard):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def begin(self, usage: Any) -> None:
            begun.append(self.name)
            super().begin(usage)

    long = Notes("long")
    held.service.submit(job([("user", "a long story " * 14)], 1), long)
    assert held.at_turn.wait(30)
    short = [Notes(f"short {at}") for at in range(12)]
    for at, one in enumerate(short):
        held.service.submit(job(ASKED, 1, owner=f"{at}"), one)
    held.go()
    for one in (long, *short):
        assert one.wait().error is None
    assert begun[0] != "long"
    assert begun.index("long") < 12, "it comes before the last of those that came after it"
    held.service.close()


def test_conversations_wait_for_room_and_all_are_answered() -> None:
    """Each fits alone, and no two at a time."""
    with cases.service(kvsieve.Full()) as service:
        want = [answer(service, [("user", name * 420)], 6, owner=name, **NEVER).ids() for name in "abcd"]
    with cases.service(kvsieve.Full(), memory=600_000) as service:
        heard = [ask(service, job([("user", name * 420)], 6, owner=name, **NEVER)) for name in "abcd"]
        answered = [one.wait() for one in heard]
        assert [one.ids() for one in answered if one.error is None] == [
            ids for ids, one in zip(want, answered) if one.error is None
        ]
        assert sum(one.error is None for one in answered) >= 1
        assert answer(service, [("user", "d" * 420)], 6, owner="e", **NEVER).ids() == want[3]
        assert service.snapshot().errors == 0
