"""Every way to generate works around a stream's cache, and gives what it gives without one while the budget holds."""

from __future__ import annotations

import threading
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, positions
from kvsieve.errors import StateError

EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))
BOUNDED = pytest.mark.parametrize("policy", tiny.BOUNDED)
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


def limit(policy: str, budget: int) -> int:
    """Most tokens of a row once a multi-token forward is over."""
    return budget - 1 if policy == "lm_infinite" else budget


@BACKEND
@EVERY
def test_sampling_draws_the_same_tokens(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 12)
    how: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "max_new_tokens": 8,
    }
    torch.manual_seed(5)
    want = model.generate(ids, **how)
    with kvsieve.stream(model, tiny.POLICIES[policy](60), backend) as stream:
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, past_key_values=stream.cache, **how), want)


@BACKEND
@EVERY
def test_beam_search_under_the_budget(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 12)
    how: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9, "num_return_sequences": 2}
    want = model.generate(ids, **how)
    with kvsieve.stream(model, tiny.POLICIES[policy](60), backend) as stream:
        assert torch.equal(model.generate(ids, past_key_values=stream.cache, **how), want)


@BACKEND
@EVERY
def test_beam_search_with_sliding_layers(policy: str, backend: str) -> None:
    model, ids = tiny.model("gemma2"), tiny.ids(1, 30)
    how: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    want = model.generate(ids, **how)
    with kvsieve.stream(model, tiny.POLICIES[policy](100), backend) as stream:
        assert torch.equal(model.generate(ids, past_key_values=stream.cache, **how), want)


@BACKEND
@BOUNDED
def test_beam_search_over_the_budget_keeps_sane_beams(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 40)
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        out = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=12, past_key_values=stream.cache)
        assert out.shape == (2, 52)
        assert torch.equal(out[:, :40], ids)
        kept = positions(stream)
        assert len(kept) == 6
        for row in kept:
            assert row == sorted(set(row))
            assert row[:2] == [0, 1] or policy == "snapkv"
            assert row[-1] == 50
            assert len(row) <= limit(policy, 16) + 64
        stream.end_turn()
        assert all(len(row) <= limit(policy, 16) for row in positions(stream))


@BACKEND
@BOUNDED
def test_the_best_beam_is_what_its_own_tokens_give(policy: str, backend: str) -> None:
    """Over the budget too, the winner's score is the sum of its tokens' log-probabilities, run alone through the same policy."""
    model, ids = tiny.model(), tiny.ids(1, 40)
    how: dict[str, Any] = {"num_beams": 4, "do_sample": False, "max_new_tokens": 10, "length_penalty": 0.0}
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        out = model.generate(ids, past_key_values=stream.cache, return_dict_in_generate=True, output_scores=True, **how)
    best = out.sequences
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as alone:
        logits = forwards(model, alone.cache, best[:, :-1], [40, 1])
    logps = logits[0, 39:].log_softmax(-1).gather(-1, best[0, 40:, None])
    assert float(logps.sum()) == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)


@BACKEND
@EVERY
def test_several_return_sequences(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 12)
    how: dict[str, Any] = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 6}
    torch.manual_seed(3)
    want = model.generate(ids, **how)
    with kvsieve.stream(model, tiny.POLICIES[policy](60), backend) as stream:
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, past_key_values=stream.cache, **how), want)
        assert len(stream.kept()) == 6


# ------------------------------------------------------------------------------------------------------------ assisted decoding


