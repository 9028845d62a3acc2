"""Rotations that are made once: bit for bit those that every layer would make for itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forwards
from kvsieve import methods
from kvsieve.facts import LayerRope

POLICIES = ["infllm", "longheads", "streaming-llm", "lm-infinite"]


def rope(pairs: int, layout: Any = "half", factor: float = 1.0) -> LayerRope:
    return LayerRope(1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs), layout, factor)


def one_by_one(self: LayerRope, x: torch.Tensor, places: Sequence[range], *, factor: bool = True) -> torch.Tensor:
    """What `rotate_to` is by its definition."""
    at = torch.tensor([position for run in places for position in run])
    return self.rotate(x, at.expand(x.shape[-2]) if len(at) == 1 else at, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_runs_of_positions_are_rotated_as_each_position_is(layout: Any, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for seed in range(40):
        torch.manual_seed(seed)
        pairs = rng.choice([1, 3, 8, 16, 32])
        turn = rope(pairs, layout, rng.choice([1.0, 1.3]))
        for _ in range(4):
            starts = [rng.choice([0, rng.randrange(40), rng.randrange(5000)]) for _ in range(rng.randint(1, 4))]
            places = [range(start, start + rng.choice([1, 2, 7, 64, 200])) for start in starts]
            count = sum(map(len, places))
            x = torch.randn(3, count if count > 1 else rng.randint(1, 9), 2 * pairs + rng.choice([0, 4]), dtype=dtype)
            factor = rng.random() < 0.5
            assert torch.equal(turn.rotate_to(x, places, factor=factor), one_by_one(turn, x, places, factor=factor))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_at_distance_zero_nothing_turns(factor: float, layout: Any) -> None:
    turn, x = rope(16, layout, factor), torch.randn(2, 5, 40)
    for scaled in (False, True):
        assert torch.equal(turn.rotate_to(x, [range(1)], factor=scaled), one_by_one(turn, x, [range(1)], factor=scaled))


@pytest.mark.parametrize("distance", [1, 95, 4000])
def test_turning_back_is_turning_by_the_same_angles(distance: int) -> None:
    turn, x = rope(16), torch.randn(2, 5, 32)
    cos, sin = turn.span(distance, 1, x)
    assert torch.equal(turn.turn(x, (cos, -sin)), turn.rotate(x, torch.full((5,), -distance)))


def test_layers_that_rotate_alike_share_one_rotation() -> None:
    found: dict[str, list[int]] = {}
    for family in ("llama", "gemma3", "smollm3", "glm4"):
        with kvsieve.stream(tiny.model(family), kvsieve.Full()) as stream:
            ropes = [layer.rope for layer in stream._engine.facts.layers]
            found[family] = [-1 if one is None else ropes.index(one) for one in ropes]
    assert found == {"llama": [0, 0], "gemma3": [0, 0], "smollm3": [0, 0, -1], "glm4": [0, 0]}


def test_rotations_that_differ_are_not_shared() -> None:
    turn = rope(8)
    assert turn.equals(rope(8))
    others = [rope(4), rope(8, "interleaved"), rope(8, factor=1.5), LayerRope(turn.inv_freq * 2, "half")]
    assert not any(turn.equals(other) for other in others)


def policy(name: str) -> Any:
    return methods.parse(next(system.small for system in methods.SYSTEMS if system.page == name))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_those_of_rotations_made_anew(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks and single tokens: with a rotation for every layer, made each time, and with a shared one."""
    model, ids, answers = tiny.model(num_hidden_layers=3), tiny.ids(1, 330), []
    for shared in (False, True):
        with monkeypatch.context() as patch, kvsieve.stream(model, policy(name), backend) as stream:
            if not shared:
                facts = stream._engine.facts
                for layer in facts.layers:
                    assert layer.rope is not None
                    own = LayerRope(layer.rope.inv_freq, layer.rope.layout, layer.rope.factor)
                    patch.setitem(vars(layer), "rope", own)
                patch.setattr(LayerRope, "rotate_to", one_by_one)
            answers.append(forwards(model, stream.cache, ids, [150, 130, 40, 1]))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", POLICIES)
def test_more_layers_need_no_more_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, table = [0], LayerRope.table

    def counted(self: LayerRope, *args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        return table(self, *args, **kwargs)

    counts = []
    for layers in (1, 4):
        model = tiny.fresh(num_hidden_layers=layers)
        with kvsieve.stream(model, policy(name), "cpu") as stream, monkeypatch.context() as patch:
            made[0] = 0
            patch.setattr(LayerRope, "table", counted)
            forwards(model, stream.cache, tiny.ids(1, 330), [150, 130, 40, 1])
            counts.append(made[0])
    assert counts[0] == counts[1]
    assert (counts[0] == 0) == (not policy(name).moves)
