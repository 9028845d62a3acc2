"""Kernels of SelectiveV, RefreshKV and Quest under the emulator, and Quest's layer, stores and streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulator
import kvsieve
import pytest
import search_cases
import telling_cases
import torch
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.backend import CudaBackend
from kvsieve.errors import PolicyError, ShapeError, UnsupportedError
from operations import ops
from telling_cases import quest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """The emulated backend, with four multiprocessors so that keys and chunks are split."""
    with emulator.emulated(emulator.Emulator(processors=4)) as made:
        yield made


@pytest.mark.parametrize("case", telling_cases.TOLD, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_what_attention_tells_of_keys(case: Any) -> None:
    telling_cases.told(case, CPU)


@pytest.mark.parametrize("case", telling_cases.ADDED, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_values_are_added_up(case: Any) -> None:
    telling_cases.add_values(case, CPU)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.bfloat16, 96), (torch.float16, 256)], ids=str)
def test_bounds_of_blocks(dtype: torch.dtype, size: int) -> None:
    telling_cases.page_bounds(dtype, size, CPU)


def test_what_does_not_fit_is_refused() -> None:
    given = {"columns": torch.zeros(1, 4, 3, dtype=torch.int64), "weights": torch.zeros(1, 4, 3)}
    given |= {"items": torch.zeros(1, dtype=torch.int32), "blocks": torch.zeros(1, 4, dtype=torch.int64)}
    given |= {"starts": torch.zeros(2, dtype=torch.int32), "spans": torch.zeros(0, 4, dtype=torch.int32)}
    whole: dict[str, Any] = {**given, "kv_heads": 2, "value_dim": 16, "dtype": torch.float32}
    for change in (
        {"weights": torch.zeros(1, 4, 2)},
        {"items": torch.zeros(0, dtype=torch.int32)},
        {"kv_heads": 3},
        {"format": [8, 0, 0, 32]},
        {"columns": torch.zeros(1, 4, 3)},
    ):
        with pytest.raises(ShapeError):
            ops.add_values(**{**whole, **change})
    with pytest.raises(ShapeError):
        ops.page_bounds(given["blocks"], torch.zeros(1), 2, 16, torch.float32)


def test_heads_sets_of_keys_before_rope_are_refused() -> None:
    tested = telling_cases.quest_layer(1, torch.float32, 16, CPU, 0)
    step, new = SimpleNamespace(stored_keys="pre_rope"), torch.zeros(1, 1, 1, 16)
    with pytest.raises(UnsupportedError, match="pre-RoPE"):
        tested.store.run_with_sets(new, new, new, step, AttendCall(1.0), [None])


# ----------------------------------------------------------------------------------------------------------------------- Quest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [1, 3])
def test_a_layer_is_the_definition(group: int, seed: int) -> None:
    telling_cases.quest_layer(group, torch.float32, 16, CPU, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_in_half_precision(dtype: torch.dtype) -> None:
    telling_cases.quest_layer(4, dtype, 64, CPU, 1)


def test_a_block_is_bounded_once_and_anew_when_it_was_written(launcher: emulator.Emulator) -> None:
    tested = telling_cases.quest_layer(1, torch.float32, 16, CPU, 0)
    launcher.launches = []

    def bounded() -> int:
        found = sum(grid[0] for module, grid, _, _ in launcher.launches or [] if module.file == "page_bounds.cu")
        launcher.launches = []
        return found

    for width in (1, 63, 64):
        before = [row.seen // 64 for row in tested.rows]
        tested.feed(width)
        assert bounded() == sum(row.seen // 64 for row in tested.rows) - sum(before)
    held = tested.store.held()
    assert 0 < held.bounds <= (held.plain_keys + held.plain_values) // 32
    runs = tested.planner.runs(0, 0)[1:3]
    tested.store.write(runs, *tested.store.read(runs))
    tested.feed(1)
    assert bounded() == len(runs)


def test_blocks_that_are_not_those_of_the_text() -> None:
    tested = telling_cases.quest_layer(1, torch.float32, 16, CPU, 0)
    asked = tested.backend.context.plan(tested.planner.begin([1] * len(tested.rows), 1, True, False), CPU).residents()
    asked.runs[0][1, 2] = 60
    with pytest.raises(UnsupportedError, match="not whole"):
        asked.whole_blocks()


@pytest.mark.parametrize("change", [{"sinks": 16}, {"window": 63}, {"stages": ((32, 64), (2, 32))}], ids=str)
def test_rules_that_cannot_be_right(change: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="page bounds"):
        CudaBackend().make_selection(quest(**change))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_equals_the_reference(family: str) -> None:
    policy = kvsieve.Quest(32, candidates=2, sinks=0, window=64, query_block=16, query_stride=3)
    search_cases.model(family, policy, CPU)


def test_streams_fork_beam_crop_and_save(tmp_path: Path) -> None:
    search_cases.loops(kvsieve.Quest(32, candidates=2, sinks=0, window=64, query_block=16, query_stride=3), CPU, tmp_path)
