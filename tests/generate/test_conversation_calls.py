"""One conversation, whatever feeds it: configured, ended by criteria, copied, by other doors, under masks."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, greedy, ids_of, joined, pad_left, solo
from kvsieve.errors import CacheMismatchError, PaddingError, StateError, UnsupportedError
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
ROOMY = [name for name in tiny.POLICIES if name != "lm_infinite_middle"]
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def own_token(model: Any, rows: list[torch.Tensor], row: int, new: int) -> tuple[int, int]:
    """A token that only ``rows[row]`` says early, and how many tokens it has said with it."""
    said = solo(model, rows, new)
    others = {token for at, answer in enumerate(said) if at != row for token in answer}
    for at, token in enumerate(said[row][: new - 2]):
        if token not in others and token not in said[row][:at]:
            return token, at + 1
    raise AssertionError(f"row {row} says nothing of its own in {said}")


# -------------------------------------------------------------------------------------------------------------- configuration


def test_a_generation_config_counts_as_keywords_do() -> None:
    model, two, more = tiny.model(seed=3), tiny.ids(2, 20), tiny.ids(2, 7, 3)
    end, length = own_token(model, list(two), 0, 8)
    said = solo(model, list(two), 8)
    want = solo(model, [joined(two[0], said[0][:length], more[0]), joined(two[1], said[1], more[1])], 4)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    own = model.generation_config.eos_token_id
    for arguments, default in (
        ({**how, "eos_token_id": end}, None),
        (how, end),
        ({"generation_config": GenerationConfig(pad_token_id=0, **how)}, end),
        ({"generation_config": GenerationConfig(pad_token_id=0, eos_token_id=end, **how)}, None),
    ):
        model.generation_config.eos_token_id = default
        try:
            with kvsieve.stream(model, kvsieve.Full()) as stream:
                stream.generate(two, **arguments)
                got = stream.generate(more, do_sample=False, max_new_tokens=4, eos_token_id=[])[:, 7:].tolist()
        finally:
            model.generation_config.eos_token_id = own
        assert got == want


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3, **HOW}, {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 6}],
    ids=["beams", "samples"],
)
@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize("length", [1, 20, 700])
def test_copies_go_on_with_the_best(length: int, as_config: bool, arguments: dict[str, Any]) -> None:
    model, one, more = tiny.model(), tiny.ids(1, length), tiny.ids(1, 7, 3)
    torch.manual_seed(0)
    want = model.generate(one, attention_mask=torch.ones_like(one), **arguments)
    given = {"generation_config": GenerationConfig(pad_token_id=0, **arguments)} if as_config else arguments
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        torch.manual_seed(0)
        got = stream.generate(one, **given)
        assert torch.equal(got, want)
        assert ids_of(stream) == [want[0].tolist()]
        assert stream.generate(more, **HOW)[0, 7:].tolist() == solo(model, [joined(want[0], more[0])])[0]


# ------------------------------------------------------------------------------------------------------------- criteria, processors


class Says(StoppingCriteria):
    """Ends the rows whose newest token is ``token``."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@BACKEND
@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("end", [2, None])
@pytest.mark.parametrize("sizes", [(20, 20), (12, 9)])
def test_a_row_that_a_criterion_ended_holds_what_it_said(
    sizes: tuple[int, int], end: int | None, policy: str, backend: str
) -> None:
    model, rows, more = tiny.model(), [tiny.ids(1, n, 5 + at)[0] for at, n in enumerate(sizes)], tiny.ids(2, 5, 3)
    token, length = own_token(model, rows, 0, 16)
    said = solo(model, rows, 16)
    want = solo(model, [joined(rows[0], said[0][:length], more[0]), joined(rows[1], said[1], more[1])])
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        criteria = StoppingCriteriaList([Says(token)])
        stream.generate(*pad_left(rows), stopping_criteria=criteria, do_sample=False, max_new_tokens=16, eos_token_id=end)
        assert ids_of(stream) == [joined(rows[0], said[0][:length]).tolist(), joined(rows[1], said[1]).tolist()]
        assert stream.generate(more, **HOW)[:, 5:].tolist() == want


class Longer(StoppingCriteria):
    """Ends the text at a length that counts the prompt."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class FirstTokens(LogitsProcessor):
    """Allows only what stands among the first ten tokens of the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        return scores.masked_fill(~allowed.scatter(1, input_ids[:, :10], True), float("-inf"))


