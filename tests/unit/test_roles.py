"""Roles join and chain; what cannot be meant is refused with words; a rule of one's own is one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forward, forwards, positions
from kvsieve.errors import PolicyError
from kvsieve.methods.sirllm import Surprisal
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Chain, Memory
from kvsieve.policy.evict import EvictionRule, KeepAll, Residents
from kvsieve.policy.position import Capped, FixedDistance, InCache, Original
from kvsieve.policy.select import Dense, TopKTokens
from kvsieve.policy.storage import Plain


class TestJoining:
    def test_parts_join_in_one_memory(self) -> None:
        joined = Memory(evict=Window(64)) | Memory(position=InCache())
        assert joined == Memory(evict=Window(64), position=InCache())
        assert joined.specs(1) == kvsieve.StreamingLLM(64).specs(1)

    @pytest.mark.parametrize(
        ("left", "right", "role"),
        [
            (kvsieve.SirLLM(64), kvsieve.StreamingLLM(64), "evict"),
            (Memory(evict=KeepAll()), Memory(evict=KeepAll()), "evict"),
            (Memory(position=InCache()), kvsieve.Full(), "position"),
            (Memory(select=Dense()), Memory(select=TopKTokens(3)), "select"),
            (Memory(storage=Plain()), Memory(storage=Plain()), "storage"),
        ],
    )
    def test_a_role_claimed_twice_is_refused(self, left: Memory, right: Memory, role: str) -> None:
        with pytest.raises(PolicyError, match=f"decide {role}.*chain them with >>"):
            left | right

    @pytest.mark.parametrize("role", ["evict", "position", "select", "storage"])
    def test_a_part_in_the_wrong_role_is_refused(self, role: str) -> None:
        wrong = InCache() if role == "evict" else Window(64)
        with pytest.raises(PolicyError, match=f"{role} must be a"):
            Memory(**{role: wrong})

    @pytest.mark.parametrize("other", [3, "sirllm", None, Window(64)])
    def test_only_policies_join(self, other: Any) -> None:
        for call in (lambda: kvsieve.Full() | other, lambda: kvsieve.StreamingLLM(64) >> other):
            with pytest.raises(TypeError):
                call()

    def test_unclaimed_roles_keep_everything_as_it_was(self) -> None:
        assert Memory().specs(1) == kvsieve.Full().specs(1)
        assert (Memory().stored_keys, Memory().moves, Memory().needs_surprisal) == ("post_rope", False, False)


class TestChaining:
    def test_a_chain_flattens(self) -> None:
        a, b, c = kvsieve.StreamingLLM(64), kvsieve.StreamingLLM(32, sinks=0), kvsieve.SirLLM(16, sinks=0, recent=0)
        assert (a >> b) >> c == a >> (b >> c)
        assert (a >> b >> c).memories == (a, b, c)
        assert len((a >> b >> c).specs(1)) == 3

    def test_a_chain_stores_pre_rope_keys_if_any_memory_does(self) -> None:
        chain = kvsieve.StreamingLLM(64) >> kvsieve.SirLLM(64, sinks=0)
        assert chain.stored_keys == "pre_rope"
        assert chain.moves
        assert chain.needs_surprisal
        assert (kvsieve.StreamingLLM(64) >> kvsieve.Full()).stored_keys == "post_rope"

    def test_python_binds_chains_tighter_than_joins(self) -> None:
        one = Memory(position=InCache()) | Memory(evict=Window(64)) >> Memory(evict=KeepAll())
        assert one.memories == (Memory(evict=Window(64), position=InCache()), Memory(evict=KeepAll()))
        two = kvsieve.StreamingLLM(64) >> Memory(evict=KeepAll()) | Memory(position=FixedDistance(3))
        assert two.memories[1] == Memory(evict=KeepAll(), position=FixedDistance(3))

    @pytest.mark.parametrize("first", [kvsieve.Full(), Memory(position=InCache()), kvsieve.LMInfinite(64, middle_top_k=2)])
    def test_nothing_can_follow_what_lets_nothing_go(self, first: Any) -> None:
        with pytest.raises(PolicyError, match="evicts nothing"):
            first >> kvsieve.SirLLM(64)

    def test_a_ceiling_belongs_to_the_first_memory(self) -> None:
        with pytest.raises(PolicyError, match="cap on distances"):
            kvsieve.StreamingLLM(64) >> kvsieve.LMInfinite(64)
        with pytest.raises(PolicyError, match="cap on distances"):
            kvsieve.StreamingLLM(64) >> Memory(evict=KeepAll(), position=Capped(3))

    def test_two_chains_do_not_join(self) -> None:
        chain = kvsieve.StreamingLLM(64) >> Memory(evict=Window(8))
        with pytest.raises(PolicyError, match="two chains"):
            chain | (Memory(position=InCache()) | Memory(evict=Window(9))) >> Memory(evict=KeepAll())

    def test_a_chain_prints_what_it_is(self) -> None:
        chain = kvsieve.StreamingLLM(64, sinks=2) >> (Memory(evict=KeepAll()) | Memory(position=FixedDistance(3)))
        assert repr(chain).startswith("StreamingLLM(budget=64, sinks=2) >> (Memory(evict=KeepAll()) | ")
        assert isinstance(chain, Chain)


@pytest.mark.parametrize("value", [-1, True, 2.0, None, "3"])
def test_counts_of_roles_are_checked(value: Any) -> None:
    for call in (
        lambda: Window(64, sinks=value),
        lambda: Capped(value),
        lambda: FixedDistance(value),
        lambda: TopKTokens(value),
        lambda: TopKTokens(1, value),
        lambda: Surprisal(64, sinks=value),
    ):
        with pytest.raises(PolicyError, match="must be an int"):
            call()


# ------------------------------------------------------------------------------------------------------------ a rule of one's own


class EveryOther(EvictionRule):
    """Sinks, recent ones, and of the rest every other token, the newest first."""

    budget, sinks, recent = 24, 2, 6

    def __init__(self) -> None:
        self.calls: list[Residents] = []

    def keep(self, residents: Residents) -> Sequence[int]:
        self.calls.append(residents)
        n = len(residents.positions)
        middle = list(range(n - self.recent - 1, self.sinks - 1, -2))[: self.budget - self.sinks - self.recent]
        return sorted([*range(self.sinks), *middle, *range(n - self.recent, n)])


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("place", [InCache(), Original(), FixedDistance(5)], ids=repr)
def test_a_rule_of_ones_own_works_end_to_end(place: Any, backend: str) -> None:
    model, rule, ids = tiny.model(), EveryOther(), tiny.ids(2, 60)
    with torch.no_grad():
        stock = model(ids[:, :24]).logits
    with kvsieve.stream(model, Memory(evict=rule, position=place), backend) as stream:
        first = forward(model, stream.cache, ids[:, :24])
        if not isinstance(place, FixedDistance):
            torch.testing.assert_close(first, stock, atol=1e-4, rtol=0)
        assert rule.calls == []
        forward(model, stream.cache, ids[:, 24:54])
        want = [0, 1, *range(17, 48, 2)][:2] + list(range(47, 15, -2))[::-1][-16:] + list(range(48, 54))
        assert positions(stream) == [sorted(want)] * 2
        assert len(rule.calls) == 2
        seen = rule.calls[0]
        assert seen.positions.tolist() == list(range(54))
        assert seen.positions.dtype == np.int64
        assert np.isnan(seen.scores).all()
        assert (seen.seen, seen.turn_ended, seen.budget) == (54, False, 24)
        forwards(model, stream.cache, ids[:, 54:], [1])
        assert len(rule.calls) == 2, "single tokens wait until a block can be won"
        stream.end_turn()
        assert rule.calls[-1].turn_ended
        # 30 residents: two sinks, six recent ones, and every other of the 22 between.
        assert stream.stats().resident == 19


def test_a_rule_of_ones_own_with_a_budget_in_bytes_is_told_its_tokens() -> None:
    class Newest(EvictionRule):
        def __init__(self, budget: int | str) -> None:
            self.budget = budget

        def keep(self, residents: Residents) -> Sequence[int]:
            n = len(residents.positions)
            return range(n - residents.budget, n)

    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        forward(model, stream.cache, tiny.ids(1, 64))
        block = stream.stats().bytes_held
    with kvsieve.stream(model, Memory(evict=Newest(f"{5 * block}B")), "reference") as stream:
        # Of five blocks two are set aside.
        forward(model, stream.cache, tiny.ids(1, 4 * 64))
        assert positions(stream) == [list(range(64, 256))]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_a_rule_of_ones_own_hands_on_what_it_evicts(backend: str) -> None:
    model = tiny.model()
    policy = Memory(evict=EveryOther(), position=InCache()) >> Memory(evict=KeepAll(), position=FixedDistance(9))
    with kvsieve.stream(model, policy, backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 100), [40, 30, 1])
        assert positions(stream) == [list(range(100))]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize(
    "keep",
    [
        lambda n: range(n),
        lambda n: range(25),
        lambda n: [*range(1, 10), *range(n - 6, n)],
        lambda n: range(10),
        lambda n: [],
        lambda n: [0, 1, *range(n - 6, n), n],
        lambda n: [0, 1, *range(n - 6, n), n - 1],
        lambda n: [*range(n - 6, n), 0, 1],
        lambda n: [-1, 0, 1, *range(n - 6, n)],
    ],
    ids=["all", "too_many", "a_sink_missing", "recent_missing", "none", "beyond", "twice", "out_of_order", "negative"],
)
def test_a_rule_that_answers_wrongly_is_refused(keep: Any, backend: str) -> None:
    class Wrong(EveryOther):
        def keep(self, residents: Residents) -> Sequence[int]:
            return list(keep(len(residents.positions)))

    model = tiny.model()
    with kvsieve.stream(model, Memory(evict=Wrong(), position=InCache()), backend) as stream:
        with pytest.raises((PolicyError, ValueError)) as caught:
            forward(model, stream.cache, tiny.ids(1, 60))
        assert isinstance(caught.value, PolicyError)
        # Nothing was evicted, and the stream can be used on.
        assert positions(stream) == [list(range(60))]


def test_a_rule_without_keep_or_budget_says_so() -> None:
    class Nothing(EvictionRule):
        pass

    class NoKeep(EvictionRule):
        budget = 16

    with pytest.raises(PolicyError, match="needs a budget"):
        kvsieve.stream(tiny.model(), Memory(evict=Nothing()), "reference")
    with (
        kvsieve.stream(tiny.model(), Memory(evict=NoKeep()), "reference") as stream,
        pytest.raises(NotImplementedError, match="NoKeep does not define keep"),
    ):
        forward(tiny.model(), stream.cache, tiny.ids(1, 60))


@pytest.mark.parametrize("budget", [0, -3, 7, 2.5, True])
def test_a_rule_with_a_wrong_budget_is_refused_on_opening(budget: Any) -> None:
    class Wrong(EveryOther):
        pass

    Wrong.budget = budget
    with pytest.raises(PolicyError):
        kvsieve.stream(tiny.model(), Memory(evict=Wrong()), "reference")
