"""With a budget at or above the length, every policy gives the full cache's logits, on every family and backend."""

from __future__ import annotations

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_logits_equal_the_stock_cache(family: str, policy: str, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(2, 46)
    with torch.no_grad():
        want = model(ids).logits
    # The chain's first memory alone holds everything, so that nothing flows on.
    with kvsieve.stream(model, tiny.POLICIES[policy](128), backend) as stream:
        got = forwards(model, stream.cache, ids, [40, 1, 4, 1])
        assert [kept.positions.tolist() for kept in stream.kept()] == [list(range(46))] * 2
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "gpt_oss"])
def test_greedy_tokens_equal_the_stock_cache(family: str, policy: str, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(2, 20)
    want = greedy(model, ids, 14)
    with kvsieve.stream(model, tiny.POLICIES[policy](80), backend) as stream:
        assert torch.equal(greedy(model, ids, 14, past_key_values=stream.cache), want)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("budget", [60, 64, 500])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "smollm3", "glm4"])
def test_streaming_is_bit_identical_to_full(family: str, budget: int, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(2, 60)
    got = {}
    for name, policy in (("full", kvsieve.Full()), ("streaming", kvsieve.StreamingLLM(budget=budget, sinks=4))):
        with kvsieve.stream(model, policy, backend) as stream:
            assert stream.stats().stored_keys == "post_rope"
            got[name] = forwards(model, stream.cache, ids, [50, 1, 5, 1])
    assert torch.equal(got["full"], got["streaming"])


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_exactly_at_the_budget_nothing_is_lost(policy: str, backend: str) -> None:
    """The last token that fits is answered as by the stock cache; the first that does not fit lets something go."""
    model, ids = tiny.model(), tiny.ids(1, 40)
    budget = {"chain": 80, "lm_infinite": 42}.get(policy, 40)
    with torch.no_grad():
        want = model(ids).logits
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        got = forward(model, stream.cache, ids)
        assert stream.stats().resident == 40
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", tiny.BOUNDED)
def test_over_the_budget_the_answer_differs(policy: str, backend: str) -> None:
    """The tests above could not fail if a budget never did anything."""
    model, ids = tiny.model(), tiny.ids(1, 60)
    with torch.no_grad():
        want = model(ids).logits
    with kvsieve.stream(model, tiny.POLICIES[policy](16), backend) as stream:
        got = forwards(model, stream.cache, ids, [20])
        assert stream.stats().resident < 60
    assert float((got - want)[:, -1].abs().max()) > 1e-2


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize(
    ("rope", "extra"),
    [
        ("linear", {"factor": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}),
    ],
)
def test_scaled_frequencies(rope: str, extra: dict[str, float], backend: str) -> None:
    import transformers

    parameters = {"rope_type": rope, "rope_theta": 10000.0, **extra}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.config("llama", rope_parameters=parameters)).eval()
    ids = tiny.ids(1, 40)
    with torch.no_grad():
        want = model(ids).logits
    for policy in ("streaming", "sirllm", "lm_infinite"):
        with kvsieve.stream(model, tiny.POLICIES[policy](64), backend) as stream:
            torch.testing.assert_close(forwards(model, stream.cache, ids, [30, 1]), want, atol=1e-4, rtol=0)
