"""Rules per head: worked numbers, what is refused, a rule of one's own."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import kvsieve
import pytest
import tiny
import torch
from drive import forward
from kvsieve import _core, backends
from kvsieve._core import Planner
from kvsieve.backends.attention_scores import attention_scores
from kvsieve.backends.base import AttendCall
from kvsieve.errors import BudgetError, PolicyError, StateError, UnsupportedError
from kvsieve.methods.h2o import HeavyHitters
from kvsieve.methods.parser import parse
from kvsieve.methods.snapkv import ObservationWindow
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import PerHeadEviction
from kvsieve.policy.position import InCache, Original
from kvsieve.policy.select import Dense, TopKTokens
from kvsieve.policy.specs import EvictionSpec, MemorySpec, PositionSpec
from kvsieve.policy.storage import Plain
from kvsieve.runtime.head_eviction import HeadEviction
from kvsieve.runtime.observation import LayerState, Observation, RowState, choose

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
ONE = AttendCall(scale=1.0)


def logs(*rows: list[float]) -> torch.Tensor:
    """Natural logarithms, float32: as logits they make softmax weights that are easy to add up."""
    return torch.tensor([[math.log(x) for x in row] for row in rows])


def identity(n: int) -> torch.Tensor:
    """Keys ``[1, n, n]`` that hand the query's own channels back as logits."""
    return torch.eye(n)[None]


# ------------------------------------------------------------------------------------------------------------------ worked numbers


