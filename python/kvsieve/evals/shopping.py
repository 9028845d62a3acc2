"""A shopping list, seventeen turns of small talk, and the question what was on the list.

The items are named once, early. Whether the memory still knows them is measured twice, before the last question:
*retention*, the share of the items' tokens that are still resident, and *recall*, whether the right item is the most
likely of a handful from the same category (mean log-probability per token, scored on forks, so that the dialogue's own
stream is never touched). The task follows the idea of SirLLM's grocery shopping task (Yao et al. 2024,
arXiv:2405.12528) with text of our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.evals.shopping_text import FILLERS, ITEMS
from kvsieve.model.support import cache_name

__all__ = [
    "Answer",
    "Dialogue",
    "EncodedTurn",
    "Outcome",
    "Question",
    "Turn",
    "encode_turn",
    "make_dialogue",
    "make_dialogues",
    "run_dialogue",
]


@dataclass(frozen=True)
class Turn:
    """One exchange; `items` are the substrings of `user` that will be asked for later."""

    user: str
    assistant: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A recall question: what the user asks, how the answer begins, and which option completes it."""

    user: str
    opening: str
    options: tuple[str, ...]
    truth: int


@dataclass(frozen=True)
class Dialogue:
    """A scripted conversation and the questions about its list."""

    seed: int
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class EncodedTurn:
    """Token ids `[n]` of one rendered turn, and the indices into them that spell a shopping item."""

    ids: tuple[int, ...]
    item_indices: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """How one question went: mean log-probability (nats a token) of each option, and the true option's index."""

    options: tuple[str, ...]
    scores: tuple[float, ...]
    truth: int

    @property
    def correct(self) -> bool:
        """Whether the true option scored best."""
        return int(np.argmax(self.scores)) == self.truth


@dataclass(frozen=True)
class Outcome:
    """One dialogue through one memory.

    `ids` are all tokens `[n]` before the questions, `kept` the resident positions, `scores` their scores (nan where
    the policy has none), `item_positions` the positions that spell the items.
    """

    seed: int
    ids: tuple[int, ...]
    item_positions: tuple[int, ...]
    kept: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    answers: tuple[Answer, ...]

    @property
    def retention(self) -> float:
        """Share of the items' tokens that were resident before the questions, 0 to 1."""
        return float(np.isin(self.item_positions, self.kept).mean())

    @property
    def recall(self) -> float:
        """Share of the questions answered correctly, 0 to 1."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)


def make_dialogue(seed: int, *, num_items: int = 2, num_fillers: int = 17, num_options: int = 5) -> Dialogue:
    """A dialogue that depends on `seed` and the counts only.

    Raises `ValueError` if there are not that many categories, fillers or items of one category.
    """
    if not (1 <= num_items <= len(ITEMS) and 0 <= num_fillers <= len(FILLERS)):
        raise ValueError(f"num_items must be 1 to {len(ITEMS)} and num_fillers 0 to {len(FILLERS)}")
    if not 2 <= num_options <= min(map(len, ITEMS.values())):
        raise ValueError(f"num_options must be 2 to {min(map(len, ITEMS.values()))}, got {num_options}")
    rng = random.Random(seed)
    categories = rng.sample(sorted(ITEMS), num_items)
    questions, items = [], []
    for category in categories:
        options = rng.sample(ITEMS[category], num_options)
        truth = rng.randrange(num_options)
        items.append(options[truth])
        questions.append(
            Question(
                user="Please read out my shopping list.",
                opening=f"Here is your shopping list:\n- {category}:",
                options=tuple(options),
                truth=truth,
            )
        )
    small_talk = [Turn(question, answer) for question, answer in rng.sample(FILLERS, num_fillers)]
    listing = Turn(
        user="Please remember my shopping list."
        + "".join(f"\n- {category}: {item}" for category, item in zip(categories, items, strict=True)),
        assistant="Of course. I will keep the list for you.",
        items=tuple(items),
    )
    greeting = Turn("Hello! Do you have a little time for me today?", "Hello! Yes, I am happy to help you.")
    return Dialogue(seed, (greeting, listing, *small_talk), tuple(questions))


def make_dialogues(count: int, *, seed: int = 0, **counts: int) -> list[Dialogue]:
    """`count` dialogues with the seeds `seed`, `seed + 1`, ...; `counts` as in `make_dialogue`."""
    return [make_dialogue(seed + i, **counts) for i in range(count)]


def render(role: str, text: str) -> str:
    """One message in ChatML, the template of the model that ships with the demo."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def encode_turn(turn: Turn, tokenizer: Any) -> EncodedTurn:
    """The turn's token ids and which of them spell an item. The tokenizer must know character offsets."""
    text = render("user", turn.user) + render("assistant", turn.assistant)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(start, start + len(item)) for item in turn.items if (start := text.index(item)) >= 0]
    hits = [
        index
        for index, (start, stop) in enumerate(encoded["offset_mapping"])
        if any(start < end and begin < stop for begin, end in spans)
    ]
    return EncodedTurn(tuple(encoded["input_ids"]), tuple(hits))


def run_dialogue(model: Any, tokenizer: Any, stream: Any, dialogue: Dialogue) -> Outcome:
    """Feeds the dialogue turn by turn into an open, empty `stream` and asks its questions on forks."""
    ids: list[int] = []
    item_positions: list[int] = []
    for turn in dialogue.turns:
        encoded = encode_turn(turn, tokenizer)
        item_positions += [len(ids) + index for index in encoded.item_indices]
        ids += encoded.ids
        stream.feed(_row(encoded.ids, model))
        stream.end_turn()
    kept = stream.kept()[0]
    answers = tuple(_ask(model, tokenizer, stream, question) for question in dialogue.questions)
    return Outcome(dialogue.seed, tuple(ids), tuple(item_positions), kept.positions, kept.scores, answers)


def run_dialogues(model: Any, tokenizer: Any, open_stream: Callable[[], Any], dialogues: Sequence[Dialogue]) -> Iterator[Outcome]:
    """Every dialogue through a stream of its own; `open_stream` returns a context manager that yields the stream."""
    for dialogue in dialogues:
        with open_stream() as stream:
            yield run_dialogue(model, tokenizer, stream, dialogue)


def _ask(model: Any, tokenizer: Any, stream: Any, question: Question) -> Answer:
    text = render("user", question.user) + f"<|im_start|>assistant\n{question.opening}"
    prompt: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    with stream.fork() as asked:
        asked.feed(_row(prompt[:-1], model))
        scores = tuple(_score(model, tokenizer, asked, prompt[-1], option) for option in question.options)
    return Answer(question.options, scores, question.truth)


def _score(model: Any, tokenizer: Any, stream: Any, last: int, option: str) -> float:
    """Mean log-probability of the option's tokens after the stream's past and the token `last`, in nats a token."""
    ids = torch.tensor(tokenizer(f" {option}", add_special_tokens=False)["input_ids"], device=model.device)
    with stream.fork() as scored, torch.no_grad():
        logits = model(_row([last, *ids[:-1].tolist()], model), **{cache_name(model): scored.cache}).logits[0].float()
    return float(logits.log_softmax(-1).gather(1, ids[:, None]).mean())


def _row(ids: Sequence[int], model: Any) -> torch.Tensor:
    return torch.tensor([list(ids)], device=model.device)
