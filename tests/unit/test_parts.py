"""A feature with a state of its own is a part: here one that counts, given to streams by one row and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward
from kvsieve.errors import StateError
from kvsieve.runtime import parts
from kvsieve.runtime.part import Apply, Crop, Forward, LayerInput, Saved, Setting, StreamPart


class Counter(StreamPart):
    """Tokens that each row has read, by what it was told alone."""

    name = "counter"
    refuses = False

    def __init__(self) -> None:
        self.read: list[int] = []
        self.calls: list[str] = []

    @classmethod
    def of(cls, setting: Setting) -> Counter:
        return cls()

    def begin(self, forward: Forward) -> None:
        assert forward.step is None
        self.calls.append("begin")

    def attend(self, layer: LayerInput) -> torch.Tensor | None:
        assert layer.forward.step is not None
        self.calls.append(f"attend {layer.index}")
        return None

    def commit(self, forward: Forward) -> Apply:
        self.calls.append("commit")
        if self.refuses:
            raise StateError("refused before anything changed")
        now = [old + new for old, new in zip(self.read or [0] * len(forward.lens), forward.lens)]
        return lambda: self._apply("committed", now)

    def _apply(self, name: str, read: list[int]) -> None:
        self.calls.append(name)
        self.read = read

    def rollback(self) -> None:
        self.calls.append("rollback")

    def evict(self, force: bool, turn_ended: bool) -> None:
        self.calls.append("evict")

    def settled(self, turn_ended: bool) -> None:
        self.calls.append("settled")

    def crop(self, crop: Crop) -> Apply:
        return lambda: self._apply("cropped", [old - gone for old, gone in zip(self.read, crop.counts)])

    def select_rows(self, rows: Sequence[int]) -> Apply:
        return lambda: self._apply("selected", [self.read[row] for row in rows])

    def state(self) -> Any:
        return list(self.read)

    def return_to(self, state: Any) -> None:
        self.read = list(state)

    def save(self) -> Saved:
        return Saved({"rows": len(self.read)}, {"read": torch.tensor(self.read)})

    def restore(self, saved: Saved) -> None:
        self.read = saved.tensors["read"].tolist()
        assert len(self.read) == saved.data["rows"]

    def reset(self) -> None:
        self.read = []


@pytest.fixture(autouse=True)
def _with_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before what attends, or the layers of some policies would not reach it.
    monkeypatch.setattr(parts, "KINDS", (Counter, *parts.KINDS))


POLICIES = {
    "full": kvsieve.Full,
    "sirllm": lambda: kvsieve.SirLLM(40, recent=8),
    "h2o": lambda: kvsieve.H2O(40, recent=8),
    "think": lambda: kvsieve.ThinK(0.5, recent=8),
    "hip": lambda: kvsieve.HiP(16, sinks=2, window=4, dense_layers=0),
}
EVERY = pytest.mark.parametrize("policy", list(POLICIES))


def counter(stream: kvsieve.Stream) -> Counter:
    return stream._engine.parts.the(Counter)


def in_step(stream: kvsieve.Stream) -> bool:
    return counter(stream).read == stream._engine.blocks.seen


@EVERY
def test_the_order_of_one_forward(policy: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, POLICIES[policy](), "cpu") as stream:
        forward(model, stream.cache, tiny.ids(1, 12))
        layers = [f"attend {layer.index}" for layer in stream._engine.facts.layers]
        assert counter(stream).calls == ["begin", *layers, "commit", "committed", "evict", "settled"]


@EVERY
def test_a_part_goes_wherever_its_stream_goes(policy: str, tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, POLICIES[policy](), "cpu") as stream:
        stream.feed(tiny.ids(2, 30))
        mark = stream.mark()
        stream.feed(tiny.ids(2, 6))
        assert counter(stream).read == [36, 36]
        with stream.fork() as child:
            child.feed(tiny.ids(2, 5))
            assert (counter(child).read, counter(stream).read) == ([41, 41], [36, 36])
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        assert counter(stream).calls[-1] == "selected"
        stream.save(tmp_path / "stream.safetensors")
        stream.rewind(mark)
        assert counter(stream).read == [30, 30]
        stream.reset()
        assert counter(stream).read == []
    with kvsieve.load(tmp_path / "stream.safetensors", model) as loaded:
        assert counter(loaded).read == [36, 36]
        loaded.feed(tiny.ids(2, 3))
        assert in_step(loaded)


@EVERY
def test_a_crop_takes_it_along_or_leaves_it_alone(policy: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, POLICIES[policy](), "cpu") as stream:
        stream.feed(tiny.ids(1, 20))
        before = list(counter(stream).calls)
        if policy == "h2o":
            with pytest.raises(StateError, match="cannot forget 4 tokens"):
                stream.cache.crop(-4)
            assert (counter(stream).calls, counter(stream).read) == (before, [20])
        else:
            stream.cache.crop(-4)
            assert (counter(stream).calls[-1], counter(stream).read) == ("cropped", [16])


@EVERY
def test_a_forward_that_a_part_refuses_never_was(policy: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 24)
    with kvsieve.stream(model, POLICIES[policy](), "cpu") as stream:
        forward(model, stream.cache, ids[:, :12])
        counter(stream).refuses = True
        with pytest.raises(StateError, match="refused before"):
            forward(model, stream.cache, ids[:, 12:])
        counter(stream).refuses = False
        got = forward(model, stream.cache, ids[:, 12:])
        assert "rollback" in counter(stream).calls
        assert in_step(stream)
    with kvsieve.stream(model, POLICIES[policy](), "cpu") as stream:
        forward(model, stream.cache, ids[:, :12])
        assert torch.equal(got, forward(model, stream.cache, ids[:, 12:]))