class TestWorkedNumbers:
    """Five tokens in one key-value head; key ``j`` is unit vector ``j``, so a query's channels are its logits."""

    def test_mass_of_two_heads_that_share_keys(self) -> None:
        # Head 0 weighs the five tokens 1 1 2 4 2, head 1 weighs them 5 1 1 1 2: tenths, both.
        q = torch.stack([logs([1, 1, 2, 4, 2]), logs([5, 1, 1, 1, 2])])
        at = torch.arange(5)
        got = attention_scores(q, identity(5), at[4:], at[None], ONE)
        torch.testing.assert_close(got, torch.tensor([[0.6, 0.2, 0.3, 0.5, 0.4]]))

    def test_a_query_gives_nothing_to_what_comes_after_it(self) -> None:
        # The query at position 1 sees two tokens only: 3 / 4 and 1 / 4. The one at 2 sees three: 1 / 2, 1 / 4, 1 / 4.
        q = torch.stack([logs([3, 1, 9, 9], [2, 1, 1, 9])])
        got = attention_scores(q[:1], identity(4), torch.tensor([1, 2]), torch.arange(4)[None], ONE)
        torch.testing.assert_close(got, torch.tensor([[1.25, 0.5, 0.25, 0.0]]))

    def test_a_learned_sink_keeps_its_share(self) -> None:
        call = AttendCall(scale=1.0, sink_logits=logs([4])[0])
        got = attention_scores(logs([1, 3])[None], identity(2), torch.tensor([1]), torch.arange(2)[None], call)
        torch.testing.assert_close(got, torch.tensor([[0.125, 0.375]]))

    def test_a_cap_bends_the_logits(self) -> None:
        call = AttendCall(scale=0.5, softcap=2.0)
        q = torch.tensor([[[0.0, 1.0]]])
        got = attention_scores(q, identity(2), torch.tensor([1]), torch.arange(2)[None], call)
        share = 1 / (1 + math.exp(-2 * math.tanh(0.25)))
        torch.testing.assert_close(got, torch.tensor([[1 - share, share]]))

    def test_a_query_that_sees_nothing_gives_nothing(self) -> None:
        got = attention_scores(torch.ones(1, 1, 2), identity(2), torch.tensor([0]), torch.tensor([[3, 4]]), ONE)
        assert got.tolist() == [[0.0, 0.0]]

    def test_many_queries_in_blocks_equal_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(6, 50, 8, generator=generator), torch.randn(2, 60, 8, generator=generator)
        at, keys_at = torch.arange(10, 60), torch.arange(60).expand(2, -1)
        whole = attention_scores(q, k, at, keys_at, ONE)
        monkeypatch.setattr("kvsieve.backends.attention_scores.CELLS", 3 * 60 * 7)
        torch.testing.assert_close(attention_scores(q, k, at, keys_at, ONE), whole)
        one = sum(attention_scores(q[:, i : i + 1], k, at[i : i + 1], keys_at, ONE) for i in range(50))
        torch.testing.assert_close(one, whole)
        torch.testing.assert_close(whole.sum(1), torch.full((2,), 150.0))

    @staticmethod
    def observation(**given: Any) -> Observation:
        none: Any = None
        empty = {
            "positions": none,
            "queries": none,
            "query_positions": none,
            "accumulated_scores": none,
            "call": ONE,
            "store": none,
            "runs": [],
        }
        return Observation(**{**empty, **given})

    def test_snapkv_pools_attention_scores_and_leaves_the_window_out(self) -> None:
        class Read:
            def read(self, runs: Any) -> Any:
                return identity(8), None

        # Eight tokens, the last two observe: they look at 0..5 as 1 0 0 6 0 1 and 0 2 0 6 0 0 tenths, and at the window.
        small = 1e-30
        weights = [[1, small, small, 6, small, 1, 2, small], [small, 2, small, 6, small, small, 1, 1]]
        found = self.observation(
            positions=torch.arange(8)[None], queries=logs(*weights)[None], query_positions=torch.tensor([6, 7]), store=Read()
        )
        torch.testing.assert_close(found.attention_scores(), torch.tensor([[0.1, 0.2, 0, 1.2, 0, 0.1, 0.3, 0.1]]))
        pooled = ObservationWindow(budget=5, observe=2, kernel=3).scores(found)
        # Each takes the highest of itself and its neighbours; 6, in the window, lends nothing to 5.
        torch.testing.assert_close(pooled, torch.tensor([[0.2, 0.2, 1.2, 1.2, 1.2, 0.1, 0.0, 0.0]]))
        assert choose(pooled[:, :6], 3, 0).tolist() == [[2, 3, 4]]
        # Of the equal ones the earlier: 0 before 1.
        assert choose(pooled[:, :6], 4, 0).tolist() == [[0, 2, 3, 4]]
        assert choose(ObservationWindow(budget=5, observe=2, kernel=1).scores(found)[:, :6], 3, 0).tolist() == [[0, 1, 3]]

    def test_h2o_adds_up_what_every_query_gave(self) -> None:
        # Three queries, one after another, then the fourth by itself: columns are tokens.
        first = attention_scores(
            torch.stack([logs([1, 9, 9, 9], [3, 1, 9, 9], [2, 1, 1, 9])]), identity(4), torch.arange(3), torch.arange(4)[None], ONE
        )
        torch.testing.assert_close(first[0], torch.tensor([1 + 0.75 + 0.5, 0.25 + 0.25, 0.25, 0.0]))
        last = attention_scores(torch.stack([logs([1, 4, 4, 1])]), identity(4), torch.tensor([3]), torch.arange(4)[None], ONE)
        total = first + last
        torch.testing.assert_close(total[0], torch.tensor([2.35, 0.9, 0.65, 0.1]))
        rule = HeavyHitters(budget=3, recent=1)
        assert torch.equal(rule.scores(self.observation(accumulated_scores=total)), total)
        assert choose(total[:, :3], 2, 0).tolist() == [[0, 1]]

    def test_choosing(self) -> None:
        scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0], [math.nan, -1.0, math.nan, -2.0, math.inf]])
        assert choose(scores, 3, 0).tolist() == [[0, 2, 4], [0, 1, 2], [1, 3, 4]]
        assert choose(scores, 3, 2).tolist() == [[0, 1, 4], [0, 1, 2], [0, 1, 4]]
        assert choose(scores, 0, 0).shape == (3, 0)
        assert choose(scores, 5, 0).tolist() == [list(range(5))] * 3


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stores_agree_about_mass_and_permute(dtype: torch.dtype, backend: str) -> None:
    """A chunk, few queries, single tokens and a row of pads, beside the definition in float64; then every head keeps its own."""
    generator = torch.Generator().manual_seed(1)
    sinks = torch.randn(6, generator=generator)
    call = AttendCall(scale=0.4, softcap=8.0, sink_logits=sinks)
    wants_parts = backend == "reference"
    planner = Planner([_core.Memory(_core.Eviction.own(500, 0, 0), _core.PositionRule.original())], "post_rope")
    store: Any = None
    held: list[list[torch.Tensor]] = [[torch.zeros(2, 0, 16), torch.zeros(2, 0, 12)] for _ in range(2)]
    for width, lens in ((40, [40, 25]), (1, [1, 1]), (5, [5, 3]), (1, [1, 0]), (30, [30, 30])):
        q, k, v = (torch.randn(2, h, width, d, generator=generator).to(dtype) for h, d in ((6, 16), (2, 16), (2, 12)))
        store = store or backends.get(backend).make_store(k, v)
        step = planner.begin(lens, width, True, wants_parts)
        out, masses = store.run_with_scores(q, k, v, step, call)
        planner.commit()
        for row, count in enumerate(lens):
            if count == 0:
                assert masses[row] is None
                assert not out[row].any()
                continue
            new = [x[row, :, width - count :].float() for x in (k, v)]
            held[row] = [torch.cat(pair, 1) for pair in zip(held[row], new)]
            n = held[row][0].shape[1]
            exact = AttendCall(scale=0.4, softcap=8.0, sink_logits=sinks.double())
            at = torch.arange(n)
            mine = q[row, :, width - count :].double()
            want = attention_scores(mine, held[row][0].double(), at[n - count :], at.expand(2, -1), exact)
            torch.testing.assert_close(masses[row].double(), want, atol=1e-5 * count, rtol=1e-5)
    for row in range(2):
        n = planner.resident(0, row)
        keep = torch.stack([torch.randperm(n - 4, generator=generator)[:70].sort().values for _ in range(2)])
        keep = keep[:, : min(70, n - 4)]
        source, to = planner.sieve(0, row, keep.shape[1], 4)
        store.permute(source, keep, to)
        for got, was in zip(store.read(planner.runs(0, row)), held[row]):
            want = torch.stack([torch.cat([was[h, keep[h]], was[h, n - 4 :]]) for h in range(2)])
            assert torch.equal(got.float(), want)


