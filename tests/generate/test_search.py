"""HiP and InfiniteHiP under a model: what stays exact, beyond the trained length, what they are seen to read, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import distinct, forward, forwards, pad_left, tokens_of
from kvsieve.errors import BudgetError, KvsieveError, PolicyError, StateError, UnsupportedError
from kvsieve.methods.hip import HiPSelection
from kvsieve.methods.infinite_hip import InfiniteHiPSelection
from kvsieve.methods.parser import parse
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import FixedDistance, Rebased
from search_policies import SEARCHES, hip, infinite
from tiny import BACKENDS

# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow

EVERY = pytest.mark.parametrize("name", list(SEARCHES))
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def dense(name: str) -> int:
    search = SEARCHES[name]().selection
    return max(search.dense_until, search.for_layer(1).dense_until)


# --------------------------------------------------------------------------------------------------------------- what stays exact


@BACKEND
@EVERY
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_text_that_fits_is_the_full_cache_bit_for_bit(family: str, name: str, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(2, dense(name) - 8 * ("infinite" in name))
    got = []
    for policy in (kvsieve.Full(), SEARCHES[name]()):
        with kvsieve.stream(model, policy, backend) as stream:
            got.append(forwards(model, stream.cache, ids, [10, 1]))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_one_token_more_is_selected_from(name: str, backend: str) -> None:
    model, length = tiny.model(), dense(name)
    ids = tiny.ids(1, length + 9)
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        full = forwards(model, stream.cache, ids, [length, 1])
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        forward(model, stream.cache, ids[:, : length - 16])
        forwards(model, stream.cache, ids[:, length - 16 : -1], [1])
        last = forward(model, stream.cache, ids[:, -1:])
        layers = stream.trace()
    assert not torch.allclose(last, full[:, -1:], atol=1e-4)
    assert [layer.dense for layer in layers] == [name == "hip", False]
    assert all(layer.read < 2 * (length + 9) for layer in layers if not layer.dense)


@EVERY
@pytest.mark.parametrize(
    ("family", "dtype"),
    # In bfloat16 the answers are compared so roughly that what a family adds would not be seen.
    [*((family, torch.float32) for family in ("llama", "qwen3", "gemma2", "gpt_oss", "gpt_neox")), ("llama", torch.bfloat16)],
)
def test_the_backends_agree(family: str, name: str, dtype: torch.dtype) -> None:
    model, (ids, mask) = tiny.model(family, dtype=torch.float32), pad_left([tiny.ids(1, n, n)[0] for n in (140, 75)])
    model = model if dtype == torch.float32 else tiny.model(family, dtype=dtype)
    got = {}
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            got[backend] = forwards(model, stream.cache, ids, [126, 5, 1], mask)[:, -75:]
    difference = (got["cpu"].float() - got["reference"].float()).abs()
    scale = got["reference"].float().abs().max()
    if dtype == torch.float32:
        assert difference.max() <= 1e-4 * scale
    else:
        # A product that is rounded otherwise may choose another block, and then everything after it differs.
        assert difference.median() <= 2e-2 * scale


@BACKEND
@EVERY
def test_a_row_equals_its_solo_run(name: str, backend: str) -> None:
    """Left padding, and rows of which one is selected from long before the other."""
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (96, 40, 18)]
    ids, mask = pad_left([row[:-30] if len(row) > 40 else row[:10] for row in rows])
    more = tiny.ids(3, 40, 5)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        whole = torch.cat([mask, torch.ones_like(more)], 1)
        got = forwards(model, stream.cache, torch.cat([ids, more], 1), [ids.shape[1], 1, 22, 1], whole)[:, ids.shape[1] :]
    for row in range(3):
        with kvsieve.stream(model, SEARCHES[name](), backend) as solo:
            forward(model, solo.cache, ids[row : row + 1, mask[row] > 0])
            alone = forwards(model, solo.cache, more[row : row + 1], [1, 22, 1])
        torch.testing.assert_close(got[row], alone[0], atol=1e-4, rtol=0)


@BACKEND
@EVERY
@pytest.mark.parametrize("chunks", [[16], [48, 32], [96, 14]])
def test_where_a_prompt_is_cut_does_not_matter_at_whole_query_blocks(name: str, chunks: list[int], backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 110)
    got = []
    for cut in ([110], chunks):
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            got.append(forwards(model, stream.cache, ids, cut))
    torch.testing.assert_close(*got, atol=1e-4, rtol=0)


@BACKEND
def test_a_choice_of_every_step_needs_no_memory_of_the_last(backend: str) -> None:
    """With ``refresh=1`` what is read depends on the text alone: a stream that was cropped equals one that never read so far."""
    model, ids = tiny.model(), tiny.ids(1, 90)
    with kvsieve.stream(model, hip(refresh=1), backend) as stream:
        forward(model, stream.cache, ids[:, :70])
        forwards(model, stream.cache, tiny.ids(1, 6, 8), [1])
        stream.cache.crop(-6)
        got = forwards(model, stream.cache, ids[:, 70:], [1])
    with kvsieve.stream(model, hip(refresh=1), backend) as stream:
        forward(model, stream.cache, ids[:, :70])
        want = forwards(model, stream.cache, ids[:, 70:], [1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ longer than trained


@BACKEND
@EVERY
def test_within_the_trained_length_an_extension_changes_nothing(name: str, backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(2, 120), []
    for extend in (False, True, 120):
        with kvsieve.stream(model, SEARCHES[name](extend=extend), backend) as stream:
            assert stream.stats().stored_keys == ("pre_rope" if extend else "post_rope")
            got.append(forwards(model, stream.cache, ids, [100, 1]))
    for other in got[1:]:
        assert float((other - got[0]).abs().max()) <= 1e-3 * float(got[0].abs().max())


@EVERY
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4"])
def test_beyond_it_what_is_read_stands_side_by_side(family: str, name: str) -> None:
    """A model that was told its trained length is 40 and reads 150 tokens; the first layer, dense otherwise, searches as well."""
    model, ids, got = tiny.model(family, vocab_size=600), distinct(1, 150), []
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name](extend=40), backend) as stream:
            got.append(forwards(model, stream.cache, ids, [64, 40, 1, 30, 1]))
            assert not any(layer.dense for layer in stream.trace())
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    with kvsieve.stream(model, SEARCHES[name](dense_layers=0), "reference") as stream:
        true = forwards(model, stream.cache, ids, [64, 40, 1, 30, 1])
    assert not torch.allclose(got[0][:, -1], true[:, -1], atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_beyond_it_distances_stay_those_that_were_trained(backend: str) -> None:
    """Text that is moved by any distance, seen side by side, is the same text: what stands before it is not read."""
    model, ids, got = tiny.model(num_hidden_layers=1), tiny.ids(1, 40), []
    for before in (80, 400):
        policy = kvsieve.HiP(1, 1, 0, 8, "oracle", 1, dense_layers=0, query_block=1, extend=1)
        with kvsieve.stream(model, policy, backend) as stream:
            forward(model, stream.cache, torch.full((1, before), 5))
            got.append(forwards(model, stream.cache, ids, [1])[:, 20:])
    torch.testing.assert_close(*got, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------------- the trace


@BACKEND
@EVERY
def test_a_trace_says_what_was_read(name: str, backend: str) -> None:
    """Every query reads the sinks, the window and what its last search found; what was read in vain would change nothing."""
    model, ids = tiny.model(), tiny.ids(2, 120)
    policy = SEARCHES[name]()
    with kvsieve.stream(model, policy, backend) as stream:
        forward(model, stream.cache, ids[:, :100])
        for at in range(100, 120):
            forward(model, stream.cache, ids[:, at : at + 1])
            for layer in stream.trace():
                rule = policy.selection.for_layer(layer.index)
                read = [{*tokens_of(head.read)} for row in layer.rows for head in row]
                assert all({*range(2), *range(at + 1 - 8, at + 1)} <= tokens for tokens in read)
                assert all({*tokens_of(head.found)} <= {*tokens_of(head.read)} for row in layer.rows for head in row)
                if rule is None:
                    assert layer.dense
                    assert read == [{*range(at + 1)}] * 4
                else:
                    assert not layer.dense
                    assert layer.read == sum(len(tokens) for tokens in read)
                    most = rule.budget if rule.kind == "hip" else rule.stages[-1][1]
                    slack = max(policy.selection.paces)
                    assert all(len(tokens) <= 2 + 8 + most + slack - 1 + 4 for tokens in read)
                    assert layer.scored <= sum(head.scored for row in layer.rows for head in row)


def test_a_policy_that_reads_everything_has_no_trace() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(64)) as stream, pytest.raises(StateError, match="reads all"):
        stream.trace()


# ------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: kvsieve.HiP(0), "budget"),
        (lambda: kvsieve.HiP(True), "budget"),
        (lambda: kvsieve.HiP("1 MB"), "budget"),
        (lambda: kvsieve.HiP(8, block=0), "block"),
        (lambda: kvsieve.HiP(8, window=0), "window"),
        (lambda: kvsieve.HiP(8, sinks=-1), "sinks"),
        (lambda: kvsieve.HiP(8, refresh=0), "refresh"),
        (lambda: kvsieve.HiP(8, query_block=0), "query_block"),
        (lambda: kvsieve.HiP(8, representative="nearest"), "representative"),
        (lambda: kvsieve.HiP(8, dense_layers=-1), "dense_layers"),
        (lambda: kvsieve.HiP(8, extend=-1), "extend"),
        (lambda: kvsieve.InfiniteHiP("4k"), "preset"),
        (lambda: kvsieve.InfiniteHiP(stages=()), "refresh for each"),
        (lambda: kvsieve.InfiniteHiP(stages=((8, 64),)), "refresh for each"),
        (lambda: kvsieve.InfiniteHiP(stages=((8, 60),), refresh=(4,)), "multiple"),
        (lambda: kvsieve.InfiniteHiP(stages=((8, 64), (3, 33)), refresh=(4, 2)), "multiple"),
        (lambda: kvsieve.InfiniteHiP(stages=((8, 64), 3), refresh=(4, 2)), "pair"),
        (lambda: kvsieve.InfiniteHiP(refresh=(4, 2)), "each of the 3 stages"),
        (lambda: kvsieve.InfiniteHiP(refresh=(4, 2, 0)), "refresh"),
        (lambda: kvsieve.InfiniteHiP(wide=4097), "wide"),
        (lambda: kvsieve.InfiniteHiP(representative="last"), "representative"),
        (lambda: kvsieve.StreamingLLM(64) | kvsieve.HiP(8), "selection would read"),
        (lambda: kvsieve.SnapKV(64) | kvsieve.HiP(8), "per head|each head|Everything"),
        (lambda: kvsieve.HiP(8) >> kvsieve.SirLLM(64), "chain"),
        (lambda: kvsieve.StreamingLLM(64) >> kvsieve.HiP(8), "chain"),
        (lambda: kvsieve.HiP(8) | kvsieve.InfiniteHiP(), "both .* decide select"),
        (lambda: kvsieve.HiP(8, extend=True) | kvsieve.SirLLM(64), "both .* decide position"),
        (lambda: Memory(position=Rebased()), "SparseSelection"),
        (lambda: Memory(position=FixedDistance(3), select=HiPSelection()), "does not go with"),
        (lambda: Memory(evict=Window(64), select=InfiniteHiPSelection()), "selection would read"),
    ],
)
def test_what_cannot_be_right_is_refused_when_it_is_built(build: Callable[[], Any], match: str) -> None:
    with pytest.raises((PolicyError, BudgetError), match=match):
        build()


@pytest.mark.parametrize(
    "policy",
    [
        kvsieve.HiP(),
        kvsieve.HiP(513, block=8, extend=True),
        kvsieve.HiP(64, extend=4096, refresh=1),
        kvsieve.InfiniteHiP(),
        kvsieve.InfiniteHiP("flash", window=512),
        kvsieve.InfiniteHiP("5k", stages=((8, 64), (4, 32), (2, 16)), wide_layers=0),
        kvsieve.InfiniteHiP(stages=((8, 64),), refresh=(4,)),
        kvsieve.SirLLM(512) | kvsieve.HiP(64),
        kvsieve.HiP(64) | kvsieve.ThinK(0.2),
    ],
    ids=repr,
)
def test_its_text_is_read_back(policy: Any) -> None:
    assert repr(parse(repr(policy))) == repr(policy)
    assert parse(repr(policy)) == policy


@BACKEND
@EVERY
def test_prompts_of_one_token_and_fewer_than_the_sinks(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    got = []
    for policy in (kvsieve.Full(), SEARCHES[name](sinks=50, window=1)):
        with kvsieve.stream(model, policy, backend) as stream:
            got.append(forwards(model, stream.cache, ids[:, :40], [1]))
    torch.testing.assert_close(*got, atol=1e-5, rtol=0)


@BACKEND
def test_a_budget_that_is_no_multiple_of_the_block_is_rounded_up(backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 120), []
    for budget in (9, 12):
        with kvsieve.stream(model, hip(budget=budget, block=4), backend) as stream:
            got.append(forwards(model, stream.cache, ids, [100, 1]))
            found = [
                len(tokens_of(head.found)) for layer in stream.trace() if not layer.dense for row in layer.rows for head in row
            ]
            assert 0 < min(found) <= max(found) <= 12
    assert torch.equal(*got)


@BACKEND
@pytest.mark.parametrize("policy", [hip(block=1), infinite(stages=((16, 48), (4, 24), (1, 8)))], ids=["hip", "infinite"])
def test_a_key_of_nan_is_not_found(policy: Any, backend: str) -> None:
    """Nor does it hide others. (In a block of several keys it may come with one that is found.)"""
    # Of two layers, so that what is broken does not spread to other tokens' keys.
    model, ids = tiny.model(), tiny.ids(1, 100)
    attention = model.model.layers[1].self_attn
    with kvsieve.stream(model, policy, backend) as stream:
        poison = {"on": True}

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if not poison["on"]:
                return output
            output = output.clone()
            output[:, 30] = torch.nan
            return output

        handle = attention.k_proj.register_forward_hook(hook)
        try:
            forward(model, stream.cache, ids[:, :90])
            poison["on"] = False
            last = forwards(model, stream.cache, ids[:, 90:], [1])
        finally:
            handle.remove()
        read = [head for layer in stream.trace() if layer.index == 1 for row in layer.rows for head in row]
        assert all(30 not in tokens_of(head.read) for head in read)
    assert torch.isfinite(last).all()


def test_a_graph_is_refused() -> None:
    from kvsieve.graphs import GraphDecoder

    model = tiny.model()
    with kvsieve.stream(model, hip()) as stream:
        forward(model, stream.cache, tiny.ids(1, 5))
        with pytest.raises(UnsupportedError):
            GraphDecoder(stream)


def test_layers_have_rules_of_their_own() -> None:
    search = infinite(dense_layers=1, wide_layers=3).selection
    assert search.for_layer(0) is None
    assert search.for_layer(1).stages == ((16, 48), (4, 24), (2, 16))
    assert search.for_layer(3) is search
    assert InfiniteHiPSelection(wide=65536).for_layer(0).stages == ((256, 65536), (32, 65536), (8, 65536))
    with pytest.raises(KvsieveError):
        HiPSelection(window=0)
