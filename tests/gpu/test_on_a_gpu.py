"""The same checks as under the emulator, on a GPU, and what only a GPU can show. `make gpu` runs them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import backend_cases
import kernel_cases
import kvsieve
import piece_cases
import pytest
import search_cases
import tier_cases
import tiny
import torch
from backend_cases import on
from kvsieve import graphs
from kvsieve.backends.cuda import launcher

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
POLICIES = [name for name in tiny.POLICIES if name not in ("lm_infinite_middle", *tiny.PER_HEAD)]

HALVES = (torch.bfloat16, torch.float16)
# Sizes that take too long to compile for the CPU.
MORE: list[kernel_cases.Case] = [
    *((d, s, s, g, "half", s, raw) for d in HALVES for s in (64, 128) for g in (1, 4, 7, 16) for raw in (False, True)),
    *((d, s, s, 4, "half", s, raw) for d in HALVES for s in (96, 256) for raw in (False, True)),
    *((torch.float32, s, s, 4, "half", s, raw) for s in (64, 96, 128, 256) for raw in (False, True)),
]


@pytest.fixture(autouse=True)
def kernels_can_run() -> None:
    launcher.require()


@pytest.mark.parametrize("case", [*kernel_cases.CASES, *MORE], ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_attend(case: kernel_cases.Case) -> None:
    kernel_cases.attend(case, GPU)


MORE_PACKED: list[kernel_cases.PackedCase] = [
    (d, s, s, g, "half", s, raw, kept, *bits, 32)
    for d in (*HALVES, torch.float32)
    for s, kept in ((64, 32), (128, 64), (128, 78), (128, 128))
    for g in (1, 4, 8)
    for bits in ((0, 0), (4, 4))
    for raw in (False, True)
]


@pytest.mark.parametrize(
    "case", [*kernel_cases.PACKED_CASES, *MORE_PACKED], ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c)
)
def test_attend_over_packed_blocks(case: kernel_cases.PackedCase) -> None:
    kernel_cases.packed_attend(case, GPU)


@pytest.mark.parametrize("name", list(kernel_cases.every(GPU)))
def test_small_cases(name: str) -> None:
    kernel_cases.every(GPU)[name]()


@pytest.mark.parametrize("case", search_cases.cases(GPU, 6), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{c[-1]}")
def test_a_sparse_layer_is_the_definition(case: Any) -> None:
    search_cases.layer(*case)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", list(search_cases.TOLERANCE), ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_a_sparse_layer_of_usual_sizes(size: int, dtype: torch.dtype, group: int) -> None:
    for kind, representative in (("hip", "middle"), ("infinite", "first")):
        search_cases.layer(kind, representative, group, dtype, size, GPU, seed=2)


@pytest.mark.parametrize(
    ("kind", "tokens"), [(kind, tokens) for kind in search_cases.READS for tokens in search_cases.READS[kind]]
)  # fmt: skip
def test_keys_that_a_selection_reads(kind: str, tokens: int) -> None:
    search_cases.reads(kind, tokens, GPU)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("policy", list(search_cases.POLICIES))
def test_a_sparse_model_equals_the_reference(policy: str, family: str) -> None:
    search_cases.model(family, search_cases.POLICIES[policy](), GPU)


@pytest.mark.parametrize("policy", list(search_cases.POLICIES))
def test_selecting_streams_fork_beam_crop_and_save(policy: str, tmp_path: Path) -> None:
    search_cases.loops(search_cases.POLICIES[policy](), GPU, tmp_path)


def test_a_selection_over_pieces_of_blocks() -> None:
    search_cases.uneven(GPU)


def test_a_selection_by_many_thread_blocks() -> None:
    """The last of a stage's thread blocks sees what the others scored."""
    rule = search_cases.infinite(stages=((4, 640), (2, 300)), refresh=(1, 1), sinks=0, window=1)
    for _ in range(20):
        search_cases.one_query(rule, 40_000, GPU)


def test_a_selecting_step_never_waits_for_the_gpu() -> None:
    tested = search_cases.SparseLayer(search_cases.infinite(query_block=8), 2, 2, 4, 64, torch.bfloat16, GPU)
    tested.feed(150)
    given = [[x.to(GPU) for x in tested.draw(1)] for _ in range(17)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for q, k, v in given:
            step = tested.planner.begin([1, 1], 1, True, False)
            tested.store.run_selected(q, k, v, step, tested.call, tested.search)
            tested.planner.commit()
    finally:
        torch.cuda.set_sync_debug_mode("default")


MORE_PIECES: list[piece_cases.Case] = [
    (dtype, size, size, group, count) for dtype in HALVES for size in (64, 128, 256) for group in (1, 4, 7) for count in (1, 90)
]


@pytest.mark.parametrize(
    "case", [*piece_cases.CASES, *MORE_PIECES], ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c)
)
def test_pieces_are_those_of_the_definition(case: piece_cases.Case) -> None:
    piece_cases.pieces(case, GPU)


@pytest.mark.parametrize("policy", list(piece_cases.POLICIES))
@pytest.mark.parametrize("dtype", list(piece_cases.TOLERANCE), ids=str)
def test_a_fetching_layer_equals_the_reference(policy: str, dtype: torch.dtype) -> None:
    piece_cases.layer(policy, dtype, GPU)


