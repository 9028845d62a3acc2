"""Systems that ask more of a store than attention, on the emulated CUDA backend: what holds for every system, and their own tests.

The tests are those of `tests/generate` and `tests/unit`, which take a backend; here it is this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulator
import generate.test_bank as bank
import generate.test_bank_lasting as bank_lasting
import generate.test_quest as quest
import generate.test_refresh_kv as refresh_kv
import generate.test_refresh_kv_moments as refresh_kv_moments
import generate.test_selective_v as selective_v
import generate.test_systems as every
import kvsieve
import pytest
import tiny
import torch
import unit.test_bank as recall
from drive import forwards
from kvsieve.errors import BackendError
from systems import OF_EVERY_KIND, ON_CUDA, SYSTEMS

PROPERTIES = [
    every.test_the_system_is_at_work,
    every.test_a_fork_goes_on_as_the_original_would,
    every.test_rows_repeated_reordered_and_selected_go_on_as_if_alone,
    every.test_the_best_beam_is_what_its_own_tokens_give,
    every.test_a_crop_is_exact_or_refused,
    every.test_assisted_decoding_is_lossless,
    every.test_a_padded_row_equals_its_solo_run,
]


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """The emulated backend, with two multiprocessors so that keys are split."""
    with emulator.emulated(emulator.Emulator(processors=2)) as made:
        yield made


def named(x: Any) -> str | None:
    return x.__name__ if callable(x) else None


@pytest.mark.parametrize(
    ("holds", "name"),
    # A row that differs from another in its settings alone shows by its forks, and by its turns below, that its kernels read right.
    [(holds, name) for holds in PROPERTIES for name in ON_CUDA if name in OF_EVERY_KIND or holds in PROPERTIES[:2]],
    ids=named,
)
def test_what_holds_for_every_system(holds: Callable[[str, str], None], name: str) -> None:
    holds(name, "cuda")


@pytest.mark.parametrize("name", ON_CUDA)
def test_two_turns_and_a_fork_are_those_of_the_specification(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "BACKENDS", ["reference", "cuda"])
    every.test_two_turns_and_a_fork_between_them_are_those_of_the_specification(name)


OWN: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *(
        (recall.test_attention_tells_its_log_sum_exp, {"width": width, "policy": policy})
        for width in (1, 3, 40)
        for policy in ("full()", "streamingllm(48, sinks=2)", "streamingllm(24, sinks=2) >> full()")
    ),
    (bank.test_a_bank_that_is_empty_or_off_changes_nothing, {}),
    (bank.test_a_bank_that_is_read_whole_is_a_memory_that_keeps_everything_at_one_distance, {"family": "llama"}),
    (bank.test_a_bank_that_is_read_whole_is_a_memory_that_keeps_everything_at_one_distance, {"family": "gpt_oss"}),
    (bank.test_backends_agree_where_chunks_are_found, {}),
    (bank.test_what_is_evicted_is_in_the_bank_once_and_nothing_else_is, {"policy": bank.CHAIN}),
    (bank.test_marks_and_crops_store_nothing_twice, {}),
    (bank.test_rows_and_users_never_see_each_others_entries, {}),
    (bank_lasting.test_a_text_is_ingested_to_its_last_token, {}),
    (bank_lasting.test_a_bank_that_was_saved_gives_the_same_logits, {}),
    (bank_lasting.test_a_session_goes_on_with_its_bank, {}),
    *(
        (refresh_kv.test_rows_with_sets_beside_rows_without, {"width": width, "dtype": dtype})
        for width in (1, 3, 40)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        (refresh_kv.test_a_stream_is_the_twin, {"seed": seed, "shape": shape, "similarity": similarity})
        for seed, (shape, similarity) in enumerate(zip(refresh_kv.GQA, (None, 0.85, None, 0.5)))
    ),
    (refresh_kv.test_layers_decide_for_themselves, {}),
    (refresh_kv.test_the_schedule_of_the_figure, {}),
    (refresh_kv.test_what_the_budget_holds_is_the_full_cache_bit_for_bit, {}),
    (refresh_kv.test_sets_keep_their_size_and_lose_the_lowest_first, {}),
    (refresh_kv.test_equal_heads_of_a_group_choose_as_one_head, {}),
    (refresh_kv.test_where_few_tokens_have_all_the_mass_a_partial_step_is_a_full_one, {}),
    (refresh_kv_moments.test_a_session_file_goes_on_as_the_stream_would, {}),
    (refresh_kv_moments.test_a_crop_within_partial_steps_is_exact_and_refused_beyond, {}),
    (refresh_kv_moments.test_after_tokens_were_taken_out_heads_choose_anew, {}),
    (refresh_kv_moments.test_a_trace_tells_what_was_read, {}),
    *(
        (selective_v.test_the_cpu_computes_the_definition, {"policy": policy, "dtype": dtype})
        for policy in ("all", "mass", "either", "rotated queries", "rotated keys")
        for dtype in selective_v.TOLERANCE
    ),
    *((selective_v.test_a_stream_on_the_cpu_reads_what_the_reference_reads, {"policy": policy}) for policy in selective_v.POLICIES),
    (selective_v.test_a_prompt_is_read_whole_however_it_is_cut, {"chunk": 16}),
    (selective_v.test_the_mass_that_was_asked_for_is_reached, {}),
    *(
        (test, {"name": name})
        for name in quest.KINDS
        for test in (
            quest.test_a_trace_says_what_was_read,
            quest.test_a_row_equals_its_solo_run,
            quest.test_where_a_prompt_is_cut_does_not_matter_at_whole_query_blocks,
            quest.test_rows_are_selected_and_repeated_with_what_they_chose,
        )
    ),
    (quest.test_a_text_that_fits_is_the_full_cache_bit_for_bit, {"family": "gpt_oss", "name": next(iter(quest.KINDS))}),
    (quest.test_what_was_cropped_leaves_no_bounds_behind, {}),
    (quest.test_assisted_decoding_is_lossless, {"how": "lookup"}),
    (quest.test_a_fork_and_its_parent_do_not_touch_each_other, {}),
    (quest.test_turns_and_what_is_saved, {}),
    *((quest.test_a_block_with_a_key_of_nan_is_not_found, {"sign": sign}) for sign in (1.0, -1.0)),
]


@pytest.mark.parametrize(("test", "given"), OWN, ids=[f"{test.__name__}-{at}" for at, (test, _) in enumerate(OWN)])
def test_their_own_tests(test: Callable[..., None], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures = {"backend": "cuda", "tested": "cuda", "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    asked = inspect.signature(test).parameters
    test(**given, **{name: value for name, value in fixtures.items() if name in asked})


@pytest.mark.parametrize("name", ["quest", "refresh_kv", "selective_v", "full"])
@torch.no_grad()
def test_blocks_on_the_host_change_nothing(name: str) -> None:
    """Whatever is asked of a store, what it reads is fetched before."""
    model, ids, got = tiny.model(), tiny.ids(1, 330), []
    for tiers in (None, kvsieve.Memory(storage=kvsieve.policy.Tiered("96KiB", keep=64))):
        policy = SYSTEMS[name].make()
        with kvsieve.stream(model, policy if tiers is None else policy | tiers, "cuda") as stream:
            got.append(forwards(model, stream.cache, ids, [300, 1]))
            found = stream.stats().tiers
            assert (found is None) == (tiers is None)
            assert found is None or found.loads > 0
    assert torch.equal(*got)


CODES = kvsieve.Quantized(8, group=16, residual=8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: kvsieve.SirLLM(400) | kvsieve.Quest(64, sinks=0, window=64), r"page bounds of whole blocks of an unbroken text"),
        (lambda: kvsieve.Quest(64) | CODES, "compresses some"),
        (lambda: kvsieve.HiP(64) | CODES, "compresses some"),
        (lambda: kvsieve.RefreshKV(64) | CODES, "compresses some"),
        (lambda: kvsieve.InfLLM(64, block=8, sinks=2, query_block=8) | CODES, "compresses some"),
        (lambda: kvsieve.LongHeads(64, chunk=16) | CODES, "compresses some"),
    ],
)
def test_what_it_cannot_do_is_refused_when_the_stream_opens(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(BackendError, match=said):
        kvsieve.stream(tiny.model(), make(), "cuda")


def test_pages_stay_whole() -> None:
    """A stream goes on after what was refused."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Quest(64, sinks=0, window=64), "cuda") as stream:
        stream.feed(tiny.ids(1, 90))
        with pytest.raises(BackendError, match="tokens would be taken out"):
            stream.evict(3, 9)
        fork = stream.fork()
        fork.feed(tiny.ids(1, 20, 3))
        with pytest.raises(BackendError, match="joined ones are not"):
            stream.join([fork])
        fork.close()
        stream.feed(tiny.ids(1, 200, 2))
        assert stream.seen == 290