LOOKS_BACK: dict[str, Any] = {
    "repetition_penalty": lambda n: {"max_new_tokens": 8, "repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda n: {"max_new_tokens": 8, "no_repeat_ngram_size": 1},
    "processor": lambda n: {"max_new_tokens": 8, "logits_processor": LogitsProcessorList([FirstTokens()])},
    "max_length": lambda n: {"max_length": n + 6},
    "min_length": lambda n: {"max_new_tokens": 8, "min_length": n + 5},
    "criterion": lambda n: {"max_new_tokens": 20, "stopping_criteria": StoppingCriteriaList([Longer(n + 5)])},
    "allowed": lambda n: {"max_new_tokens": 6, "prefix_allowed_tokens_fn": lambda batch, text: sorted(set(text.tolist()))},
}


@pytest.mark.parametrize("sizes", [(700,), (40,), (30, 9, 15)])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", list(LOOKS_BACK))
def test_what_looks_back_sees_all_turns(name: str, beams: int, sizes: tuple[int, ...]) -> None:
    model, pieces = tiny.model(), [tiny.ids(1, n, n) for n in sizes]
    text = pieces[0]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        for at, piece in enumerate(pieces):
            if at:
                text = torch.cat([text, got[:, pieces[at - 1].shape[1] :], piece], 1)  # noqa: F821
            arguments = {"do_sample": False, "num_beams": beams, **LOOKS_BACK[name](text.shape[1])}
            want = model.generate(text, attention_mask=torch.ones_like(text), **arguments)
            got = stream.generate(piece, **arguments)
            assert got[0, piece.shape[1] :].tolist() == want[0, text.shape[1] :].tolist()


def test_what_looks_back_sees_rows_of_unlike_length() -> None:
    # A processor sees the pads of a batch, so the texts are ones that are not answered with the pad.
    model, rows, more = tiny.model(), [tiny.ids(1, 20)[0], tiny.ids(1, 9, 3)[0]], [tiny.ids(1, 3, 4)[0], tiny.ids(1, 8, 6)[0]]
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "repetition_penalty": 1.8}
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        first = stream.generate(*pad_left(rows), **arguments)[:, 20:]
        second = stream.generate(*pad_left(more), **arguments)[:, 8:]
    for at in range(2):
        text = rows[at][None]
        want = model.generate(text, **arguments)
        assert 0 not in want
        assert first[at].tolist() == want[0, len(rows[at]) :].tolist()
        text = torch.cat([want, more[at][None]], 1)
        assert second[at].tolist() == model.generate(text, **arguments)[0, text.shape[1] :].tolist()


# ------------------------------------------------------------------------------------------------------------ rows and copies


@BACKEND
@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 3, 12)])
def test_one_prefix_for_many_rows(sizes: tuple[int, ...], policy: str, backend: str) -> None:
    model, prefix, questions = tiny.model(), tiny.ids(1, 30, 1), [tiny.ids(1, n, 4 + at)[0] for at, n in enumerate(sizes)]
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        stream.feed(prefix)
        stream.cache.batch_repeat_interleave(3)
        batch, mask = pad_left(questions)
        got = stream.generate(batch, mask, **HOW)[:, batch.shape[1] :].tolist()
    assert got == solo(model, [joined(prefix[0], question) for question in questions])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_forks(copied: Any) -> None:
    model, prefix, one, other = tiny.model(), tiny.ids(1, 30), tiny.ids(1, 8, 2), tiny.ids(1, 8, 3)
    want = [greedy(model, torch.cat([prefix, q], 1), 6)[:, 38:] for q in (one, other)]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(prefix)
        cache = copied(stream.cache)
        got = greedy(model, torch.cat([prefix, one], 1), 6, past_key_values=cache)[:, 38:]
        assert torch.equal(got, want[0])
        twin = copied(stream)
        assert torch.equal(twin.generate(one, **HOW)[:, 8:], want[0])
        twin.close()
        assert torch.equal(stream.generate(other, **HOW)[:, 8:], want[1])
    for thing in (stream, cache):
        with pytest.raises(UnsupportedError, match="save"):
            pickle.dumps(thing)


# ---------------------------------------------------------------------------------------------------------------------- other doors


@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("sizes", [(30,), (30, 12)])
def test_a_turn_by_the_callers_generate_then_one_by_the_stream(sizes: tuple[int, ...], policy: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, n, at)[0] for at, n in enumerate(sizes)]
    more = tiny.ids(len(rows), 9, 5)
    batch, mask = pad_left(rows)
    said = solo(model, rows)
    want = solo(model, [joined(row, answer, new) for row, answer, new in zip(rows, said, more)])
    with kvsieve.stream(model, tiny.POLICIES[policy](120)) as stream:
        out = model.generate(batch, attention_mask=mask, past_key_values=stream.cache, **HOW)
        told = ids_of(stream)
        for call in (stream.generate, stream.feed):
            with pytest.raises(StateError, match=r"model\.generate"):
                call(more)
        assert ids_of(stream) == told
        assert stream.generate(more, unread=out[:, -1:], **HOW)[:, 9:].tolist() == want


@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("sizes", [(30,), (30, 12)])
def test_a_plain_forward_then_a_turn_by_the_stream(sizes: tuple[int, ...], policy: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, n, at)[0] for at, n in enumerate(sizes)]
    more = tiny.ids(len(rows), 9, 5)
    batch, mask = pad_left(rows)
    want = solo(model, [joined(row, new) for row, new in zip(rows, more)])
    with kvsieve.stream(model, tiny.POLICIES[policy](120)) as stream:
        forward(model, stream.cache, batch, mask)
        assert stream.generate(more, **HOW)[:, 9:].tolist() == want


