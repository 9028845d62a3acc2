"""What a user may get wrong fails early, by name, with words that help; and leaves model and stream as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
import transformers
from drive import forward, forwards, greedy, positions
from kvsieve.errors import (
    ArgumentError,
    BackendError,
    BankError,
    CacheMismatchError,
    KvsieveError,
    PolicyError,
    RangeError,
    SaveError,
    SessionError,
    ShapeError,
    StateError,
    UnsupportedModelError,
)
from kvsieve.model.ids import check_device, check_known

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


# ------------------------------------------------------------------------------------------------------------------------- NaN


@BACKEND
def test_tokens_with_nan_scores_go_first_and_poison_nothing(backend: str) -> None:
    """One word's row of the head is NaN from the start: its logits are, and with them every score."""
    model = copy.deepcopy(tiny.model())
    clean = tiny.ids(1, 60)
    with kvsieve.stream(model, kvsieve.SirLLM(budget=80, sinks=2, recent=4), backend) as stream:
        forward(model, stream.cache, clean[:, :30])
        known = stream.kept()[0].scores[:30].copy()
        weight = model.lm_head.weight.data.clone()
        model.lm_head.weight.data[7] = torch.nan
        forward(model, stream.cache, clean[:, 30:])
        model.lm_head.weight.data.copy_(weight)
        # Token 30 was scored by the clean carry; those after it by rows with a NaN.
        scores = stream.kept()[0].scores
        assert np.array_equal(scores[:30], known)
        assert np.isnan(scores[31:60]).all()
        forward(model, stream.cache, tiny.ids(1, 40, 3))
        kept = positions(stream)[0]
        assert len(kept) == 80
        assert set(range(31)) <= set(kept)
        assert set(range(62, 100)) <= set(kept), "clean tokens outrank those without a score"
        stream.reset()
        again = forwards(model, stream.cache, clean, [30, 1])
        torch.testing.assert_close(again, model(clean).logits.detach(), atol=1e-4, rtol=0)
        assert np.isfinite(stream.kept()[0].scores).all()


@BACKEND
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_a_nan_in_one_row_stays_in_that_row(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 40)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream, torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        want = forwards(model, stream.cache, ids, [20, 1])
        stream.reset()
        hook = model.model.layers[1].register_forward_hook(lambda m, a, o: _poison(o))
        try:
            got = forwards(model, stream.cache, ids, [20, 1])
        finally:
            hook.remove()
        assert embeds.isfinite().all()
    assert torch.isnan(got[1]).any()
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=0)


def _poison(output: Any) -> Any:
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    hidden[1] = torch.nan
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


# --------------------------------------------------------------------------------------------------------------------- prompts


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


# ------------------------------------------------------------------------------------------- numbers, rows, ranges, flags, paths


@pytest.mark.parametrize("rows", [2, -1, True, 0.0, "0", [0, 2], [[0]], [], np.array([0.5]), 2**70, range(2**60), {"a": 1}])
def test_rows_that_there_are_not_are_refused(rows: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(budget=64), "cpu") as stream:
        stream.feed(tiny.ids(2, 20))
        for call in (stream.pin, stream.unpin, stream.evict):
            with pytest.raises(RangeError):
                call(2, 5, rows)
        assert stream.pins == [[], []]
        assert positions(stream) == [list(range(20))] * 2


@pytest.mark.parametrize("start", [-1, 5, True, 2.0, "2", None, 2**60, np.float32(2)])
def test_ranges_that_are_none_are_refused(start: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(budget=64), "cpu") as stream:
        stream.feed(tiny.ids(1, 20))
        for call in (stream.pin, stream.unpin, stream.evict):
            with pytest.raises(RangeError):
                call(start, 5)
        assert stream.pins == [[]]
        assert positions(stream) == [list(range(20))]


