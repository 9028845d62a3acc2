"""Numbers worked out by hand, or by running the published systems on a few tokens; every backend must reproduce them."""

from __future__ import annotations

import math

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import Layer, attention, forward, forwards
from hypothesis import given, settings
from hypothesis import strategies as st
from kvsieve import _core, backends
from kvsieve.facts import LayerRope
from kvsieve.methods.sirllm import Surprisal
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import InCache, Original
from kvsieve.runtime.surprisal import published_scores, true_scores

ROPE = LayerRope(torch.tensor([1.0], dtype=torch.float64), "half")
SCALE = 1 / math.sqrt(2)

STREAMING = kvsieve.StreamingLLM(budget=5, sinks=2)  # a query sees two sinks, three before it, and itself
INFINITE = kvsieve.LMInfinite(window=4, sinks=2)

SLOT_WEIGHTS = [0.18553, 0.09563, 0.07539, 0.11311, 0.22245, 0.30789]
CEILING_WEIGHTS = [0.10507, 0.10507, 0.08283, 0.12429, 0.24442, 0.33831]


def ten(amplitudes: list[float] | None = None, values: str = "number") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten tokens of one head: q = (1, 0), k = (a_j, 0), v_j = j, or one value channel for each token."""
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 10, 2).contiguous()
    k = q.clone()
    if amplitudes is not None:
        k = k * torch.tensor(amplitudes)[None, None, :, None]
    v = torch.stack([torch.arange(10.0), torch.zeros(10)], 1)[None, None] if values == "number" else torch.eye(16)[None, None, :10]
    return q, k, v.contiguous()


def play(policy: object, backend: str, chunk: int, amplitudes: list[float] | None = None, values: str = "number") -> torch.Tensor:
    """Outputs ``[10, Dv]`` of the ten tokens, fed ``chunk`` at a time."""
    layer = Layer(backend, policy, rope=ROPE, scale=SCALE)
    q, k, v = ten(amplitudes, values)
    out = [layer.feed(*(x[:, :, lo : lo + chunk] for x in (q, k, v)))[0, :, 0] for lo in range(0, 10, chunk)]
    return torch.cat(out)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
class TestThreeRotaryRules:
    @pytest.mark.parametrize("chunk", [1, 3, 9, 10])
    def test_slot_distances(self, backend: str, chunk: int) -> None:
        out = play(STREAMING, backend, chunk)[9, 0]
        assert out == pytest.approx(5.890367, abs=2e-6)
        assert out != pytest.approx(6.340546, abs=1e-2)
        weights = play(STREAMING, backend, chunk, values="one")[9]
        assert weights[[0, 1, 6, 7, 8, 9]].tolist() == pytest.approx(SLOT_WEIGHTS, abs=1e-5)
        assert weights[2:6].abs().max() == 0

    @pytest.mark.parametrize("chunk", [1, 3, 9, 10])
    def test_ceiling(self, backend: str, chunk: int) -> None:
        assert play(INFINITE, backend, chunk)[9, 0] == pytest.approx(6.472257, abs=2e-6)
        weights = play(INFINITE, backend, chunk, values="one")[9]
        assert weights[[0, 1, 6, 7, 8, 9]].tolist() == pytest.approx(CEILING_WEIGHTS, abs=1e-5)
        assert weights[2:6].abs().max() == 0

    @pytest.mark.parametrize("chunk", [1, 3, 9, 10])
    def test_without_eviction(self, backend: str, chunk: int) -> None:
        assert play(kvsieve.Full(), backend, chunk)[9, 0] == pytest.approx(4.827433, abs=2e-6)

    def test_original_distances_are_another_policy(self, backend: str) -> None:
        """What forgetting to re-place the keys would give, and what `AsRotated` says that it gives."""
        policy = Memory(evict=Window(budget=5, sinks=2), position=Original())
        assert play(policy, backend, 1)[9, 0] == pytest.approx(6.340546, abs=2e-6)

    def test_slot_distances_of_a_scored_memory(self, backend: str) -> None:
        policy = kvsieve.SirLLM(budget=5, sinks=2, recent=0)
        layer = Layer(backend, policy, rope=ROPE, scale=SCALE)
        q, k, v = ten()
        scores = [0, 0, 1, 1, 1, 1, 9, 9, 9]
        layer.feed(q[:, :, :9], k[:, :, :9], v[:, :, :9], scores=[scores])
        assert layer.positions() == [0, 1, 6, 7, 8]
        out = layer.feed(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:])
        assert out[0, 0, 0, 0] == pytest.approx(5.890367, abs=2e-6)


AMPLITUDES = [1, 1, 0.5, 1.5, -1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
class TestMiddle:
    @pytest.mark.parametrize("chunk", [1, 9, 10])
    def test_picks_the_best_token_of_the_middle(self, backend: str, chunk: int) -> None:
        policy = kvsieve.LMInfinite(window=4, sinks=2, middle_top_k=1, middle_from_layer=0, middle_distance=2)
        assert play(policy, backend, chunk, AMPLITUDES)[9, 0] == pytest.approx(6.020015, abs=2e-6)
        weights = play(policy, backend, chunk, AMPLITUDES, values="one")[9]
        want = [0.08585, 0.08585, 0.18293, 0.06768, 0.10155, 0.19971, 0.27642]
        assert weights[[0, 1, 4, 6, 7, 8, 9]].tolist() == pytest.approx(want, abs=1e-5)
        assert weights[[2, 3, 5]].abs().max() == 0

    @pytest.mark.parametrize("k", [4, 5, 100])
    @pytest.mark.parametrize("chunk", [1, 10])
    def test_all_of_a_short_middle_is_read_at_its_distance(self, backend: str, chunk: int, k: int) -> None:
        policy = kvsieve.LMInfinite(window=4, sinks=2, middle_top_k=k, middle_from_layer=0, middle_distance=2)
        got = play(policy, backend, chunk, AMPLITUDES, values="one")[9]
        q, keys, v = ten(AMPLITUDES, "one")
        distances = [4, 4, 2, 2, 2, 2, 3, 2, 1, 0]
        want = attention(q[0, :, 9], keys[0].transpose(0, 1), v[0].transpose(0, 1), distances, ROPE, SCALE)[0]
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)

    def test_only_the_last_query_of_a_chunk_reads_it(self, backend: str) -> None:
        middle = kvsieve.LMInfinite(window=4, sinks=2, middle_top_k=1, middle_from_layer=0, middle_distance=2)
        with_it, without = play(middle, backend, 10, AMPLITUDES), play(INFINITE, backend, 10, AMPLITUDES)
        torch.testing.assert_close(with_it[:9], without[:9], atol=1e-6, rtol=0)
        assert (with_it[9] - without[9]).abs().max() > 0.1

    def test_layers_below_the_first_do_not_read_it(self, backend: str) -> None:
        policy = kvsieve.LMInfinite(window=4, sinks=2, middle_top_k=1, middle_from_layer=0, middle_distance=2)
        layer = Layer(backend, policy, rope=ROPE, scale=SCALE, top_k=False)
        q, k, v = ten(AMPLITUDES)
        out = torch.cat([layer.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))[0, :, 0] for i in range(10)])
        torch.testing.assert_close(out, play(INFINITE, backend, 1, AMPLITUDES), atol=1e-6, rtol=0)

    def test_k_of_zero_is_the_plain_policy(self, backend: str) -> None:
        assert kvsieve.LMInfinite(window=4, sinks=2, middle_top_k=0) == INFINITE


@pytest.mark.parametrize("backend", tiny.BACKENDS)
class TestWhatAQuerySees:
    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 10])
    def test_infinite_allows_as_many_keys_as_its_lambda(self, backend: str, chunk: int) -> None:
        seen = (play(INFINITE, backend, chunk, values="one") > 0).sum(1)
        assert seen.tolist() == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]

    def test_streaming_trim(self, backend: str) -> None:
        """After token 9 slots hold [0, 1, 7, 8, 9]; token 9 itself stood at slot 5, after [0, 1, 6, 7, 8]."""
        layer = Layer(backend, STREAMING, rope=ROPE, scale=SCALE)
        q, k, v = ten(values="one")
        for i in range(10):
            out = layer.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
            assert len(layer.positions()) == min(i + 1, 5)
        assert layer.positions() == [0, 1, 7, 8, 9]
        distances = torch.tensor([5.0, 4, 3, 2, 1, 0])
        want = (distances.cos() * SCALE).softmax(0)
        assert out[0, 0, 0, [0, 1, 6, 7, 8, 9]].tolist() == pytest.approx(want.tolist(), abs=1e-6)
        assert int((out > 0).sum()) == 6

    @pytest.mark.parametrize("chunk", [1, 4, 10])
    def test_window_keeps_the_same_whatever_the_chunk(self, backend: str, chunk: int) -> None:
        layer = Layer(backend, STREAMING, rope=ROPE, scale=SCALE)
        q, k, v = ten()
        for lo in range(0, 10, chunk):
            layer.feed(*(x[:, :, lo : lo + chunk] for x in (q, k, v)))
        assert layer.positions() == [0, 1, 7, 8, 9]


def test_window_rule() -> None:
    assert _core.keep_window(10, 2, 3) == [0, 1, 7, 8, 9]
    assert _core.keep_window(5, 2, 3) == [0, 1, 2, 3, 4]
    assert _core.keep_window(0, 2, 3) == []


# --------------------------------------------------------------------------------------------------------------------- rotation

HALF6 = [1.798417, 1.756545, 2.601095, 4.11273]
HALF4 = [1.616764, 1.838443, -2.717733, 4.076779]
INTERLEAVED4 = [0.859961, -2.06409, 2.837643, 4.116768]
FREQUENCIES = torch.tensor([1.0, 1e4**-0.5], dtype=torch.float64)


class TestRotation:
    @pytest.mark.parametrize(("layout", "at", "want"), [("half", 6, HALF6), ("half", 4, HALF4), ("interleaved", 4, INTERLEAVED4)])
    def test_worked_positions(self, layout: str, at: int, want: list[float]) -> None:
        x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
        got = LayerRope(FREQUENCIES, layout).rotate(x, torch.tensor([at]))  # type: ignore[arg-type]
        assert got[0].tolist() == pytest.approx(want, abs=1e-6)

    def test_rotations_add_up(self) -> None:
        rope, x = LayerRope(FREQUENCIES, "half"), torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
        back = rope.rotate(rope.rotate(x, torch.tensor([6])), torch.tensor([-2]))
        torch.testing.assert_close(back, rope.rotate(x, torch.tensor([4])), atol=1e-12, rtol=0)

    @given(st.integers(-(2**40), 2**40))
    def test_phases_are_exact_far_out(self, at: int) -> None:
        cos, sin = LayerRope(FREQUENCIES, "half").table(torch.tensor([at]), torch.float64)
        assert float(cos[0, 0]) == pytest.approx(math.cos(at), abs=1e-12)
        assert float(sin[0, 0]) == pytest.approx(math.sin(at), abs=1e-12)

    def test_channels_beyond_the_rotary_ones_pass_through(self) -> None:
        x = torch.arange(1.0, 7)[None].double()
        got = LayerRope(FREQUENCIES, "half").rotate(x, torch.tensor([4]))
        assert got[0, :4].tolist() == pytest.approx(HALF4, abs=1e-6)
        assert got[0, 4:].tolist() == [5, 6]


# ----------------------------------------------------------------------------------------------------------------------- scores

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
IDS = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize("backend", tiny.BACKENDS)
class TestSurprisal:
    def test_true_scores_carry_the_first(self, backend: str) -> None:
        following = backends.get(backend).surprisal(P.log()[:-1], IDS[1:]).numpy()
        assert true_scores(following, 0.77, 4).tolist() == pytest.approx([0.77, 2.3026, 2.3026, 1.3863], abs=1e-4)

    def test_first_token_of_a_session_takes_the_largest_kept_score(self, backend: str) -> None:
        following = backends.get(backend).surprisal(P.log()[:-1], IDS[1:]).numpy()
        assert true_scores(following, None, 4)[0] == pytest.approx(2.3026, abs=1e-4)

    def test_published_scores(self, backend: str) -> None:
        repeats = backends.get(backend).surprisal(P.log(), IDS).numpy()
        assert published_scores(repeats).tolist() == pytest.approx([2.3026, 1.2040, 0.9163, 1.3863], abs=1e-4)
        rows = P.clone()
        rows[3] = torch.tensor([0.7, 0.001, 0.1, 0.199])
        repeats = backends.get(backend).surprisal(rows.log(), IDS).numpy()
        assert published_scores(repeats)[0] == pytest.approx(6.9078, abs=1e-4)

    def test_no_underflow(self, backend: str) -> None:
        logits = torch.tensor([[0.0, -120.0, -1.0]])
        got = backends.get(backend).surprisal(logits, torch.tensor([1]))
        assert got[0] == pytest.approx(120.3133, abs=1e-4)
        assert got[0] == pytest.approx(120 + math.log(1 + math.exp(-1) + math.exp(-120)), rel=1e-6)

    def test_impossible_token_stays_finite(self, backend: str) -> None:
        got = backends.get(backend).surprisal(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
        assert torch.isfinite(got).all()
        assert got[0] > 1e30

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_random_rows(self, backend: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        logits, ids = (torch.randn(37, 501) * 4).to(dtype), torch.randint(0, 501, (37,))
        want = torch.nn.functional.cross_entropy(logits.double(), ids, reduction="none")
        got = backends.get(backend).surprisal(logits, ids)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)

    @pytest.mark.parametrize("chunks", [[60], [1], [7, 20, 1, 5]])
    def test_sum_over_a_text_is_the_models_loss(self, backend: str, chunks: list[int]) -> None:
        model, ids = tiny.model(), tiny.ids(2, 60)
        with torch.no_grad():
            stock = model(ids).logits
        losses = torch.nn.functional.cross_entropy(stock[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        with kvsieve.stream(model, kvsieve.SirLLM(budget=128), backend) as stream:
            forwards(model, stream.cache, ids, chunks)
            for row, kept in enumerate(stream.kept()):
                assert kept.scores[1:].tolist() == pytest.approx(losses[row].tolist(), abs=1e-3)
                assert kept.scores[1:].sum() == pytest.approx(float(losses[row].sum()), rel=1e-4)

    def test_published_mode_scores_a_chunk_by_its_predecessors_repeats(self, backend: str) -> None:
        model, ids = tiny.model(), tiny.ids(1, 30)
        with torch.no_grad():
            stock = model(ids).logits[0]
        repeats = torch.nn.functional.cross_entropy(stock, ids[0], reduction="none")
        with kvsieve.stream(model, kvsieve.SirLLM(budget=64, score="published"), backend) as stream:
            forward(model, stream.cache, ids)
            scores = stream.kept()[0].scores
        assert scores[1:].tolist() == pytest.approx(repeats[:-1].tolist(), abs=1e-3)
        assert scores[0] == pytest.approx(float(repeats.max()), abs=1e-3)


# -------------------------------------------------------------------------------------------------------------------- kept sets

E = np.float32([9, 1, 2, 0.5, 3, 0.1, 4, 0.2, 5, 0.3])


class TestKeptSets:
    def test_example_a(self) -> None:
        assert _core.keep_surprisal_published(E, 2, 6, 0, 2) == [0, 1, 4, 6, 8, 9]

    def test_example_a_with_sinks_left_out_of_the_ranking(self) -> None:
        assert _core.keep_surprisal(E, 2, 0, 6) == [0, 1, 2, 4, 6, 8]

    def test_example_b(self) -> None:
        assert _core.keep_surprisal_published(E, 2, 4, 2, 2) == [0, 1, 6, 7, 8, 9]

    @pytest.mark.parametrize("eta", [1.0, 0.5])
    @pytest.mark.parametrize("decay_first", [True, False])
    def test_decay_table(self, eta: float, decay_first: bool) -> None:
        """Decaying before appending a turn, or the turn with what it meets, differ by a common factor: the same are kept."""
        turns = [[9, 1, 2, 0.5], [6, 0.1, 3], [2.5, 2.2, 0.3], [0.4, 0.2, 0.1]]
        names: list[str] = []
        scores = np.zeros(0, np.float32)
        starts = []
        for t, turn in enumerate(turns):
            kept = _core.keep_surprisal_published(scores, 2, 6, 0, len(turn)) if len(scores) else []
            names, scores = [names[i] for i in kept], scores[kept]
            if decay_first:
                scores = scores * np.float32(eta)
            starts.append((list(names), scores.copy()))
            names += [f"t{t}.{i}" for i in range(len(turn))]
            scores = np.concatenate([scores, np.float32(turn)])
            if not decay_first:
                scores = scores * np.float32(eta)
        assert starts[2][0] == ["t0.0", "t0.1", "t1.0", "t1.1", "t1.2"]
        if eta == 1.0:
            assert starts[3][0] == ["t0.0", "t0.1", "t1.0", "t1.2", "t2.2"]
        else:
            assert starts[3][0] == ["t0.0", "t0.1", "t1.0", "t2.0", "t2.2"]
            if decay_first:
                assert starts[3][1].tolist() == pytest.approx([1.125, 0.125, 1.5, 1.25, 0.15])

    def test_a_chunk_beyond_the_budget_without_sinks_is_refused(self) -> None:
        assert len(_core.keep_surprisal_published(E, 2, 6, 0, 6)) == 2
        with pytest.raises(ValueError, match="incoming"):
            _core.keep_surprisal_published(E, 2, 6, 0, 7)

    @given(st.data())
    def test_any_scores(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, 40), label="n")
        scores = np.float32(data.draw(st.lists(st.floats(0, 100, width=32), min_size=n, max_size=n), label="scores"))
        sinks, recent = data.draw(st.integers(0, 5), label="sinks"), data.draw(st.integers(0, 5), label="recent")
        budget = sinks + max(recent, 1) + data.draw(st.integers(0, 10), label="more")
        kept = _core.keep_surprisal(scores, sinks, recent, budget)
        assert kept == sorted(set(kept))
        assert len(kept) == min(n, budget)
        assert set(range(min(sinks, n))) <= set(kept)
        assert set(range(max(n - recent, 0), n)) <= set(kept)
        free = [i for i in range(n) if i not in kept]
        chosen = [i for i in kept if sinks <= i < n - recent]
        assert all((scores[a], -a) > (scores[b], -b) for a in chosen for b in free)

    @given(st.data())
    def test_a_common_factor_never_changes_a_kept_set(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, 40), label="n")
        scores = np.float32(data.draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n), label="scores"))
        power = np.float32(2.0 ** data.draw(st.integers(-20, 20), label="power"))
        assert _core.keep_surprisal(scores, 2, 3, 12) == _core.keep_surprisal(scores * power, 2, 3, 12)
        assert _core.keep_surprisal_published(scores, 2, 9, 1, 3) == _core.keep_surprisal_published(scores * power, 2, 9, 1, 3)

    @given(st.data())
    def test_published_rule_on_any_scores(self, data: st.DataObject) -> None:
        n, m = data.draw(st.integers(2, 40), label="n"), data.draw(st.integers(0, 9), label="m")
        scores = np.float32(data.draw(st.lists(st.floats(0, 100, width=32), min_size=n, max_size=n), label="scores"))
        kept = _core.keep_surprisal_published(scores, 2, 9, 1, m)
        assert kept == sorted(set(kept))
        assert len(kept) == min(n, 12 - m)
        assert {0, 1} <= set(kept)

    def test_nan_ranks_lowest_and_ties_go_to_the_older(self) -> None:
        scores = np.float32([0, 5, np.nan, 5, 5, np.nan, 1, 0])
        assert _core.keep_surprisal(scores, 1, 1, 4) == [0, 1, 3, 7]
        assert _core.keep_surprisal(scores, 1, 1, 6) == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_decay_over_turns_in_a_stream(backend: str) -> None:
    """The stream decays after a turn and keeps the true rule; kept scores are the same floats times the factor."""
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.SirLLM(budget=32, sinks=2, recent=4, decay=0.5), backend) as stream:
        stream.feed(tiny.ids(1, 20))
        before = stream.kept()[0].scores.copy()
        stream.end_turn()
        assert np.array_equal(stream.kept()[0].scores, before * np.float32(0.5))
        stream.end_turn()
        assert np.array_equal(stream.kept()[0].scores, before * np.float32(0.25))


# ----------------------------------------------------------------------------------------------------------------- any chunking


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", ["streaming", "lm_infinite"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_chunking_gives_the_same_logits(family: str, policy: str, backend: str) -> None:
    model, ids = tiny.model(family), tiny.ids(2, 70)
    results = {}
    for chunks in ([70], [1], [17], [40, 1, 1, 5], [3, 60, 7]):
        with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
            results[tuple(chunks)] = forwards(model, stream.cache, ids, chunks)
            want = [0, 1, *range(70 - (stream.stats().resident - 2), 70)]
            assert all(kept.positions.tolist() == want for kept in stream.kept())
    for got in results.values():
        torch.testing.assert_close(got, results[(70,)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_letting_go_physically_does_not_change_the_next_logits(backend: str) -> None:
    """A middle that no layer reads keeps every token, and changes nothing."""
    model, ids = tiny.model(), tiny.ids(1, 60)
    trimmed = kvsieve.LMInfinite(window=12, sinks=2)
    whole = kvsieve.LMInfinite(window=12, sinks=2, middle_top_k=2, middle_from_layer=99)
    with kvsieve.stream(model, trimmed, backend) as a, kvsieve.stream(model, whole, backend) as b:
        x, y = (forwards(model, s.cache, ids, [30, 1]) for s in (a, b))
        assert (a.stats().resident, b.stats().resident) == (13, 60)
    torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_slots_of_scored_residents_follow_the_definition(backend: str, data: st.DataObject) -> None:
    """Residents left by any scores, and new queries: distances count what is resident, key by key in float64."""
    seed = data.draw(st.integers(0, 2**16), label="seed")
    old, new = data.draw(st.integers(1, 90), label="old"), data.draw(st.integers(1, 20), label="new")
    generator = torch.Generator().manual_seed(seed)
    rope = LayerRope(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64), "half")
    policy = Memory(evict=Surprisal(budget=30, sinks=2, recent=3), position=InCache())
    layer = Layer(backend, policy, rope=rope, scale=0.35)
    q, k, v = (torch.randn(1, h, old + new, 8, generator=generator) for h in (4, 2, 2))
    layer.feed(q[:, :, :old], k[:, :, :old], v[:, :, :old], scores=[torch.rand(old, generator=generator).numpy()], settle=True)
    residents = [*layer.positions(), *range(old, old + new)]
    out = layer.feed(q[:, :, old:], k[:, :, old:], v[:, :, old:], scores=[np.zeros(new)])
    for i in range(new):
        shown = residents[: len(residents) - new + i + 1]
        distances = torch.arange(len(shown) - 1, -1, -1)
        want = attention(q[0, :, old + i], k[0, :, shown].transpose(0, 1), v[0, :, shown].transpose(0, 1), distances, rope, 0.35)
        torch.testing.assert_close(out[0, i].double(), want, atol=2e-5, rtol=0)
