"""Numbers, rows, ranges, flags and paths that are none fail early, by name; and leave the stream as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import positions
from kvsieve.errors import ArgumentError, BankError, PolicyError, RangeError, SaveError, SessionError, StateError


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


def test_what_is_no_policy_is_refused() -> None:
    for thing in ("sirllm(64)", 64, None, kvsieve.SirLLM, kvsieve.methods.streaming_llm.Window(64)):
        with pytest.raises(PolicyError, match="a stream needs a policy such as"):
            kvsieve.stream(tiny.model(), thing, "reference")  # type: ignore[arg-type]