def test_numbers_of_numpy_are_numbers() -> None:
    three = np.int64(3)
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(budget=np.int32(64), sinks=np.uint8(2)), "cpu") as stream:
        stream.feed(tiny.ids(2, 20), chunk=np.int64(7))
        stream.pin(np.int32(1), three, rows=np.array([0, 1]))
        stream.pin(np.int32(8), np.int64(9), rows=np.int64(1))
        assert stream.pins == [[(1, 3)], [(1, 3), (8, 9)]]
        stream.cache.batch_select_indices(np.array([1, 0]))
        assert stream.pins == [[(1, 3), (8, 9)], [(1, 3)]]
        stream.cache.crop(np.int64(-1))
        assert stream.seen == 19
    many: list[Any] = [
        kvsieve.SirLLM(np.int64(64), sinks=three, recent=np.int32(8), decay=np.float64(0.5)),
        kvsieve.LMInfinite(np.int64(22), sinks=three, middle_top_k=three),
        kvsieve.H2O(np.int64(64), recent=three),
        kvsieve.SnapKV(np.int64(64), observe=three, kernel=three),
        kvsieve.HiP(np.int64(64), window=three, extend=np.int64(64)),
        kvsieve.InfiniteHiP(stages=((np.int64(8), np.int64(64)),), refresh=(three,), wide_layers=np.int64(0)),
        kvsieve.Quest(np.int64(64), refresh=np.int64(2)),
        kvsieve.ThinK(np.float64(0.5), recent=three, skip_layers=(np.int64(1),)),
        kvsieve.Quantized(np.int64(8), group=np.int64(16)),
        kvsieve.InfLLM(np.int64(64), blocks=three, per_head=np.bool_(True)),
        kvsieve.LongHeads(np.int64(96), chunk=np.int64(16)),
        kvsieve.RefreshKV(np.int64(64), kernel=three, similarity=np.float64(0.5)),
        kvsieve.SelectiveV(np.int64(7), mass=np.float64(0.5)),
        kvsieve.StreamingLLM(64) >> kvsieve.MemoryBank(capacity=np.int64(64), top_k=np.int64(16), layers=np.array([1]).tolist()),
    ]
    for policy in many:
        assert "np." not in repr(policy)
        assert repr(kvsieve.methods.parse(repr(policy))) == repr(policy)


NO_COUNTS: tuple[Any, ...] = (True, 2.0, "x", None, -3, 2**60, float("nan"), np.float32(2), torch.tensor(3), [3], b"3")


@pytest.mark.parametrize("count", NO_COUNTS, ids=repr)
def test_what_is_no_count_is_refused_by_every_policy(count: Any) -> None:
    makers: list[Callable[[Any], Any]] = [
        lambda n: kvsieve.SirLLM(n),
        lambda n: kvsieve.SirLLM(64, sinks=n),
        lambda n: kvsieve.StreamingLLM(n),
        lambda n: kvsieve.LMInfinite(n),
        lambda n: kvsieve.H2O(n),
        lambda n: kvsieve.SnapKV(n),
        lambda n: kvsieve.HiP(n),
        lambda n: kvsieve.Quest(n),
        lambda n: kvsieve.Quantized(8, residual=n),
        lambda n: kvsieve.ThinK(recent=n),
        lambda n: kvsieve.ThinK(skip_layers=(n,)),
        lambda n: kvsieve.InfLLM(n),
        lambda n: kvsieve.LongHeads(n),
        lambda n: kvsieve.RefreshKV(n),
        lambda n: kvsieve.MemoryBank(capacity=n),
        lambda n: kvsieve.policy.TopKTokens(n),
        lambda n: kvsieve.policy.FixedDistance(n),
        lambda n: kvsieve.policy.Tiered(n),
    ]
    for make in makers:
        with pytest.raises(PolicyError) as caught:
            make(count)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.5, True, "0.5", 10**400, 1j], ids=str)
