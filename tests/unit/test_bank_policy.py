"""A bank as a policy: arguments and companions that are refused, its text, how far it is seen, its handles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kvsieve
import pytest
from kvsieve.errors import PolicyError
from kvsieve.methods.parser import parse


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": 3}, "path must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"chunk": 3}, "capacity must be a multiple of chunk=3"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_k": 20}, "top_k must be a multiple"),
        ({"capacity": 100}, "capacity must be a multiple"),
        ({"capacity": "1MiB"}, "capacity must be"),
        ({"layers": []}, "layers must name"),
        ({"layers": [1, 1]}, "layers must name"),
        ({"layers": [-1]}, "layers must be"),
        ({"bias": float("nan")}, "bias must be"),
        ({"per_head": 1}, "per_head must be"),
        ({"bias": float("inf")}, "bias must be"),
        ({"bias": "high"}, "bias must be"),
        ({"reads": "some"}, "reads must be"),
        ({"read_only": 1}, "read_only must be"),
        ({"distance": -1}, "distance must be"),
        ({"namespace": ""}, "a namespace is"),
        ({"namespace": ["a", "a"]}, "a namespace is"),
        ({"namespace": 7}, "a namespace is"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.MemoryBank(**arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memorybank()", "the end of a chain"),
        ("memorybank() >> full()", "the end of a chain"),
        ("memorybank() | full()", "the end of a chain"),
        ("streamingllm(64) | memorybank()", "the end of a chain"),
        ("streamingllm(64) >> memorybank() >> full()", "ends with a bank"),
        ("streamingllm(64) >> memorybank() >> memorybank()", "ends with a bank"),
        ("streamingllm(64) >> memorybank() | quantized(8)", "a bank is the end of a chain"),
        ("full() >> memorybank()", "give the bank a distance"),
        ("lminfinite(64, middle_top_k=8) >> memorybank(distance=9)", "read a selection"),
        ("hip(64) >> memorybank(distance=9)", "read a selection"),
        ("(sirllm(160) | hip(32)) >> memorybank()", "read a selection"),
        ("snapkv(64) >> memorybank()", "keeps other tokens for each head"),
        ("(streamingllm(64) | quantized(8)) >> memorybank()", "compresses its tokens"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_it_is_built(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "StreamingLLM(budget=64, sinks=4) >> MemoryBank()",
        "StreamingLLM(budget=64, sinks=4) >> SirLLM(budget=64, sinks=0, recent=0) >> MemoryBank(chunk=4, top_k=8)",
        "Full() >> MemoryBank(read_only=True, bias=-1e999, distance=9, namespace='a')",
        "StreamingLLM(budget=64, sinks=4) >> MemoryBank(top_k=256, bias=2.0, per_head=False, reads='answers')",
        "SirLLM(budget=64, sinks=4) >> MemoryBank(path='x.bank', capacity=32, layers=(1, 2), bias=-0.5, namespace=['a', 'b'])",
    ],
)
def test_a_text_of_it_is_read_back(text: str) -> None:
    policy = parse(text)
    assert repr(policy) == text
    assert repr(parse(repr(policy))) == text
    assert (policy.stored_keys, policy.moves) == ("pre_rope", True)


@pytest.mark.parametrize(
    ("text", "distance"),
    [
        ("streamingllm(64, sinks=4)", 63),
        ("streamingllm('6KiB')", 63),
        ("lminfinite(40, sinks=8)", 40),
        ("sirllm(48)", 47),
        ("streamingllm(24) >> sirllm(16, sinks=0, recent=0)", 39),
    ],
)
def test_a_bank_is_seen_as_far_as_the_oldest_token_before_it(text: str, distance: int) -> None:
    policy: Any = parse(f"{text} >> memorybank()")
    assert policy.distance(32 if "KiB" in text else 1) == distance
    assert parse(f"{text} >> memorybank(distance=5)").distance(1) == 5  # type: ignore[attr-defined]


def test_handles_of_a_bank_are_one_bank() -> None:
    bank = kvsieve.MemoryBank(chunk=4, capacity=64)
    other = bank.namespace(["a", "b"])
    assert (bank.names, other.names, other.chunk) == (("default",), ("a", "b"), 4)
    assert other.book is bank.book
    assert bank != kvsieve.MemoryBank(chunk=4, capacity=64)
    assert (bank.like(bias=-2.0).bias, bank.like(reads="answers").reads) == (-2.0, "answers")
    assert bank.like(top_k=8).book is bank.book
    reader = kvsieve.MemoryBank(chunk=4, capacity=64).like(read_only=True)
    assert not reader.book.terms.read_only
    for wrong in ({"chunk": 8}, {"bias": None}, {"top_k": 5}):
        with pytest.raises(PolicyError):
            bank.like(**wrong)
    with pytest.raises(PolicyError, match="read-only"):
        kvsieve.MemoryBank("x", read_only=True).like(read_only=False)
    assert os.fspath(kvsieve.MemoryBank(Path("x")).path or "") == "x"