@BACKEND
def test_permute_refuses_what_does_not_fit(backend: str) -> None:
    k = torch.randn(1, 2, 10, 4)
    store = backends.get(backend).make_store(k, k)
    runs = [(0, 0, 10)]
    store.write(runs, k[0], k[0])
    for keep in (torch.tensor([[0, 1], [2, 10]]), torch.tensor([[0, 1], [2, -1]])):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            store.permute(runs, keep, [(0, 0, 2)])
    if backend == "cpu":
        with pytest.raises(ValueError, match="keep"):
            store.permute(runs, torch.tensor([[0, 1]]), [(0, 0, 2)])
    assert torch.equal(store.read(runs)[0], k[0])


# ---------------------------------------------------------------------------------------------------------------------- bad input


class NewestOnly(PerHeadEviction):
    """What the newest query looks at."""

    budget, observe, recent = 20, 1, 1

    def scores(self, observation: Observation) -> torch.Tensor:
        return observation.attention_scores()


class TestRefused:
    @pytest.mark.parametrize(
        ("call", "error", "match"),
        [
            (lambda: kvsieve.SnapKV(32), BudgetError, "at least 33"),
            (lambda: kvsieve.SnapKV(8, observe=9), BudgetError, "at least 10"),
            (lambda: kvsieve.SnapKV(0), BudgetError, "positive"),
            (lambda: kvsieve.SnapKV(True), BudgetError, "count"),
            (lambda: kvsieve.SnapKV(0.5), BudgetError, "count"),  # type: ignore[arg-type]
            (lambda: kvsieve.SnapKV("12 parsecs"), BudgetError, "cannot read"),
            (lambda: kvsieve.SnapKV(64, observe=0), PolicyError, "observe"),
            (lambda: kvsieve.SnapKV(64, observe=True), PolicyError, "observe"),
            (lambda: kvsieve.SnapKV(64, observe=8.0), PolicyError, "observe"),  # type: ignore[arg-type]
            (lambda: kvsieve.SnapKV(64, kernel=0), PolicyError, "kernel"),
            (lambda: kvsieve.SnapKV(64, kernel=4), PolicyError, "odd"),
            (lambda: kvsieve.SnapKV(64, kernel=True), PolicyError, "kernel"),
            (lambda: kvsieve.SnapKV(64, kernel=-3), PolicyError, "kernel"),
            (lambda: kvsieve.H2O(0), BudgetError, "positive"),
            (lambda: kvsieve.H2O(True), BudgetError, "count"),
            (lambda: kvsieve.H2O(64, recent=65), BudgetError, "recent"),
            (lambda: kvsieve.H2O(64, recent=60, sinks=5), BudgetError, "sinks"),
            (lambda: kvsieve.H2O(4, recent=0, sinks=4), BudgetError, "sinks"),
            (lambda: kvsieve.H2O(64, recent=-1), PolicyError, "recent"),
            (lambda: kvsieve.H2O(64, recent=True), PolicyError, "recent"),
            (lambda: kvsieve.H2O(64, sinks=True), PolicyError, "sinks"),
            (lambda: kvsieve.H2O(64, sinks=1.0), PolicyError, "sinks"),  # type: ignore[arg-type]
        ],
    )
    def test_arguments(self, call: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            call()

    def test_a_byte_budget_is_checked_when_the_stream_opens(self) -> None:
        token = 2 * 2 * 2 * 16 * 4
        with kvsieve.stream(tiny.model(), kvsieve.SnapKV(f"{5 * 64 * token}B"), "reference") as stream:
            assert stream._engine.parts.the(HeadEviction).budget == 192
        with pytest.raises(BudgetError, match="200 observed"):
            kvsieve.stream(tiny.model(), kvsieve.SnapKV(f"{5 * 64 * token}B", observe=200), "reference")
        with pytest.raises(BudgetError, match="recent"):
            kvsieve.stream(tiny.model(), kvsieve.H2O(f"{5 * 64 * token}B", recent=193), "reference")

    @pytest.mark.parametrize(
        "policy", [kvsieve.SnapKV(64), kvsieve.H2O(64), Memory(evict=NewestOnly())], ids=["SnapKV", "H2O", "own"]
    )
    def test_places_and_chains_that_need_one_position_for_all_heads(self, policy: Memory) -> None:
        retain = Memory(evict=policy.evict)
        with pytest.raises(PolicyError, match=r"positions differ per head.*Original, not with InCache"):
            retain | Memory(position=InCache())
        with pytest.raises(PolicyError, match="positions differ per head"):
            Memory(evict=policy.evict, position=kvsieve.policy.FixedDistance(3))
        with pytest.raises(PolicyError, match="goes with Dense"):
            retain | Memory(select=TopKTokens(3))
        for build in (lambda: policy >> kvsieve.SirLLM(64), lambda: kvsieve.StreamingLLM(64) >> policy):
            with pytest.raises(PolicyError, match="cannot be part of a chain"):
                build()
        whole = retain | Memory(position=Original(), select=Dense(), storage=Plain())
        assert (whole.stored_keys, whole.moves) == ("post_rope", False)
        with pytest.raises(PolicyError, match="chain"):
            kvsieve.policy.Chain((Memory(evict=Window(9)), whole))

    def test_keep_has_no_one_answer(self) -> None:
        none: Any = None
        with pytest.raises(PolicyError, match="each head"):
            HeavyHitters(9).keep(none)
        with pytest.raises(NotImplementedError, match="scores"):
            PerHeadEviction().scores(none)

    @pytest.mark.parametrize(
        "bad",
        [
            lambda seen: None,
            lambda seen: [[0.0]],
            lambda seen: torch.zeros(2, 3),
            lambda seen: torch.zeros(seen.positions.shape, dtype=torch.int64),
            lambda seen: torch.zeros(seen.positions.shape[1]),
        ],
    )
    def test_scores_of_the_wrong_kind_are_refused_and_lose_nothing(self, bad: Any) -> None:
        class Wrong(NewestOnly):
            def scores(self, observation: Observation) -> torch.Tensor:
                return bad(observation)  # type: ignore[no-any-return]

        model = tiny.model()
        with kvsieve.stream(model, Memory(evict=Wrong()), "reference") as stream:
            with pytest.raises(PolicyError, match=r"Wrong.scores must return floats of shape \(2, 30\), got"):
                forward(model, stream.cache, tiny.ids(1, 30))
            assert stream.seen == 30
            assert stream.kept(0, 0)[0].positions.tolist() == list(range(30))

    @pytest.mark.parametrize("observe", [-1, True, 1.0, "2"])
    def test_observe_must_be_a_count(self, observe: Any) -> None:
        class Wrong(NewestOnly):
            pass

        Wrong.observe = observe
        with pytest.raises(PolicyError, match="observe must be an int"):
            kvsieve.stream(tiny.model(), Memory(evict=Wrong()), "reference")

    def test_graphs(self) -> None:
        from kvsieve.graphs import GraphDecoder

        with kvsieve.stream(tiny.model(), kvsieve.SnapKV(64), "reference") as stream:
            forward(tiny.model(), stream.cache, tiny.ids(1, 4))
            with pytest.raises(UnsupportedError):
                GraphDecoder(stream)


# ------------------------------------------------------------------------------------------------------------ names and texts


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("snapkv(1024)", "SnapKV(budget=1024, observe=32, kernel=7)"),
        ("SnapKV('64MiB', observe=16, kernel=1)", "SnapKV(budget='64MiB', observe=16, kernel=1)"),
        ("h2o(512)", "H2O(budget=512)"),
        ("h_2_o(512, 100, 4)", "H2O(budget=512, recent=100, sinks=4)"),
    ],
)
def test_policies_parse_and_print(text: str, want: str) -> None:
    assert repr(parse(text)) == want
    assert parse(want) == parse(text)