def test_what_is_no_share_is_refused(number: Any) -> None:
    makers: list[Callable[[Any], Any]] = [
        lambda x: kvsieve.SirLLM(64, decay=x),
        lambda x: kvsieve.ThinK(x),
        lambda x: kvsieve.SelectiveV(mass=x),
        lambda x: kvsieve.policy.Tiered("1MiB", decay=x),
    ]
    for make in makers:
        with pytest.raises(PolicyError):
            make(number)


@pytest.mark.parametrize(
    "text", [None, 3, b"full()", "full() " * 10_000, "(" * 3000, "full()\0", "sirllm(" + "9" * 5000 + ")", "full(**{1: 2})", ""]
)
def test_texts_that_are_no_policy_are_refused(text: Any) -> None:
    with pytest.raises(PolicyError):
        kvsieve.methods.parse(text)


def test_parts_that_are_none_make_no_policy() -> None:
    chain, banked, both = kvsieve.policy.Chain, kvsieve.policy.Banked, kvsieve.policy.PrunedAndQuantized
    window, bank = kvsieve.StreamingLLM(24), kvsieve.MemoryBank()
    makers: list[Callable[[], Any]] = [
        lambda: chain(3),  # type: ignore[arg-type]
        lambda: chain((window,)),  # type: ignore[arg-type]
        lambda: chain((kvsieve.Full(), window)),
        lambda: banked(window, 3),  # type: ignore[arg-type]
        lambda: banked(window >> bank, bank),
        lambda: both(kvsieve.policy.Plain(), kvsieve.policy.Plain()),
        lambda: kvsieve.Memory(text=3),  # type: ignore[arg-type]
    ]
    for make in makers:
        with pytest.raises(PolicyError):
            make()


def test_flags_that_are_none_are_refused() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        calls: list[Callable[[Any], Any]] = [
            lambda flag: stream.feed(tiny.ids(1, 5), pin=flag),
            lambda flag: stream.generate(tiny.ids(1, 5), max_new_tokens=1, pin=flag),
            lambda flag: stream.generate(tiny.ids(1, 5), max_new_tokens=1, end_turn=flag),
            lambda flag: stream.join([stream.fork()], canonical=flag),
        ]
        for call in calls:
            for flag in (1, "yes", None, torch.tensor([True, False])):
                with pytest.raises(ArgumentError) as caught:
                    call(flag)
                assert isinstance(caught.value, TypeError)
        assert stream.seen == 0


@pytest.mark.parametrize("path", [0, 3, None, b"x", "", "a\0b", "\ud800", True, [1], 2.5], ids=ascii)
def test_paths_that_are_none_are_refused(path: Any) -> None:
    """A number would be a file that is open already: 0 is what is typed."""
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        with pytest.raises(SaveError):
            stream.save(path)
        with pytest.raises(SessionError):
            kvsieve.load(path, tiny.model())
        with pytest.raises(BankError):
            kvsieve.MemoryBank.load(path)
        if path is not None:
            with pytest.raises(PolicyError):
                kvsieve.MemoryBank(path)


