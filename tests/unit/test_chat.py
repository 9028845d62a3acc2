"""`kvsieve chat`: the model reads what a template would render, and whatever goes wrong leaves the conversation as it was."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import kvsieve
import pytest
import tiny
import torch
from kvsieve.chat import Chat, talk
from kvsieve.cli import main
from kvsieve.errors import ArgumentError, StateError

MOST = 6


class Templated:
    """A token a letter, and a letter a token; messages stand between marks as in ChatML, after a system message of its own."""

    chat_template = "as below"
    all_special_ids: tuple[int, ...] = ()
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(tiny.VOCAB)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        assert not add_special_tokens, "the template writes them"
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(chr(int(one)) for one in torch.as_tensor(ids).reshape(-1))

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        told = messages if messages[0]["role"] == "system" else [{"role": "system", "content": "be kind"}, *messages]
        return "".join(f"<{one['role']}>{one['content']}$\n" for one in told) + "<assistant>" * add_generation_prompt


END = ord("$")


@pytest.fixture(params=["full()", "streamingllm(96)", "sirllm(96)"])
def chat(request: pytest.FixtureRequest) -> Iterator[Chat]:
    """A chat with a model that has a token for the end of a message."""
    model = tiny.model()
    stream = kvsieve.stream(model, kvsieve.methods.parse(request.param))
    made = Chat(stream, Templated(), max_new_tokens=MOST, do_sample=False, eos_token_id=END)
    yield made
    made.stream.close()


def told(chat: Chat) -> str:
    return Templated().decode(chat.stream.ids[0])


def say(chat: Chat, said: str) -> str:
    return chat.say(said, io.StringIO())


def test_what_is_read_is_what_the_template_renders(chat: Chat) -> None:
    messages: list[dict[str, str]] = []
    for said in ("Who are you?", "And then?", "Why?"):
        answer = say(chat, said)
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        rendered = Templated().apply_chat_template(messages, False, False)
        assert rendered.startswith(told(chat))
        assert rendered.removeprefix(told(chat)) in ("$\n", "\n"), "only the end of the answer is not read yet"
    assert [turn.said for turn in chat.turns] == ["Who are you?", "And then?", "Why?"]
    assert [turn.stop for turn in chat.turns[:-1]] == [turn.start for turn in chat.turns[1:]]
    assert chat.turns[-1].stop == len(chat.stream.ids[0])


def test_an_answer_that_ended_is_not_ended_twice(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    say(chat, "Who?")
    ids = torch.tensor([[END]])
    chat.stream.feed(ids)  # as if the model had said it
    monkeypatch.setattr(chat.stream.model.generation_config, "eos_token_id", [END])
    say(chat, "And?")
    assert "$$" not in told(chat)


def test_the_answer_is_that_of_the_whole_conversation() -> None:
    """Under the full cache: the stock model, given all that was rendered."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        chat = Chat(stream, Templated(), max_new_tokens=MOST, do_sample=False)
        first, second = say(chat, "Who are you?"), say(chat, "And then?")
    messages = [{"role": "user", "content": "Who are you?"}]
    for answer, said in ((first, "And then?"), (second, None)):
        ids = torch.tensor([[ord(letter) for letter in Templated().apply_chat_template(messages, False, True)]])
        wanted = model.generate(ids, max_new_tokens=MOST, do_sample=False)
        assert answer == Templated().decode(wanted[0, ids.shape[1] :])
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": str(said)}]


def test_regenerate_is_the_turn_as_it_was(chat: Chat) -> None:
    with pytest.raises(StateError, match="no message to answer again"):
        chat.regenerate()
    say(chat, "Who are you?")
    second = say(chat, "And then?")
    before, turns = told(chat), list(chat.turns)
    assert chat.regenerate(io.StringIO()) == second
    assert told(chat) == before
    assert chat.turns == turns


def test_what_was_forgotten_stays_so_when_the_answer_is_made_again(chat: Chat) -> None:
    say(chat, "Who are you?")
    say(chat, "And then?")
    turn = chat.turn("1")
    chat.change("evict", "1")
    chat.regenerate(io.StringIO())
    assert not any(turn.start <= at < turn.stop for at in chat.stream.kept()[0].positions)
    chat.change("pin", "2")
    assert chat.stream.pins == [[(chat.turn("2").start, chat.stream.seen)]]
    chat.change("unpin", "2")
    assert chat.stream.pins == [[]]


def test_a_system_prompt_is_pinned_and_no_turn() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64)) as stream:
        chat = Chat(stream, Templated(), system="speak in rhymes", max_new_tokens=MOST, do_sample=False)
        for number in range(6):
            say(chat, f"question {number}")
        assert told(chat).startswith("<system>speak in rhymes$\n<user>question 0")
        [[(start, stop)]] = stream.pins
        assert (start, stop) == (0, chat.turns[0].start)
        assert set(range(stop)) <= set(stream.kept()[0].positions.tolist())
        assert Templated().decode(stream.ids[0][start:stop]) == "<system>speak in rhymes$\n<user>"


class Interrupted:
    """The model's forwards, of which one is interrupted."""

    def __init__(self, model: Any, at: int) -> None:
        self.left, self.model = at, model

    def __enter__(self) -> None:
        self.handle = self.model.register_forward_pre_hook(self.count)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def count(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_answer_stays_as_far_as_it_came(chat: Chat) -> None:
    whole = say(chat, "Who are you?")
    chat.stream.reset()
    chat.turns.clear()
    with Interrupted(chat.stream.model, 5):  # the opening, the message, and so three tokens
        cut = say(chat, "Who are you?")
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)
    assert told(chat).endswith(f"Who are you?$\n<assistant>{cut}")
    say(chat, "And then?")
    assert f"<assistant>{cut}$\n<user>And then?$\n<assistant>" in told(chat)


