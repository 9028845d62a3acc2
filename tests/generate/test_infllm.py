"""InfLLM under generate: what a window holds, calls and turns, moments, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forward, forwards, pad_left
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.errors import BackendError, PolicyError, StateError, UnsupportedError
from kvsieve.runtime.fetching import Fetching
from tier_cases import most_in_memory
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def small(**changes: Any) -> Any:
    numbers = {"window": 16, "blocks": 2, "block": 4, "representatives": 2, "sinks": 2, "query_block": 8}
    return kvsieve.InfLLM(**{**numbers, **changes})


def part_of(stream: kvsieve.Stream) -> Fetching:
    return stream._engine.parts.the(Fetching)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@BACKEND
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "gpt_oss", "smollm3"])
def test_a_text_that_the_window_holds_is_the_full_cache(family: str, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(1, 50)
    answers = []
    for policy in (kvsieve.Full(), kvsieve.InfLLM(50, sinks=2, block=4)):
        with kvsieve.stream(model, policy, backend) as stream:
            answers.append(forwards(model, stream.cache, ids, [30, 1, 1, 18]))
    assert close(answers[1], answers[0])


@BACKEND
def test_where_positions_begin_changes_nothing(backend: str) -> None:
    model, ids, answers = tiny.model(), tiny.ids(1, 60), []
    for start in (0, 1000):
        with kvsieve.stream(model, small(), backend) as stream, torch.no_grad():
            found = []
            for piece in (ids[:, :48], *ids[:, 48:].split(1, 1)):
                at = start + stream.seen
                positions = torch.arange(at, at + piece.shape[1])[None]
                found.append(model(input_ids=piece, position_ids=positions, past_key_values=stream.cache).logits)
            answers.append(torch.cat(found, 1))
    assert close(*answers)


@BACKEND
def test_padded_rows_are_as_alone(backend: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (70, 43)]
    ids, mask = pad_left(rows)
    mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    ids = torch.cat([ids, tiny.ids(2, 12, 3)], 1)
    with kvsieve.stream(model, small(), backend) as stream:
        got = forwards(model, stream.cache, ids, [70, 1], mask)
    for row, text in enumerate(rows):
        with kvsieve.stream(model, small(), backend) as stream:
            want = forwards(model, stream.cache, ids[row : row + 1, 70 - len(text) :], [len(text), 1])
        assert close(got[row, -want.shape[1] :], want[0])


@BACKEND
def test_where_a_prompt_is_cut_at_query_blocks_changes_nothing(backend: str) -> None:
    model, ids, answers = tiny.model(), tiny.ids(1, 64), []
    for cuts in ([64], [8], [40, 8, 16]):
        with kvsieve.stream(model, small(), backend) as stream:
            answers.append(forwards(model, stream.cache, ids, cuts))
    assert all(close(answer, answers[0]) for answer in answers)


@BACKEND
def test_a_session_file_goes_on_as_the_stream_would(tmp_path: Path, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, small(), backend) as stream:
        forwards(model, stream.cache, tiny.ids(2, 51), [48, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(2, 10, 3), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend=backend) as loaded:
        assert torch.equal(forwards(model, loaded.cache, tiny.ids(2, 10, 3), [1]), want)


@BACKEND
def test_a_forward_that_died_leaves_nothing(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, small(), backend) as stream, kvsieve.stream(model, small(), backend) as other:
        forwards(model, stream.cache, ids, [40])
        forwards(model, other.cache, ids, [40])
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("died")))
        try:
            with pytest.raises(KeyError, match="died"):
                forward(model, stream.cache, tiny.ids(1, 40, 9))
        finally:
            hook.remove()
        got, want = (forwards(model, one.cache, tiny.ids(1, 30, 4), [8, 1]) for one in (stream, other))
        assert torch.equal(got, want)


@BACKEND
def test_a_crop_is_refused_and_a_mark_goes_back(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, small(), backend) as stream:
        forwards(model, stream.cache, ids[:, :40], [40])
        mark = stream.mark()
        want = forwards(model, stream.cache, ids[:, 40:], [1])
        with pytest.raises(StateError, match=r"cannot forget 4 tokens.*part of what.*take a mark"):
            stream.cache.crop(-4)
        stream.rewind(mark)
        assert torch.equal(forwards(model, stream.cache, ids[:, 40:], [1]), want)


@BACKEND
@pytest.mark.parametrize("gone", [3, 13, 26])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_a_crop_is_exact_where_keys_alone_are_summed_up(summary: str, gone: int, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 70)
    policy = kvsieve.InfLLM(16, blocks=2, block=4, sinks=2, query_block=1, summary=summary)
    with kvsieve.stream(model, policy, backend) as stream, kvsieve.stream(model, policy, backend) as other:
        forwards(model, stream.cache, ids[:, :60], [60])
        stream.cache.crop(-gone)
        forwards(model, other.cache, ids[:, : 60 - gone], [60 - gone])
        got, want = (forwards(model, one.cache, tiny.ids(1, 30, 4), [8, 1]) for one in (stream, other))
        assert close(got, want)
        assert all(len(state.table) == (90 - gone - 18) // 4 for state in part_of(stream).rows[0].values())


@BACKEND
def test_tokens_cannot_be_taken_out_nor_streams_joined(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, small(), backend) as stream:
        stream.feed(tiny.ids(1, 40))
        with pytest.raises(UnsupportedError, match="unbroken text"):
            stream.evict(5, 9)
        with stream.fork() as fork:
            fork.feed(tiny.ids(1, 5, 2))
            with pytest.raises(UnsupportedError, match="shows tokens at other distances"):
                stream.join([fork])


@BACKEND
@pytest.mark.parametrize("per_head", [False, True])
def test_a_trace_tells_what_was_read(per_head: bool, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, small(per_head=per_head), backend) as stream:
        stream.feed(tiny.ids(1, 12))
        assert all(layer.dense and layer.read == 2 * 12 for layer in stream.trace())
        forwards(model, stream.cache, tiny.ids(1, 50, 2), [49, 1])
        num = (61 - 18) // 4
        for index, layer in enumerate(stream.trace()):
            blocks = part_of(stream).read[index][0].choice.blocks  # type: ignore[union-attr]
            assert len(blocks) == (2 if per_head else 1)
            assert (layer.dense, layer.scored) == (False, 2 * num)
            for head, traced in enumerate(layer.rows[0]):
                chosen = {t for b in blocks[min(head, len(blocks) - 1)] for t in range(2 + 4 * b, 6 + 4 * b)}
                read = np.concatenate([np.arange(*r) for r in traced.read]).tolist()
                assert read == sorted({0, 1} | chosen | set(range(2 + 4 * num, 62)))
                assert {t for lo, hi in traced.found for t in range(lo, hi)} == chosen
                assert traced.scored == num
            assert layer.read == 2 * (2 + 8 + 60 - 4 * num)


@BACKEND
def test_summaries_are_counted_once_for_rows_that_share_them(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, small(), backend) as stream:
        stream.feed(tiny.ids(1, 60))
        stats = stream.stats()
        states = [state for layers in part_of(stream).rows for state in layers.values()]
        least = sum(state.table.data.nbytes + state.scores.nbytes for state in states)
        assert least <= stats.parts.summaries <= 4 * least
        parts = stats.parts
        assert stats.bytes_held == parts.keys + parts.values + parts.summaries
        stream.cache.batch_repeat_interleave(3)
        assert stream.stats().parts.summaries == stats.parts.summaries


@BACKEND
def test_tokens_that_were_not_read_have_no_summaries(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, small(), backend) as stream:
        stream._engine.begin_at(20, [(20, [(list(range(20)), [0.0] * 20)])])
        with pytest.raises(StateError, match="knows no summaries"):
            forward(model, stream.cache, tiny.ids(1, 4))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"window": 0}, "window must be"),
        ({"blocks": -1}, "blocks must be"),
        ({"block": 0}, "block must be"),
        ({"sinks": 1.5}, "sinks must be"),
        ({"query_block": 0}, "query_block must be"),
        ({"representatives": 0}, "representatives must be"),
        ({"block": 4, "representatives": 5}, "cannot have 5 representatives"),
        ({"per_head": 1}, "per_head must be"),
        ({"summary": "median"}, "summary must be one of 'representatives', 'mean', 'bounds'; got 'median'"),
        ({"summary": "chunk_attention"}, "summary must be one of"),
        ({"summary": "bounds", "representatives": 2}, "is made of all tokens"),
    ],
)
def test_numbers_that_are_none_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.InfLLM(**arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sirllm(64) | infllm()", "decide position"),
        ("streamingllm(64) | infllm()", "decide position"),
        ("snapkv(64) | infllm()", "decide position"),
        ("hip(64) | infllm()", "decide select"),
        ("streamingllm(64) >> infllm()", "one part of a chain"),
        ("infllm() >> full()", "one part of a chain"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_it_is_built(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.methods.parse(text)


def test_roles_that_need_each_other() -> None:
    select = kvsieve.InfLLM().select
    with pytest.raises(PolicyError, match="goes with a FetchedSelection"):
        kvsieve.Memory(position=kvsieve.policy.Fetched())
    with pytest.raises(PolicyError, match=r"of which .* evicts some"):
        kvsieve.Memory(evict=kvsieve.SirLLM(64).evict, select=select, position=kvsieve.policy.Fetched())
    with pytest.raises(PolicyError, match="evicts the text between"):
        kvsieve.Memory(evict=kvsieve.StreamingLLM(64).evict, select=select, position=kvsieve.policy.Fetched())
    with pytest.raises(PolicyError, match="goes with the position rule Fetched"):
        kvsieve.Memory(select=select)
    with pytest.raises(PolicyError, match="goes with the position rule Fetched"):
        kvsieve.Memory(select=select, position=kvsieve.policy.InCache())


def test_a_text_of_it_is_read_back() -> None:
    assert repr(kvsieve.InfLLM()) == "InfLLM()"
    policy = kvsieve.InfLLM(64, block=16, representatives=1, per_head=True)
    assert repr(policy) == "InfLLM(window=64, block=16, representatives=1, per_head=True)"
    assert kvsieve.methods.parse(repr(policy)) == policy


def test_a_backend_that_cannot_says_so() -> None:
    with pytest.raises(BackendError, match="at other distances than their own"):
        replace(CUDA, selection=replace(CUDA.selection, fetched=False)).check_fetching()


@BACKEND
@pytest.mark.parametrize("base", ["infllm", "infllm per head", "longheads"])
def test_where_blocks_lie_changes_no_output(base: str, backend: str, tmp_path: Path) -> None:
    """As many blocks in memory as all, a few, and the fewest that there can be, in either order of leaving."""
    make = {
        "infllm": lambda: kvsieve.InfLLM(64, blocks=3, block=32, representatives=2, sinks=8, query_block=64),
        "infllm per head": lambda: kvsieve.InfLLM(64, blocks=2, block=8, sinks=8, query_block=64, per_head=True),
        "longheads": lambda: kvsieve.LongHeads(128, chunk=32),
    }[base]
    model, ids, blocks = tiny.model(), tiny.ids(1, 424), 64 * 2 * 2 * (16 + 16) * 4
    with kvsieve.stream(model, make(), backend) as stream:
        want, whole = forwards(model, stream.cache, ids, [400, 1]), stream.stats()
    for count, order in ((20, "recency"), (4, "recency"), (3, "recency"), (3, "scores")):
        where = kvsieve.Memory(storage=kvsieve.policy.Tiered(count * blocks, str(tmp_path), keep=64, order=order))  # type: ignore[arg-type]
        with kvsieve.stream(model, make() | where, backend) as stream:
            assert torch.equal(forwards(model, stream.cache, ids, [400, 1]), want)
            tiers = stream.stats().tiers
            assert tiers is not None
            assert tiers.hits > 0
            if count == 20:
                assert (tiers.loads, tiers.spills) == (0, 0)
                continue
            assert tiers.bytes_read >= tiers.loads * (blocks // 2) > 0
            # The block that is being filled is there besides. The reference frees nothing.
            assert most_in_memory(stream) <= count + 1
            assert backend == "reference" or tiers.bytes_in_memory <= (count + 1) * blocks < whole.parts.keys + whole.parts.values
    assert list(tmp_path.iterdir()) == []


@BACKEND
def test_its_budget_of_memory_is_one_of_tiers(backend: str, tmp_path: Path) -> None:
    made = small(host_budget=5 * 32768, disk=str(tmp_path))
    assert made.memories[0].storage == kvsieve.policy.Tiered(5 * 32768, str(tmp_path), keep=20)
    assert kvsieve.methods.parse(repr(made)) == made
    with kvsieve.stream(tiny.model(), made, backend) as stream:
        stream.feed(tiny.ids(1, 500), chunk=100)
        tiers = stream.stats().tiers
        assert tiers is not None
        assert tiers.spills > 0
    with pytest.raises(PolicyError, match="host_budget"):
        small(disk=str(tmp_path))
    with pytest.raises(kvsieve.errors.BudgetError, match="give it at least"):
        kvsieve.stream(tiny.model(), small(host_budget=32768), backend)
