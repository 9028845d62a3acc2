"""What a service remembers: each answer is that of the library's own stream, and nothing is read twice that need not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvsieve
import pytest
import serve_cases as cases
import tiny
import torch
from kvsieve.errors import ServiceFullError, UnsupportedError
from kvsieve.serve.service import Service
from serve_cases import answer, ask, job, rendered, say, settled
from systems import SYSTEMS

SYSTEM = ("system", "you are kind and brief, and you know the sea")
ASKED = ("user", "what is it that lies behind the islands?")
LATER = ("user", "and who was there before us, do you know?")


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The tokens of every forward of a model, rows times columns."""
    found: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


def talk(service: Service, turns: int, new: int = 8, **more: Any) -> list[tuple[str, str]]:
    """A conversation of so many answers, its last answer included."""
    messages = [SYSTEM]
    for turn in range(turns):
        messages.append(("user", f"{turn}: tell me more of it, as much as you like"))
        messages.append(("assistant", answer(service, messages, new, **more).text()))
    return messages


# ------------------------------------------------------------------------------------------------------------------------- equality

NAMES = ["full", "streaming_llm", "sirllm", "snapkv", "h2o", "quest", "infllm", "refresh_kv", "think_quantized", "infllm_tiered"]


@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_that_of_a_stream_with_the_same_turns(name: str) -> None:
    """Three turns, in which the client sends everything again."""
    policy = SYSTEMS[name].make()
    with cases.service(policy) as service, kvsieve.stream(tiny.model(), policy, "cpu") as stream:
        messages, start = [SYSTEM], 0
        for turn in range(3):
            messages.append(("user", f"{turn}: tell me more of it, as much as you like" * (1 + turn % 2)))
            text = rendered(messages)[0]
            want, read = say(stream, messages, start)
            seen = len(text) - start
            heard = answer(service, messages)
            assert heard.ids() == want
            assert heard.usage().prompt + len(want) - (want[-1] == cases.END) == len(stream.ids[0])
            # What was said last and not read is read with the rest.
            assert heard.usage().read == seen + (turn > 0)
            assert heard.usage().resident == stream.stats().resident
            assert not heard.usage().read_again
            messages.append(("assistant", heard.text()))
            start = read


def test_sliding_layers_are_remembered_as_well() -> None:
    model, policy = tiny.model("gemma3"), kvsieve.SirLLM(64, recent=8)
    with cases.service(policy, model) as service, kvsieve.stream(model, policy, "cpu") as stream:
        messages, start = [SYSTEM], 0
        for _ in range(2):
            messages.append(ASKED)
            want, start = say(stream, messages, start)
            heard = answer(service, messages)
            assert heard.ids() == want
            messages.append(("assistant", heard.text()))


def test_sampling_by_seed_is_that_of_the_batch() -> None:
    options = {"do_sample": True, "temperature": 1.5, "seed": 7}
    with cases.service(kvsieve.Full()) as service, kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        text, ends, _ = rendered([ASKED])
        last, batch = cases.read(stream, text, 0, ends), kvsieve.Batch(tiny.model())
        want = batch.add(stream, last, max_new_tokens=8, eos_token_id=cases.END, **options)
        batch.run()
        assert answer(service, [ASKED], **options).ids() == want.ids.tolist()
        assert answer(service, [ASKED], **{**options, "seed": 8}).ids() != want.ids.tolist()


# ---------------------------------------------------------------------------------------------------------- one state, several ways


@pytest.mark.parametrize("name", ["full", "sirllm", "quest"])
def test_two_requests_on_one_state_at_the_same_time(name: str) -> None:
    policy = SYSTEMS[name].make()
    with cases.service(policy) as service:
        past = talk(service, 2)
        ways = [[*past, ASKED], [*past, LATER], [*past, ASKED]]
        together = [ask(service, job(way, 12)) for way in ways]
        found = [heard.wait().ids() for heard in together]
        assert all(heard.usage().cached > 100 for heard in together)
    for way, ids in zip(ways, found):
        with cases.service(policy) as service:
            assert talk(service, 2) == past
            assert answer(service, way, 12).ids() == ids


def test_an_edited_last_message_costs_that_message() -> None:
    with cases.service(kvsieve.Full()) as service:
        past = talk(service, 2)
        first = answer(service, [*past, ASKED])
        edited = answer(service, [*past, LATER])
        text = rendered([*past, LATER])[0]
        assert edited.usage().read == len(text) - len(rendered(past[:-1])[0]) - len(past[-1][1]) + 1
        assert edited.usage().read < first.usage().prompt / 3
        assert not edited.usage().read_again
        fresh = answer(service, [*past, LATER], owner="another")
        assert fresh.usage().cached == 0
        assert fresh.usage().read_again, "its answers were read as text"
        assert fresh.ids() == edited.ids()


