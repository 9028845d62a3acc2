"""The tensors of sliding layers, without a model: every step and every change against a naive twin that forgets nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kvsieve.backends.base import AttendCall
from kvsieve.errors import CacheMismatchError, SessionError, ShapeError, StateError
from kvsieve.runtime.part import Crop, Forward, LayerInput, Saved
from kvsieve.runtime.sliding import SlidingLayers
from kvsieve.runtime.sliding_attention import QUERIES

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
CALLS = {
    "plain": AttendCall(0.3),
    "softcap": AttendCall(0.3, softcap=2.0),
    "sinks": AttendCall(0.3, sink_logits=torch.tensor([-1.0, 0.5, 2.0, 8.0])),
    "both": AttendCall(0.3, softcap=2.0, sink_logits=torch.tensor([-1.0, 0.5, 2.0, 8.0])),
}


def made(windows: dict[int, int]) -> SlidingLayers:
    none: Any = None
    return SlidingLayers(windows, none)


def begun(layers: SlidingLayers, seen: list[int], lens: list[int], width: int, verifying: bool = False) -> Forward:
    forward = Forward(lens, width, seen, verifying)
    layers.begin(forward)
    return forward


class Naive:
    """Every token of every row, in a list; a query reads the last `size` of them, its own included, in float64."""

    def __init__(self, size: int, call: AttendCall) -> None:
        self.size, self.call = size, call
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int]) -> list[torch.Tensor]:
        """Outputs ``[lens[row], H, Dv]`` of each row."""
        width = q.shape[2]
        self.rows = self.rows or [[] for _ in lens]
        outs = []
        for row, count in enumerate(lens):
            out = []
            for at in range(width - count, width):
                self.rows[row].append((k[row, :, at].double(), v[row, :, at].double()))
                out.append(self.read(q[row, :, at].double(), self.rows[row][-self.size :]))
            outs.append(torch.stack(out) if out else torch.zeros(0, HEADS, VALUE_DIM, dtype=torch.float64))
        return outs

    def read(self, query: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        out = []
        keys, values = (torch.stack(tensors) for tensors in zip(*seen))
        for head in range(HEADS):
            logits = keys[:, head // 2] @ query[head] * self.call.scale
            if self.call.softcap is not None:
                logits = torch.tanh(logits / self.call.softcap) * self.call.softcap
            weights = logits.exp()
            below = weights.sum() + (0 if self.call.sink_logits is None else self.call.sink_logits[head].double().exp())
            out.append(weights / below @ values[:, head // 2])
        return torch.stack(out)


class Both:
    """Layers under test and their twin, driven alike."""

    def __init__(self, size: int, call: AttendCall, seed: int = 0) -> None:
        self.layers, self.naive, self.call = made({3: size}), Naive(size, call), call
        self.made = torch.Generator().manual_seed(seed)

    @property
    def seen(self) -> list[int]:
        return [len(row) for row in self.naive.rows]

    def make(self, batch: int, width: int) -> list[torch.Tensor]:
        shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
        return [torch.randn(batch, heads, width, dim, generator=self.made) for heads, dim in shapes]

    def step(self, lens: list[int], width: int, verifying: bool = False) -> None:
        q, k, v = self.make(len(lens), width)
        forward = begun(self.layers, self.seen or [0] * len(lens), lens, width, verifying)
        got = self.layers.attend(LayerInput(3, q, k, v, self.call, forward))
        assert got is not None
        assert got.shape == (len(lens), width, HEADS, VALUE_DIM)
        assert got.isfinite().all()
        for row, want in enumerate(self.naive.step(q, k, v, lens)):
            torch.testing.assert_close(got[row, width - lens[row] :].double(), want, rtol=0, atol=2e-5)
        self.layers.commit(forward)()

    def crop(self, counts: list[int]) -> None:
        crop = Crop(self.seen, counts, None, keeps_pins=False)
        self.layers.check_crop(crop)
        self.layers.crop(crop)()
        self.naive.rows = [row[: len(row) - count] for row, count in zip(self.naive.rows, counts)]

    def select(self, rows: list[int]) -> None:
        self.layers.select_rows(rows)()
        self.naive.rows = [list(self.naive.rows[row]) for row in rows]

    def saved(self) -> None:
        """Go on from a session file."""
        saved = self.layers.save()
        self.layers = made(self.layers.windows)
        tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
        self.layers.restore(Saved(saved.data, tensors, seen=self.seen))


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_any_sequence_of_steps_and_changes_is_what_the_twin_says(size: int, call: str) -> None:
    for seed in range(3):
        lot, both = random.Random(seed), Both(size, CALLS[call], seed)
        batch = lot.choice([1, 3])
        states: list[Any] = []
        for _ in range(30):
            what = lot.choice(["step", "step", "step", "one", "crop", "select", "save", "mark", "rewind", "verify"])
            width = lot.randint(1, 7)
            if what == "step" or not both.seen:
                both.step([lot.randint(0, width) for _ in range(batch)], width)
            elif what == "one":
                both.step([1] * batch, 1)
            elif what == "crop":
                counts = [lot.randint(0, min(3, seen)) for seen in both.seen]
                before = both.layers.now
                exact = all(
                    not n or min(s - n, size - 1) <= max(had - n, 0) for n, s, had in zip(counts, both.seen, before.counts[size])
                )
                if exact:
                    both.crop(counts)
                else:
                    with pytest.raises(CacheMismatchError, match=f"sliding window of {size} tokens"):
                        both.crop(counts)
                    assert both.layers.now is before
            elif what == "verify":
                both.step([width] * batch, width, verifying=True)
                both.crop([lot.randint(0, width) for _ in range(batch)])
            elif what == "select":
                batch = lot.choice([1, 2, 3])
                both.select([lot.randrange(len(both.seen)) for _ in range(batch)])
            elif what == "save":
                both.saved()
            elif what == "mark":
                states.append((both.layers.now, [list(row) for row in both.naive.rows]))
            elif states:
                both.layers.now, rows = states[-1]
                both.naive.rows, batch = [list(row) for row in rows], len(rows)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("lens", [[QUERIES + 70], [QUERIES + 70, QUERIES + 3, 0]])
def test_a_prompt_in_several_pieces(lens: list[int], call: str) -> None:
    both = Both(40, CALLS[call])
    both.step(lens, QUERIES + 70)
    both.step(lens, QUERIES + 70)
    both.step([1] * len(lens), 1)


def test_a_step_that_died_leaves_what_was_held() -> None:
    both = Both(5, CALLS["plain"])
    both.step([4, 4], 4)
    before, held = both.layers.now, {name: t.clone() for name, t in both.layers.save().tensors.items()}
    forward = begun(both.layers, both.seen, [3, 3], 3)
    both.layers.attend(LayerInput(3, *both.make(2, 3), both.call, forward))
    both.layers.rollback()
    assert both.layers.now is before
    assert all(torch.equal(held[name], t) for name, t in both.layers.save().tensors.items())
    both.step([2, 1], 2)


def test_a_step_without_all_layers_does_not_count() -> None:
    layers = made({0: 4, 2: 4})
    forward = begun(layers, [0], [3], 3)
    layers.attend(LayerInput(0, *Both(4, CALLS["plain"]).make(1, 3), CALLS["plain"], forward))
    with pytest.raises(StateError, match=r"\[2\]"):
        layers.commit(forward)


def test_attending_needs_an_open_step_of_that_width() -> None:
    both = Both(4, CALLS["plain"])
    with pytest.raises(StateError, match="no open step of 3"):
        both.layers.attend(LayerInput(3, *both.make(1, 3), both.call, Forward([3], 3, [0])))
    forward = begun(both.layers, [0], [2], 2)
    with pytest.raises(StateError, match="no open step of 3"):
        both.layers.attend(LayerInput(3, *both.make(1, 3), both.call, forward))


@pytest.mark.parametrize("rows", [[], [0, 2], [-1]])
def test_rows_that_are_not_held_are_refused(rows: list[int]) -> None:
    both = Both(4, CALLS["plain"])
    both.step([3, 2], 3)
    with pytest.raises(CacheMismatchError, match="holds rows 0 to 1"):
        both.layers.select_rows(rows)


def test_keys_of_another_shape_are_refused() -> None:
    both = Both(4, CALLS["plain"])
    both.step([3], 3)
    forward = begun(both.layers, both.seen, [1], 1)
    q, k, v = both.make(1, 1)
    with pytest.raises(ShapeError, match="open a new stream"):
        both.layers.attend(LayerInput(3, q, k.repeat(1, 2, 1, 1), v, both.call, forward))


def test_bytes_held_are_those_of_the_windows() -> None:
    both = Both(16, CALLS["plain"])
    both.step([300, 300], 300)
    token = 2 * KV_HEADS * (DIM + VALUE_DIM) * 4
    assert both.layers.bytes_held == 15 * token
    for _ in range(20):
        both.step([1, 1], 1)
        # One token more, because a view of the buffer that was read is kept.
        assert both.layers.bytes_held <= 16 * token
    both.layers.reset()
    assert both.layers.bytes_held == 0


def test_other_windows_and_broken_files_are_refused() -> None:
    both = Both(16, CALLS["plain"])
    both.step([30, 20], 30)
    saved = both.layers.save()
    with pytest.raises(CacheMismatchError, match=r"\{3: 16\}.*\{3: 8\}"):
        made({3: 8}).restore(saved)
    cut = {name: t[:, :, 1:] for name, t in saved.tensors.items()}
    with pytest.raises(SessionError, match=r"14, \d+\], which does not fit"):
        made({3: 16}).restore(Saved(saved.data, cut, seen=both.seen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for call in CALLS.values():
        layers, naive, both = made({3: 12}), Naive(12, call), Both(12, call)
        seen = 0
        for width in (20, 1, 5):
            q, k, v = (t.to(dtype) for t in both.make(2, width))
            forward = begun(layers, [seen] * 2, [width] * 2, width)
            got = layers.attend(LayerInput(3, q, k, v, call, forward))
            assert got is not None
            assert got.dtype == dtype
            want = torch.stack(naive.step(q, k, v, [width] * 2))
            torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)
            layers.commit(forward)()
            seen += width


def test_mixed_dtypes_are_widened_and_nothing_is_lost() -> None:
    both, layers = Both(12, CALLS["plain"]), made({3: 12})
    q, k, v = both.make(1, 8)
    forward = begun(layers, [0], [8], 8)
    layers.attend(LayerInput(3, q, k, v, both.call, forward))
    layers.commit(forward)()
    forward = begun(layers, [8], [2], 2)
    q2, k2, v2 = both.make(1, 2)
    out = layers.attend(LayerInput(3, q2, k2.bfloat16(), v2.bfloat16(), both.call, forward))
    assert out is not None
    assert out.dtype == torch.bfloat16
    layers.commit(forward)()
    keys, _ = layers.now.tensors[3]
    assert torch.equal(keys[:, :, :8], k)
    want = torch.stack(Naive(12, both.call).step(torch.cat([q, q2], 2), torch.cat([k, k2], 2), torch.cat([v, v2], 2), [10]))
    torch.testing.assert_close(out.double(), want[:, 8:], rtol=0, atol=0.05)
