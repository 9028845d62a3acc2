"""`kvsieve chat`: a conversation on the terminal whose memory does not grow.

Each turn reads what is new and nothing else: the tokenizer's chat template is asked for the text between the last answer and the
next one, so that the model sees what it would see if the whole conversation were rendered.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from kvsieve.arguments import MODEL, POLICIES, add_machine, add_speed, need_torch, positive
from kvsieve.errors import ArgumentError, KvsieveError, StateError

if TYPE_CHECKING:
    import torch

    from kvsieve.streams import Mark, Stream

__all__ = ["Chat", "Turn", "add_chat"]

SAID, ASKED = "kvsieve-said", "kvsieve-asked"
"""Stand for an answer and for a message where a template is asked what stands around them."""

HELP = """\
/save FILE      write the memory to a session file
/load FILE      go on from one; its policy is that of the file
/read FILE      read a text file as a message, without an answer
/regenerate     answer the last message again
/turns          what was said, with the numbers of the turns
/pin N          turn N is never evicted; /unpin N takes that back
/forget N       remove turn N from the memory
/stats          what is held
/help           this list
/quit           end; so does Ctrl-D. Ctrl-C ends an answer only"""

CHANGES: dict[str, Literal["pin", "unpin", "evict"]] = {"/pin": "pin", "/unpin": "unpin", "/forget": "evict"}


@dataclass(frozen=True)
class Turn:
    """A message and its answer: tokens ``start`` to ``stop - 1`` of the stream."""

    said: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Asked:
    """A message that can be answered again: the moment before it, and what was changed by name since."""

    mark: Mark
    said: str
    turns: int
    changes: list[tuple[str, int, int]]


class Chat:
    """A conversation of one stream.

    Args:
        stream: of one sequence; it may have a past.
        tokenizer: of the model; its chat template is used where it has one.
        system: what the model is told before the first message; never evicted.
        options: for ``generate``.

    Attributes:
        stream: the memory; another one after :meth:`load`.
        turns: messages and answers that this chat has seen.

    Raises:
        ArgumentError: for a tokenizer without a chat template, or with one that does not write messages as they are.
    """

    def __init__(
        self, stream: Stream, tokenizer: Any, *, system: str | None = None, backend: str | None = None, **options: Any
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ArgumentError("this model's tokenizer has no chat template; kvsieve generate continues a text")
        self.stream, self.turns = stream, list[Turn]()
        self._tokenizer, self._system, self._backend, self._options = tokenizer, system, backend, options
        self._last: _Asked | None = None
        self._rendered(self._first, 0)
        self._rendered(self._later, 1)

    # ------------------------------------------------------------------------------------------------------------ what is read

    @property
    def _first(self) -> list[dict[str, str]]:
        """Messages of a conversation up to its first question."""
        told = [{"role": "system", "content": self._system}] if self._system is not None else []
        return [*told, {"role": "user", "content": ASKED}]

    @property
    def _later(self) -> list[dict[str, str]]:
        """Messages of a conversation up to its second question, after the answer :data:`SAID`."""
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}, {"role": "user", "content": ASKED}]

    def _rendered(self, messages: list[dict[str, str]], answers: int) -> tuple[str, str]:
        """What the template puts before the question, after the answer if there is one; and what between it and the next answer.

        Raises:
            ArgumentError: for a template that does not render these messages as they are.
        """
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, and raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise ArgumentError(f"the tokenizer's chat template refuses messages of {roles}: {error}") from error
        before, _, after = text.partition(ASKED)
        if (text.count(ASKED), text.count(SAID)) != (1, answers) or SAID in after:
            raise ArgumentError("the tokenizer's chat template does not write messages as they are; chat with another model")
        return before.rpartition(SAID)[2], after

    def _ids(self, text: str) -> torch.Tensor:
        """``text``, int64 ``[1, n]``, without what the tokenizer puts before a text: the template writes that itself."""
        import torch

        device = next(self.stream.model.parameters()).device
        return torch.tensor([self._tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long, device=device)

    def _message(self, said: str, *, answered: bool) -> torch.Tensor:
        """The new tokens of a turn, int64 ``[1, n]``. What stands before the first one is read, and pinned if it was asked for."""
        if self.stream.seen:
            before, after = self._rendered(self._later, 1)
            before = before.removeprefix(self._ended())
        else:
            before, after = self._rendered(self._first, 0)
            if (opening := self._ids(before)).shape[1]:
                self.stream.feed(opening, pin=self._system is not None)
                before = ""
        return self._ids(before + said + (after if answered else ""))

    def _ended(self) -> str:
        """The text of the token that ended the last answer, which the template writes as well; empty where it was cut."""
        last = int(self.stream.ids[0][-1])
        ends = getattr(self.stream.model.generation_config, "eos_token_id", None)
        return str(self._tokenizer.decode([last])) if last in (ends if isinstance(ends, list) else [ends]) else ""

    # ---------------------------------------------------------------------------------------------------------------- what is done

    def say(self, said: str, out: TextIO | None = None) -> str:
        """Reads a message, and prints the answer as it comes; returns it. Ctrl-C ends the answer; what was said by then stays.

        Raises:
            KeyboardInterrupt: before the answer began; the message is then forgotten, as after any other error.
        """
        asked = _Asked(self.stream.mark(), said, len(self.turns), [])
        answer = self._answer(asked, out)
        self._last = asked
        return answer

    def regenerate(self, out: TextIO | None = None) -> str:
        """Answers the last message again. What was pinned or forgotten of earlier turns since stays so.

        Raises:
            StateError: if there is none.
        """
        asked = self._last
        if asked is None:
            raise StateError("there is no message to answer again")
        now, turns = self.stream.mark(), self.turns
        self.stream.rewind(asked.mark)
        try:
            before = [(change, start, stop) for change, start, stop in asked.changes if start < self.stream.seen]
            for change, start, stop in before:
                getattr(self.stream, change)(start, min(stop, self.stream.seen))
            self.turns = self.turns[: asked.turns]
            answer = self._answer(asked, out)
            for change, start, stop in before:  # the token that was said last before the message was read by it
                getattr(self.stream, change)(start, stop)
            return answer
        except BaseException:
            self.stream.rewind(now)
            self.turns = turns
            raise

    def change(self, what: Literal["pin", "unpin", "evict"], number: str) -> None:
        """Pins turn ``number``, unpins it, or removes it from the memory; raises as the stream's calls do.

        Raises:
            ArgumentError: if there is no such turn.
        """
        turn = self.turn(number)
        stop = min(turn.stop, self.stream.seen)  # the token that was said last is not read yet
        getattr(self.stream, what)(turn.start, stop)
        if self._last is not None:
            self._last.changes.append((what, turn.start, stop))

    def _answer(self, asked: _Asked, out: TextIO | None) -> str:
        from kvsieve.view.typist import print_while_generating

        start, read = 0, None
        try:
            ids = self._message(asked.said, answered=True)
            start = self._length()
            read = start + ids.shape[1]
            answer = print_while_generating(
                self.stream, self._tokenizer, ids, out=out, greedy=False, end_turn=False, **self._options
            )
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) or read is None or self._length() <= read:
                self.stream.rewind(asked.mark)
                raise
            print(file=sys.stdout if out is None else out)
            answer = str(self._tokenizer.decode(self.stream.ids[0][read:], skip_special_tokens=True))
        self.turns.append(Turn(asked.said, start, self._length()))
        self.stream.end_turn()
        return answer

    def read(self, text: str) -> int:
        """Reads a message that asks for no answer; returns its tokens. One that is interrupted is forgotten."""
        mark = self.stream.mark()
        try:
            ids = self._message(text, answered=False)
            start = self._length()
            self.stream.feed(ids)
        except BaseException:
            self.stream.rewind(mark)
            raise
        self.turns.append(Turn(text, start, self._length()))
        self._last = None
        self.stream.end_turn()
        return int(ids.shape[1])

    def turn(self, number: str) -> Turn:
        """Turn ``number``, from 1 on.

        Raises:
            ArgumentError: if there is none.
        """
        if not number.isdecimal() or not 1 <= int(number) <= len(self.turns):
            known = f"1 to {len(self.turns)}" if self.turns else "none yet"
            raise ArgumentError(f"name a turn by its number, {known}; /turns lists them")
        return self.turns[int(number) - 1]

    def save(self, path: Path) -> None:
        """Writes the memory; raises as :meth:`kvsieve.Stream.save`."""
        self.stream.save(path, tokenizer=self._tokenizer)

    def load(self, path: Path) -> None:
        """Goes on from a session file; after an error from where it was. Raises as :func:`kvsieve.load`."""
        import kvsieve

        found = kvsieve.load(path, self.stream.model, backend=self._backend, tokenizer=self._tokenizer)
        if len(found.ids) > 1:
            found.close()
            raise ArgumentError(f"{path} holds {len(found.ids)} conversations side by side; a chat is one")
        self.stream.close()
        self.stream, self._last = found, None
        self.turns = [Turn(f"(what {path.name} holds)", 0, self._length())] if found.seen else []

    def _length(self) -> int:
        """Tokens of the conversation, one that was said and not read yet among them."""
        ids = self.stream.ids
        return len(ids[0]) if ids else 0


# --------------------------------------------------------------------------------------------------------------------- the terminal


def add_chat(commands: Any) -> None:
    """Adds the command to those of ``commands``, what `argparse` calls its subparsers."""
    chat = commands.add_parser("chat", help="talk to a model whose memory has a budget")
    chat.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    chat.add_argument("--policy", default="sirllm(1024)", help=f'default: "sirllm(1024)"; {POLICIES}')
    chat.add_argument("--system", help="what the model is told first, and never forgets")
    chat.add_argument("--load", type=Path, help="go on from this session file; its policy is that of the file")
    chat.add_argument("--max-new-tokens", type=positive, default=512, help="most tokens of an answer; default: 512")
    chat.add_argument("--temperature", type=float, help="0 takes the most probable token; default: as the model's settings say")
    chat.add_argument("--top-p", type=float, help="sample among the most probable tokens of this share; default: as the model's")
    chat.add_argument("--seed", type=int, help="of the sampling; default: another one each time")
    add_machine(chat, dtype_help="default: float32")
    add_speed(chat)
    chat.set_defaults(run=_run)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is asked for.

    Raises:
        ArgumentError: for a temperature or share that is none.
    """
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature is not None:
        if not 0 <= arguments.temperature <= 100:
            raise ArgumentError(f"--temperature must be from 0 to 100, got {arguments.temperature}")
        options |= {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    if arguments.top_p is not None:
        if not 0 < arguments.top_p <= 1:
            raise ArgumentError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
        options |= {"do_sample": True, "top_p": arguments.top_p}
        if arguments.temperature == 0:
            raise ArgumentError("--top-p samples, and --temperature 0 does not; leave one of them out")
    return options


def _run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    if arguments.load is not None and arguments.system is not None:
        raise ArgumentError("--system comes before the first message, and --load goes on after it; leave one of them out")
    need_torch(arguments.threads)
    import torch

    import kvsieve
    from kvsieve.loading import check_asked, load_asked

    policy = kvsieve.methods.parse(arguments.policy)
    check_asked(arguments)
    model, tokenizer = load_asked(arguments)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    stream = kvsieve.stream(model, policy, backend=arguments.backend)
    try:
        chat = Chat(stream, tokenizer, system=arguments.system, backend=arguments.backend, **options)
    except BaseException:
        stream.close()
        raise
    try:
        if arguments.load is not None:
            chat.load(arguments.load)
        talk(chat)
    finally:
        chat.stream.close()
    return 0


def talk(chat: Chat, ask: Callable[[str], str] = input) -> None:
    """Messages and commands line by line, until the end of the input or `/quit`. Nothing that goes wrong ends it."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # history and editing of the line
        print(f"{chat.stream.policy!r}. /help lists commands; Ctrl-C ends an answer, Ctrl-D the chat.")
    for line in _lines(ask):
        name, _, rest = line.strip().partition(" ")
        try:
            if name == "/quit":
                return
            _do(chat, line.strip(), name, rest.strip())
        except KeyboardInterrupt:
            print("\n(interrupted)")
        except (KvsieveError, OSError) as error:
            print(f"kvsieve: {error}", file=sys.stderr)
        except Exception as error:  # out of memory on a GPU, a template: the conversation is worth more than the trace
            print(f"kvsieve: {type(error).__name__}: {error}", file=sys.stderr)


def _lines(ask: Callable[[str], str]) -> Iterator[str]:
    while True:
        try:
            line = ask("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends the chat)")
            continue
        except UnicodeDecodeError as error:
            print(f"kvsieve: this line is not text: {error}", file=sys.stderr)
            continue
        except EOFError:
            return
        if line.strip():
            yield line


def _do(chat: Chat, line: str, name: str, rest: str) -> None:
    """One line of the user."""
    if name == "/regenerate":
        _timed(chat, chat.regenerate)
    elif name == "/save":
        chat.save(_path(rest))
        print(f"saved in {rest}")
    elif name == "/load":
        chat.load(_path(rest))
        print(f"{chat.stream.policy!r}, {chat.stream.seen:,} tokens seen")
    elif name == "/read":
        count = chat.read(_path(rest).read_text(encoding="utf-8", errors="replace"))
        print(f"{count:,} tokens read; {_held(chat)}")
    elif name == "/turns":
        for number, turn in enumerate(chat.turns, 1):
            said = " ".join(turn.said.split())
            print(f"{number:4}  {turn.stop - turn.start:6,} tokens  {said[:60]}")
    elif name in CHANGES:
        chat.change(CHANGES[name], rest)
        print(_held(chat))
    elif name == "/stats":
        print(_stats(chat))
    elif name == "/help":
        print(HELP)
    elif name.startswith("/"):
        raise ArgumentError(f"there is no command {name}; /help lists them")
    else:
        _timed(chat, lambda: chat.say(line))


def _path(text: str) -> Path:
    if not text:
        raise ArgumentError("name a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"cannot find {text}: {error}") from error


def _timed(chat: Chat, answer: Callable[[], str]) -> None:
    began = time.perf_counter()
    answer()
    turn, seconds = chat.turns[-1], max(time.perf_counter() - began, 1e-9)
    print(f"[{_held(chat)}; {(turn.stop - turn.start) / seconds:.1f} tokens a second, read and written]")


def _held(chat: Chat) -> str:
    """What is held, in a line."""
    stats = chat.stream.stats()
    return (
        f"{stats.seen:,} tokens seen, {stats.resident:,} held: {stats.bytes_held / 2**20:.1f} of {stats.bytes_full / 2**20:.1f} MiB"
    )


def _stats(chat: Chat) -> str:
    """What is held, line by line."""
    stats, pins = chat.stream.stats(), chat.stream.pins
    pinned = sum(stop - start for row in pins for start, stop in row)
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in asdict(stats.parts).items() if size)
    lines = [
        ("policy", f"{stats.policy} on {stats.backend}"),
        ("tokens seen", f"{stats.seen:,}"),
        ("held", f"{stats.resident:,}, of which {pinned:,} are pinned"),
        ("MiB held", f"{stats.bytes_held / 2**20:.1f}: {parts or 'nothing'}"),
        ("a full cache", f"{stats.bytes_full / 2**20:.1f} MiB"),
    ]
    return "\n".join(f"{name:14}{value}" for name, value in lines)