def repeating(length: int) -> torch.Tensor:
    """A prompt in which lookups find something."""
    return torch.cat([tiny.ids(1, 9, 4)] * (length // 9 + 1), 1)[:, :length]


@BACKEND
@EVERY
@pytest.mark.parametrize("budget", [200, 30], ids=["under", "over"])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_is_lossless(policy: str, budget: int, how: str, backend: str) -> None:
    model, ids, new = tiny.model(), repeating(60), 18
    extra = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": tiny.model(seed=1, num_hidden_layers=1)}
    made = tiny.POLICIES[policy](budget)
    with kvsieve.stream(model, made, backend) as plain:
        want = greedy(model, ids, new, past_key_values=plain.cache)
        left = positions(plain)
    with kvsieve.stream(model, made, backend) as stream:
        got = greedy(model, ids, new, past_key_values=stream.cache, **extra)
        assert torch.equal(got, want)
        if policy in tiny.BOUNDED and budget < 60:
            assert len(positions(stream)[0]) <= limit(policy, budget) + 64
            if policy in ("streaming", "lm_infinite"):
                assert len(left[0]) == limit(policy, budget)
            stream.end_turn()
            assert len(positions(stream)[0]) <= limit(policy, budget)


@BACKEND
@BOUNDED
def test_a_model_of_the_same_weights_as_assistant_is_always_right(policy: str, backend: str) -> None:
    """All candidates are accepted, so `crop` removes nothing; the memory comes back to the budget all the same."""
    model, ids = tiny.model(), tiny.ids(1, 50)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as plain:
        want = greedy(model, ids, 24, past_key_values=plain.cache)
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        got = greedy(model, ids, 24, past_key_values=stream.cache, assistant_model=tiny.model(seed=0, rms_norm_eps=1.0001e-6))
        assert torch.equal(got, want)
        stream.end_turn()
        assert len(positions(stream)[0]) <= limit(policy, 24)


@BACKEND
@BOUNDED
def test_lookup_with_sliding_layers(policy: str, backend: str) -> None:
    model, ids = tiny.model("gemma2"), repeating(60)
    made = tiny.POLICIES[policy](30)
    with kvsieve.stream(model, made, backend) as plain:
        want = greedy(model, ids, 16, past_key_values=plain.cache)
    with kvsieve.stream(model, made, backend) as stream:
        assert torch.equal(greedy(model, ids, 16, past_key_values=stream.cache, prompt_lookup_num_tokens=4), want)


# ------------------------------------------------------------------------------------------------------- prefill in chunks


@BACKEND
@EVERY
def test_prefill_in_chunks_under_the_budget(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 50)
    want = greedy(model, ids, 8)
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        assert torch.equal(greedy(model, ids, 8, past_key_values=stream.cache, prefill_chunk_size=16), want)


@BACKEND
@BOUNDED
def test_prefill_in_chunks_is_bounded_after_each(policy: str, backend: str) -> None:
    model, ids, residents = tiny.model(), tiny.ids(1, 150), []
    with kvsieve.stream(model, tiny.POLICIES[policy](32), backend) as stream:
        hook = model.register_forward_hook(lambda *_: residents.append((stream.seen, len(positions(stream)[0]))))
        try:
            greedy(model, ids, 4, past_key_values=stream.cache, prefill_chunk_size=25)
        finally:
            hook.remove()
    assert [seen for seen, _ in residents] == [25, 50, 75, 100, 125, 150, 151, 152, 153]
    assert all(count <= limit(policy, 32) for _, count in residents[:6])
    assert residents[-1][1] <= limit(policy, 32) + 64


# ------------------------------------------------------------------------------------------------------------------ threads


@BACKEND
@EVERY
def test_a_streamer_in_a_thread(policy: str, backend: str) -> None:
    from transformers import TextIteratorStreamer

    class Words:
        """Tokens as words; all that a streamer asks of a tokenizer."""

        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(f"{int(t)} " for t in tokens)

    model, ids = tiny.model(), tiny.ids(1, 30)
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        want = greedy(model, ids, 10, past_key_values=stream.cache)[0, 30:].tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        how = {"past_key_values": stream.cache, "streamer": streamer}
        worker = threading.Thread(target=greedy, args=(model, ids, 10), kwargs=how)
        worker.start()
        got = [int(word) for word in "".join(streamer).split()]
        worker.join()
    assert got == want


@BACKEND
@pytest.mark.parametrize(("one", "two"), [("streaming", "sirllm"), ("sirllm", "full"), ("lm_infinite_middle", "chain")])
def test_two_threads_on_one_model(one: str, two: str, backend: str) -> None:
    model, prompts, answers = tiny.model(), (tiny.ids(1, 40, 1), tiny.ids(1, 33, 2)), {}
    wants = []
    for name, ids in zip((one, two), prompts):
        with kvsieve.stream(model, tiny.POLICIES[name](20), backend) as stream:
            wants.append(greedy(model, ids, 20, past_key_values=stream.cache))

    def work(at: int, stream: kvsieve.Stream) -> None:
        answers[at] = greedy(model, prompts[at], 20, past_key_values=stream.cache)

    with (
        kvsieve.stream(model, tiny.POLICIES[one](20), backend) as a,
        kvsieve.stream(model, tiny.POLICIES[two](20), backend) as b,
    ):
        workers = [threading.Thread(target=work, args=(at, stream)) for at, stream in enumerate((a, b))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert sorted(answers) == [0, 1]
    assert all(torch.equal(answers[at], wants[at]) for at in (0, 1))


# ------------------------------------------------------------------------------------------------------------- other callers


def test_a_text_generation_pipeline() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", bos_token="w1")
    model, ids = tiny.model(), tiny.ids(1, 25)
    text = " ".join(f"w{int(i)}" for i in ids[0])
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7, "return_full_text": False}
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), "reference") as stream:
        got = pipe(text, past_key_values=stream.cache, **how)[0]["generated_text"]
        assert stream.seen >= 25
    assert got == pipe(text, **how)[0]["generated_text"]


