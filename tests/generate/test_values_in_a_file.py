"""Streams whose keys stay in memory while values lie in a file: every output is that of the stream that holds all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forwards, pad_left, same_memory
from kvsieve.errors import BackendError, BudgetError, PolicyError, TierError
from kvsieve.policy import Memory, Tiered
from tier_cases import BLOCK

VALUES = BLOCK // 2
"""Bytes of the values of a block of 64 tokens in both layers."""

POLICIES = {
    "all": kvsieve.Full(),
    "heaviest": kvsieve.SelectiveV(8),
    "by mass": kvsieve.SelectiveV(None, mass=0.5, renormalise=True),
    "quest": kvsieve.Quest(64),
    "infllm": kvsieve.InfLLM(64, blocks=2, block=64, sinks=4),
    "longheads": kvsieve.LongHeads(128, chunk=32),
    "refresh_kv": kvsieve.RefreshKV(64, stride=4),
}


def tiered(base: Any, disk: Any, blocks: int = 4, **others: Any) -> Any:
    return base | Memory(storage=Tiered(blocks * VALUES, str(disk), values_alone=True, **others))


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("options", [{}, {"background": True}], ids=["at once", "later"])
def test_an_output_does_not_depend_on_where_values_lie(name: str, options: Any, tmp_path: Path) -> None:
    model, ids, base = tiny.model(), tiny.ids(1, 700), POLICIES[name]
    policy = tiered(base, tmp_path, blocks=5, **options)
    with kvsieve.stream(model, base, "cpu") as full, kvsieve.stream(model, policy, "cpu") as stream:
        chunks = [300, 64, 1, 1, 1, 200, 1, 1, 1]
        assert torch.equal(forwards(model, stream.cache, ids, chunks), forwards(model, full.cache, ids, chunks))
        assert same_memory(full, stream)
        for store in stream._engine.stores.values():
            store.finish()  # type: ignore[attr-defined]
        stats, held = stream.stats(), full.stats()
        assert stats.tiers is not None
        assert stats.tiers.spills > 0
        keys = [sum(store.held().plain_keys for store in one._engine.stores.values()) for one in (stream, full)]
        values = sum(store.held().plain_values for store in stream._engine.stores.values())
        assert keys[0] == keys[1], "all keys are in memory"
        assert values <= 6 * VALUES
        assert stats.tiers.bytes_in_memory == keys[0] + values < held.bytes_held


def test_a_token_fetches_the_blocks_of_what_it_adds_up(tmp_path: Path) -> None:
    """Three values of each head: no more blocks than that many are asked for, and the newest ones are there."""
    model, ids = tiny.model(), tiny.ids(1, 900)
    with kvsieve.stream(model, tiered(kvsieve.SelectiveV(3), tmp_path), "cpu") as stream:
        stream.feed(ids[:, :-20])
        asked = []
        for at in range(20):
            before = stream.stats().tiers
            stream.feed(ids[:, 880 + at : 881 + at])
            after = stream.stats().tiers
            assert before is not None
            assert after is not None
            asked.append(after.hits + after.loads - before.hits - before.loads)
        heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
        assert max(asked) <= 3 * heads * layers
        assert min(asked) >= layers
        assert stream.stats().tiers.bytes_in_file > 0  # type: ignore[union-attr]


def test_rows_crops_marks_forks_and_beams(tmp_path: Path) -> None:
    model, base = tiny.model(), kvsieve.SelectiveV(8)
    ids, mask = pad_left([tiny.ids(1, n, seed=n)[0] for n in (400, 290)])
    streams = [kvsieve.stream(model, policy, "cpu") for policy in (base, tiered(base, tmp_path, blocks=8, keep=64))]
    more = [tiny.ids(2, 80, seed=seed) for seed in range(4)]
    told: list[list[Any]] = [[], []]
    for stream, mine in zip(streams, told):
        mine.append(stream.feed(ids, mask, chunk=150))
        mark = stream.mark()
        mine += [stream.feed(more[0]), stream.cache.crop(-300), stream.feed(more[1], chunk=1)]
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        with stream.fork() as fork:
            mine += [fork.feed(more[2]), stream.feed(more[3], chunk=1), fork.feed(more[3][:, :9], chunk=1)]
        stream.rewind(mark)
        mine += [stream.generate(more[0], max_new_tokens=6, do_sample=False)]
    for mine, theirs in zip(*told):
        assert mine is None or torch.equal(mine, theirs)
    assert same_memory(*streams)
    for stream in streams:
        stream.close()
    answers = []
    for policy in (base, tiered(base, tmp_path)):
        with kvsieve.stream(model, policy, "cpu") as stream:
            answers.append(stream.generate(tiny.ids(1, 320), max_new_tokens=6, do_sample=False, num_beams=3))
    assert torch.equal(*answers)


def test_a_session_file(tmp_path: Path) -> None:
    model, base = tiny.model(), kvsieve.SelectiveV(8)
    policy = kvsieve.SelectiveV(8, host_budget=4 * VALUES, disk=str(tmp_path))
    assert policy.tiers == Tiered(4 * VALUES, str(tmp_path), values_alone=True)
    with kvsieve.stream(model, policy, "cpu") as stream, kvsieve.stream(model, base, "cpu") as full:
        for one in (stream, full):
            one.feed(tiny.ids(1, 500))
        before = stream.stats().tiers
        stream.save(tmp_path / "session")
        after = stream.stats().tiers
        assert before is not None
        assert after is not None
        assert before.loads == after.loads, "saving leaves values where they are"
        with kvsieve.load(tmp_path / "session", model, backend="cpu") as loaded:
            assert loaded.policy == policy
            want = full.generate(tiny.ids(1, 3), max_new_tokens=5, do_sample=False)
            for again in (loaded, stream):
                assert torch.equal(again.generate(tiny.ids(1, 3), max_new_tokens=5, do_sample=False), want)
            assert loaded.stats().tiers.bytes_in_file > 0  # type: ignore[union-attr]


def test_values_that_were_damaged_are_an_error_and_no_answer(tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiered(kvsieve.SelectiveV(40), tmp_path), "cpu") as stream:
        stream.feed(tiny.ids(1, 700))
        (name,) = [link for link in Path("/proc/self/fd").iterdir() if str(link.resolve()).startswith(str(tmp_path))]
        with open(name, "r+b") as file:
            file.truncate(0)
        new = tiny.ids(1, 64)  # reads every value
        with pytest.raises(TierError):
            stream.feed(new)


def test_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="values_alone"):
        Tiered("1MiB", values_alone=1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="keys and values together"):
        kvsieve.stream(tiny.model(), tiered(kvsieve.SelectiveV(8), tmp_path), "reference")
    with pytest.raises(PolicyError, match="a folder without a host_budget"):
        kvsieve.SelectiveV(8, disk=str(tmp_path))
    with pytest.raises(BudgetError):
        kvsieve.SelectiveV(8, host_budget="many")
    with pytest.raises(BudgetError, match=f"give it at least {2 * VALUES} bytes"):
        kvsieve.stream(tiny.model(), kvsieve.SelectiveV(8, host_budget=VALUES), "cpu")
    with pytest.raises(PolicyError, match="order='scores'"):
        kvsieve.stream(tiny.model(), tiered(kvsieve.SelectiveV(8), tmp_path, order="scores"), "cpu")