@pytest.mark.parametrize("first", [True, False])
def test_a_message_that_is_interrupted_or_refused_is_forgotten(chat: Chat, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not first:
        say(chat, "Who are you?")
    before, turns = [row.tolist() for row in chat.stream.ids], list(chat.turns)
    kept = [row.positions.tolist() for row in chat.stream.kept()]
    with Interrupted(chat.stream.model, 1), pytest.raises(KeyboardInterrupt):
        say(chat, "And then?")
    monkeypatch.setitem(chat._options, "num_beams", -1)
    with pytest.raises(ValueError, match="num_beams"):
        say(chat, "And then?")
    assert [row.tolist() for row in chat.stream.ids] == before
    assert [row.positions.tolist() for row in chat.stream.kept()] == kept
    assert chat.turns == turns


class Lines:
    """What a user types."""

    def __init__(self, *lines: str) -> None:
        self.left = list(lines)

    def __call__(self, prompt: str) -> str:
        if not self.left:
            raise EOFError
        return self.left.pop(0)


def test_commands(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, text = tmp_path / "chat.safetensors", tmp_path / "text.txt"
    text.write_text("A document of some words.")
    lines = Lines(
        "Who?", "", f"/save {saved}", f"/read {text}", "/turns", "/forget 2", "/stats", "/help", f"/load {saved}", "/turns"
    )
    talk(chat, lines)
    printed = capsys.readouterr()
    assert not printed.err
    assert "A document of some words." in printed.out
    assert f"saved in {saved}" in printed.out
    assert "of which 0 are pinned" in printed.out
    assert "(what chat.safetensors holds)" in printed.out.splitlines()[-1]
    assert told(chat).count("<user>") == 1, "the document came after the file was written"
    say(chat, "And then?")
    assert told(chat).count("<user>") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nonsense", "no command /nonsense"),
        ("/save", "name a file"),
        ("/load no-such-file", "no-such-file"),
        ("/read no-such-file", "no-such-file"),
        ("/pin", "none yet"),
        ("/forget two", "none yet"),
        ("/pin \N{SUPERSCRIPT TWO}", "none yet"),
        ("/save ~no-such-user-here/x", "no-such-user-here"),
        ("/regenerate", "no message to answer again"),
    ],
)
def test_a_mistake_is_a_line_and_the_chat_goes_on(chat: Chat, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    talk(chat, Lines(line, "/turns"))
    assert said in capsys.readouterr().err
    assert not chat.stream.seen


def test_whatever_goes_wrong_the_chat_goes_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory, say. And a line that is no text."""
    say(chat, "Who?")
    before = told(chat)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    class Typed(Lines):
        def __call__(self, prompt: str) -> str:
            line = super().__call__(prompt)
            if line == "broken":
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return line

    monkeypatch.setattr(chat.stream, "generate", fails)
    talk(chat, Typed("broken", "And then?", "/turns"))
    printed = capsys.readouterr()
    assert "this line is not text" in printed.err
    assert "RuntimeError: CUDA out of memory" in printed.err
    assert "Who?" in printed.out
    assert told(chat) == before


def test_a_session_of_several_rows_is_no_chat(chat: Chat, tmp_path: Path) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(2, 5))
        stream.save(tmp_path / "two")
    with pytest.raises(ArgumentError, match="2 conversations"):
        chat.load(tmp_path / "two")
    assert say(chat, "Who?")


def test_a_model_that_is_no_chat_model_is_refused() -> None:
    class Asis(Templated):
        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
            return super().apply_chat_template(messages, tokenize, add_generation_prompt).upper()

    class Angry(Templated):
        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
            if messages[0]["role"] == "system":
                raise ValueError("no system role")
            return super().apply_chat_template(messages, tokenize, add_generation_prompt)

    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        with pytest.raises(ArgumentError, match="no chat template"):
            Chat(stream, object())
        with pytest.raises(ArgumentError, match="does not write messages as they are"):
            Chat(stream, Asis())
        with pytest.raises(ArgumentError, match=r"refuses messages of system, user: no system role"):
            Chat(stream, Angry(), system="be kind")
        Chat(stream, Angry())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(), Templated()))

    def run(*arguments: str, lines: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr("kvsieve.chat.talk", lambda chat: talk(chat, Lines(*lines)))
        return main(["chat", *arguments])

    return run


def test_the_command(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "chat.safetensors"
    options = ("--max-new-tokens", "4", "--temperature", "0", "--policy", "streamingllm(96)")
    assert command(*options, "--system", "be brief", lines=("Who are you?", f"/save {saved}", "/quit", "never read")) == 0
    first = capsys.readouterr().out
    assert "of 0.0 MiB" in first
    assert command(*options, "--load", str(saved), lines=("/turns",)) == 0
    assert "(what chat.safetensors holds)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "--temperature must be from 0 to 100"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--temperature", "0", "--top-p", "0.5"], "leave one of them out"),
        (["--load", "no-such-file"], "no-such-file"),
        (["--load", "x", "--system", "y"], "leave one of them out"),
        (["--policy", "nothing(3)"], "nothing"),
    ],
)
def test_wrong_arguments(command: Callable[..., int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]