def test_parts() -> None:
    snapkv, h2o = kvsieve.SnapKV(64), kvsieve.H2O(64)
    assert (snapkv.evict, snapkv.position, snapkv.stored_keys) == (ObservationWindow(64, 32, 7), Original(), "post_rope")
    assert snapkv.specs(1) == [MemorySpec(EvictionSpec("own", budget=64, sinks=0, recent=32), PositionSpec("original"))]
    assert h2o.specs(1) == [MemorySpec(EvictionSpec("own", budget=64, sinks=0, recent=32), PositionSpec("original"))]
    assert kvsieve.H2O(64, recent=0).specs(1)[0].evict.recent == 0
    assert (snapkv.needs_surprisal, h2o.needs_surprisal) == (False, False)


# ---------------------------------------------------------------------------------------------------------------- kept, by head


@BACKEND
def test_kept_by_layer_and_head(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(20, recent=4), backend) as stream:
        assert stream.kept() == stream.kept(0) == stream.kept(0, 1) == []
        forward(model, stream.cache, tiny.ids(2, 50))
        for row in range(2):
            every = [[stream.kept(layer, head)[row] for head in range(2)] for layer in range(2)]
            for layer, heads in enumerate(every):
                for kept in heads:
                    assert kept.positions.dtype == "int64"
                    assert (len(kept.positions), kept.scores.shape) == (20, (20,))
                    assert kept.positions[-4:].tolist() == [46, 47, 48, 49]
                    assert (kept.scores > 0).all()
                assert stream.kept(layer)[row].positions.tolist() == sorted({*heads[0].positions, *heads[1].positions})
            union = {p for heads in every for kept in heads for p in kept.positions.tolist()}
            assert stream.kept()[row].positions.tolist() == sorted(union)
            assert len(union) > 20
            assert all(math.isnan(x) for x in stream.kept()[row].scores)
    with kvsieve.stream(model, kvsieve.SnapKV(20, observe=4), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 50))
        assert all(math.isnan(x) for x in stream.kept(1, 1)[0].scores)


