"""The evaluation tasks: their data is reproducible, their measuring is what the words say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from kvsieve import methods
from kvsieve.cli import main
from kvsieve.evals import models, passkey, shopping, stream_nll
from kvsieve.evals.shopping_text import FILLERS, ITEMS
from kvsieve.model.support import cache_name


class Words:
    """A tokenizer with one token a word, offsets included; ids are handed out in order of appearance."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import re

        found = list(re.finditer(r" ?[^\s]+|\s", text))
        ids = [self.vocabulary.setdefault(match.group(), len(self.vocabulary)) for match in found]
        return {"input_ids": ids, "offset_mapping": [match.span() for match in found]}

    def decode(self, ids: Any) -> str:
        words = list(self.vocabulary)
        return "".join(words[int(i)] for i in ids)


# ---------------------------------------------------------------------------------------------- shopping list


def test_a_dialogue_depends_on_its_seed_only() -> None:
    assert shopping.make_dialogue(3) == shopping.make_dialogue(3)
    assert shopping.make_dialogue(3) != shopping.make_dialogue(4)
    assert shopping.make_dialogues(2, seed=3)[1] == shopping.make_dialogue(4)


def test_a_dialogue_names_each_item_once_and_early() -> None:
    for dialogue in shopping.make_dialogues(20):
        truths = [question.options[question.truth] for question in dialogue.questions]
        assert tuple(truths) == dialogue.turns[1].items
        for item in truths:
            mentions = [i for i, turn in enumerate(dialogue.turns) if item in turn.user + turn.assistant]
            assert mentions == [1]
            assert dialogue.turns[1].user.count(item) == 1


def test_options_are_distinct_items_of_one_category() -> None:
    for dialogue in shopping.make_dialogues(20):
        for question in dialogue.questions:
            assert len(set(question.options)) == 5
            assert any(set(question.options) <= set(items) for items in ITEMS.values())


def test_a_dialogue_is_long_enough_to_forget_in() -> None:
    for dialogue in shopping.make_dialogues(20):
        assert sum(len((turn.user + turn.assistant).split()) for turn in dialogue.turns) > 700


def test_no_filler_gives_an_item_away() -> None:
    small_talk = " ".join(question + " " + answer for question, answer in FILLERS).lower()
    assert not [item for items in ITEMS.values() for item in items if item in small_talk]
    assert len(set(FILLERS)) == len(FILLERS)


@pytest.mark.parametrize("counts", [{"num_items": 0}, {"num_items": 99}, {"num_fillers": 99}, {"num_options": 1}])
def test_counts_beyond_the_material_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        shopping.make_dialogue(0, **counts)


def test_encoding_a_turn_finds_the_tokens_of_its_items() -> None:
    turn = shopping.Turn("Buy oat milk and rye bread now.", "Yes.", items=("oat milk", "rye bread"))
    words = Words()
    encoded = shopping.encode_turn(turn, words)
    assert words.decode(encoded.ids[i] for i in encoded.item_indices) == " oat milk rye bread"


