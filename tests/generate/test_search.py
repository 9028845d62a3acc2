"""HiP and InfiniteHiP under a model: what stays exact, every loop, and what they are seen to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import distinct, forward, forwards, greedy, pad_left, tokens_of
from kvsieve.errors import BudgetError, KvsieveError, PolicyError, StateError, UnsupportedError
from kvsieve.methods.hip import HiPSelection
from kvsieve.methods.infinite_hip import InfiniteHiPSelection
from kvsieve.methods.parser import parse
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import FixedDistance, Rebased
from tiny import BACKENDS

# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow

Make = Callable[..., Any]


def hip(**changes: Any) -> Any:
    known = {"budget": 12, "sinks": 2, "window": 8, "dense_layers": 1, "refresh": 4, "query_block": 16, "query_stride": 3}
    return kvsieve.HiP(**{**known, **changes})


def infinite(**changes: Any) -> Any:
    known = {"stages": ((16, 48), (4, 24), (2, 8)), "refresh": (8, 4, 2), "sinks": 2, "window": 8, "wide": 16, "wide_layers": 1}
    return kvsieve.InfiniteHiP(**{**known, "query_block": 16, "query_stride": 3, **changes})


SEARCHES: dict[str, Make] = {
    "hip": hip,
    # Both layers of a model search under this one, and only the second under the one before.
    "hip_first": lambda **changes: hip(**{"representative": "first", "block": 4, "dense_layers": 0, **changes}),
    "infinite": infinite,
    "infinite_middle": lambda **changes: infinite(representative="middle", **changes),
}

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


# ------------------------------------------------------------------------------------- what was retained, and longer than trained


def with_sirllm(name: str, budget: int) -> Any:
    return kvsieve.SirLLM(budget, sinks=2, recent=8) | SEARCHES[name]()


@BACKEND
@EVERY
def test_a_selection_over_more_than_is_retained_is_sirllm_alone(name: str, backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 130), []
    for policy in (kvsieve.SirLLM(24, sinks=2, recent=8), kvsieve.SirLLM(24, sinks=2, recent=8) | SEARCHES[name](window=80)):
        with kvsieve.stream(model, policy, backend) as stream:
            got.append(forwards(model, stream.cache, ids, [60, 1]))
            assert stream.stats().resident <= 24 + 63
    assert torch.equal(*got)


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_selection_over_what_sirllm_retained(family: str, name: str) -> None:
    model, ids, got, read = tiny.model(family, vocab_size=600), distinct(2, 260), [], []
    for backend in BACKENDS:
        with kvsieve.stream(model, with_sirllm(name, 100), backend) as stream:
            # Token 254 makes 163 residents into 100 again, in the midst of decoding.
            got.append(forwards(model, stream.cache, ids, [40, 40, 40, 40, 30, 1]))
            assert stream.stats().resident == 106
            assert stream.stats().stored_keys == "pre_rope"
            layers = stream.trace()
            kept = [set(kept.positions.tolist()) for kept in stream.kept()]
            for layer in layers[1:]:
                heads = [set(tokens_of(head.read)) for head in layer.rows[0]]
                assert all(len(tokens) < len(kept[0]) for tokens in heads)
                assert all(259 in tokens and 0 in tokens for tokens in heads)
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in layers])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[0] == read[1]


PACKS = {
    "think": lambda: kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=8),
    "codes": lambda: kvsieve.Quantized(8, group=16, residual=16),
    "both": lambda: kvsieve.ThinK(0.25, recent=8, observe=8) | kvsieve.Quantized(4, group=16, residual=16),
}


@EVERY
@pytest.mark.parametrize("pack", list(PACKS))
def test_a_selection_from_compressed_tokens(pack: str, name: str) -> None:
    """Channel-pruned and quantized keys are compared and read as stored; the second turn is read over compressed tokens."""
    model, ids, got, read = tiny.model(), tiny.ids(2, 150), [], []
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name]() | PACKS[pack](), backend) as stream:
            out = [forwards(model, stream.cache, ids[:, :112], [90, 1])]
            stream.end_turn()
            got.append(torch.cat([*out, forwards(model, stream.cache, ids[:, 112:], [20, 1])], 1))
            assert stream.stats().compressed > 90
            assert not stream.trace()[1].dense
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[0] == read[1]


OVER: dict[str, Callable[[str], Any]] = {
    "extended": lambda name: SEARCHES[name](extend=40),
    "retained": lambda name: with_sirllm(name, 100),
    "thin": lambda name: SEARCHES[name]() | PACKS["think"](),
    "codes": lambda name: SEARCHES[name]() | PACKS["codes"](),
}


@pytest.mark.parametrize("name", ["hip", "infinite_middle"])
@pytest.mark.parametrize("over", list(OVER))
def test_padded_rows_and_two_turns_of_whatever_is_selected_from(over: str, name: str) -> None:
    """Each row of a padded batch reads what it reads alone, in the first turn and in the second."""
    model, rows = tiny.model(vocab_size=600), [distinct(1, n)[0] for n in (120, 84)]
    (ids, mask), more = pad_left(rows), distinct(1, 204)[0, 120:].view(2, 42)
    got, read = [], []

    def drive(stream: Any, ids: torch.Tensor, mask: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
        forwards(model, stream.cache, ids, [ids.shape[1] - 30, 20, 1], mask)
        stream.end_turn()
        whole = None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)
        return torch.cat(
            [
                forward(model, stream.cache, more[:, lo:hi], None if whole is None else whole[:, : ids.shape[1] + hi])
                for lo, hi in [(0, 30), *((at, at + 1) for at in range(30, 42))]
            ],
            1,
        )

    for backend in BACKENDS:
        with kvsieve.stream(model, OVER[over](name), backend) as stream:
            got.append(drive(stream, ids, mask, more))
            assert not stream.trace()[1].dense
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    scale = float(got[0].abs().max())
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * scale
    assert read[0] == read[1]
    for row in range(2):
        with kvsieve.stream(model, OVER[over](name), "cpu") as solo:
            alone = drive(solo, rows[row][None], None, more[row : row + 1])
        assert float((got[1][row] - alone[0]).abs().max()) <= 1e-3 * scale


@BACKEND
@EVERY
def test_packing_does_not_end_a_choice(name: str, backend: str) -> None:
    """A choice names residents by number, which packing does not change: a layer that packs all it has reads what it would have."""
    model, ids, read = tiny.model(num_hidden_layers=3), tiny.ids(1, 120), []
    # The last layer drops channels, so that there is something to pack; those before it are packed whole.
    for extra in (None, kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=4, skip_layers=(0, 1))):
        policy = SEARCHES[name]() if extra is None else SEARCHES[name]() | extra
        with kvsieve.stream(model, policy, backend) as stream:
            forward(model, stream.cache, ids[:, :100])
            steps = []
            for at in range(100, 120):
                forward(model, stream.cache, ids[:, at : at + 1])
                steps.append([head.read.tolist() for layer in stream.trace()[:2] for head in layer.rows[0]])
            read.append(steps)
            assert (stream.stats().compressed > 100) == (extra is not None)
    assert read[0] == read[1]


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


# ---------------------------------------------------------------------------------------------------------------------- loops


@BACKEND
@EVERY
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_is_lossless(name: str, how: str, backend: str) -> None:
    model = tiny.model()
    ids = torch.cat([tiny.ids(1, 9, 4)] * 7, 1)
    extra = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": tiny.model(seed=1, num_hidden_layers=1)}
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        want = greedy(model, ids, 24, past_key_values=stream.cache)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        assert torch.equal(greedy(model, ids, 24, past_key_values=stream.cache, **extra), want)


@EVERY
def test_beams_are_those_of_the_specification(name: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(2, 60), []
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            got.append(model.generate(ids, past_key_values=stream.cache, num_beams=3, do_sample=False, max_new_tokens=14))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_rows_are_selected_and_repeated_with_what_they_chose(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 80)
    tail = tiny.ids(1, 7, 3)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        forwards(model, stream.cache, ids, [70, 1])
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        got = forwards(model, stream.cache, tail.repeat(2, 1), [1])
        stream.cache.batch_select_indices(torch.tensor([1]))
        later = forwards(model, stream.cache, tail, [1])
    with kvsieve.stream(model, SEARCHES[name](), backend) as solo:
        forwards(model, solo.cache, ids[1:], [70, 1])
        want = forwards(model, solo.cache, tail, [1])
        after = forwards(model, solo.cache, tail, [1])
    torch.testing.assert_close(got, want.repeat(2, 1, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(later, after, atol=1e-4, rtol=0)


@BACKEND
@EVERY
def test_a_fork_and_its_parent_do_not_touch_each_other(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 73)
    one, two = tiny.ids(1, 9, 1), tiny.ids(1, 9, 2)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        forwards(model, stream.cache, ids, [70, 1])
        with stream.fork() as child:
            assert repr([layer.rows for layer in child.trace()]) == repr([layer.rows for layer in stream.trace()])
            mixed = [[forward(model, s.cache, x[:, i : i + 1]) for s, x in ((stream, one), (child, two))] for i in range(9)]
    for which, x in enumerate((one, two)):
        with kvsieve.stream(model, SEARCHES[name](), backend) as solo:
            forwards(model, solo.cache, ids, [70, 1])
            want = forwards(model, solo.cache, x, [1])
        assert torch.equal(torch.cat([step[which] for step in mixed], 1), want)


@BACKEND
@EVERY
@pytest.mark.parametrize("width", [1, 24])
def test_a_forward_that_died_leaves_every_choice_as_it_was(
    name: str, width: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny.model(), tiny.ids(1, 110)

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    got = []
    for unlucky in (False, True):
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            forwards(model, stream.cache, ids[:, :73], [70, 1])
            if unlucky:
                for _ in range(2):
                    with monkeypatch.context() as patch:
                        patch.setattr(model.model.layers[1].mlp, "forward", dies)
                        with pytest.raises(RuntimeError, match="out of memory"):
                            forward(model, stream.cache, ids[:, 73 : 73 + width])
            got.append(forwards(model, stream.cache, ids[:, 73:], [width, 1]))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_turns(name: str, backend: str) -> None:
    """Turns of new tokens are read by the same rule as one long loop of forwards."""
    model = tiny.model()
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        said = stream.generate(tiny.ids(1, 64), max_new_tokens=8, do_sample=False)
        more = stream.generate(tiny.ids(1, 31, 7), max_new_tokens=8, do_sample=False)
        assert stream.seen == 64 + 8 + 31 + 7
        assert stream.stats().resident == stream.seen
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        last = forward(model, stream.cache, tiny.ids(1, 64))
        for at in range(64, 72):
            assert int(last[0, -1].argmax()) == int(said[0, at])
            if at < 71:
                last = forward(model, stream.cache, said[:, at : at + 1])
        last = forward(model, stream.cache, torch.cat([said[:, -1:], tiny.ids(1, 31, 7)], 1))
        assert int(last[0, -1].argmax()) == int(more[0, 31])


@BACKEND
@EVERY
def test_a_saved_stream_goes_on(name: str, backend: str, tmp_path: Path) -> None:
    """What was chosen is not written: a loaded stream chooses at its first token, as one whose choices are all due."""
    model, ids = tiny.model(), tiny.ids(1, 96)
    every = {"refresh": 1} if name.startswith("hip") else {"refresh": (1, 1, 1)}
    with kvsieve.stream(model, SEARCHES[name](**every), backend) as stream:
        forwards(model, stream.cache, ids[:, :90], [80, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, ids[:, 90:], [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend) as stream:
        assert repr(stream.policy) == repr(SEARCHES[name](**every))
        torch.testing.assert_close(forwards(model, stream.cache, ids[:, 90:], [1]), want, atol=1e-5, rtol=0)


@BACKEND
def test_reset_forgets_what_was_chosen(backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 80), []
    with kvsieve.stream(model, hip(), backend) as stream:
        for _ in range(2):
            got.append(forwards(model, stream.cache, ids, [70, 1]))
            stream.reset()
        with pytest.raises(StateError, match="nothing"):
            stream.trace()
    assert torch.equal(*got)


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
