"""Quest under a model: what stays exact, every loop, what it reads, and the bounds that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import distinct, forward, forwards, greedy, pad_left, tokens_of
from kvsieve.errors import BackendError, PolicyError
from kvsieve.methods.infinite_hip import InfiniteHiPSelection
from kvsieve.methods.parser import parse
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow


def quest(**changes: Any) -> Any:
    """Two blocks of 64 are candidates, of which 32 tokens are read; selected from 96 tokens on."""
    return kvsieve.Quest(**{"budget": 32, "sinks": 0, "window": 64, "query_block": 16, "query_stride": 3, **changes})


KINDS: dict[str, Callable[..., Any]] = {
    "every token": quest,
    "rarely": lambda **changes: quest(refresh=(8, 2), **changes),
    "with sinks": lambda **changes: quest(budget=24, block=8, candidates=8, sinks=64, dense_layers=1, **changes),
    "the paper's": lambda **changes: quest(budget=128, block=64, candidates=1, window=70, **changes),
}
EVERY = pytest.mark.parametrize("name", list(KINDS))

LONG = 420
"""Tokens of a text that has four blocks, or more, to choose from."""


@BACKEND
@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_text_that_fits_is_the_full_cache_bit_for_bit(family: str, name: str, backend: str) -> None:
    policy, got = KINDS[name](), []
    model, ids = tiny.model(family), tiny.ids(2, policy.selection.dense_until)
    for each in (kvsieve.Full(), policy):
        with kvsieve.stream(model, each, backend) as stream:
            got.append(forwards(model, stream.cache, ids, [ids.shape[1] - 20, 1]))
            assert stream.stats().parts.bounds == 0
    assert torch.equal(*got)


@EVERY
@pytest.mark.parametrize(
    ("family", "dtype"),
    # In bfloat16 the answers are compared so roughly that what a family adds would not be seen.
    [*((family, torch.float32) for family in ("llama", "gemma2", "gpt_oss")), ("llama", torch.bfloat16)],
)
def test_the_backends_agree(family: str, name: str, dtype: torch.dtype) -> None:
    model, (ids, mask) = tiny.model(family, dtype=dtype), pad_left([tiny.ids(1, n, n)[0] for n in (LONG, 310)])
    got, read = {}, []
    for backend in BACKENDS:
        with kvsieve.stream(model, KINDS[name](), backend) as stream:
            got[backend] = forwards(model, stream.cache, ids, [400, 5, 1], mask)[:, -300:]
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    difference = (got["cpu"].float() - got["reference"].float()).abs()
    scale = got["reference"].float().abs().max()
    if dtype == torch.float32:
        assert difference.max() <= 1e-4 * scale
        assert read[0] == read[1]
    else:
        # A product that is rounded otherwise may choose another block, and then everything after it differs.
        assert difference.median() <= 2e-2 * scale


@BACKEND
@EVERY
def test_a_trace_says_what_was_read(name: str, backend: str) -> None:
    """Sinks, a window, and from the candidates' blocks what was found; in all much less than there is."""
    model, policy = tiny.model(), KINDS[name]()
    rule, ids = policy.selection, tiny.ids(2, LONG)
    with kvsieve.stream(model, policy, backend) as stream:
        forward(model, stream.cache, ids[:, :400])
        for at in range(400, LONG):
            forward(model, stream.cache, ids[:, at : at + 1])
            for layer in stream.trace():
                if layer.dense:
                    assert layer.index < rule.dense_layers
                    continue
                for head in [head for row in layer.rows for head in row]:
                    tokens = {*tokens_of(head.read)}
                    assert {*range(rule.sinks), *range(at + 1 - rule.window, at + 1)} <= tokens
                    found = np.array(tokens_of(head.found))
                    (size, blocks), (block, budget) = rule.stages
                    assert 0 < len(found) <= budget
                    assert len({*(found // size)}) <= blocks // size
                    assert set((found // block).tolist()) == {t // block for t in found if t % block == 0}
                    assert len(tokens) <= rule.sinks + rule.window + budget + max(rule.refresh) - 1


def test_bounds_find_what_walks_miss() -> None:
    """One key in 2,000 that answers the query: it makes its block's bound the highest, wherever in the block it is."""
    from kvsieve.backends.reference.definition import bound_scores, group_scores
    from kvsieve.backends.reference.select.infinite import infinite_hip_search

    rng = torch.Generator().manual_seed(0)
    found = walked = 0
    for at in range(80, 1900, 7):
        k = torch.randn(1, 2000, 16, generator=rng) * 0.3
        q = torch.randn(1, 1, 16, generator=rng)
        k[0, at] = 2 * q[0, 0]
        scores, bounds = group_scores(q, k, [1999], 64), bound_scores(q, k, [1999], 64)
        assert (bounds[0] + 1e-9 >= scores[0, : 31 * 64].reshape(31, 64).max(1))[:30].all(), "no key scores more than its bound"
        args = scores, 64, 1936, (64, 2), (256, 16)
        found += at in infinite_hip_search(*args, bounds=bounds).tokens(0)
        walked += at in infinite_hip_search(*args).tokens(0)
    assert found == 260
    assert walked < 200


@BACKEND
@EVERY
def test_a_row_equals_its_solo_run(name: str, backend: str) -> None:
    """Left padding, and rows of which one is selected from long before the other."""
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (330, 140, 18)]
    ids, mask = pad_left(rows)
    more = tiny.ids(3, 60, 5)
    with kvsieve.stream(model, KINDS[name](), backend) as stream:
        whole = torch.cat([mask, torch.ones_like(more)], 1)
        got = forwards(model, stream.cache, torch.cat([ids, more], 1), [330, 1, 40, 1], whole)[:, 330:]
    for row in range(3):
        with kvsieve.stream(model, KINDS[name](), backend) as solo:
            forward(model, solo.cache, rows[row][None])
            alone = forwards(model, solo.cache, more[row : row + 1], [1, 40, 1])
        torch.testing.assert_close(got[row], alone[0], atol=1e-4, rtol=0)


@BACKEND
@EVERY
def test_where_a_prompt_is_cut_does_not_matter_at_whole_query_blocks(name: str, backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, LONG), []
    for cut in ([LONG], [16], [304, 48], [64, 356]):
        with kvsieve.stream(model, KINDS[name](), backend) as stream:
            got.append(forwards(model, stream.cache, ids, cut))
    for other in got[1:]:
        torch.testing.assert_close(got[0], other, atol=1e-4, rtol=0)


@BACKEND
def test_what_was_cropped_leaves_no_bounds_behind(backend: str) -> None:
    """Blocks that are filled a second time, with other tokens, after they were judged."""
    model, ids = tiny.model(), tiny.ids(1, LONG)
    with kvsieve.stream(model, quest(), backend) as stream:
        forward(model, stream.cache, ids[:, :150])
        forwards(model, stream.cache, tiny.ids(1, 260, 8), [240, 1])
        stream.cache.crop(-260)
        got = forwards(model, stream.cache, ids[:, 150:], [250, 1])
    with kvsieve.stream(model, quest(), backend) as stream:
        forward(model, stream.cache, ids[:, :150])
        want = forwards(model, stream.cache, ids[:, 150:], [250, 1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@BACKEND
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_is_lossless(how: str, backend: str) -> None:
    model = tiny.model()
    ids = torch.cat([tiny.ids(1, 9, 4)] * 30, 1)
    extra = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": tiny.model(seed=1, num_hidden_layers=1)}
    with kvsieve.stream(model, quest(), backend) as stream:
        want = greedy(model, ids, 40, past_key_values=stream.cache)
    with kvsieve.stream(model, quest(), backend) as stream:
        assert torch.equal(greedy(model, ids, 40, past_key_values=stream.cache, **extra), want)


def test_beams_are_those_of_the_specification() -> None:
    model, ids, got = tiny.model(), tiny.ids(2, 250), []
    for backend in BACKENDS:
        with kvsieve.stream(model, quest(), backend) as stream:
            got.append(model.generate(ids, past_key_values=stream.cache, num_beams=3, do_sample=False, max_new_tokens=14))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_rows_are_selected_and_repeated_with_what_they_chose(name: str, backend: str) -> None:
    """Rows share whole blocks and their bounds; a block that is half full is copied when one of them goes on."""
    model, ids = tiny.model(), tiny.ids(2, 300)
    tail = tiny.ids(1, 26, 3)
    with kvsieve.stream(model, KINDS[name](), backend) as stream:
        forwards(model, stream.cache, ids, [290, 1])
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        got = forwards(model, stream.cache, tail.repeat(2, 1), [1])
        stream.cache.batch_select_indices(torch.tensor([1]))
        later = forwards(model, stream.cache, tail[:, :9], [1])
    with kvsieve.stream(model, KINDS[name](), backend) as solo:
        forwards(model, solo.cache, ids[1:], [290, 1])
        want = forwards(model, solo.cache, tail, [1])
        after = forwards(model, solo.cache, tail[:, :9], [1])
    torch.testing.assert_close(got, want.repeat(2, 1, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(later, after, atol=1e-4, rtol=0)


@BACKEND
def test_a_fork_and_its_parent_do_not_touch_each_other(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 300)
    one, two = tiny.ids(1, 40, 1), tiny.ids(1, 40, 2)
    with kvsieve.stream(model, quest(), backend) as stream:
        forwards(model, stream.cache, ids, [290, 1])
        with stream.fork() as child:
            mixed = [[forward(model, s.cache, x[:, i : i + 1]) for s, x in ((stream, one), (child, two))] for i in range(40)]
    for which, x in enumerate((one, two)):
        with kvsieve.stream(model, quest(), backend) as solo:
            forwards(model, solo.cache, ids, [290, 1])
            want = forwards(model, solo.cache, x, [1])
        assert torch.equal(torch.cat([step[which] for step in mixed], 1), want)


@BACKEND
@EVERY
@pytest.mark.parametrize("width", [1, 90])
def test_a_forward_that_died_leaves_everything_as_it_was(
    name: str, width: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 326), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    for unlucky in (False, True):
        with kvsieve.stream(model, KINDS[name](), backend) as stream:
            forwards(model, stream.cache, ids[:, :310], [300, 1])
            if unlucky:
                with monkeypatch.context() as patch:
                    patch.setattr(model.model.layers[1].mlp, "forward", dies)
                    with pytest.raises(RuntimeError, match="out of memory"):
                        forward(model, stream.cache, tiny.ids(1, width, 9))
            got.append(forwards(model, stream.cache, ids[:, 310:], [1]))
    assert torch.equal(*got)


@BACKEND
def test_turns_and_what_is_saved(backend: str, tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, quest(), backend) as stream:
        said = stream.generate(tiny.ids(1, 250), max_new_tokens=8, do_sample=False)
        stream.generate(tiny.ids(1, 131, 7), max_new_tokens=8, do_sample=False)
        assert stream.stats().resident == stream.seen == 250 + 8 + 131 + 7
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(1, 30, 2), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend) as stream:
        assert repr(stream.policy) == repr(quest())
        torch.testing.assert_close(forwards(model, stream.cache, tiny.ids(1, 30, 2), [1]), want, atol=1e-5, rtol=0)
    with kvsieve.stream(model, quest(), backend) as stream:
        last = forward(model, stream.cache, tiny.ids(1, 250))
        for at in range(250, 258):
            assert int(last[0, -1].argmax()) == int(said[0, at])
            last = forward(model, stream.cache, said[:, at : at + 1])


@BACKEND
@EVERY
def test_what_fits_is_read_whole_with_an_extension_too(name: str, backend: str) -> None:
    policy = KINDS[name]()
    model, ids, got = tiny.model(), tiny.ids(2, policy.selection.dense_until), []
    for extend in (False, True):
        with kvsieve.stream(model, KINDS[name](extend=extend), backend) as stream:
            got.append(forwards(model, stream.cache, ids, [ids.shape[1] - 20, 1]))
    assert float((got[1] - got[0]).abs().max()) <= 1e-3 * float(got[0].abs().max())


@EVERY
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_within_the_trained_length_pre_rope_blocks_are_judged_by_content(family: str, name: str) -> None:
    """And their keys compared and read at their true distances; then beyond it, in the same stream."""
    model, got, read = tiny.model(family, vocab_size=600), [], []
    ids, mask = pad_left([distinct(1, LONG)[0], distinct(1, 330)[0]])
    for backend in BACKENDS:
        with kvsieve.stream(model, KINDS[name](extend=400), backend) as stream:
            parts = []
            for lo, hi in [(0, 320), (320, 384), *((at, at + 1) for at in range(384, LONG))]:
                parts.append(forward(model, stream.cache, ids[:, lo:hi], mask[:, :hi]))
                if hi in (390, LONG):
                    read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
                    assert any(layer.dense for layer in stream.trace()) == (hi == 390 and name == "with sinks")
            got.append(torch.cat(parts, 1)[:, -300:])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[:2] == read[2:]


@EVERY
@pytest.mark.parametrize("family", ["qwen3", "glm4"])
def test_beyond_it_what_is_read_stands_side_by_side(family: str, name: str) -> None:
    """A model that was told its trained length is 40, a padded batch; the first layer, dense otherwise, searches as well."""
    model, got, read = tiny.model(family, vocab_size=600), [], []
    ids, mask = pad_left([distinct(1, LONG)[0], distinct(1, 300)[0]])
    for backend in BACKENDS:
        with kvsieve.stream(model, KINDS[name](extend=40), backend) as stream:
            got.append(forwards(model, stream.cache, ids, [320, 90, 1], mask)[:, -300:])
            assert not any(layer.dense for layer in stream.trace())
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[0] == read[1]
    with kvsieve.stream(model, KINDS[name](dense_layers=0) if name != "with sinks" else quest(), "reference") as stream:
        true = forwards(model, stream.cache, ids, [320, 90, 1], mask)
    assert not torch.allclose(got[0][:, -1], true[:, -1], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bounds_are_counted(dtype: torch.dtype) -> None:
    """Two rows of keys for 64 tokens, in what the allocator holds; none before they are needed, and none after a reset."""
    model, ids = tiny.model(dtype=dtype), tiny.ids(1, 640)
    with kvsieve.stream(model, quest(), "cpu") as stream:
        forward(model, stream.cache, ids[:, :90])
        assert stream.stats().parts.bounds == 0
        forward(model, stream.cache, ids[:, 90:])
        stats = stream.stats()
        # Keys and values are as wide as each other: of 64 tokens 2 rows, beside 128.
        assert stats.parts.bounds == (stats.parts.keys + stats.parts.values) // 64
        assert stats.parts.keys + stats.parts.values + stats.parts.bounds == stats.bytes_held
        stream.reset()
        assert stream.stats().parts.bounds == 0


@BACKEND
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_block_with_a_key_of_nan_is_not_found(sign: float, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, LONG)
    with kvsieve.stream(model, quest(), backend) as stream:

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, 100] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
            return output

        handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(hook)
        forward(model, stream.cache, ids[:, :400])
        handle.remove()
        last = forwards(model, stream.cache, ids[:, 400:], [1])
        heads = [head for layer in stream.trace() if layer.index == 1 for row in layer.rows for head in row]
        assert heads
        assert all(not {*range(64, 128)} & {*tokens_of(head.found)} for head in heads)
    assert torch.isfinite(last).all()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: kvsieve.Quest(0), "budget"),
        (lambda: kvsieve.Quest(100, block=8), "multiple of block"),
        (lambda: kvsieve.Quest(100), "64"),
        (lambda: kvsieve.Quest(96, block=3), "divide 64"),
        (lambda: kvsieve.Quest(candidates=0), "candidates"),
        (lambda: kvsieve.Quest(sinks=16), "sinks"),
        (lambda: kvsieve.Quest(window=63), "window"),
        (lambda: kvsieve.Quest(refresh=0), "refresh"),
        (lambda: kvsieve.Quest(refresh=(8, 4, 1)), "refresh"),
        (lambda: InfiniteHiPSelection(((32, 64), (2, 32)), 64, 64, (1, 1), wide_layers=0, page_bounds=True), "chunk must be 64"),
        (lambda: kvsieve.StreamingLLM(256) | kvsieve.Quest(), "evicts the text"),
        (lambda: kvsieve.Quest() >> kvsieve.StreamingLLM(256), "chain"),
    ],
)
def test_what_cannot_be_right_is_refused_when_it_is_built(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        build()


@pytest.mark.parametrize("policy", [quest(), quest(refresh=(8, 2), extend=4096), kvsieve.Quest(block=8, candidates=8)])
def test_its_text_is_read_back(policy: Any) -> None:
    assert parse(repr(policy)) == policy
    assert repr(parse(repr(policy))) == repr(policy)


def test_a_backend_without_bounds_refuses_it_when_the_stream_opens() -> None:
    from kvsieve.backends.cuda.capabilities import CAPABILITIES

    without = replace(CAPABILITIES, selection=replace(CAPABILITIES.selection, page_bounds=False))
    with pytest.raises(BackendError, match="bounds"):
        without.check_selection(kvsieve.Quest().selection, "post_rope", False)