@pytest.mark.parametrize("sizes", [(30,), (30, 12)])
def test_a_turn_by_the_stream_then_the_whole_text_by_generate(sizes: tuple[int, ...]) -> None:
    """What the caller's own generate is given is the left-padded batch of all conversations."""
    model, rows = tiny.model(), [tiny.ids(1, n, at)[0] for at, n in enumerate(sizes)]
    more = tiny.ids(len(rows), 4, 5)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        out = stream.generate(*pad_left(rows), **HOW)[:, 30:]
        texts = [joined(row, answer, new) for row, answer, new in zip(rows, out, more)]
        batch, mask = pad_left(texts)
        got = model.generate(batch, attention_mask=mask, past_key_values=stream.cache, **HOW)[:, batch.shape[1] :]
    assert got.tolist() == solo(model, texts)


@pytest.mark.parametrize("rows", [(30,), (30, 12)])
def test_inputs_are_taken_as_a_tokenizer_returns_them(rows: tuple[int, ...]) -> None:
    model, texts = tiny.model(), [tiny.ids(1, n, at)[0] for at, n in enumerate(rows)]
    batch, mask = pad_left(texts)
    encoded = BatchEncoding({"input_ids": batch, "attention_mask": mask})
    for call in (
        lambda s: s.generate(**encoded, **HOW),
        lambda s: s.generate(encoded, **HOW),
        lambda s: s.generate(input_ids=batch, attention_mask=mask, **HOW),
        lambda s: s.generate(inputs=batch, attention_mask=mask, **HOW),
        lambda s: s.generate(batch, mask, **HOW),
    ):
        with kvsieve.stream(model, kvsieve.Full()) as stream:
            assert call(stream)[:, batch.shape[1] :].tolist() == solo(model, texts)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(encoded)
        assert ids_of(stream) == [text.tolist() for text in texts]


class Words:
    """Stands for a tokenizer: token 17 is the word ``w17``."""

    def decode(self, tokens: Any, **kwargs: Any) -> str:
        return "".join(f"w{int(token)} " for token in torch.as_tensor(tokens).flatten())


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("sizes", [(30, 9), (700,)])
@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}], ids=["", "looks_back"])
def test_a_streamer_prints_this_turn(extra: dict[str, Any], sizes: tuple[int, ...], skip_prompt: bool) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        for n in sizes:
            out, text = io.StringIO(), tiny.ids(1, n, n)
            with contextlib.redirect_stdout(out):
                answer = stream.generate(text, streamer=TextStreamer(Words(), skip_prompt=skip_prompt), **HOW, **extra)
            assert out.getvalue().split() == Words().decode(answer[:, n:] if skip_prompt else answer).split()


# --------------------------------------------------------------------------------------------------------------------------- masks


def test_masks_that_hide_what_was_read_are_refused() -> None:
    model, text = tiny.model(), tiny.ids(2, 12)
    for hide in ([(0, 2), (1, 2)], [(1, 4)], [(0, 0)]):
        mask = torch.ones_like(text)
        for row, column in hide:
            mask[row, column] = 0
        with kvsieve.stream(model, kvsieve.Full()) as stream:
            forward(model, stream.cache, text[:, :6])
            with pytest.raises(PaddingError, match="mask"):
                forward(model, stream.cache, text[:, 6:], mask)
            assert ids_of(stream) == text[:, :6].tolist()
            forward(model, stream.cache, text[:, 6:], torch.ones_like(text))
            assert ids_of(stream) == text.tolist()


@pytest.mark.parametrize("policy", ["full", "streaming", "snapkv"])
def test_assisted_hidden_states_are_those_of_plain_decoding(policy: str) -> None:
    model, text = tiny.model(), torch.cat([tiny.ids(1, 20, 5)] * 3, 1)
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False, "max_new_tokens": 12}
    found = []
    for extra in ({}, {"prompt_lookup_num_tokens": 4}):
        with kvsieve.stream(model, tiny.POLICIES[policy](32)) as stream:
            found.append(model.generate(text, past_key_values=stream.cache, **how, **extra))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for plain, assisted in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        for a, b in zip(plain, assisted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_hidden_states_of_a_prompt_in_pieces_are_whole() -> None:
    model, text = tiny.model(), tiny.ids(1, 700)
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_hidden_states": True, **HOW}
    want = model.generate(text, **how)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        got = stream.generate(text, **how)
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=0)


def test_a_plain_forward_with_wrong_positions_after_the_streams_own_turn_is_refused() -> None:
    """Without a mask the model counts columns; a row that was padded has seen fewer tokens."""
    model, rows = tiny.model(), [tiny.ids(1, 20)[0], tiny.ids(1, 9, 2)[0]]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(*pad_left(rows))
        told = ids_of(stream)
        with pytest.raises(CacheMismatchError, match="position"):
            forward(model, stream.cache, tiny.ids(2, 3, 7))
        assert ids_of(stream) == told
        mask = torch.cat([pad_left(rows)[1], torch.ones(2, 3, dtype=torch.long)], 1)
        forward(model, stream.cache, tiny.ids(2, 3, 7), mask)