def test_kept_refuses_layers_and_heads_that_are_not_there() -> None:
    for policy in (kvsieve.Full(), kvsieve.H2O(20)):
        with kvsieve.stream(tiny.model("gemma2"), policy, "reference") as stream:
            forward(tiny.model("gemma2"), stream.cache, tiny.ids(1, 10))
            with pytest.raises(StateError, match="pass layer="):
                stream.kept(head=0)
            for layer in (0, 3, -1):
                with pytest.raises(StateError, match=r"full-attention layers are \[1, 2\]"):
                    stream.kept(layer)
            for head in (2, -1):
                with pytest.raises(StateError, match="heads 0 to 1"):
                    stream.kept(1, head)
            assert [kept.positions.tolist() for kept in stream.kept(2, 1)] == [list(range(10))]


# --------------------------------------------------------------------------------------------------------- a rule of one's own


class LargestKeys(PerHeadEviction):
    """Looks at keys only, and at positions."""

    budget, sinks, recent = 24, 2, 3
    found: ClassVar[list[Observation]] = []

    def scores(self, observation: Observation) -> torch.Tensor:
        self.found.append(observation)
        return observation.keys.float().norm(dim=-1)


@BACKEND
def test_a_rule_of_ones_own(backend: str) -> None:
    model, rule = tiny.model(), LargestKeys()
    LargestKeys.found = []
    with kvsieve.stream(model, Memory(evict=rule), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 40))
        keys = {index: store.read(stream._engine.planner.runs(0, 0))[0] for index, store in stream._engine.stores.items()}
        assert len(rule.found) == 2
        for layer, seen in enumerate(rule.found):
            assert (seen.queries.shape[1], seen.accumulated_scores) == (0, None)
            assert seen.positions.tolist() == [list(range(40))] * 2
            for head in range(2):
                kept = stream.kept(layer, head)[0].positions.tolist()
                norms = seen.keys[head].norm(dim=-1)
                middle = sorted(range(2, 37), key=lambda i: (-float(norms[i]), i))[:19]
                assert kept == [0, 1, *sorted(middle), 37, 38, 39]
                assert torch.equal(keys[layer][head], seen.keys[head][kept])