def test_an_answer_that_is_asked_for_again_costs_the_words_before_it() -> None:
    with cases.service(kvsieve.SirLLM(64, recent=8)) as service:
        past = talk(service, 1)
        first = answer(service, [*past, ASKED])
        again = answer(service, [*past, ASKED])
        assert again.ids() == first.ids()
        assert again.usage().read == len("<assistant>")


def test_a_divergence_goes_on_from_the_nearest_moment_before_it() -> None:
    with cases.service(kvsieve.Full()) as service:
        past = talk(service, 4)
        changed = [*past[:4], ("assistant", "something else"), *past[5:], ASKED]
        found = answer(service, changed)
        # Moments deep inside are not remembered; that of the first message is.
        assert found.usage().cached == len(rendered([SYSTEM])[0]) - len("<assistant>")
        assert found.usage().read_again
        nearer = answer(service, [*past[:-1], ("assistant", "something else"), ASKED])
        assert nearer.usage().cached > found.usage().cached
        fresh = answer(service, changed, owner="another")
        assert fresh.usage().cached == 0
        assert fresh.ids() == found.ids()


def test_moments_inside_of_a_conversation_are_few() -> None:
    with cases.service(kvsieve.Full()) as service:
        talk(service, 3)
        few = settled(service).states
        talk(service, 9)
        assert settled(service).states <= few + 3
        assert service.snapshot().bytes_held > 0


def test_a_text_that_is_sent_back_whole_goes_on_where_it_ended() -> None:
    """As completions do: no messages, and the prompt ends where the answer did."""
    with cases.service(kvsieve.Full()) as service, kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        text = "the history of the sea is the history of those who crossed it"
        whole = stream.generate(cases.ids_of(text), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(text) :].tolist()
        first = answer(service, text, 5, eos_token_id=None)
        rest = answer(service, text + first.text(), 7, eos_token_id=None)
        assert first.ids() + rest.ids() == whole
        assert rest.usage().read == 1
        again = answer(service, text, 5, eos_token_id=None)
        assert again.ids() == first.ids()
        assert again.usage().cached == 0
        # Where an end token came, all of the text was read, and nothing is left that could tell the next token.
        ended = answer(service, text, 12, eos_token_id=whole[2], owner="bob")
        assert ended.reason() == "stop"
        said = text + ended.text()[:-1]
        assert answer(service, said, 3, owner="bob").ids() == answer(service, said, 3, owner="cat").ids()


def test_an_answer_that_is_no_text_is_not_remembered() -> None:
    """Half of a character cannot be sent back."""

    class Halves(cases.Letters):
        def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
            return "".join("\ufffd" if one > 100 else chr(one) for one in ids)

    with Service(tiny.model(), Halves(), kvsieve.Full(), memory=1 << 30, backend="cpu") as service:
        heard = answer(service, "once upon a time there was", 1, sequence_bias={(110,): 1000.0})
        assert heard.ids() == [110]
        assert settled(service).states == 0


# -------------------------------------------------------------------------------------------------------------------------- sharing


def test_a_first_message_is_read_once_for_all_conversations() -> None:
    model = tiny.fresh()
    with cases.service(kvsieve.StreamingLLM(96), model) as service, counted(model) as tokens:
        shared = len(rendered([SYSTEM])[0]) - len("<assistant>")
        heard = [ask(service, job([SYSTEM, ("user", f"{name}: what is behind the islands?")], 1)) for name in "abcdef"]
        prompt = [one.wait().usage() for one in heard]
        assert sum(one.read for one in prompt) == sum(tokens)
        # Those that come at once begin before the first one has read it.
        assert [one.cached for one in prompt].count(shared) >= len(heard) - 1
        assert answer(service, [SYSTEM, ASKED], 1).usage().cached == shared


def test_nothing_of_one_owner_is_ever_used_for_another() -> None:
    model = tiny.fresh()
    with cases.service(kvsieve.Full(), model) as service:
        past = talk(service, 2)
        with counted(model) as tokens:
            mine = answer(service, [*past, ASKED], owner="ada")
            few = sum(tokens)
            tokens.clear()
            theirs = answer(service, [*past, ASKED], owner="bob")
            many = sum(tokens)
            tokens.clear()
            answer(service, [*past, ASKED], owner="public")
            assert sum(tokens) == many, "not even the name of what is everybody's"
        assert theirs.usage().cached == 0
        assert many == len(rendered([*past, ASKED])[0]) + len(theirs.ids()) - 1
        assert few < many / 2
        assert theirs.ids() == mine.ids()


def test_public_texts_are_everybodys_and_are_read_at_the_start() -> None:
    model, text = tiny.fresh(), rendered([SYSTEM])[0].removesuffix("<assistant>")
    service = cases.service(kvsieve.SirLLM(64, recent=8), model, public=[text])
    with counted(model) as tokens:
        service.start()
        assert sum(tokens) == len(text)
        for name in ("ada", "bob"):
            assert answer(service, [SYSTEM, ASKED], owner=name).usage().cached == len(text)
    service.close()