@BACKEND
@EVERY
def test_return_dict_in_generate(policy: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 20)
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    want = greedy(model, ids, 5, **how)
    with kvsieve.stream(model, tiny.POLICIES[policy](80), backend) as stream:
        got = greedy(model, ids, 5, past_key_values=stream.cache, **how)
        assert got.past_key_values is stream.cache
        stream.reset()
        turn = stream.generate(ids, do_sample=False, max_new_tokens=5, **how)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(turn.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@BACKEND
@EVERY
def test_a_loop_of_plain_forwards_equals_generate(policy: str, backend: str) -> None:
    model, ids, tokens = tiny.model(), tiny.ids(1, 40), []
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        want = greedy(model, ids, 10, past_key_values=stream.cache)
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        logits = forward(model, stream.cache, ids)
        for _ in range(10):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = forward(model, stream.cache, tokens[-1])
    assert torch.equal(torch.cat([ids, *tokens], 1), want)


@BACKEND
@EVERY
@pytest.mark.parametrize("remove", [1, 7, 20])
def test_crop_forgets_the_newest_tokens(policy: str, remove: int, backend: str) -> None:
    model, ids, other = tiny.model(), tiny.ids(1, 40), tiny.ids(1, 10, 8)
    with torch.no_grad():
        want = model(torch.cat([ids[:, : 40 - remove], other], 1)).logits[:, 40 - remove :]
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        forwards(model, stream.cache, ids, [15, 1])
        if policy == "h2o":
            with pytest.raises(StateError, match="sums"):
                stream.cache.crop(-remove)
            return
        stream.cache.crop(-remove)
        assert stream.cache.get_seq_length() == 40 - remove
        assert positions(stream)[0] == list(range(40 - remove))
        torch.testing.assert_close(forwards(model, stream.cache, other, [4, 1]), want, atol=1e-4, rtol=0)


@BACKEND
@pytest.mark.parametrize("policy", ["sirllm", "chain"])
def test_scores_after_a_crop_are_those_of_the_text_that_stayed(policy: str, backend: str) -> None:
    """The row of logits that scores the next token is cropped with the tokens it saw."""
    model, ids, other = tiny.model(), tiny.ids(1, 40), tiny.ids(1, 5, 8)
    with kvsieve.stream(model, tiny.POLICIES[policy](200), backend) as stream:
        forwards(model, stream.cache, torch.cat([ids, other], 1), [40, 5])
        want = stream.kept()[0].scores
    with kvsieve.stream(model, tiny.POLICIES[policy](200), backend) as stream:
        stream.cache.activate_past_recording()
        forward(model, stream.cache, ids)
        forward(model, stream.cache, tiny.ids(1, 7, 9))
        stream.cache.crop(-7)
        forward(model, stream.cache, other)
        got = stream.kept()[0].scores
    torch.testing.assert_close(torch.tensor(got[1:45]), torch.tensor(want[1:45]), atol=1e-3, rtol=0)


@BACKEND
def test_forwards_without_the_streams_cache_are_stock(backend: str) -> None:
    from transformers import DynamicCache

    model, ids = tiny.model("gemma2"), tiny.ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        plain, padded = model(ids, use_cache=False).logits, model(ids, attention_mask=mask).logits
    tokens = greedy(model, ids, 6)
    with kvsieve.stream(model, kvsieve.SirLLM(budget=16), backend) as stream, torch.no_grad():
        forward(model, stream.cache, ids)
        held = positions(stream)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask).logits, padded)
        assert torch.equal(greedy(model, ids, 6), tokens)
        cache = DynamicCache(config=model.config)
        assert torch.equal(greedy(model, ids, 6, past_key_values=cache), tokens)
        assert positions(stream) == held


@BACKEND
@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(policy: str, dtype: torch.dtype, backend: str) -> None:
    model, ids = tiny.model("llama", dtype), tiny.ids(2, 40)
    with torch.no_grad():
        want = model(ids).logits.float()
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        got = forwards(model, stream.cache, ids, [30, 1]).float()
        assert stream.stats().bytes_full == 80 * stream._engine.facts.bytes_per_token
        assert stream._engine.facts.bytes_per_token == 2 * 2 * 32 * 2
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) < (0.1 if dtype is torch.bfloat16 else 0.02) * scale


@BACKEND
@BOUNDED
def test_greedy_keeps_within_the_budget_and_a_block(policy: str, backend: str) -> None:
    model, counts = tiny.model(), []
    with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
        hook = model.register_forward_hook(lambda *_: counts.append(len(positions(stream)[0])))
        try:
            greedy(model, tiny.ids(1, 10), 96, past_key_values=stream.cache)
        finally:
            hook.remove()
        assert stream.seen == 105
    slack = 0 if policy in ("streaming", "lm_infinite") else 64
    assert max(counts) <= limit(policy, 24) + slack
    assert len(counts) == 96