@BACKEND
def test_what_a_rule_sees_after_its_first_choice(backend: str) -> None:
    found: ClassVar[list[Observation]] = []

    class Both(NewestOnly):
        observe, accumulates, recent = 6, True, 6

        def scores(self, observation: Observation) -> torch.Tensor:
            found.append(observation)
            assert observation.accumulated_scores is not None
            return observation.accumulated_scores + observation.attention_scores()

    model = tiny.model()
    with kvsieve.stream(model, Memory(evict=Both()), backend) as stream:
        forward(model, stream.cache, tiny.ids(1, 30))
        before = [stream.kept(layer, 1)[0].positions.tolist() for layer in range(2)]
        found.clear()
        for at in range(3):
            forward(model, stream.cache, tiny.ids(1, 2, at))
        seen = found[-2:]
        assert [x.queries.shape for x in seen] == [(4, 6, 16)] * 2
        assert all(x.query_positions.tolist() == list(range(30, 36)) for x in seen)
        assert all(x.accumulated_scores is not None and x.accumulated_scores.shape == (2, 22) for x in seen)
        assert all(x.positions.shape == (2, 22) for x in seen)
        assert all(x.positions[1, -6:].tolist() == list(range(30, 36)) for x in seen)
        for layer, x in enumerate(found[:2]):
            assert x.positions[1].tolist() == [*before[layer], 30, 31]
            assert float(x.attention_scores().sum()) == pytest.approx(24.0, rel=1e-4)  # four heads, six queries


@BACKEND
def test_what_is_kept_holds_no_graph(backend: str) -> None:
    """A forward with gradients on leaves nothing that would keep its activations alive."""
    model, rule = tiny.model(), NewestOnly()
    rule.accumulates = True
    with kvsieve.stream(model, Memory(evict=rule), backend) as stream, torch.enable_grad():
        for width in (30, 1, 5):
            model(tiny.ids(1, width), past_key_values=stream.cache)
            for state in stream._engine.parts.the(HeadEviction).rows[0].layers.values():
                assert state.accumulated is not None
                assert not any(x.requires_grad for x in (state.accumulated, *state.queries))


def test_states_are_never_changed() -> None:
    """What a fork or a mark remembers stays as it was."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.H2O(20, recent=4), "cpu") as stream:
        forward(model, stream.cache, tiny.ids(1, 30))
        heads = stream._engine.parts.the(HeadEviction)
        rows = list(heads.rows)
        copies = [{x: (s.chosen.clone(), s.accumulated.clone()) for x, s in row.layers.items()} for row in rows]  # type: ignore[union-attr]
        for at in range(80):
            forward(model, stream.cache, tiny.ids(1, 1, at))
        stream.end_turn()
        stream._engine.crop_rows([3])
        for row, copied in zip(rows, copies):
            for layer, state in row.layers.items():
                assert torch.equal(state.chosen, copied[layer][0])
                assert state.accumulated is not None
                assert torch.equal(state.accumulated, copied[layer][1])
        assert isinstance(heads.rows[0], RowState)
        assert isinstance(heads.rows[0].layers[0], LayerState)
        assert heads.rows[0] is not rows[0]