@pytest.mark.parametrize("policy", list(piece_cases.POLICIES))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_fetching_model_equals_the_reference(family: str, policy: str) -> None:
    piece_cases.model(family, policy, GPU)


@pytest.mark.parametrize("policy", list(piece_cases.POLICIES))
def test_fetching_streams_fork_beam_rewind_and_save(policy: str, tmp_path: Path) -> None:
    piece_cases.loops(policy, GPU, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_on_the_host_change_no_output(seed: int) -> None:
    tier_cases.schedule("cuda", seed, None, GPU)


def test_what_is_on_the_host_is_never_read() -> None:
    tier_cases.never_read("cuda", None, GPU)


def test_what_fits_on_the_device_stays() -> None:
    tier_cases.what_fits_stays("cuda", None, device=GPU)


@pytest.mark.parametrize("base", list(tier_cases.BASES))
def test_a_model_with_blocks_on_the_host(base: str) -> None:
    tier_cases.model(base, GPU)


@pytest.mark.parametrize("policy", list(piece_cases.POLICIES))
def test_a_fetching_step_waits_once_a_layer(policy: str) -> None:
    """For the choice of blocks, which is the host's to place."""
    model, token = on(tiny.model(), GPU), tiny.ids(1, 1).to(GPU)
    with kvsieve.stream(model, piece_cases.POLICIES[policy]()) as stream, torch.no_grad():
        stream.feed(tiny.ids(1, 150).to(GPU))
        model(input_ids=token, past_key_values=stream.cache, use_cache=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                for _ in range(40):
                    model(input_ids=token, past_key_values=stream.cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == 40 * model.config.num_hidden_layers


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("dtype", list(backend_cases.TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_a_layer_equals_the_reference(policy: str, dtype: torch.dtype, size: int) -> None:
    backend_cases.layer(policy, dtype, GPU, size, seeds=4)


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_model_equals_the_reference(family: str, policy: str) -> None:
    backend_cases.model(family, policy, GPU)


@pytest.mark.parametrize("bits", [(0, 0), (4, 4), (2, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("dtype", list(backend_cases.TOLERANCE), ids=str)
@pytest.mark.parametrize("frame", ["post_rope", "pre_rope"])
def test_a_packed_layer_equals_the_reference(bits: tuple[int, int], dtype: torch.dtype, frame: str) -> None:
    backend_cases.packed_layer(dtype, bits, frame, GPU)


@pytest.mark.parametrize("policy", list(backend_cases.PACKINGS))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_packed_model_equals_the_reference(family: str, policy: str) -> None:
    backend_cases.packed_model(family, policy, GPU)


@pytest.mark.parametrize("policy", [name for name in backend_cases.PACKINGS if "codes" not in name])
def test_packed_streams_fork_beam_crop_and_save(policy: str, tmp_path: Path) -> None:
    backend_cases.packed_loops(policy, GPU, tmp_path)


@pytest.mark.parametrize("policy", [*POLICIES, *backend_cases.PACKINGS])
def test_a_graph_gives_the_same_tokens(policy: str) -> None:
    backend_cases.graph(policy, GPU, 200)


@pytest.mark.parametrize("policy", ["full", "streaming", "lm_infinite"])
def test_a_decode_step_never_waits_for_the_gpu(policy: str) -> None:
    model = on(tiny.model(), GPU)
    with kvsieve.stream(model, tiny.POLICIES[policy](100)) as stream, torch.no_grad():
        stream.feed(tiny.ids(1, 150).to(GPU))
        token = tiny.ids(1, 1).to(GPU)
        model(input_ids=token, past_key_values=stream.cache, use_cache=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(130):
                model(input_ids=token, past_key_values=stream.cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_a_scored_memory_never_waits_inside_a_step() -> None:
    model = on(tiny.model(), GPU)
    with kvsieve.stream(model, tiny.POLICIES["sirllm"](100)) as stream:
        stream.feed(tiny.ids(1, 150).to(GPU))
        decoder, token = graphs.GraphDecoder(stream), tiny.ids(1, 1).to(GPU)
        decoder.step(token)
        decoder.finish()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step(token)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bytes_reported_are_bytes_allocated() -> None:
    model = on(tiny.model(dtype=torch.bfloat16), GPU)
    with kvsieve.stream(model, kvsieve.StreamingLLM(1024)) as stream:
        stream.feed(tiny.ids(1, 64).to(GPU))
        before, held = torch.cuda.memory_allocated(), stream.stats().bytes_held
        stream.feed(tiny.ids(1, 4000).to(GPU))
        torch.cuda.synchronize()
        grown = torch.cuda.memory_allocated() - before
        assert abs(grown - (stream.stats().bytes_held - held)) < 4 << 20, "plans and tables may take a few megabytes"


def test_streams_on_two_torch_streams_do_not_disturb_each_other() -> None:
    model, ids = on(tiny.model(), GPU), tiny.ids(1, 60).to(GPU)
    with kvsieve.stream(model, kvsieve.StreamingLLM(40)) as stream:
        want = stream.generate(ids, max_new_tokens=40, do_sample=False)
    with kvsieve.stream(model, kvsieve.StreamingLLM(40)) as a, kvsieve.stream(model, kvsieve.StreamingLLM(40)) as b:
        found = []
        for stream in (a, b):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found.append(stream.generate(ids, max_new_tokens=40, do_sample=False))
        torch.cuda.synchronize()
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], want)