@pytest.mark.parametrize("path", ["/", ".", "folder", "folder/.."])
def test_a_bank_at_a_folder_is_refused_and_leaves_nothing_there(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some folders have no name, beside which a lock could lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    bank = kvsieve.MemoryBank(path, capacity=64, chunk=4, top_k=8)
    with pytest.raises(BankError, match="that is a folder"):
        bank.ingest(tiny.model(), tiny.ids(1, 20), window=16, backend="cpu")
    bank.close()
    assert [one.name for one in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("tokenizer", [3, "x", object()], ids=lambda one: type(one).__name__)
def test_what_is_no_tokenizer_is_refused(tokenizer: Any, tmp_path: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        stream.feed(tiny.ids(1, 5))
        with pytest.raises(ArgumentError, match="tokenizer"):
            stream.save(tmp_path / "a.session", tokenizer=tokenizer)
        assert not (tmp_path / "a.session").exists()


WRONG_ROWS: tuple[Any, ...] = (
    *(torch.tensor(x) for x in ([2], [-3], [[0]], 0, [0.5], [])),
    *(torch.tensor([0], device="meta"), torch.tensor([0]).to_sparse(), torch.tensor(0).expand(2**31), "x", None, 0, [True, 0]),
)


@pytest.mark.parametrize("index", WRONG_ROWS, ids=range(len(WRONG_ROWS)))
def test_a_cache_has_no_other_rows_than_its_own(index: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        stream.feed(tiny.ids(2, 20))
        for call in (stream.cache.reorder_cache, stream.cache.batch_select_indices):
            with pytest.raises(RangeError):
                call(index)
        assert [row.tolist() for row in stream.ids] == tiny.ids(2, 20).tolist()
        stream.cache.batch_select_indices(torch.tensor([-1, 0]))
        stream.cache.batch_select_indices(torch.tensor([False, True]))
        assert [row.tolist() for row in stream.ids] == tiny.ids(2, 20)[:1].tolist()


@pytest.mark.parametrize("count", [0, -1, True, 1.0, None, 2**31, 2**70])
def test_rows_are_repeated_a_number_of_times(count: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        stream.feed(tiny.ids(1, 5))
        with pytest.raises(RangeError):
            stream.cache.batch_repeat_interleave(count)
        assert len(stream.ids) == 1


@pytest.mark.parametrize("columns", [True, -0.5, None, "x", torch.tensor([-1, -1]), torch.tensor(True), -(2**70)])
def test_what_a_crop_takes_is_a_number_of_columns(columns: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        stream.feed(tiny.ids(1, 5))
        with pytest.raises(RangeError):
            stream.cache.crop(columns)
        assert stream.seen == 5
        stream.cache.crop(torch.tensor(-1))  # type: ignore[arg-type]
        assert stream.seen == 4


def test_a_layer_that_the_cache_does_not_have_is_refused() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(64), "cpu") as stream:
        for layer in (2, -1, None, "0", True, 2**70):
            with pytest.raises(RangeError):
                stream.cache.update(torch.zeros(1), torch.zeros(1), layer)  # type: ignore[arg-type]
        with pytest.raises(StateError, match="outside"):
            stream.cache.update(torch.zeros(1), torch.zeros(1), 0)


@BACKEND
def test_another_batch_size_is_refused(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(2, 20))
        before = positions(stream)
        with pytest.raises(CacheMismatchError, match=r"2 sequences.* 3"):
            forward(model, stream.cache, tiny.ids(3, 5))
        assert positions(stream) == before
        got = forward(model, stream.cache, tiny.ids(2, 5, 1))
    want = model(torch.cat([tiny.ids(2, 20), tiny.ids(2, 5, 1)], 1)).logits[:, 20:].detach()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@BACKEND
def test_positions_that_do_not_go_on_are_refused(backend: str) -> None:
    """A second turn without a mask over everything seen would be told positions from 0."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 20))
        with pytest.raises(CacheMismatchError, match="position"), torch.no_grad():
            model(tiny.ids(1, 5), position_ids=torch.arange(5)[None], past_key_values=stream.cache)
        assert stream.seen == 20
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


# -------------------------------------------------------------------------------------------------------- models that change


@BACKEND
def test_a_model_moved_to_another_dtype_is_refused(backend: str) -> None:
    for fed in (False, True):
        model = copy.deepcopy(tiny.model())
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            if fed:
                forward(model, stream.cache, tiny.ids(1, 20))
            model.to(torch.bfloat16)
            with pytest.raises(ShapeError, match=r"float32.*(bfloat16|16-bit)"):
                forward(model, stream.cache, tiny.ids(1, 5))
            model.to(torch.float32)
            assert forward(model, stream.cache, tiny.ids(1, 5)).dtype == torch.float32
            assert stream.seen == 20 * fed + 5


def test_a_backend_that_cannot_run_here_says_so() -> None:
    model = tiny.model()
    for name, match in (("cuda", "CUDA"), ("abacus", "known: reference, cpu")):
        with pytest.raises(BackendError, match=match):
            kvsieve.stream(model, kvsieve.Full(), name)
    assert model.config._attn_implementation != "kvsieve"


def test_a_dtype_the_backend_does_not_hold_is_refused() -> None:
    model = copy.deepcopy(tiny.model()).to(torch.float64)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert stream.stats().backend == "reference"
        torch.testing.assert_close(forwards(model, stream.cache, tiny.ids(1, 20), [15, 1]), model(tiny.ids(1, 20)).logits.detach())
    with pytest.raises(BackendError, match="float64"), kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        forward(model, stream.cache, tiny.ids(1, 5))


# ------------------------------------------------------------------------------------------------------ calls that cannot score


@BACKEND
def test_embeddings_are_fine_unless_tokens_are_scored(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    with torch.no_grad():
        embeds, want = model.get_input_embeddings()(ids), model(ids).logits
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            got = model(inputs_embeds=embeds, past_key_values=stream.cache).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
            with pytest.raises(StateError, match="input_ids, not inputs_embeds"):
                model(inputs_embeds=embeds, past_key_values=stream.cache)
            torch.testing.assert_close(forward(model, stream.cache, ids), want, atol=1e-4, rtol=0)


@BACKEND
def test_the_base_model_is_fine_unless_tokens_are_scored(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
        with kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), backend) as stream:
            got = model.model(ids, past_key_values=stream.cache).last_hidden_state
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            assert stream.seen == 20
        with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
            with pytest.raises(StateError, match="causal LM, not its base model"):
                model.model(ids, past_key_values=stream.cache)
            assert forward(model, stream.cache, ids).shape[1] == 20
            with pytest.raises(StateError, match="causal LM, not its base model"):
                model.model(ids, past_key_values=stream.cache)
            assert stream.seen == 20


@BACKEND
def test_probabilities_are_never_materialised(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        with pytest.raises(StateError, match="output_attentions"), torch.no_grad():
            model(tiny.ids(1, 5), past_key_values=stream.cache, output_attentions=True)
        assert stream.seen == 0
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


def test_a_cache_that_is_not_used_is_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        with pytest.raises(StateError, match="use_cache"), torch.no_grad():
            model(tiny.ids(1, 5), past_key_values=stream.cache, use_cache=False)
        assert forward(model, stream.cache, tiny.ids(1, 5)).shape[1] == 5


def test_another_attention_set_inside_the_block_is_the_models_and_not_the_streams() -> None:
    model, text = copy.deepcopy(tiny.model()), tiny.ids(1, 5)
    want = tiny.model()(text).logits
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        model.set_attn_implementation("eager")
        torch.testing.assert_close(forward(model, stream.cache, text), want)
        assert stream.seen == 5
        assert model(text, output_attentions=True).attentions[0].shape == (1, 4, 5, 5)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}


@BACKEND
@pytest.mark.parametrize("amount", [1, -21, -100])
def test_a_crop_beyond_what_was_seen_is_refused(amount: int, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 20))
        with pytest.raises(ValueError):  # noqa: PT011
            stream.cache.crop(amount)
        assert stream.seen == 20
        stream.cache.crop(0)
        stream.cache.crop(-20)
        assert stream.seen == 0


# ------------------------------------------------------------------------------------------------------------ unsupported models

SMALL: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = dict(
    **SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
GPT: dict[str, Any] = dict(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)

# Attention that bypasses the interface is found either when it is set, or when no layer calls it.
ELSEWHERE = r"(:| does not dispatch|, layer 0:) .*(AttentionInterface|no rotation explains)"
"""Attention that goes another way; of GPT-J and CodeGen, which dispatch it from 5.24 on, the rotation does."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (
        lambda: _made("Bloom", hidden_size=32, n_layer=2, n_head=4, **SMALL),
        f"BloomForCausalLM{ELSEWHERE}",
    ),
    "gptj": (lambda: _made("GPTJ", **GPT), f"GPTJForCausalLM{ELSEWHERE}"),
    "codegen": (lambda: _made("CodeGen", **GPT), f"CodeGenForCausalLM{ELSEWHERE}"),
    "falcon": (
        lambda: _made("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SMALL),
        f"FalconForCausalLM{ELSEWHERE}",
    ),
    "mpt": (lambda: _made("Mpt", d_model=32, n_heads=4, n_layers=2, **SMALL), f"MptForCausalLM{ELSEWHERE}"),
    "gpt_neo": (
        lambda: _made(
            "GPTNeo",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
            **SMALL,
        ),
        f"GPTNeoForCausalLM{ELSEWHERE}",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "deepseek_v3": (
        lambda: _made(
            "DeepseekV3",
            **{**LLAMA, "num_key_value_heads": 4},
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=4,
            moe_intermediate_size=16,
        ),
        "DeepseekV3ForCausalLM uses multi-head latent attention",
    ),
    "gemma3n": (
        lambda: transformers.Gemma3nForCausalLM(
            transformers.Gemma3nTextConfig(
                **{**LLAMA, "intermediate_size": [48] * 4},
                num_kv_shared_layers=2,
                layer_types=["sliding_attention", "full_attention"] * 2,
                vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8,
                altup_num_inputs=2,
                laurel_rank=4,
                activation_sparsity_pattern=[0.0] * 4,
            )
        ),
        "Gemma3nForCausalLM shares keys and values between layers",
    ),
    "mistral_all_sliding": (
        lambda: _made("Mistral", **LLAMA, sliding_window=32),
        "every layer of this MistralForCausalLM already slides over 32 tokens",
    ),
    "base_model": (lambda: tiny.model().model, "LlamaModel has no language-model head"),
}


def _made(name: str, **values: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**values)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_that_cannot_be_served_is_refused_by_name(name: str) -> None:
    make, match = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    before, hooks = model.config._attn_implementation, _hooks(model)
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "reference")
    assert isinstance(caught.value, NotImplementedError)
    assert model.config._attn_implementation == before
    assert _hooks(model) == hooks
    if name not in ("t5", "base_model"):
        with torch.no_grad():
            assert model(tiny.ids(1, 10) % 60).logits.isfinite().all()


def test_what_is_no_model_is_refused() -> None:
    for thing in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
            kvsieve.stream(thing, kvsieve.Full(), "reference")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_frequencies_that_depend_on_the_length_cannot_be_re_placed(policy: str) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = transformers.LlamaForCausalLM(tiny.config("llama", rope_parameters=rope)).eval()
    before = model.config._attn_implementation
    if not tiny.POLICIES[policy](64).moves:
        with kvsieve.stream(model, tiny.POLICIES[policy](64), "reference") as stream:
            assert torch.equal(greedy(model, tiny.ids(1, 20), 5, past_key_values=stream.cache), greedy(model, tiny.ids(1, 20), 5))
    else:
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*dynamic NTK"):
            kvsieve.stream(model, tiny.POLICIES[policy](64), "reference")
    assert model.config._attn_implementation == before


def test_models_without_positions_take_only_policies_that_do_not_move() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = tiny.ids(1, 20) % 60
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no rotary positions"):
        kvsieve.stream(model, kvsieve.StreamingLLM(budget=64), "reference")
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        torch.testing.assert_close(forwards(model, stream.cache, ids, [15, 1]), model(ids).logits.detach(), atol=1e-4, rtol=0)


def test_what_is_no_policy_is_refused() -> None:
    for thing in ("sirllm(64)", 64, None, kvsieve.SirLLM, kvsieve.methods.streaming_llm.Window(64)):
        with pytest.raises(PolicyError, match="a stream needs a policy such as"):
            kvsieve.stream(tiny.model(), thing, "reference")  # type: ignore[arg-type]
