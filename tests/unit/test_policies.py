"""The published systems: their parameters, what they refuse, and how they read and write themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import systems
import tiny
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.methods import registry
from kvsieve.methods.parser import parse
from kvsieve.methods.registry import SYSTEMS
from kvsieve.methods.sirllm import Surprisal
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Chain
from kvsieve.policy.evict import KeepAll
from kvsieve.policy.position import Capped, FixedDistance, InCache, Original
from kvsieve.policy.select import TopKTokens
from kvsieve.policy.specs import EvictionSpec, MemorySpec, PositionSpec

WELL = [
    "Full()",
    "StreamingLLM(budget=1024, sinks=4)",
    "StreamingLLM(budget='64MiB', sinks=0)",
    "LMInfinite(window=2, sinks=0)",
    "LMInfinite(window=1020, sinks=4)",
    "LMInfinite(window=100, sinks=4, ceiling=50)",
    "LMInfinite(window=100, sinks=4, middle_top_k=5, middle_from_layer=2)",
    "LMInfinite(window=100, sinks=4, ceiling=50, middle_top_k=5, middle_from_layer=0, middle_distance=7)",
    "SirLLM(budget=1024, sinks=4)",
    "SirLLM(budget=1024, sinks=4, recent=0)",
    "SirLLM(budget='1GB', sinks=1, recent=8, decay=0.7)",
    "SirLLM(budget=64, sinks=4, decay=0.9, score='published')",
    "StreamingLLM(budget=64, sinks=4) >> SirLLM(budget=64, sinks=0, recent=0)",
    "StreamingLLM(budget=64, sinks=4) >> StreamingLLM(budget=64, sinks=0) >> SirLLM(budget=64, sinks=0, recent=0)",
]


@pytest.mark.parametrize("text", WELL)
def test_a_policy_prints_what_parses_back(text: str) -> None:
    policy = parse(text)
    assert repr(policy) == text
    assert repr(parse(repr(policy))) == repr(policy)
    assert parse(repr(policy)) == policy
    assert policy.specs(1024) == parse(repr(policy)).specs(1024)


@pytest.mark.parametrize("name", list(tiny.POLICIES))
def test_every_policy_of_the_tests_prints_what_parses_back(name: str) -> None:
    policy = tiny.POLICIES[name](64)
    assert repr(parse(repr(policy))) == repr(policy)
    assert parse(repr(policy)).specs(8) == policy.specs(8)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("full", "Full()"),
        ("  FULL ", "Full()"),
        ("sirllm(1024, decay=0.9)", "SirLLM(budget=1024, sinks=4, decay=0.9)"),
        ("streaming_llm(512) >> sirllm(512)", "StreamingLLM(budget=512, sinks=4) >> SirLLM(budget=512, sinks=4)"),
        ("lm_infinite(100)", "LMInfinite(window=100, sinks=10)"),
        ("streamingllm(budget='64MiB')", "StreamingLLM(budget='64MiB', sinks=4)"),
    ],
)
def test_parse_is_lenient_about_case_and_underscores(text: str, want: str) -> None:
    assert repr(parse(text)) == want


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot read"),
        ("sirllm(", "cannot read"),
        ("sirllm(budget=1024", "cannot read"),
        ("juggle(budget=4)", "unknown policy 'juggle'; known: full"),
        ("1024", "cannot read"),
        ("sirllm(budget=1024).x", "cannot read"),
        ("__import__('os')", "unknown policy"),
        ("sirllm(budget=__import__('os').getpid())", "literal"),
        ("sirllm(budget=open('x'))", "literal"),
        ("sirllm()", "budget"),
        ("sirllm(1024, wrong=1)", "wrong"),
        ("sirllm(1024, *[1])", "sirllm"),
        ("sirllm(1024, **{'decay': 0.5})", "sirllm"),
        ("full() & full()", "cannot read"),
        ("sirllm(budget=0)", "positive"),
        ("full() >> sirllm(10)", "evicts nothing"),
        ("streamingllm(64) | sirllm(64)", "decide evict"),
    ],
)
def test_parse_refuses_with_a_policy_error(text: str, match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        parse(text)


class TestRegistry:
    def test_it_feeds_the_public_names(self) -> None:
        assert sorted(system.name for system in SYSTEMS) == sorted(registry.__all__)
        for system in SYSTEMS:
            assert getattr(kvsieve, system.name) is system.make
            assert system.name in kvsieve.__all__

    def test_a_system_is_one_file(self) -> None:
        files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")} - {"__init__", "registry", "parser"}
        assert {system.make.__module__ for system in SYSTEMS} == {f"kvsieve.methods.{name}" for name in files}
        assert all(system.paper for system in SYSTEMS if system.does != "nothing")

    @pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
    def test_it_feeds_the_parser_and_the_tables_of_the_tests(self, system: registry.System) -> None:
        policy, made = parse(system.small), [row.make() for row in systems.SYSTEMS.values()]
        assert f"{system.name}(" in repr(policy)
        # Two banks are two, whatever they are called.
        assert policy in made or (policy.bank is not None and repr(policy) in map(repr, made))
        tried = [repr(make(64)) for make in tiny.POLICIES.values()]
        assert system.does != "evicts" or any(text.startswith(f"{system.name}(") for text in tried)

    def test_it_says_what_a_system_decides(self) -> None:
        for system in SYSTEMS:
            (memory,) = parse(system.small).memories
            does = {
                "evicts": memory.roles.evict.evicts,
                "selects": memory.roles.select.sparse or memory.roles.select.thins_values,
                "stores": not memory.roles.storage.plain,
            }
            does["recalls"] = parse(system.small).bank is not None
            want = {"nothing": [], "recalls": ["evicts", "recalls"]}.get(system.does, [system.does])
            assert [name for name, found in does.items() if found] == want


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.does != "recalls"], ids=lambda system: system.name)
def test_policies_are_frozen_and_hashable(system: registry.System) -> None:
    policy = parse(system.small)
    assert policy == parse(system.small)
    assert hash(policy) == hash(parse(system.small))
    with pytest.raises(AttributeError):
        policy.memories[0].evict = None  # type: ignore[misc]


class TestParts:
    def test_full(self) -> None:
        memory = kvsieve.Full()
        assert (memory.evict, memory.position) == (KeepAll(), Original())
        assert (memory.stored_keys, memory.moves, memory.needs_surprisal) == ("post_rope", False, False)

    def test_streaming(self) -> None:
        memory = kvsieve.StreamingLLM(100)
        assert (memory.evict, memory.position) == (Window(budget=100, sinks=4), InCache())
        assert (memory.stored_keys, memory.moves, memory.needs_surprisal) == ("post_rope", True, False)
        assert memory.specs(1) == [MemorySpec(EvictionSpec("window", sinks=4, window=96), PositionSpec("in_cache"))]
        assert memory.specs(1)[0].evict.visible == 97

    def test_infinite(self) -> None:
        memory = kvsieve.LMInfinite(window=100)
        assert (memory.evict, memory.position) == (Window(budget=109, sinks=10), Capped(100))
        assert (memory.stored_keys, memory.moves) == ("pre_rope", True)
        spec = memory.specs(1)[0]
        assert (spec.evict.window, spec.evict.visible, spec.position.distance) == (99, 100, 100)
        assert kvsieve.LMInfinite(window=100, ceiling=33).position == Capped(33)

    def test_infinite_with_a_middle(self) -> None:
        chain = kvsieve.LMInfinite(window=100, middle_top_k=5)
        assert isinstance(chain, Chain)
        near, middle = chain.memories
        assert (middle.evict, middle.position, middle.select) == (KeepAll(), FixedDistance(50), TopKTokens(5, 4))
        assert near == kvsieve.LMInfinite(window=100)
        assert kvsieve.LMInfinite(100, middle_top_k=5, middle_distance=9).memories[1].position == FixedDistance(9)

    def test_sirllm(self) -> None:
        memory = kvsieve.SirLLM(104)
        assert (memory.evict, memory.position) == (Surprisal(budget=104, sinks=4), InCache())
        assert (memory.stored_keys, memory.moves, memory.needs_surprisal) == ("pre_rope", True, True)
        assert memory.specs(1)[0].evict.recent == 50
        assert kvsieve.SirLLM(104, score="published").specs(1)[0].evict.recent == 0
        assert kvsieve.SirLLM(104, recent=7, score="published").specs(1)[0].evict.recent == 7


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kvsieve.SirLLM(64, decay=0), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay=0.0), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay=1.5), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay=-0.5), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay=float("nan")), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay=True), PolicyError, "decay"),
        (lambda: kvsieve.SirLLM(64, decay="0.5"), PolicyError, "decay"),  # type: ignore[arg-type]
        (lambda: kvsieve.SirLLM(64, score="entropy"), PolicyError, "score"),  # type: ignore[arg-type]
        (lambda: kvsieve.SirLLM(64, sinks=-1), PolicyError, "sinks"),
        (lambda: kvsieve.SirLLM(64, sinks=2.0), PolicyError, "sinks"),  # type: ignore[arg-type]
        (lambda: kvsieve.SirLLM(64, recent=-1), PolicyError, "recent"),
        (lambda: kvsieve.SirLLM(64, recent=True), PolicyError, "recent"),
        (lambda: kvsieve.SirLLM(8, sinks=4, recent=5), BudgetError, "sinks"),
        (lambda: kvsieve.SirLLM(4, sinks=4), BudgetError, "sinks"),
        (lambda: kvsieve.SirLLM(4, sinks=4, recent=0), BudgetError, "sinks"),
        (lambda: kvsieve.StreamingLLM(4, sinks=4), BudgetError, "sinks"),
        (lambda: kvsieve.StreamingLLM(64, sinks=True), PolicyError, "sinks"),
        (lambda: kvsieve.LMInfinite(window=1), PolicyError, "window"),
        (lambda: kvsieve.LMInfinite(window=0), PolicyError, "window"),
        (lambda: kvsieve.LMInfinite(window=64.0), PolicyError, "window"),  # type: ignore[arg-type]
        (lambda: kvsieve.LMInfinite(window=64, sinks=-1), PolicyError, "sinks"),
        (lambda: kvsieve.LMInfinite(window=64, ceiling=0), PolicyError, "ceiling"),
        (lambda: kvsieve.LMInfinite(window=64, middle_top_k=-1), PolicyError, "middle_top_k"),
        (lambda: kvsieve.LMInfinite(window=64, middle_top_k=2, middle_from_layer=-1), PolicyError, "from_layer"),
        (lambda: kvsieve.LMInfinite(window=64, middle_top_k=2, middle_distance=-1), PolicyError, "distance"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("make", [kvsieve.StreamingLLM, kvsieve.SirLLM])
def test_the_smallest_budget_works(make: Any) -> None:
    for sinks in (0, 4):
        policy = make(sinks + 1, sinks=sinks)
        with kvsieve.stream(tiny.model(), policy, "reference") as stream:
            stream.generate(tiny.ids(1, 30), max_new_tokens=4, do_sample=False)
            kept = stream.kept()[0].positions.tolist()
        assert len(kept) == sinks + 1
        assert kept[:sinks] == list(range(sinks))