class ScriptedStream:
    """A stream that keeps the last `budget` tokens and, through its model, prefers tokens it still holds."""

    def __init__(self, budget: int, ids: tuple[int, ...] = ()) -> None:
        self.budget, self.ids, self.turns, self.forks = budget, ids, 0, 0
        self.cache = self

    def feed(self, ids: torch.Tensor) -> None:
        self.ids += tuple(ids[0].tolist())

    def end_turn(self) -> None:
        self.turns += 1

    def kept(self) -> list[SimpleNamespace]:
        positions = np.arange(len(self.ids))[-self.budget :]
        return [SimpleNamespace(positions=positions, scores=np.full(len(positions), np.nan, np.float32))]

    def fork(self) -> ScriptedStream:
        self.forks += 1
        return ScriptedStream(self.budget, self.ids)

    def __enter__(self) -> ScriptedStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class HoldingModel:
    """Logits 1 for every token that the stream still holds, 0 for the others."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor, past_key_values: ScriptedStream) -> SimpleNamespace:
        logits = torch.zeros(1, ids.shape[1], 4096)
        logits[..., list(past_key_values.ids[-past_key_values.budget :])] = 1.0
        return SimpleNamespace(logits=logits)

    __call__ = forward


def test_a_memory_that_holds_the_items_recalls_them_and_is_left_untouched() -> None:
    dialogue, stream = shopping.make_dialogue(0), ScriptedStream(budget=10_000)
    outcome = shopping.run_dialogue(HoldingModel(), Words(), stream, dialogue)
    assert outcome.retention == 1.0
    assert outcome.recall == 1.0
    assert stream.ids == outcome.ids
    assert stream.turns == len(dialogue.turns)
    assert stream.forks == len(dialogue.questions)


def test_a_window_forgets_the_items() -> None:
    outcome = shopping.run_dialogue(HoldingModel(), Words(), ScriptedStream(budget=100), shopping.make_dialogue(0))
    assert outcome.retention == 0.0
    assert all(len(set(answer.scores)) == 1 for answer in outcome.answers)


# ---------------------------------------------------------------------------------------------- passkey


def test_a_passkey_text_has_the_length_and_the_key_where_it_says() -> None:
    words = Words()
    made = passkey.make_passkey(words, num_tokens=500, depth=0.5, seed=7)
    assert len(made.ids) == 500
    assert words.decode(made.ids[i] for i in made.positions).strip() == made.key
    assert 200 < made.positions[0] < 300
    assert made == passkey.make_passkey(words, num_tokens=500, depth=0.5, seed=7)
    assert made.key != passkey.make_passkey(words, num_tokens=500, depth=0.5, seed=8).key


@pytest.mark.parametrize(("num_tokens", "depth"), [(500, 1.5), (500, -0.1), (4, 0.5)])
def test_an_impossible_passkey_is_refused(num_tokens: int, depth: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        passkey.make_passkey(Words(), num_tokens=num_tokens, depth=depth)


def test_passkey_scoring_reads_retention_and_the_answer() -> None:
    words = Words()
    made = passkey.make_passkey(words, num_tokens=200, depth=0.1)

    class Answering(ScriptedStream):
        def fork(self) -> Answering:
            return Answering(self.budget, self.ids)

        def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat([ids, torch.tensor([[made.ids[i] for i in made.positions]])], 1)

    result = passkey.score_passkey(Answering(budget=50), words, made)
    assert (result.retention, result.found) == (0.0, True)
    assert passkey.score_passkey(Answering(budget=200), words, made).retention == 1.0


class Letters(Words):
    """A tokenizer with one token a character, so that a key has five; ids stay within a tiny model's vocabulary."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [self.vocabulary.setdefault(letter, len(self.vocabulary) + 3) for letter in text]}

    def decode(self, ids: Any) -> str:
        letters = {number: letter for letter, number in self.vocabulary.items()}
        return "".join(letters.get(int(i), "?") for i in ids)


SEARCH = kvsieve.HiP(32, sinks=2, window=16, dense_layers=1, query_block=16)


@pytest.mark.parametrize("policy", [kvsieve.Full(), SEARCH, kvsieve.StreamingLLM(40, sinks=2)], ids=["full", "hip", "streaming"])
def test_texts_that_share_a_beginning_are_read_as_if_alone(policy: Any) -> None:
    letters, model = Letters(), tiny.model()
    keys = [
        passkey.make_passkey(letters, num_tokens=240, depth=depth, seed=1, key=key)
        for depth, key in [(0.05, "12345"), (0.5, "54321"), (0.51, "99999"), (1.0, "00000")]
    ]
    assert [letters.decode([made.ids[i] for i in made.positions]) for made in keys] == [f" {made.key}" for made in keys]
    question = tiny.ids(1, 5, 9)
    for made, stream in zip(keys, passkey.read_all(model, policy, keys)):
        assert stream.seen == 240
        with kvsieve.stream(model, policy) as alone:
            alone.feed(torch.tensor([made.ids]))
            want = model(question, **{cache_name(model): alone.cache}).logits
        torch.testing.assert_close(model(question, **{cache_name(model): stream.cache}).logits, want, atol=1e-4, rtol=0)


def test_asking_tells_who_read_the_key() -> None:
    letters, model = Letters(), tiny.model()
    for depth, everyone in ((0.0, False), (1.0, True)):
        made = passkey.make_passkey(letters, num_tokens=400, depth=depth)
        with kvsieve.stream(model, kvsieve.HiP(16, sinks=2, window=160, dense_layers=1)) as stream:
            stream.feed(torch.tensor([made.ids]))
            text, read = passkey.ask(stream, letters, made)
        assert len(text) == len(made.positions) + 2
        assert read is not None
        assert (read == 1.0) == everyone  # a key within the window is read by all heads
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(torch.tensor([made.ids]))
        assert passkey.ask(stream, letters, made)[1] is None


