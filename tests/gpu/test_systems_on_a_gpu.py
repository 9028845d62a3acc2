"""What `tests/cuda/test_systems.py`, `test_telling.py` and `test_raw_selection.py` check under the emulator, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import raw_cases
import search_cases
import telling_cases
import tiny
import torch
from backend_cases import on
from drive import forwards
from kvsieve.backends.cuda import launcher
from systems import ON_CUDA, PROMPT, SYSTEMS

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def kernels_can_run() -> None:
    launcher.require()


@pytest.mark.parametrize("case", telling_cases.TOLD, ids=str)
def test_what_attention_tells_of_keys(case: Any) -> None:
    telling_cases.told(case, GPU)


@pytest.mark.parametrize("case", telling_cases.ADDED, ids=str)
def test_values_are_added_up(case: Any) -> None:
    telling_cases.add_values(case, GPU)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.bfloat16, 96), (torch.float16, 256)], ids=str)
def test_bounds_of_blocks(dtype: torch.dtype, size: int) -> None:
    telling_cases.page_bounds(dtype, size, GPU)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.bfloat16, 128), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_a_layer_of_quest_is_the_definition(group: int, dtype: torch.dtype, size: int, seed: int) -> None:
    telling_cases.quest_layer(group, dtype, size, GPU, seed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_model_under_quest_equals_the_reference(family: str) -> None:
    policy = kvsieve.Quest(32, candidates=2, sinks=0, window=64, query_block=16, query_stride=3)
    search_cases.model(family, policy, GPU)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", raw_cases.MODES)
@pytest.mark.parametrize("kind", list(raw_cases.RULES))
def test_a_selection_from_pre_rope_keys_is_the_references(kind: str, mode: raw_cases.Mode, seed: int) -> None:
    raw_cases.layer(kind, mode, GPU, seed=seed)


@pytest.mark.parametrize("mode", raw_cases.MODES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
def test_a_selection_from_pre_rope_keys_in_half_precision(dtype: torch.dtype, size: int, mode: raw_cases.Mode) -> None:
    raw_cases.layer("infinite", mode, GPU, dtype, size=size)


@pytest.mark.parametrize("kind", ["hip", "infinite"])
def test_a_selection_from_what_was_retained(kind: str) -> None:
    raw_cases.slots(kind, GPU)


@pytest.mark.parametrize("extend", [40, 400])
def test_a_model_beyond_its_length_equals_the_reference(extend: int) -> None:
    search_cases.model("llama", search_cases.hip_policy(extend=extend, dense_layers=0), GPU)


@pytest.mark.parametrize("name", ON_CUDA)
def test_a_stream_equals_the_reference(name: str) -> None:
    """A prompt, single tokens, a chunk, in two rows of one batch; the logits are those of the reference on the CPU."""
    ids, logits = tiny.ids(2, PROMPT + 60), []
    for backend, where in (("cuda", GPU), ("reference", torch.device("cpu"))):
        made = on(tiny.model(), where)
        with kvsieve.stream(made, SYSTEMS[name].of_rows(2), backend) as stream:
            logits.append(forwards(made, stream.cache, ids.to(where), [PROMPT, 1, 1, 1, 5, 40, 1]).cpu())
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-3 * float(logits[1].abs().max())


@pytest.mark.parametrize("name", ON_CUDA)
def test_streams_fork_go_back_and_save(name: str, tmp_path: Path) -> None:
    made = on(tiny.model(), GPU)

    def go_on(stream: kvsieve.Stream) -> torch.Tensor:
        return forwards(made, stream.cache, tiny.ids(1, 12, 5).to(GPU), [1])

    with kvsieve.stream(made, SYSTEMS[name].make(), "cuda") as stream:
        forwards(made, stream.cache, tiny.ids(1, PROMPT + 2).to(GPU), [PROMPT, 1])
        mark = stream.mark()
        with stream.fork() as child:
            found = [go_on(child)]
        found.append(go_on(stream))
        stream.rewind(mark)
        found.append(go_on(stream))
        stream.rewind(mark)
        if stream.policy.bank is None:
            stream.save(tmp_path / "stream")
    if SYSTEMS[name].make().bank is None:
        with kvsieve.load(tmp_path / "stream", made, backend="cuda") as loaded:
            found.append(go_on(loaded))
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) <= 1e-4 * float(found[0].abs().max())


def partial_steps(policy: Any) -> Callable[[], None]:
    made = on(tiny.model(), GPU)
    stream = kvsieve.stream(made, policy, "cuda").__enter__()
    forwards(made, stream.cache, tiny.ids(1, PROMPT + 4).to(GPU), [PROMPT, 1])
    token = tiny.ids(1, 1).to(GPU)

    def step() -> None:
        with torch.no_grad():
            made(input_ids=token, past_key_values=stream.cache, use_cache=True)

    return step


@pytest.mark.parametrize(
    "policy",
    [
        lambda: kvsieve.SelectiveV(9),
        lambda: kvsieve.SelectiveV(None, mass=0.7),
        lambda: kvsieve.RefreshKV(48, stride=4, similarity=None),
        lambda: kvsieve.Quest(32, candidates=2, sinks=0, window=64),
    ],
    ids=["SelectiveV", "mass", "RefreshKV", "Quest"],
)
def test_a_step_never_waits_for_the_gpu(policy: Callable[[], Any]) -> None:
    step = partial_steps(policy())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(70):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
