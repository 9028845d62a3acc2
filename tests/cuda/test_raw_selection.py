"""Selections from pre-RoPE keys on the emulated CUDA backend: a text beyond the trained length, and what SirLLM retained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emulator
import kvsieve
import pytest
import raw_cases
import search_cases
import tiny
import torch
from drive import forwards
from kvsieve.errors import UnsupportedError
from raw_cases import MODES, RULES, Mode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """The emulated backend, with four multiprocessors so that keys and chunks are split."""
    with emulator.emulated(emulator.Emulator(processors=4)) as made:
        yield made


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(RULES))
def test_a_layer_is_the_references(kind: str, mode: Mode, seed: int) -> None:
    raw_cases.layer(kind, mode, CPU, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_in_half_precision(mode: Mode, dtype: torch.dtype) -> None:
    raw_cases.layer("infinite", mode, CPU, dtype, size=64)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_tokens_stand_in_slots(kind: str, seed: int) -> None:
    raw_cases.slots(kind, CPU, seed)


EXTENDED = {
    "hip": lambda extend: search_cases.hip_policy(extend=extend, dense_layers=0),
    "quest": lambda extend: kvsieve.Quest(32, candidates=2, sinks=0, window=64, query_block=16, query_stride=3, extend=extend),
}


@pytest.mark.parametrize("family", ["llama", "glm4"])
@pytest.mark.parametrize("extend", [40, 400])
@pytest.mark.parametrize("name", list(EXTENDED))
def test_a_model_equals_the_reference(name: str, extend: int, family: str) -> None:
    """Within the length and beyond it."""
    search_cases.model(family, EXTENDED[name](extend), CPU)


@pytest.mark.parametrize("name", list(EXTENDED))
def test_streams_fork_beam_crop_and_save(name: str, tmp_path: Path) -> None:
    search_cases.loops(EXTENDED[name](90), CPU, tmp_path)


def test_where_tokens_were_taken_out_they_cannot_be_placed() -> None:
    model, policy = tiny.model(), search_cases.hip_policy(extend=200)
    with kvsieve.stream(model, policy, "cuda") as stream:
        forwards(model, stream.cache, tiny.ids(1, 80), [80])
        stream.evict(20, 30)
        with pytest.raises(UnsupportedError, match="taken out"):
            forwards(model, stream.cache, tiny.ids(1, 1, 2), [1])
