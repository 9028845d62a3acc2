"""Blocks in a file, store by store: whatever comes and goes, what is read is what a store without a file holds."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tier_cases
import torch
from kvsieve import backends
from kvsieve.errors import BudgetError, PolicyError, TierError, TierFullError, UnsupportedError
from kvsieve.policy import Memory, Tiered
from tier_cases import DIM, HEADS, Twins
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@BACKEND
@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_changes_an_output(backend: str, seed: int, tmp_path: Path) -> None:
    tier_cases.schedule(backend, seed, tmp_path)


@BACKEND
def test_what_is_not_in_memory_is_never_read(backend: str, tmp_path: Path) -> None:
    tier_cases.never_read(backend, tmp_path)


@BACKEND
@pytest.mark.parametrize("later", [False, True])
def test_what_fits_the_capacity_stays(later: bool, backend: str, tmp_path: Path) -> None:
    tier_cases.what_fits_stays(backend, tmp_path, later)


@BACKEND
def test_memory_is_given_back(backend: str, tmp_path: Path) -> None:
    twins = Twins(backend, tmp_path, capacity=3, rows=1)
    block = 64 * 2 * HEADS * DIM * 4
    for _ in range(10):
        twins.feed(twins.planners[0], [64])
        twins.tiered.trim([])
        assert len(tier_cases.in_memory(twins.tiered, twins.runs(twins.planners[0]))) <= 3
        # The reference frees nothing.
        assert backend == "reference" or twins.tiered.bytes_held <= 3 * block
    used, size = twins.file.bytes()
    assert used >= 7 * block
    assert size >= used
    assert twins.tiered.tier_counts().bytes_in_file == used
    del twins.tiered
    gc.collect()
    assert twins.file.bytes()[0] == 0


@BACKEND
def test_the_order_in_which_blocks_leave(backend: str, tmp_path: Path) -> None:
    def spilled(twins: Twins, **scores: float) -> list[int]:
        before = twins.tiered.tier_counts().spills
        twins.tiered.trim([6])
        assert twins.tiered.tier_counts().spills == before + 3
        gone = []
        for block in range(7):
            loads = twins.tiered.tier_counts().loads
            twins.tiered.hold([block])
            gone += [block] if twins.tiered.tier_counts().loads > loads else []
        return gone

    recent = Twins(backend, tmp_path, capacity=4, rows=1)
    recent.feed(recent.planners[0], [7 * 64])
    recent.tiered.fetch([(0, 0, 64), (2, 5, 6)])
    assert spilled(recent) == [1, 3, 4]
    scored = Twins(backend, tmp_path, capacity=4, rows=1, decay=0.5)
    scored.feed(scored.planners[0], [7 * 64])
    scored.tiered.score([0, 1, 3], [8.0, 0.5, 3.0])
    scored.tiered.score([2, 3, 4], [1.0, 0.5, 4.5])
    assert spilled(scored) == [1, 2, 5], "4, 0.25, 1, 2 and 4.5 of blocks 0 to 4; 6 is kept"


@BACKEND
@pytest.mark.parametrize("decay", [None, 0.5], ids=["recency", "scores"])
def test_a_block_that_mattered_outlasts_those_that_were_fetched_later(decay: float | None, backend: str, tmp_path: Path) -> None:
    """Three of five blocks have place. By hand, with a decay of a half, as of the last step before somebody has to leave:

    fetched        0    1    2    3        0        1
    attention      6   .5   .4   .3      .05        1
    block 0        6    3  1.5  .75     .425
    block 1            .5  .25 (leaves)
    block 2                 .4   .2       .1 (leaves)
    block 3                      .3      .15

    Block 0 is found in memory when it is fetched again, where the order of fetching has let it go as the oldest. What it had before
    still counts afterwards: .375 + .05, not .05 alone, which would be the least of the three.
    """
    twins = Twins(backend, tmp_path, capacity=3, rows=1, decay=decay)
    twins.feed(twins.planners[0], [5 * 64])
    runs = twins.runs(twins.planners[0])
    twins.tiered.spill([block for block, _, _ in runs])
    held = []
    for block, attention in ((0, 6.0), (1, 0.5), (2, 0.4), (3, 0.3), (0, 0.05), (1, 1.0)):
        twins.tiered.fetch([runs[block]])
        twins.tiered.score([block], [attention])
        twins.tiered.trim([])
        held.append(tier_cases.in_memory(twins.tiered, runs))
    if decay is None:
        assert held[3:] == [{1, 2, 3}, {2, 3, 0}, {3, 0, 1}]
    else:
        assert held[3:] == [{0, 2, 3}, {0, 2, 3}, {0, 3, 1}]
    counts = twins.tiered.tier_counts()
    assert (counts.hits, counts.loads) == ((0, 6) if decay is None else (1, 5))
    twins.check()


@BACKEND
def test_a_store_without_a_file(backend: str) -> None:
    example = torch.zeros(1, HEADS, 1, DIM)
    store: Any = backends.get(backend).make_store(example, example)
    store.fetch([])
    for act in (lambda: store.trim([]), lambda: store.spill([0]), lambda: store.hold([0]), lambda: store.score([0], [1.0])):
        with pytest.raises(UnsupportedError, match="Tiered"):
            act()
    assert store.tier_counts() == (0, 0, 0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------------------------- the file


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", Path("/proc/self")):
        with pytest.raises(TierError, match="could not create"):
            backends.get("cpu").make_tier(str(folder))


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """As a full disk: blocks stay in memory, and go on their way once there is space."""
    twins = Twins("cpu", tmp_path, capacity=2, rows=1)
    planner = twins.planners[0]
    twins.feed(planner, [20 * 64])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(TierFullError, match=r"no space for .* bytes .* they stay in memory"):
            twins.tiered.trim([])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < twins.tiered.tier_counts().spills < 18
    twins.check()
    twins.feed(planner, [5])
    twins.tiered.trim([])
    assert twins.tiered.tier_counts().bytes_in_file >= 18 * 64 * 2 * HEADS * DIM * 4
    twins.check()


# ------------------------------------------------------------------------------------------------------------------- the rule


def test_budgets_and_folders() -> None:
    assert Tiered("64MiB").budget_bytes == 64 << 20
    assert Tiered(1000, Path("/somewhere")) == Tiered(1000, "/somewhere")
    for budget in (0, -1, 1.5, True, "many", None):
        with pytest.raises(BudgetError):
            Tiered(budget)  # type: ignore[arg-type]
    for wrong in ({"disk": 3}, {"keep": -1}, {"order": "random"}, {"decay": 1.1}, {"decay": "0.1"}, {"background": 1}):
        with pytest.raises(PolicyError):
            Tiered("1MiB", **wrong)  # type: ignore[arg-type]


def test_what_it_goes_with() -> None:
    tiered = Memory(storage=Tiered("1MiB"))
    assert (kvsieve.Full() | tiered).tiers == Tiered("1MiB")
    assert (kvsieve.HiP() | tiered).compression is None
    assert kvsieve.Full().tiers is None
    with pytest.raises(PolicyError, match="keep every token"):
        kvsieve.StreamingLLM(100) | tiered
    with pytest.raises(PolicyError, match="keep every token"):
        kvsieve.SnapKV(100) | tiered
    with pytest.raises(PolicyError, match="both"):
        kvsieve.Quantized() | tiered
    with pytest.raises(PolicyError, match="stands alone"):
        kvsieve.StreamingLLM(100) >> tiered
