"""Prompts, masks and ids that are none fail early, by name; and leave model and stream as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, greedy
from kvsieve.errors import ArgumentError, KvsieveError, RangeError, ShapeError
from kvsieve.model.ids import check_device, check_known


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(0, 5, dtype=torch.long),
        torch.zeros(5, dtype=torch.long),
        torch.zeros(1, 5),
        torch.zeros(1, 5, dtype=torch.bool),
        [[1, 2, 3]],
        "text",
        None,
    ],
    ids=["empty", "no_rows", "one_dimension", "floats", "bools", "list", "text", "none"],
)
def test_prompts_that_are_not_ids_are_refused(ids: Any) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), "reference") as stream:
        for call in (stream.feed, stream.generate):
            with pytest.raises(ShapeError) as caught:
                call(ids)
            assert isinstance(caught.value, ValueError)
        assert stream.seen == 0
        assert stream.generate(tiny.ids(1, 5), max_new_tokens=2, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("most", ["4", ["a", ""], Path("/nowhere"), 2.5, -1, torch.ones(2), torch.empty(2, device="meta")])
def test_lengths_of_a_batchs_answers_that_are_none_are_refused(most: Any) -> None:
    """transformers compares a length with a number, whatever it is."""
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream, pytest.raises(KvsieveError) as caught:
        kvsieve.Batch(stream.model).add(stream, tiny.ids(1, 6), max_new_tokens=most, do_sample=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_a_forward_over_a_nested_tensor_fails_where_the_stock_model_does(backend: str) -> None:
    model, nested = tiny.model(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(RuntimeError, match="Expected"):
        model(nested)
    with kvsieve.stream(model, kvsieve.StreamingLLM(64), backend) as stream:
        with pytest.raises(RuntimeError, match="Expected") as caught:
            model(nested, past_key_values=stream.cache)
        assert Path(kvsieve.__file__).parent not in Path(caught.traceback[-1].path).parents
        assert stream.seen == 0
        assert stream.generate(tiny.ids(1, 5), max_new_tokens=2, do_sample=False).shape == (1, 7)


WRONG_IDS: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "beyond the vocabulary": (lambda: torch.tensor([[5, tiny.VOCAB]]), RangeError),
    "negative": (lambda: torch.tensor([[-1, 5]]), RangeError),
    "huge": (lambda: torch.tensor([[2**63 - 1, 5]]), RangeError),
    "small type": (lambda: torch.tensor([[5, 6]], dtype=torch.int16), ShapeError),
    "three dimensions": (lambda: torch.full((1, 2, 2), 5), ShapeError),
    "meta": (lambda: torch.full((1, 4), 5, device="meta"), ShapeError),
    "sparse": (lambda: torch.full((1, 4), 5).to_sparse(), ShapeError),
    "nested": (lambda: torch.nested.nested_tensor([torch.tensor([5]), torch.tensor([5, 6])]), ShapeError),
    "requires a gradient": (lambda: torch.full((1, 4), 5.0, requires_grad=True), ShapeError),
    "seems to have 2 ** 31 tokens": (lambda: torch.tensor(5).expand(1, 2**31), ShapeError),
    "seems to have 2 ** 31 rows": (lambda: torch.tensor(5).expand(2**31, 1), ShapeError),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_that_the_model_cannot_have_are_refused_by_every_call_that_takes_them(name: str) -> None:
    model, text, (make, kind) = tiny.model(), tiny.ids(1, 9), WRONG_IDS[name]
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), "cpu") as stream:
        stream.feed(text)
        calls: list[Callable[[Any], Any]] = [
            stream.feed,
            lambda ids: stream.generate(ids, max_new_tokens=2, do_sample=False),
            lambda ids: stream.read_twice(ids, text),
            lambda ids: stream.read_twice(text, ids),
            lambda ids: stream.feed(text, unread=ids),
            lambda ids: stream.feed({"input_ids": ids}),
        ]
        for call in calls:
            with pytest.raises(kind) as caught:
                call(make())
            assert isinstance(caught.value, KvsieveError)
            assert "\n" not in str(caught.value)
        assert stream.ids[0].tolist() == text[0].tolist()
        answer = stream.generate(tiny.ids(1, 3, 1), max_new_tokens=4, do_sample=False)
    whole = torch.cat([text, tiny.ids(1, 3, 1)], 1)
    assert answer[0, 3:].tolist() == greedy(model, whole, 4)[0, 12:].tolist()


@pytest.mark.parametrize(
    "ids", [torch.tensor([[5, tiny.VOCAB]]), torch.tensor([[-1]]), torch.tensor([tiny.VOCAB]), torch.zeros(1, 0, dtype=torch.long)]
)
def test_a_forward_over_no_tokens_or_unknown_ones_is_refused_before_it_begins(ids: torch.Tensor) -> None:
    model, text = tiny.model(), tiny.ids(1, 9)
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "cpu") as stream:
        forward(model, stream.cache, text)
        with pytest.raises(KvsieveError, match=r"knows the tokens 0 to 127|prompt is empty"):
            forward(model, stream.cache, ids)
        got = forward(model, stream.cache, tiny.ids(1, 3, 1))
    want = model(torch.cat([text, tiny.ids(1, 3, 1)], 1)).logits[:, 9:].detach()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_ids_of_32_bits_are_ids_and_pads_may_have_any() -> None:
    model, text = tiny.model(), tiny.ids(1, 9)
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "cpu") as stream:
        want = stream.generate(text, max_new_tokens=4, do_sample=False)
        stream.reset()
        assert torch.equal(stream.generate(text.int(), max_new_tokens=4, do_sample=False), want)
        stream.reset()
        padded, mask = torch.cat([torch.tensor([[-100, 2**40]]), text], 1), torch.tensor([[0, 0, *[1] * 9]])
        got = stream.generate(padded, mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(got[:, 2:], want)
        assert got[0, :2].tolist() == [-100, 2**40]


def test_ids_that_stand_for_an_image_are_not_looked_up() -> None:
    """Models with images put something else in place of such ids before they look at their embedding."""
    inner = tiny.model().config
    model = SimpleNamespace(
        get_input_embeddings=lambda: torch.nn.Embedding(10, 2),
        config=SimpleNamespace(image_token_id=12, get_text_config=lambda decoder: inner),
    )
    check_known(model, torch.tensor([3, 12, 12, 9]), "input_ids")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="hold 11"):
        check_known(model, torch.tensor([3, 12, 11]), "input_ids")  # type: ignore[arg-type]


def test_ids_on_another_device_are_refused_unless_what_moves_them_stands_before_the_model() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")  # the device that every machine has besides
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(10, 2))
    with pytest.raises(ShapeError, match=r"are on meta, the model on cpu"):
        check_device(model, ids, "input_ids")  # type: ignore[arg-type]
    model._hf_hook = None
    check_device(model, ids, "input_ids")  # type: ignore[arg-type]
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(10, 2, device="meta"))  # its weights are elsewhere
    check_device(model, torch.zeros(1, 3, dtype=torch.long), "input_ids")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, "x", 1.5, [2, "x"], 2**70], ids=repr)
def test_ends_and_beams_that_are_no_numbers_are_refused_before_anything_is_read(value: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        for name in ("eos_token_id", "num_beams"):
            with pytest.raises(ArgumentError, match=name):
                stream.generate(tiny.ids(1, 5), max_new_tokens=1, **{name: value})
        assert stream.seen == 0
        with pytest.raises(ArgumentError, match="eos_token_id"):
            stream.generate(tiny.ids(1, 5), max_new_tokens=1, eos_token_id=torch.tensor([[1]]))
        for end in (None, torch.tensor(2), [2, 3]):
            assert stream.generate(tiny.ids(1, 5), max_new_tokens=1, eos_token_id=end).shape == (1, 6)


@pytest.mark.parametrize("mask", [torch.ones(1, 9, device="meta"), torch.ones(1, 9).to_sparse(), torch.ones(9), "x", [[1] * 9]])
def test_masks_that_are_none_are_refused(mask: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        for call in (stream.feed, stream.generate):
            with pytest.raises(ShapeError, match="attention_mask"):
                call(tiny.ids(1, 9), mask)
        assert stream.seen == 0
