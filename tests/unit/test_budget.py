"""Budgets are counts of tokens or bytes, checked when they are written or when a model is known."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from kvsieve.budget import check_budget, parse_bytes, tokens_for
from kvsieve.errors import BudgetError, PolicyError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("64MiB", 64 * 2**20),
        ("64MB", 64 * 10**6),
        ("2GiB", 2 * 2**30),
        ("2GB", 2 * 10**9),
        ("1.5KiB", 1536),
        (" 10 kb ", 10_000),
        ("12B", 12),
        ("1kib", 1024),
    ],
)
def test_bytes_as_text(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize(
    "text", ["", "64", "MiB", "64 MiBs", "-1MiB", "0MB", "0.0GB", "1e3MB", "64TiB", "50%", "nan MB", "1iB", "0.1B"]
)
def test_bytes_that_cannot_be_read(text: str) -> None:
    for call in (lambda: parse_bytes(text), lambda: kvsieve.StreamingLLM(text), lambda: kvsieve.SirLLM(text)):
        with pytest.raises(BudgetError):
            call()


BAD: list[Any] = [0, -1, 0.5, 1.0, 1024.0, True, False, None, [64], float("nan")]


@pytest.mark.parametrize("budget", BAD, ids=repr)
@pytest.mark.parametrize(
    "make", [kvsieve.StreamingLLM, kvsieve.SirLLM, kvsieve.methods.streaming_llm.Window, kvsieve.methods.sirllm.Surprisal]
)
def test_what_is_not_a_count_is_refused(make: Any, budget: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        make(budget)
    assert isinstance(caught.value, PolicyError)
    assert isinstance(caught.value, ValueError)


def test_a_ratio_is_told_what_to_write() -> None:
    with pytest.raises(BudgetError, match=r"count of tokens \(int\) or bytes .*64MiB.*0\.5"):
        kvsieve.SirLLM(budget=0.5)  # type: ignore[arg-type]


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 60))
def test_a_budget_holds_sinks_recent_and_one_more(sinks: int, recent: int, budget: int) -> None:
    fits = budget >= sinks + max(recent, 1)
    if fits:
        assert check_budget(budget, sinks=sinks, recent=recent, name="x") == budget
    else:
        with pytest.raises(BudgetError, match=f"at least {sinks + max(recent, 1)}"):
            check_budget(budget, sinks=sinks, recent=recent, name="x")


@given(st.integers(1, 4096), st.integers(1, 2**32))
def test_bytes_buy_whole_blocks_less_two(bytes_per_token: int, total: int) -> None:
    if total < 3 * 64 * bytes_per_token:
        with pytest.raises(BudgetError, match=f"at least {3 * 64 * bytes_per_token} bytes"):
            tokens_for(f"{total}B", bytes_per_token)
        return
    tokens = tokens_for(f"{total}B", bytes_per_token)
    assert tokens % 64 == 0
    assert tokens >= 64
    assert (tokens + 128) * bytes_per_token <= total < (tokens + 192) * bytes_per_token


def test_a_count_is_left_alone() -> None:
    assert tokens_for(7, 10**9) == 7


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("make", [kvsieve.StreamingLLM, kvsieve.SirLLM])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_byte_budget_is_respected_at_rest(make: Any, family: str, backend: str) -> None:
    model, text = tiny.model(family), "256KiB"
    with kvsieve.stream(model, make(text), backend) as stream:
        facts = stream._engine.facts
        want = tokens_for(text, facts.bytes_per_token)
        assert 64 <= want < 512
        for at in range(4):
            stream.generate(tiny.ids(1, 190, at), max_new_tokens=5, do_sample=False)
            stats = stream.stats()
            if backend == "cpu":
                assert stats.bytes_held - stream._engine.bytes_of_parts <= parse_bytes(text)
        assert stats.resident == want


def test_a_byte_budget_too_small_for_a_model_is_refused_on_opening() -> None:
    with pytest.raises(BudgetError, match="1KiB is 1024 bytes"):
        kvsieve.stream(tiny.model(), kvsieve.SirLLM("1KiB"), "reference")


def test_a_byte_budget_too_small_for_its_sinks_is_refused_on_opening() -> None:
    token = 2 * 2 * 32 * 4
    with pytest.raises(BudgetError, match="sinks"):
        kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(f"{3 * 64 * token}B", sinks=64), "reference")
