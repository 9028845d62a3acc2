"""Sparse attention on the CUDA backend, under the emulator: choices and outputs are the definition's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulator
import kvsieve
import pytest
import search_cases
import tiny
import torch
from drive import Layer
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda import plan, selection
from kvsieve.backends.cuda.backend import CudaBackend
from kvsieve.backends.cuda.ops import residents
from kvsieve.errors import BackendError, PolicyError, ShapeError, StateError, UnsupportedError
from kvsieve.graphs import GraphDecoder
from search_cases import SparseLayer, hip, infinite

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """The emulated backend, with four multiprocessors so that keys and chunks are split."""
    with emulator.emulated(emulator.Emulator(processors=4)) as made:
        yield made


@pytest.mark.parametrize("case", search_cases.cases(CPU, 2), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{c[-1]}")
def test_a_layer_is_the_definition(case: Any) -> None:
    search_cases.layer(*case)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 64), (torch.float16, 96)], ids=str)
def test_other_dtypes_and_sizes(dtype: torch.dtype, size: int) -> None:
    tested = SparseLayer(hip(budget=16, refresh=2, window=4), 1, 1, 4, size, dtype)
    for width in (70, 1, 1, 3):
        tested.feed(width)


@pytest.mark.parametrize("rule", [hip(), infinite()], ids=["hip", "infinite"])
def test_from_the_first_token_and_rows_that_begin_later(rule: Any) -> None:
    tested = SparseLayer(rule, 2, 1, 3, 16)
    for width, lens in ((1, [1, 1]), (1, [1, 1]), (3, [3, 3]), (20, [20, 0]), (90, [0, 90]), (1, [1, 1])):
        tested.feed(width, lens)
    tested = SparseLayer(rule, 2, 1, 3, 16)
    for width, lens in ((20, [20, 0]), (70, [70, 3]), (1, [1, 1])):
        tested.feed(width, lens)


@pytest.mark.parametrize("rule", [hip(query_block=4), infinite(query_block=4)], ids=["hip", "infinite"])
def test_more_blocks_of_queries_than_a_launch_takes(
    rule: Any, monkeypatch: pytest.MonkeyPatch, launcher: emulator.Emulator
) -> None:
    tested = SparseLayer(rule, 2, 1, 3, 16)
    tested.feed(150)
    monkeypatch.setattr(residents, "BAND", 5)
    monkeypatch.setattr(residents, "SCRATCH", 4 * 3 * 40)
    launcher.launches = []
    tested.feed(41)
    grids = [grid for module, grid, *_ in launcher.launches if module.file in ("search.cu", "sparse.cu")]
    assert max(z for _, _, z in grids) == 5
    assert len(grids) > 8


def test_residents_in_pieces_of_blocks() -> None:
    search_cases.uneven(CPU)


# -------------------------------------------------------------------------------------------------------------- worked numbers

SIXTEEN = [1, 2, 3, 2.5, 0.5, 1.5, 5, 9, 4, 3.5, 2.2, 1.2, 6, 7, 1.1, 0.1]


def sixteen(rule: Any) -> tuple[list[int], int, int, float]:
    """What a query of 1 chooses of sixteen keys whose values are their numbers: first tokens, reads, rounds, and the output."""
    tested = SparseLayer(rule, 1, 1, 1, 16)
    tested.call = AttendCall(1.0)
    k, v = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    k[0, 0, :, 0], v[0, 0, :, 0] = torch.tensor(SIXTEEN), torch.arange(16.0)
    q = torch.ones_like(k)
    tested.run(q[:, :, :15], k[:, :, :15], v[:, :, :15])
    out = tested.run(q[:, :, 15:], k[:, :, 15:], v[:, :, 15:])
    (head,) = tested.search.choice(0)
    return head.ranges[:, 0].tolist(), head.reads, head.rounds, out[0, 0, 0, 0].item()


@pytest.mark.parametrize(
    ("change", "starts", "reads", "rounds", "output"),
    [
        ({"budget": 2}, [6, 7], 12, 3, 6.982014),
        ({"budget": 2, "representative": "first"}, [12, 13], None, 3, None),
        ({"budget": 2, "representative": "oracle"}, [7, 13], None, 3, 7.715218),
        ({"budget": 4}, [6, 7, 12, 13], None, 2, 7.866377),
        ({"budget": 8}, [2, 3, 6, 7, 8, 9, 12, 13], None, 1, None),
        ({"budget": 16}, list(range(16)), 0, 0, 7.849450),
        ({"budget": 4, "block": 2}, [2, 6], 16, 2, None),
        ({"budget": 4, "block": 2, "representative": "first"}, [8, 12], None, 2, None),
    ],
    ids=str,
)
def test_sixteen_keys(change: dict[str, Any], starts: list[int], reads: int | None, rounds: int, output: float | None) -> None:
    found = sixteen(hip(**{"sinks": 0, "window": 0, "block": 1, "refresh": 1, "query_block": 1, **change}))
    assert (found[0], found[2]) == (starts, rounds)
    assert reads in (None, found[1])
    if output is not None:
        assert found[3] == pytest.approx(output, abs=1e-5)


@pytest.mark.parametrize(("representative", "start"), [("first", 8), ("middle", 0)])
def test_the_walk_down_a_chunk(representative: str, start: int) -> None:
    """By first keys the second half finds 7 and the first 3; by middle ones 4 and 9."""
    rule = infinite(sinks=0, window=0, query_block=1, stages=((8, 8),), refresh=(1,), representative=representative)
    assert sixteen(rule)[:3] == ([start], 12, 1)


@pytest.mark.parametrize(("kind", "tokens"), [(kind, tokens) for kind in search_cases.READS for tokens in search_cases.READS[kind]])
def test_keys_read(kind: str, tokens: int) -> None:
    search_cases.reads(kind, tokens, CPU)


# ------------------------------------------------------------------------------------------------------------- from step to step


def test_a_window_is_frozen_between_refreshes() -> None:
    """A key that left the window after the choice is still read; the next choice may leave it."""
    tested = SparseLayer(hip(sinks=1, window=4, budget=8, block=2, refresh=6), 1, 1, 1, 16)
    tested.feed(60)  # its last query block chose for 48..59
    reads = []
    for _ in range(8):
        tested.feed(1)
        reads.append(tested.search.work)
    assert [searched > 0 for searched, _ in reads] == [False] * 5 + [True] + [False] * 2
    assert [read for _, read in reads] == [14, 15, 16, 17, 18, 13, 14, 15]


def test_stages_are_refreshed_each_at_its_pace() -> None:
    tested = SparseLayer(infinite(stages=((8, 48), (4, 24), (2, 8)), refresh=(16, 8, 4), query_block=32), 2, 1, 3, 16)
    tested.feed(96)
    rounds = []
    for _ in range(18):
        tested.feed(1)
        rounds.append(tested.search.choice(0)[0].rounds if tested.search.work[0] else 0)
    # The prompt's last block of queries chose from all, at step 0.
    assert rounds == [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0]


def launches_of(launcher: emulator.Emulator, tested: SparseLayer) -> list[str]:
    launcher.launches = []
    tested.feed(1)
    names = [module.expressions[0].split("<")[0] for module, *_ in launcher.launches]
    launcher.launches = None
    return names


def test_what_a_step_launches(launcher: emulator.Emulator) -> None:
    attends = ["append", "sparse", "merge"]
    tested = SparseLayer(hip(refresh=2, query_block=8), 2, 2, 3, 16)
    tested.feed(79)
    assert launches_of(launcher, tested) == attends
    assert launches_of(launcher, tested) == ["append", "hip", "sparse", "merge"]
    tested = SparseLayer(infinite(stages=((8, 48), (4, 24)), refresh=(4, 2), query_block=8), 1, 2, 3, 16)
    tested.feed(79)
    found = [launches_of(launcher, tested) for _ in range(4)]
    assert found == [attends, ["append", "narrow", "sparse", "merge"], attends, ["append", "narrow", "narrow", "sparse", "merge"]]


def test_layers_share_a_schedule_and_its_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (SparseLayer(hip(refresh=2, query_block=8), 2, 1, 3, 16, seed=seed) for seed in (0, 1))
    two.backend, two.planner = one.backend, one.planner
    uploads: list[Any] = []
    upload = plan.upload
    monkeypatch.setattr(plan, "upload", lambda x, device: (uploads.append(x.shape), upload(x, device))[1])
    for width in (79, 1, 1, 1, 5, 1):
        given = [tested.draw(width) for tested in (one, two)]
        step = one.planner.begin([width] * 2, width, width <= 16, False)
        for tested, (q, k, v) in zip((one, two), given):
            tested.store = tested.store or tested.backend.make_store(k, v)
            uploads.clear()
            tested.store.run_selected(q, k, v, step, tested.call, tested.search)
        assert [shape for shape in uploads if shape[1] == residents.QUERY_COLUMNS] == [], (
            "the second layer uploads nothing of its own"
        )
        one.planner.commit()


def test_a_crop_makes_it_choose_anew() -> None:
    tested = SparseLayer(hip(refresh=100, query_block=8), 1, 1, 3, 16)
    for width in (79, 1, 1):
        tested.feed(width)
    assert tested.search.work[0] == 0
    tested.planner.crop(1)
    row = tested.rows[0]
    row.k, row.v, row.seen = row.k[:, :-1], row.v[:, :-1], row.seen - 1
    tested.feed(1)
    assert tested.search.work[0] > 0
    tested.feed(1)
    assert tested.search.work[0] == 0
    tested.search.reset()
    row.found = None
    assert tested.search.choice(0) == []
    tested.feed(1)
    assert tested.search.work[0] > 0


def test_undo_runs_the_same_step_again() -> None:
    """A forward that died is run again: the choices that stood stand, those that were made are forgotten."""
    tested = SparseLayer(hip(refresh=2, query_block=8), 2, 1, 3, 16)
    tested.feed(79)
    for width in (1, 1, 1, 5, 40, 1):
        before = [choices(tested, row) for row in range(2)]
        given = tested.draw(width)
        step = tested.planner.begin([width] * 2, width, width <= 16, False)
        tested.store.run_selected(*given, step, tested.call, tested.search)
        tested.planner.rollback()
        tested.search.undo()
        tested.search.undo()
        assert [choices(tested, row) for row in range(2)] == before
        tested.feed(width)


def choices(tested: SparseLayer, row: int) -> list[Any]:
    return [(head.ranges.tolist(), head.end, head.reads, head.rounds) for head in tested.search.choice(row)]


def test_an_error_leaves_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = SparseLayer(infinite(refresh=(1, 1, 1)), 1, 1, 3, 16)
    tested.feed(150)
    before = choices(tested, 0)
    with monkeypatch.context() as patched:
        patched.setattr(selection, "Sparse", lambda **given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tested.run(*tested.draw(1))
    assert choices(tested, 0) == before
    tested.search.undo()
    assert choices(tested, 0) == before, "a run that failed has nothing to undo"
    tested.feed(1)


@pytest.mark.parametrize(
    "rule", [hip(refresh=3, query_block=8), infinite(refresh=(6, 3, 2), query_block=8)], ids=["hip", "infinite"]
)
def test_rows_are_reordered(rule: Any) -> None:
    tested = SparseLayer(rule, 3, 1, 3, 16)
    tested.feed(150, [150, 131, 140])
    tested.feed(1)
    order = [2, 0, 2, 1]
    tested.planner.select_rows(order)
    tested.search.select_rows(order)
    tested.rows = [search_cases.copied(tested.rows[row]) for row in order]
    tested.shape = (4, *tested.shape[1:])
    for _ in range(7):
        tested.feed(1)
    with pytest.raises(ShapeError, match="below 4"):
        tested.search.select_rows([4])


@pytest.mark.parametrize(
    "rule", [hip(refresh=3, query_block=8), infinite(refresh=(6, 3, 2), query_block=8)], ids=["hip", "infinite"]
)
def test_a_state_is_returned_to_here_and_elsewhere(rule: Any) -> None:
    """Marks and forks: what happens afterwards to one does not reach the other."""
    tested = SparseLayer(rule, 2, 1, 3, 16)
    tested.feed(150, [150, 90])
    tested.feed(1)
    state, planner, rows = tested.search.state(), tested.planner.fork(), [search_cases.copied(row) for row in tested.rows]
    before = [choices(tested, row) for row in range(2)]
    other = tested.backend.make_selection(rule)
    other.return_to(state)
    for _ in range(5):
        tested.feed(1)
    tested.search, tested.planner, tested.rows = other, planner, rows
    assert [choices(tested, row) for row in range(2)] == before
    again = other.state()
    for _ in range(4):
        tested.feed(1)
    other.return_to(again)
    assert [choices(tested, row) for row in range(2)] == before


def test_slots_are_used_again() -> None:
    """However many choices later there are no more slots than rows hold, now and before."""
    tested = SparseLayer(infinite(stages=((8, 48), (4, 24)), refresh=(2, 1), query_block=8), 2, 1, 3, 16)
    tested.feed(80)
    for _ in range(12):
        tested.feed(1)
    assert [pool.tensor.shape[0] for pool in tested.search._pools] == [4, 4]
    tested.search.reset()
    assert all(sorted(pool.free) == [0, 1, 2, 3] for pool in tested.search._pools)


# --------------------------------------------------------------------------------------------------------------- what is refused


def refused(layer: Layer, width: int = 1) -> None:
    search = layer.backend.make_selection(hip())  # type: ignore[attr-defined]
    step = layer.planner.begin([width], width, width <= 16, True)
    given = (torch.randn(1, heads, width, 16) for heads in (4, 2, 2))
    try:
        layer.store.run_selected(*given, step, layer.call, search)
    finally:
        layer.planner.rollback()


@pytest.mark.parametrize("width", [1, 20])
def test_memories_that_cannot_be_selected_from(width: int) -> None:
    from kvsieve.policy.storage import Channels, Packing

    def fed(policy: Any, tokens: int = 80) -> Layer:
        layer = Layer("cuda", policy, scale=0.25)
        layer.feed(torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16))
        return layer

    with pytest.raises(UnsupportedError, match="keeps every token"):
        refused(fed(kvsieve.StreamingLLM(40, sinks=2)), width)
    far = Layer("cuda", kvsieve.LMInfinite(38, sinks=2), rope=tiny_rope(), scale=0.25)
    far.feed(*(torch.randn(1, h, 80, 16) for h in (4, 2, 2)))
    with pytest.raises(UnsupportedError, match=r"side by side.*reference|keeps every token"):
        refused(far, width)
    packed = fed(kvsieve.Full())
    packed.pack(64, Channels(torch.arange(8).expand(2, 8), (0, 0)), Packing(8))
    with pytest.raises(BackendError, match=r"compressed.*leave"):
        refused(packed, width)


def tiny_rope() -> Any:
    from kvsieve.facts import LayerRope

    return LayerRope(10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), "half")


@pytest.mark.parametrize(
    "rule",
    [
        hip(budget=0),
        hip(block=0),
        hip(representative="nearest"),
        hip(refresh=0),
        hip(query_block=0),
        hip(window=-1),
        hip(kind="best"),
        infinite(stages=()),
        infinite(stages=((8, 8), (3, 3)), refresh=(1, 1)),
        infinite(stages=((8, 12),), refresh=(1,)),
        infinite(refresh=(1, 1)),
        infinite(refresh=(1, 1, 0)),
        infinite(representative="last"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_right(rule: Any) -> None:
    with pytest.raises(PolicyError):
        CudaBackend().make_selection(rule)


def test_more_than_a_selection_can_follow() -> None:
    backend = CudaBackend()
    backend.make_selection(hip(budget=2048))
    with pytest.raises(BackendError, match=r"1024.*larger blocks"):
        backend.make_selection(hip(budget=2049))
    stages = tuple((1 << 8 - i, 1 << 8) for i in range(9))
    with pytest.raises(BackendError, match="8 stages"):
        backend.make_selection(infinite(stages=stages, refresh=(1,) * 9))


def test_a_state_of_another_rule() -> None:
    tested = SparseLayer(hip(), 2, 1, 3, 16)
    with pytest.raises(StateError, match="another rule"):
        tested.search.return_to(filled_state())


def filled_state() -> Any:
    other = SparseLayer(infinite(), 1, 1, 3, 16)
    other.feed(150)
    return other.search.state()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("policy", list(search_cases.POLICIES))
def test_a_model_equals_the_reference(policy: str, family: str) -> None:
    search_cases.model(family, search_cases.POLICIES[policy](), CPU)


@pytest.mark.parametrize("policy", ["hip", "infinite"])
def test_streams_fork_beam_crop_and_save(policy: str, tmp_path: Path) -> None:
    search_cases.loops(search_cases.POLICIES[policy](), CPU, tmp_path)


def test_what_a_stream_may_not_ask() -> None:
    with kvsieve.stream(tiny.model(), search_cases.hip_policy(), "cuda") as stream:
        stream.feed(tiny.ids(1, 60))
        with pytest.raises(UnsupportedError, match="selection is due"):
            GraphDecoder(stream)
    for policy, match in (
        (search_cases.hip_policy() | kvsieve.ThinK(0.5, recent=4, observe=4), "compresses some"),
        (kvsieve.HiP(2048, block=1), "1024"),
    ):
        with pytest.raises(BackendError, match=match):
            kvsieve.stream(tiny.model(), policy, "cuda")