def test_a_service_that_cannot_start_gives_everything_back() -> None:
    model, text = tiny.fresh(), rendered([SYSTEM])[0]
    service = cases.service(kvsieve.Full(), model, memory=1000, public=[text])
    with pytest.raises(ServiceFullError, match="public"):
        service.start()
    assert not service._states.holdings.streams
    assert not model._forward_hooks
    assert not service.alive


def test_several_answers_read_a_prompt_once() -> None:
    model = tiny.fresh()
    options = {"do_sample": True, "temperature": 2.0}
    with cases.service(kvsieve.SirLLM(64, recent=8), model) as service, counted(model) as tokens:
        text = rendered([ASKED])[0]
        heard = answer(service, [ASKED], 6, n=3, seed=5, **options)
        # The last token of a prompt is read with the first forward of all answers, each with its own.
        assert sum(tokens) == len(text) - 1 + 3 * 6 - sum(len(heard.ids(at)) < 6 for at in range(3))
        alone = [answer(service, [ASKED], 6, seed=5 + at, owner="bob", **options).ids() for at in range(3)]
        assert [heard.ids(at) for at in range(3)] == alone
        assert len({tuple(ids) for ids in alone}) == 3
        assert {heard.usage(at).read for at in range(3)} == {len(text)}
        for at in range(3):
            later = answer(service, [ASKED, ("assistant", heard.text(at)), LATER])
            assert later.usage().cached >= len(text) + len(heard.text(at)) - 1


def test_a_policy_with_a_bank_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="bank"):
        cases.service(SYSTEMS["memory_bank"].make())
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        assert stream.generate(tiny.ids(1, 3), max_new_tokens=1).shape == (1, 4)


# --------------------------------------------------------------------------------------------------------------------------- budget


def allocated(service: Service) -> int:
    """Bytes by the allocators of all streams that are open, each once."""
    stores = {id(one._engine.stores): one._engine.stores for one in service._states.holdings.streams}
    return sum(store.bytes_held for of_family in stores.values() for store in of_family.values())


def test_the_byte_budget_holds_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve conversations where three fit: memory is really given back, and each goes on as if it had never left."""
    policy, memory, most = kvsieve.Full(), 500_000, [0]
    with cases.service(policy, memory=memory) as service:
        step = service._worker.turn

        def turn() -> None:
            step()
            most[0] = max(most[0], allocated(service))
            assert service._states.holdings.bytes_held == allocated(service)
            assert not service._worker.works or service.snapshot().bytes_held <= memory

        monkeypatch.setattr(service._worker, "turn", turn)
        pasts: list[list[tuple[str, str]]] = [[("user", f"{name} " * 45)] for name in "abcdefghijkl"]
        for _ in range(2):
            heard = [ask(service, job(past)) for past in pasts]
            for past, one in zip(pasts, heard):
                assert one.wait().error is None
                past += [("assistant", one.text()), ("user", "and then?")]
        found = settled(service)
        assert memory / 2 < most[0] <= memory
        assert found.dropped > 6
        assert found.errors == 0
    with cases.service(policy) as roomy:
        for past in pasts[::5]:
            assert answer(roomy, past[:-3][:1]).text() == past[1][1]


def test_bytes_of_shared_blocks_count_once() -> None:
    with cases.service(kvsieve.Full()) as service:
        long = ("system", "a long text " * 60)
        answer(service, [long, ASKED], 1)
        one = settled(service).bytes_held
        for at in range(8):
            answer(service, [long, ("user", f"{at}{at}{at}")], 1)
        assert settled(service).states > 8
        # A block of its own for each, and not the text.
        token = service._states.holdings.bytes_per_token
        assert service.snapshot().bytes_held - one <= 8 * 2 * 64 * token
        assert one > 700 * token


def test_a_conversation_that_does_not_fit_fails_alone() -> None:
    with cases.service(kvsieve.Full(), memory=300_000) as service:
        small = ask(service, job([ASKED], 40, eos_token_id=None))
        large = ask(service, job([("user", "a very long text " * 60)]))
        assert isinstance(large.wait().error, ServiceFullError)
        assert len(small.wait().ids()) == 40
        assert small.error is None
        assert answer(service, [ASKED], 4).reason() == "length"
        # One that grows beyond it while it answers.
        grows = ask(service, job([("user", "long " * 60)], 3000, eos_token_id=None))
        assert isinstance(grows.wait().error, ServiceFullError)
        assert grows.ids()
        assert answer(service, [LATER], 4).error is None
        assert settled(service).bytes_held <= 300_000


def test_everything_is_given_back_at_the_end() -> None:
    model = tiny.fresh()
    with cases.service(kvsieve.Full(), model) as service:
        talk(service, 2)
        holdings = service._states.holdings
        assert model._forward_hooks
    assert not holdings.streams
    assert holdings.bytes_held == 0
    assert not model._forward_hooks
    assert torch.equal(model(cases.ids_of("abc")).logits, tiny.fresh()(cases.ids_of("abc")).logits)