def test_passkeys_are_counted_by_policy_and_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype: (tiny.model(), Letters()))
    path = tmp_path / "keys.json"
    argv = ["eval", "passkey", "--policy", repr(SEARCH), "--dense", repr(SEARCH), "--length", "180", "220", "--depths", "3"]
    assert main([*argv, "--json", str(path)]) == 0
    answers = json.loads(path.read_text())["answers"]
    assert [(a["prompt"], a["length"]) for a in answers] == [
        *[("own", 180)] * 3, *[("dense", 180)] * 3, *[("own", 220)] * 3, *[("dense", 220)] * 3
    ]  # fmt: skip
    assert {a["policy"] for a in answers} == {repr(SEARCH)}
    assert len({a["key"] for a in answers}) == 3
    assert all(0.0 <= a["read"] <= 1.0 and a["found"] == (a["key"] in a["text"]) for a in answers)
    assert len([line for line in capsys.readouterr().out.splitlines() if " of 3 " in line]) == 4


def test_passkeys_of_texts_that_a_bank_has_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key has a bank and a stream of its own, which is asked and has read nothing else."""
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype: (tiny.model(), Letters()))
    held: list[tuple[int, int]] = []

    def ask(stream: Any, tokenizer: Any, key: Any) -> tuple[str, None]:
        held.append((stream.policy.bank.stats().tokens, stream.seen))
        return f"{key.key} it is", None

    monkeypatch.setattr(passkey, "ask", ask)
    path = tmp_path / "keys.json"
    policy = "streamingllm(64) >> memory_bank(top_k=32)"
    argv = ["eval", "passkey", "--ingest", policy, "--length", "180", "--depths", "3"]
    assert main([*argv, "--json", str(path)]) == 0
    assert held == [(180, 0)] * 3
    answers = json.loads(path.read_text())["answers"]
    assert [(a["prompt"], a["found"], a["policy"]) for a in answers] == [("ingested", True, repr(methods.parse(policy)))] * 3
    assert " 3 of 3 " in capsys.readouterr().out
    argv[argv.index(policy)] = "streamingllm(64)"
    assert main(argv) == 2
    assert "end with a bank" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- streaming nll


class Bigram:
    """A model without memory: its logits depend on the current token only, so chunking cannot matter."""

    def __init__(self, vocabulary: int = 50) -> None:
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: torch.Tensor, past_key_values: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])

    __call__ = forward


def held() -> stream_nll.Holding:
    return stream_nll.Holding(1, 2)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_nll_is_the_same_in_any_chunks(chunk: int) -> None:
    ids = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(1))
    model, reading = Bigram(), stream_nll.Reading("x", bucket=100)
    steps = list(stream_nll.read(model, ids, None, held, reading, chunk=chunk))
    expected = F.cross_entropy(model.table[ids[0, :-1]], ids[0, 1:], reduction="none")
    assert steps[-1].seen == 300
    assert steps[-1].mean_nll == pytest.approx(float(expected.mean()), rel=1e-5)
    wanted = [expected[:99].mean(), expected[99:199].mean(), expected[199:].mean()]
    assert reading.nll == pytest.approx([float(x) for x in wanted], rel=1e-5)


def test_reading_stops_when_its_time_is_up() -> None:
    reading = stream_nll.Reading("x", bucket=100)
    ids = torch.zeros(1, 300, dtype=torch.long)
    steps = list(stream_nll.read(Bigram(), ids, None, held, reading, chunk=10, seconds=0.0))
    assert [step.seen for step in steps] == [10]


def test_reading_wants_one_row() -> None:
    with pytest.raises(ValueError, match=r"\[1, n\]"):
        next(stream_nll.read(Bigram(), torch.zeros(2, 3, dtype=torch.long), None, held, stream_nll.Reading("x", 10)))


def test_nll_between_takes_whole_buckets() -> None:
    reading = stream_nll.Reading("x", bucket=10, nll=[1.0, 2.0, 4.0])
    assert reading.nll_between(0, 20) == 1.5
    assert reading.nll_between(10, 30) == 3.0
    assert math.isnan(reading.nll_between(25, 30))


def test_meter_of_a_dynamic_cache_counts_keys_and_values() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8), 0)
    assert stream_nll.dynamic_cache_meter(cache)() == stream_nll.Holding(5, 2 * 3 * 5 * 8 * 4)


@pytest.mark.model
def test_a_gguf_file_is_read_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table of contents takes seconds, and transformers asks three times; for gguf's table of names, at every module."""
    gguf = pytest.importorskip("gguf")
    made: list[Any] = []
    named: list[Any] = []
    names = gguf.get_tensor_name_map

    class Counted(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(args)
            super().__init__(*args, **kwargs)

    def counted(*args: Any) -> Any:
        named.append(args)
        return names(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    models.load_smollm2()
    assert (len(made), len(named)) == (1, 1)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counted, counted)
