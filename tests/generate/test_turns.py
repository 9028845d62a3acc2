"""Turns of a conversation, prompts longer than the budget, and what forks, saves and resets promise."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forwards, greedy, pad_left, positions, same_memory, snapshot, solo
from kvsieve.errors import CacheMismatchError, KvsieveError, SaveError, ShapeError, StateError, UnsupportedError
from kvsieve.files import tensor_file

EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
BOUNDED = pytest.mark.parametrize("policy", tiny.BOUNDED)
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)

# What a query sees does not depend on where chunks and turns begin.
ANY_CHUNKS = pytest.mark.parametrize("policy", ["full", "streaming", "lm_infinite"])


def limit(policy: str, budget: int) -> int:
    """Most tokens of a row in steady state."""
    return budget - 1 if policy == "lm_infinite" else budget


def turn(stream: kvsieve.Stream, ids: torch.Tensor, new: int = 6, **kwargs: Any) -> torch.Tensor:
    return stream.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


# --------------------------------------------------------------------------------------------------------------------- turns


@BACKEND
@ANY_CHUNKS
@pytest.mark.parametrize("budget", [200, 20], ids=["under", "over"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_turns_of_new_tokens_equal_the_whole_text_at_once(family: str, policy: str, budget: int, backend: str) -> None:
    model, text = tiny.model(family), torch.zeros(1, 0, dtype=torch.long)
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        for at, length in enumerate((30, 7, 1, 25)):
            new = tiny.ids(1, length, at)
            text = torch.cat([text, new], 1)
            got = turn(stream, new)
            assert torch.equal(got[:, :length], new)
            with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as whole:
                want = greedy(model, text, 6, past_key_values=whole.cache)
            assert torch.equal(got[:, length:], want[:, text.shape[1] :])
            text = torch.cat([text, got[:, length:]], 1)
            # The last sampled token is read at the next turn.
            assert stream.seen == text.shape[1] - 1
            assert stream.cache.get_seq_length() == text.shape[1] - 1


@BACKEND
@EVERY
def test_facts_over_turns(policy: str, backend: str) -> None:
    model, seen = tiny.model(), 0
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        token = stream._engine.facts.bytes_per_token
        assert stream.stats().bytes_held == 0
        for at in range(4):
            turn(stream, tiny.ids(1, 15, at), 5)
            seen += 20
            stats = stream.stats()
            assert stats.seen == seen - 1
            assert stats.bytes_full == (seen - 1) * token
            assert stats.resident == len(positions(stream)[0])
            assert stats.bytes_held >= stats.resident * token
            assert stats.bytes_held == sum(layer.bytes_held for layer in stats.layers)
            if policy in tiny.BOUNDED:
                assert stats.resident == min(limit(policy, 20), seen - 1)
            else:
                assert stats.resident == seen - 1


@BACKEND
@EVERY
def test_turns_of_a_padded_batch_equal_their_solo_runs(policy: str, backend: str) -> None:
    model = tiny.model()
    rows = [[tiny.ids(1, n, 7 * i + at)[0] for at, n in enumerate(sizes)] for i, sizes in enumerate(((30, 6, 9), (11, 6, 9)))]
    answers = []
    for texts in rows:
        with kvsieve.stream(model, tiny.POLICIES[policy](64), backend) as stream:
            answers.append([turn(stream, text[None])[0, len(text) :].tolist() for text in texts])
    with kvsieve.stream(model, tiny.POLICIES[policy](64), backend) as stream:
        for at in range(3):
            ids, mask = pad_left([rows[0][at], rows[1][at]])
            got = turn(stream, ids, attention_mask=mask)
            for row in range(2):
                assert got[row, ids.shape[1] :].tolist() == answers[row][at]


@BACKEND
@EVERY
def test_feed_then_generate(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 50)
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        stream.feed(ids[:, :30])
        stream.feed(ids[:, 30:45], chunk=4)
        assert stream.seen == 45
        got = turn(stream, ids[:, 45:])
    assert got[:, 5:].tolist() == solo(model, [ids[0]])


@BACKEND
@EVERY
def test_feed_after_generate_reads_the_last_sampled_token_first(policy: str, backend: str) -> None:
    model, ids, more = tiny.model(), tiny.ids(1, 20), tiny.ids(1, 5, 3)
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        text = turn(stream, ids)
        stream.feed(more)
        assert stream.seen == text.shape[1] + 5
        got = turn(stream, ids[:, :3])
    whole = torch.cat([text, more, ids[:, :3]], 1)
    assert got[:, 3:].tolist() == solo(model, [whole[0]])


@BACKEND
@BOUNDED
def test_prompts_longer_than_the_budget_and_the_trained_length(policy: str, backend: str) -> None:
    model = tiny.model(max_position_embeddings=64)
    counts: list[int] = []
    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        hook = model.register_forward_hook(lambda *_: counts.append(len(positions(stream)[0])))
        try:
            out = turn(stream, tiny.ids(1, 300))
        finally:
            hook.remove()
        assert stream.seen == 305
        assert out.shape == (1, 306)
        assert len(positions(stream)[0]) == limit(policy, 40)
    assert len(counts) > 10
    assert max(counts) <= limit(policy, 40) + 32


@BACKEND
@ANY_CHUNKS
def test_a_long_prompt_is_read_as_by_one_forward(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 130)
    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        want = greedy(model, ids, 6, past_key_values=stream.cache)
    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        stream.feed(ids[:, :100], chunk=13)
        assert torch.equal(turn(stream, ids[:, 100:])[:, 30:], want[:, 130:])


# ------------------------------------------------------------------------------------------------------------------ end of turn


@BACKEND
def test_end_turn_halves_kept_scores(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=40, sinks=2, recent=4, decay=0.5), backend) as stream:
        stream.feed(tiny.ids(2, 60))
        before = [(k.positions.copy(), k.scores.copy()) for k in stream.kept()]
        stream.end_turn()
        for (places, scores), kept in zip(before, stream.kept()):
            assert np.array_equal(kept.positions, places)
            assert np.array_equal(kept.scores, scores * np.float32(0.5))


@BACKEND
@BOUNDED
def test_end_turn_brings_residents_down_to_the_budget(policy: str, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        turn(stream, tiny.ids(1, 15), 40, end_turn=False)
        over = positions(stream)[0]
        stream.end_turn()
        kept = positions(stream)[0]
        assert len(kept) == limit(policy, 20)
        assert set(kept) <= set(over)
        held = snapshot(stream)
        stream.end_turn()
        assert all(torch.equal(held[k], v) for k, v in snapshot(stream).items())


def test_end_turn_of_an_empty_stream_is_nothing() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.SirLLM(budget=20), "reference") as stream:
        stream.end_turn()
        assert stream.stats().resident == 0


@BACKEND
@EVERY
def test_reset_starts_a_new_session(policy: str, backend: str) -> None:
    model = tiny.model("gemma2")
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        want = turn(stream, tiny.ids(1, 30))
        turn(stream, tiny.ids(1, 30, 5))
        stream.reset()
        stats = stream.stats()
        assert (stats.seen, stats.resident, stats.bytes_held, stream.kept()) == (0, 0, 0, [])
        assert torch.equal(turn(stream, tiny.ids(1, 30)), want)
        stream.reset()
        assert turn(stream, tiny.ids(3, 10)).shape == (3, 16)


# ------------------------------------------------------------------------------------------------------------------------ forks


@BACKEND
@EVERY
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_fork_leaves_its_parent_bit_identical(family: str, policy: str, backend: str) -> None:
    model = tiny.model(family)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        stream.feed(tiny.ids(2, 50))
        held = snapshot(stream)
        assert ("sliding.keys.0" in held) == (family == "gemma2")
        with stream.fork() as child:
            assert same_memory(stream, child)
            turn(child, tiny.ids(2, 20, 1), 12)
            child.end_turn()
            child.reset()
        after = snapshot(stream)
        assert held.keys() == after.keys()
        assert all(torch.equal(held[name], after[name]) for name in held)
        got = turn(stream, tiny.ids(2, 9, 2))
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as other:
        other.feed(tiny.ids(2, 50))
        assert torch.equal(turn(other, tiny.ids(2, 9, 2)), got)


@BACKEND
@EVERY
def test_the_order_of_forks_does_not_matter(policy: str, backend: str) -> None:
    model, options = tiny.model(), [tiny.ids(1, n, n) for n in (5, 20, 1)]
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        stream.feed(tiny.ids(1, 70))
        results = []
        for order in ([0, 1, 2], [2, 1, 0]):
            logits: dict[int, torch.Tensor] = {}
            for at in order:
                with stream.fork() as child:
                    logits[at] = forwards(model, child.cache, options[at], [20])
            results.append(logits)
        with stream.fork() as a, stream.fork() as b, a.fork() as c:
            logits = {}
            for lo in range(0, 20, 4):
                for at, child in ((0, a), (1, b), (2, c)):
                    if lo < options[at].shape[1]:
                        part = forwards(model, child.cache, options[at][:, lo : lo + 4], [4])
                        logits[at] = torch.cat([logits[at], part], 1) if at in logits else part
    for at in range(3):
        assert torch.equal(results[0][at], results[1][at])
        if policy in ("full", "streaming", "lm_infinite"):
            torch.testing.assert_close(logits[at], results[0][at], atol=1e-4, rtol=0)
        elif options[at].shape[1] <= 4:
            assert torch.equal(logits[at], results[0][at])


@BACKEND
@EVERY
def test_a_fork_outlives_its_parent(policy: str, backend: str) -> None:
    model = tiny.model()
    with ExitStack() as left_open:
        stream = left_open.enter_context(kvsieve.stream(model, tiny.POLICIES[policy](24), backend))
        stream.feed(tiny.ids(1, 50))
        child, twin = (left_open.enter_context(stream.fork()) for _ in range(2))
        want = turn(twin, tiny.ids(1, 9, 2), 12)
        twin.close()
        stream.reset()
        stream.feed(tiny.ids(1, 200, 3))
        stream.close()
        assert torch.equal(turn(child, tiny.ids(1, 9, 2), 12), want)


# -------------------------------------------------------------------------------------------------------------------- save, load


@BACKEND
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_stream_goes_on_identically(policy: str, backend: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = tiny.model("llama", dtype), tmp_path / "stream.safetensors"
    ids, mask = pad_left([tiny.ids(1, 50)[0], tiny.ids(1, 31, 2)[0]])
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        turn(stream, ids, attention_mask=mask)
        stream.save(path)
        with kvsieve.load(path, model, backend) as loaded:
            assert same_memory(stream, loaded)
            assert repr(loaded.policy) == repr(stream.policy)
            a, b = stream.stats(), loaded.stats()
            assert (a.seen, a.resident, a.bytes_full) == (b.seen, b.resident, b.bytes_full)
            for at in range(3):
                assert torch.equal(turn(stream, tiny.ids(2, 8, at)), turn(loaded, tiny.ids(2, 8, at)))
            # Blocks lie elsewhere after loading, so sums may run in another order: equal places, close numbers.
            assert positions(loaded) == positions(stream)
            mine, theirs = snapshot(stream), snapshot(loaded)
            for name in (n for n in mine if n.startswith(("keys", "values"))):
                torch.testing.assert_close(theirs[name], mine[name], atol=1e-4 if dtype is torch.float32 else 0.1, rtol=1e-2)


@BACKEND
def test_an_empty_stream_can_be_saved(backend: str, tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=20), backend) as stream:
        stream.save(tmp_path / "empty")
    with kvsieve.load(tmp_path / "empty", model, backend) as loaded:
        assert loaded.seen == 0
        assert turn(loaded, tiny.ids(1, 5)).shape == (1, 11)


def test_a_stream_saved_by_one_backend_loads_in_another(tmp_path: Path) -> None:
    model, path = tiny.model(), tmp_path / "stream"
    with kvsieve.stream(model, kvsieve.SirLLM(budget=24), "reference") as stream:
        stream.feed(tiny.ids(1, 60))
        stream.save(path)
        with kvsieve.load(path, model, "cpu") as loaded:
            assert same_memory(stream, loaded)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "reference") as stream:
        stream.feed(tiny.ids(1, 10))
        stream.save(path)
    for other in (tiny.model("qwen2"), tiny.model("llama", torch.bfloat16), tiny.model(num_hidden_layers=1)):
        before = other.config._attn_implementation
        with pytest.raises(CacheMismatchError, match="saved from LlamaForCausalLM"):
            kvsieve.load(path, other)
        assert other.config._attn_implementation == before


def test_a_file_that_is_not_a_stream_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(KvsieveError, match="no kvsieve stream"):
        kvsieve.load(tmp_path / "other", tiny.model())
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", metadata={"kvsieve": '{"version": 99}'})
    with pytest.raises(KvsieveError, match="format 99"):
        kvsieve.load(tmp_path / "newer", tiny.model())
    (tmp_path / "junk").write_bytes(b"not a safetensors file")
    with pytest.raises(KvsieveError):
        kvsieve.load(tmp_path / "junk", tiny.model())
    with pytest.raises(FileNotFoundError):
        kvsieve.load(tmp_path / "missing", tiny.model())


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny.model(), tmp_path / "stream"
    write, written = tensor_file._write_tensor, []

    def half(*args: Any) -> None:
        written.append(write(*args))
        if len(written) > 2:
            raise OSError("disk full")

    with kvsieve.stream(model, kvsieve.SirLLM(budget=24), "reference") as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(path)
        before = path.read_bytes()
        stream.feed(tiny.ids(1, 40, 1))
        monkeypatch.setattr(tensor_file, "_write_tensor", half)
        with pytest.raises(SaveError, match=r"disk full; what was there before is as it was"):
            stream.save(path)
    assert len(written) == 3
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    own = kvsieve.Memory(evict=kvsieve.methods.streaming_llm.Window(20), position=kvsieve.policy.InCache())
    with kvsieve.stream(tiny.model(), own, "reference") as stream:
        stream.feed(tiny.ids(1, 10))
        with pytest.raises(UnsupportedError, match="cannot be written as text"):
            stream.save(tmp_path / "stream")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- wide and assisted turns


@BACKEND
@EVERY
def test_a_turn_with_beams_leaves_one_row_that_read_the_best(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    want = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=6)
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        got = turn(stream, ids, num_beams=3)
        assert torch.equal(got, want)
        assert len(stream.kept()) == 1
        assert stream.seen == 26
        more = turn(stream, tiny.ids(1, 4, 6))
    whole = torch.cat([want, tiny.ids(1, 4, 6)], 1)
    assert more[:, 4:].tolist() == solo(model, [whole[0]])


@BACKEND
def test_assisted_turns_equal_plain_ones(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    with kvsieve.stream(model, kvsieve.StreamingLLM(budget=120), backend) as stream:
        got = turn(stream, ids, prompt_lookup_num_tokens=3)
        assert torch.equal(got, greedy(model, ids, 6))
        text = torch.cat([got, ids], 1)
        got = turn(stream, ids, prompt_lookup_num_tokens=3)
        assert torch.equal(got[:, 20:], greedy(model, text, 6)[:, text.shape[1] :])
        before = stream.ids
        with pytest.raises(UnsupportedError, match="assisted"):
            # Transformers feeds a stream's history again where something looks back at it.
            turn(stream, ids, prompt_lookup_num_tokens=3, repetition_penalty=1.5)
        assert all(torch.equal(a, b) for a, b in zip(stream.ids, before))
        text = torch.cat([text, got[:, 20:], ids], 1)
        assert torch.equal(turn(stream, ids)[:, 20:], greedy(model, text, 6)[:, text.shape[1] :])


def test_arguments_that_cannot_be_right_are_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        with pytest.raises(StateError, match="past_key_values"):
            stream.generate(tiny.ids(1, 4), past_key_values=stream.cache)
        for chunk in (-1, 0):
            with pytest.raises(ShapeError, match="chunk"):
                stream.feed(tiny.ids(1, 4), chunk=chunk)
        stream.feed(tiny.ids(2, 4))
        with pytest.raises(CacheMismatchError, match="2 sequences"):
            stream.feed(tiny.ids(1, 4))
        assert stream.seen == 4
