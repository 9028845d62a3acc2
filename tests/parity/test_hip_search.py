"""The search of HiP and InfiniteHiP: numbers worked out by hand, what the maths promises, how well needles are found."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvsieve.backends.attention import attend, merge
from kvsieve.backends.reference.definition import Selection, first_stage, group_scores, kept, region, sparse_attend
from kvsieve.backends.reference.select.hip import REPRESENTATIVES, hip_search
from kvsieve.backends.reference.select.infinite import best_on_the_way, infinite_hip_search
from kvsieve.errors import PolicyError, ShapeError

Scores = npt.NDArray[np.float64]

SIXTEEN = np.array([[1, 2, 3, 2.5, 0.5, 1.5, 5, 9, 4, 3.5, 2.2, 1.2, 6, 7, 1.1, 0.1]])
SMALL = {"chunks": (64, 16, 8), "keep": (2048, 1024, 256)}


def starts(selection: Selection) -> list[int]:
    return selection.starts[0].tolist()


def distinct(n: int, seed: int, heads: int = 1) -> Scores:
    """Random scores without equal ones."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n) for _ in range(heads)]).astype(np.float64)


class TestTheTree:
    """Sixteen keys whose scores one can follow by hand."""

    def test_budget_of_two(self) -> None:
        """The best two are 7 and 13: a branch that held one of them was left, because another key spoke for it."""
        found = hip_search(SIXTEEN, 0, 16, 2, 1)
        assert (starts(found), found.rounds, found.reads) == ([6, 7], (3,), (12,))

    @pytest.mark.parametrize(
        ("budget", "block", "representative", "want"),
        [
            (2, 1, "first", [12, 13]),
            (2, 1, "oracle", [7, 13]),
            (4, 1, "middle", [6, 7, 12, 13]),
            (8, 1, "middle", [2, 3, 6, 7, 8, 9, 12, 13]),
            (16, 1, "middle", list(range(16))),
            (4, 2, "middle", [2, 6]),
            (4, 2, "first", [8, 12]),
        ],
    )
    def test_budgets(self, budget: int, block: int, representative: str, want: list[int]) -> None:
        assert starts(hip_search(SIXTEEN, 0, 16, budget, block, representative)) == want

    def test_rounds_and_reads(self) -> None:
        assert [hip_search(SIXTEEN, 0, 16, *case).rounds[0] for case in ((4, 1), (4, 2), (16, 1))] == [2, 2, 0]
        assert [hip_search(SIXTEEN, 0, 16, *case).reads[0] for case in ((4, 1), (4, 2), (16, 1))] == [16, 16, 0]

    @pytest.mark.parametrize(
        ("budget", "representative", "want"),
        [(16, "middle", 7.849450), (2, "middle", 6.982014), (2, "oracle", 7.715218), (4, "middle", 7.866377)],
    )
    def test_outputs(self, budget: int, representative: str, want: float) -> None:
        found = hip_search(SIXTEEN, 0, 16, budget, 1, representative)
        k, v = torch.from_numpy(SIXTEEN)[:, :, None], torch.arange(16.0, dtype=torch.float64)[None, :, None]
        out, _ = sparse_attend(torch.ones(1, 1, 1, dtype=torch.float64), k, v, kept(found, [15], 16, 0, 0), 1.0)
        assert out.item() == pytest.approx(want, abs=1e-5)

    def test_ties_go_to_the_earlier_block(self) -> None:
        assert starts(hip_search(np.zeros((1, 64)), 0, 64, 8, 1)) == list(range(8))

    def test_a_score_of_zero_is_a_score(self) -> None:
        scores = np.full((1, 64), -1.0)
        scores[0, 40:48] = 0.0
        assert set(starts(hip_search(scores, 0, 64, 8, 1))) == set(range(40, 48))

    @pytest.mark.parametrize("hidden", [np.nan, -np.inf])
    def test_what_no_query_may_see_is_never_chosen(self, hidden: float) -> None:
        scores = distinct(64, 0)
        scores[0, 5:] = hidden
        assert set(starts(hip_search(scores, 0, 64, 8, 1, "oracle"))) == set(range(5))
        assert starts(hip_search(np.full((1, 64), hidden), 0, 64, 8, 1)) == []

    def test_heads_choose_for_themselves(self) -> None:
        both = np.concatenate([SIXTEEN, SIXTEEN[:, ::-1]])
        found = hip_search(both, 0, 16, 4, 1)
        for head in range(2):
            assert found.starts[head].tolist() == starts(hip_search(both[head : head + 1], 0, 16, 4, 1))


class TestWhatTheMathsPromises:
    @given(n=st.integers(1, 300), budget=st.integers(1, 80), lo=st.integers(0, 9), seed=st.integers(0, 1 << 30))
    @settings(max_examples=100, deadline=None)
    def test_an_oracle_finds_the_best(self, n: int, budget: int, lo: int, seed: int) -> None:
        scores = distinct(n + lo, seed)
        found = hip_search(scores, lo, n + lo, budget, 1, "oracle")
        want = np.sort(np.argsort(-scores[0, lo:])[:budget]) + lo
        assert starts(found) == want.tolist()

    @pytest.mark.parametrize(("sign", "want"), [(1, range(56, 64)), (-1, range(8))])
    def test_monotone_scores_are_exact(self, sign: int, want: range) -> None:
        scores = sign * np.arange(64.0)[None]
        assert starts(hip_search(scores, 0, 64, 8, 1)) == list(want)
        if sign > 0:
            assert starts(hip_search(scores, 0, 64, 8, 1, "first")) == list(want)

    def test_a_long_run_is_never_missed_altogether(self) -> None:
        """A constant run of n / 2k keys above the rest, wherever it lies."""
        base = np.random.default_rng(0).random((1, 4096))
        for at in range(0, 4088):
            scores = base.copy()
            scores[0, at : at + 8] = 2.0
            chosen = hip_search(scores, 0, 4096, 256, 1).starts[0]
            assert np.any((chosen >= at) & (chosen < at + 8)), at

    @given(
        n=st.integers(0, 200),
        lo=st.integers(0, 5),
        budget=st.integers(1, 60),
        block=st.integers(1, 9),
        representative=st.sampled_from(REPRESENTATIVES),
        seed=st.integers(0, 1 << 30),
    )
    @settings(max_examples=150, deadline=None)
    def test_any_choice_is_within_region_and_budget(
        self, n: int, lo: int, budget: int, block: int, representative: str, seed: int
    ) -> None:
        found = hip_search(distinct(n + lo, seed, 2), lo, lo + n, budget, block, representative)
        for head in range(2):
            tokens = found.tokens(head)
            assert np.all(np.diff(tokens) > 0)
            assert np.all((tokens >= lo) & (tokens < lo + n))
            assert np.all((found.starts[head] - lo) % block == 0)
            num = -(-n // block)
            assert len(found.starts[head]) == min(num, -(-budget // block))
            if n <= budget:
                assert tokens.tolist() == list(range(lo, lo + n))
                assert found.reads[head] == found.rounds[head] == 0

    @given(
        n=st.integers(0, 500),
        lo=st.integers(0, 5),
        lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        counts=st.lists(st.integers(1, 9), min_size=3, max_size=3),
        representative=st.sampled_from(["first", "middle"]),
        seed=st.integers(0, 1 << 30),
    )
    @settings(max_examples=150, deadline=None)
    def test_any_choice_in_stages(
        self, n: int, lo: int, lengths: list[int], counts: list[int], representative: str, seed: int
    ) -> None:
        chunks = np.cumprod(lengths)[::-1].tolist()
        keep = [length * count for length, count in zip(chunks, counts)]
        scores = distinct(n + lo, seed, 2)
        found = infinite_hip_search(scores, lo, lo + n, chunks, keep, representative)
        assert len(found.inputs) == len(chunks)
        for head in range(2):
            tokens = found.tokens(head)
            assert np.all(np.diff(tokens) > 0)
            assert np.all((tokens >= lo) & (tokens < lo + n))
            assert len(tokens) <= keep[-1]
            if n <= keep[-1]:
                assert (tokens.tolist(), found.reads[head]) == (list(range(lo, lo + n)), 0)
        for start in range(1, len(chunks)):
            again = infinite_hip_search(scores, lo, lo + n, chunks, keep, representative, start=start, inputs=found.inputs)
            for head in range(2):
                assert again.starts[head].tolist() == found.starts[head].tolist()


class TestStages:
    @pytest.mark.parametrize(
        ("chunk", "representative", "token", "score"),
        [((8, 16), "first", 13, 7.0), ((8, 16), "middle", 8, 4.0), ((0, 8), "first", 2, 3.0), ((0, 8), "middle", 7, 9.0)],
    )
    def test_the_way_down(self, chunk: tuple[int, int], representative: str, token: int, score: float) -> None:
        best, at, reads = best_on_the_way(SIXTEEN[0], np.array([chunk]), representative)
        assert (best.tolist(), at.tolist(), reads) == ([score], [token], 6)

    @pytest.mark.parametrize("representative", ["first", "middle"])
    def test_ragged_single_and_hidden_chunks(self, representative: str) -> None:
        scores = SIXTEEN[0].copy()
        scores[:3] = -np.inf
        best, at, reads = best_on_the_way(scores, np.array([[0, 3], [3, 4], [13, 16], [4, 7]]), representative)
        assert best.tolist()[:2] == [-np.inf, 2.5]
        assert at.tolist()[:2] == [0, 3]
        assert best[2] == 7.0
        assert not np.isnan(best).any()
        assert reads <= 4 + 1 + 4 + 4
        hidden = infinite_hip_search(np.full((1, 64), np.nan), 0, 64, (16, 4), (32, 8), representative)
        assert starts(hidden) == []

    def test_a_better_key_on_the_way_counts(self) -> None:
        """The middle of a half may be better than where the walk ends: the chunk is worth the better one."""
        scores = np.array([1.0, 0, 5, 1, 0, 0, 0, 0])
        best, at, _ = best_on_the_way(scores, np.array([[0, 8]]), "middle")
        assert (best[0], at[0]) == (5.0, 2)
        scores[2:4] = [9.0, 9.5]
        assert best_on_the_way(scores, np.array([[0, 8]]), "middle")[0][0] == 9.5

    def test_when_stages_are_computed_again(self) -> None:
        want = [0, None, None, None, 2, None, None, None, 1, None, None, None, 2, None, None, None, 0, None]
        assert [first_stage(step, (16, 8, 4)) for step in range(18)] == want
        share = [first_stage(step, (96, 24, 8)) for step in range(96)]
        assert [share.count(stage) for stage in (0, 1, 2, None)] == [1, 3, 8, 84]
        assert [first_stage(step, (1, 1, 1)) for step in range(4)] == [0] * 4


class TestReads:
    """S = 16, W = 256, budget 512 in blocks of 2; InfiniteHiP: S = 256, W = 1024, its presets of 3K and 5K."""

    @pytest.mark.parametrize(("n", "rounds", "reads"), [(8192, 4, 4096), (32768, 6, 6144), (131072, 8, 8192), (1 << 20, 11, 11264)])
    def test_hip(self, n: int, rounds: int, reads: int) -> None:
        """Two children a node, exactly, where the region is a power of two; elsewhere a node of one block has only one."""
        scores = np.random.default_rng(0).standard_normal((1, n))
        exact = hip_search(scores, 0, n, 512, 2)
        assert (exact.rounds, exact.reads) == ((rounds,), (reads,))
        lo, hi = region([n - 1], 16, 256)
        found = hip_search(scores, lo, hi, 512, 2)
        assert found.rounds == (rounds,)
        assert reads - 512 < found.reads[0] <= reads
        assert int(kept(found, [n - 1], n, 16, 256).sum()) == 784

    @pytest.mark.parametrize(
        ("n", "three", "five"),
        [(8192, 7776, 6912), (32768, 17952, 23936), (131072, 24496, 42768), (1 << 20, 81840, 214800)],
    )
    def test_infinite_hip(self, n: int, three: int, five: int) -> None:
        scores = np.random.default_rng(0).standard_normal((1, n))
        lo, hi = region([n - 1], 256, 1024)
        found = infinite_hip_search(scores, lo, hi, every_stage=True)
        assert found.reads == (three,)
        assert int(kept(found, [n - 1], n, 256, 1024).sum()) == 3328
        skipped = infinite_hip_search(scores, lo, hi)
        assert skipped.reads[0] <= three
        assert skipped.starts[0].tolist() == found.starts[0].tolist()
        assert infinite_hip_search(scores, lo, hi, (64, 32, 16), (32768, 16384, 4096), every_stage=True).reads == (five,)


# Mean share of a run of needles that is found among 4,096 keys of N(0, 1), budget 256, 200 draws: HiP middle in blocks of 1 and 2,
# first in blocks of 1, InfiniteHiP first and middle.
NEEDLES = {
    1: [0.195, 0.250, 0.350, 0.380, 0.280],
    4: [0.626, 0.369, 0.559, 0.463, 0.578],
    8: [0.796, 0.652, 0.744, 0.679, 0.751],
    16: [0.899, 0.834, 0.867, 0.750, 0.843],
    64: [0.976, 0.962, 0.966, 0.958, 0.976],
}
# Two entries lie 0.08 from what 3,000 draws give (0.298 and 0.452): 2.5 standard errors of the 200 draws behind them.
FEW_DRAWS = {(1, 3), (4, 1)}

# Keys whose correlation falls off over so many tokens, 64 channels, scores of standard deviation 3, budget 256 of 4,096: recall
# of the best 256 / share of the attention scores selected, for HiP middle in blocks of 1, 2 and 8, InfiniteHiP first and middle;
# then their own share.
NEIGHBOURS = {
    0: ([(0.232, 0.225), (0.231, 0.216), (0.165, 0.209), (0.177, 0.274), (0.178, 0.268)], 0.921),
    8: ([(0.906, 0.890), (0.769, 0.834), (0.433, 0.583), (0.516, 0.688), (0.529, 0.769)], 0.906),
    32: ([(0.989, 0.877), (0.884, 0.869), (0.706, 0.798), (0.729, 0.830), (0.737, 0.842)], 0.877),
    128: ([(0.999, 0.837), (0.942, 0.835), (0.867, 0.823), (0.863, 0.823), (0.865, 0.824)], 0.837),
}


class TestHowWellItFinds:
    @pytest.mark.parametrize("length", NEEDLES)
    def test_needles(self, length: int) -> None:
        draws = 300
        rng = np.random.default_rng(length)
        scores = rng.standard_normal((draws, 4096))
        at = rng.integers(0, 4096 - length + 1, draws)
        for row, first in zip(scores, at):
            row[first : first + length] = 100.0

        def share(found: Selection) -> float:
            hits = [np.sum((t >= first) & (t < first + length)) for t, first in zip(map(found.tokens, range(draws)), at)]
            return float(np.mean(hits)) / length

        got = [share(hip_search(scores, 0, 4096, 256, b, r)) for b, r in ((1, "middle"), (2, "middle"), (1, "first"))]
        got += [share(infinite_hip_search(scores, 0, 4096, **SMALL, representative=r)) for r in ("first", "middle")]
        for i, (mine, want) in enumerate(zip(got, NEEDLES[length])):
            assert mine == pytest.approx(want, abs=0.13 if (length, i) in FEW_DRAWS else 0.08), i

    @pytest.mark.parametrize("length", NEIGHBOURS)
    def test_neighbours(self, length: int) -> None:
        """A share is compared by what is lost against the best 256, because that of the best itself varies from draw to draw."""
        draws, dim = 150, 64
        rng = np.random.default_rng(7 + length)
        rho = np.exp(-1 / length) if length else 0.0
        keys = np.empty((4096, draws, dim), np.float32)
        state = rng.standard_normal((draws, dim), np.float32)
        for t in range(4096):
            state = (rho * state + np.sqrt(1 - rho * rho) * rng.standard_normal((draws, dim), np.float32)).astype(np.float32)
            keys[t] = state
        q = rng.standard_normal((draws, dim), np.float32)
        scores = np.einsum("tnd,nd->nt", keys, 3 * q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float64)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        best = [np.argsort(-row)[:256] for row in scores]
        most = float(np.mean([w[b].sum() for w, b in zip(weights, best)]))

        def quality(found: Selection) -> tuple[float, float]:
            chosen = [found.tokens(i) for i in range(draws)]
            recall = float(np.mean([np.isin(b, t).mean() for b, t in zip(best, chosen)]))
            return recall, most - float(np.mean([w[t].sum() for w, t in zip(weights, chosen)]))

        got = [quality(hip_search(scores, 0, 4096, 256, b)) for b in (1, 2, 8)]
        found = [infinite_hip_search(scores, 0, 4096, **SMALL, representative=r) for r in ("first", "middle")]
        assert found[0].reads[0] == 2560
        table, exact = NEIGHBOURS[length]
        for i, ((recall, lost), (want, held)) in enumerate(zip(got + [quality(f) for f in found], table)):
            assert recall >= want - 0.03, i
            # One entry, blocks of 8 at a length of 8, is 0.05 above what 200 draws give; its recall is not.
            assert lost <= exact - held + (0.08 if (length, i) == (8, 2) else 0.03), i
        if length == 32:
            assert got[0][0] >= 0.95
        if length == 0:
            assert got[0][0] <= 0.35, "a dense path hides somewhere"


class TestWhatIsRead:
    SCORES = torch.tensor([2, 0.5, 1, 0, 3, 1, 0, 0, 2.5, 0, 1, 1.5], dtype=torch.float64)
    CHOSEN = Selection(2, 9, (np.array([4, 8]),), (np.array([6, 9]),), (0,), (0,))

    def attend(self, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.arange(12, dtype=torch.float64)[None, :, None]
        return sparse_attend(torch.ones(1, 1, 1, dtype=torch.float64), self.SCORES[None, :, None], values, visible, 1.0)

    def test_sinks_window_and_choice_are_disjoint(self) -> None:
        visible = kept(self.CHOSEN, [11], 12, 2, 3)
        assert visible[0, 0].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 8, 9, 10, 11]
        out, lse = self.attend(visible)
        assert out.item() == pytest.approx(5.333243, abs=1e-6)
        assert (lse - torch.logsumexp(self.SCORES, 0)).exp().item() == pytest.approx(0.901311, abs=1e-6)
        assert self.attend(torch.ones(1, 1, 12, dtype=torch.bool))[0].item() == pytest.approx(5.176874, abs=1e-6)

    def test_a_key_of_choice_and_window_counts_once(self) -> None:
        overlapping = Selection(2, 9, (np.array([4, 8]),), (np.array([6, 10]),), (0,), (0,))
        assert self.attend(kept(overlapping, [11], 12, 2, 3))[0].item() == pytest.approx(5.333243, abs=1e-6)

    def test_parts_merge(self) -> None:
        visible = kept(self.CHOSEN, [11], 12, 2, 3)
        halves = [visible & (torch.arange(12) < 5), visible & (torch.arange(12) >= 5)]
        assert merge([self.attend(half) for half in halves]).item() == pytest.approx(5.333243, abs=1e-6)

    @given(
        n=st.integers(1, 60),
        group=st.sampled_from([1, 3, 4]),
        queries=st.integers(1, 5),
        sinks=st.integers(0, 5),
        window=st.integers(0, 70),
        seed=st.integers(0, 1 << 30),
    )
    @settings(max_examples=150, deadline=None)
    def test_a_budget_for_all_is_dense(self, n: int, group: int, queries: int, sinks: int, window: int, seed: int) -> None:
        queries = min(queries, n)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(h, t, 4, generator=generator) for h, t in ((2 * group, queries), (2, n), (2, n)))
        at = list(range(n - queries, n))
        lo, hi = region(at, sinks, window)
        scores = group_scores(q, k, at, window)
        causal = torch.arange(n)[None] <= torch.tensor(at)[:, None]
        dense, _ = attend(q, k, v, causal, 0.5)
        for found in (
            hip_search(scores, lo, hi, n, 2),
            infinite_hip_search(scores, lo, hi, (16, 4), (64, 64)),
        ):
            assert set(found.rounds) == {0}
            visible = kept(found, at, n, sinks, window)
            assert torch.equal(visible, causal.expand(2, -1, -1))
            out, _ = sparse_attend(q, k, v, visible, 0.5)
            assert (out - dense).abs().max() <= 1e-5

    @given(
        n=st.integers(40, 200),
        queries=st.integers(1, 16),
        sinks=st.integers(0, 4),
        window=st.integers(0, 30),
        seed=st.integers(0, 1 << 30),
    )
    @settings(max_examples=100, deadline=None)
    def test_every_key_can_be_read_and_none_of_the_future(self, n: int, queries: int, sinks: int, window: int, seed: int) -> None:
        """What may be chosen, and what is always read, are all keys up to each query."""
        at = list(range(n - queries, n))
        lo, hi = region(at, sinks, window)
        everything = Selection(lo, hi, (np.array([lo]),), (np.array([hi]),), (0,), (0,))
        causal = torch.arange(n)[None] <= torch.tensor(at)[:, None]
        assert torch.equal(kept(everything, at, n, sinks, window)[0], causal)
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(3, queries, 4, generator=generator), torch.randn(1, n, 4, generator=generator)
        scores = group_scores(q, k, at, window)
        for t in range(lo, hi):
            seen = [(q[:, i] @ k[0, t]).max().item() for i, p in enumerate(at) if t <= p - window]
            assert scores[0, t] == pytest.approx(max(seen), abs=1e-5)

    def test_a_frozen_window_shows_what_would_slide_out(self) -> None:
        """Between refreshes a query reads every key from where the window began."""
        n, sinks, window = 100, 4, 8
        lo, hi = region([n - 1], sinks, window)
        found = hip_search(distinct(n, 3), lo, hi, 16, 2)
        for later in range(1, 8):
            visible = kept(found, [n - 1 + later], n + later, sinks, window + later)[0, 0]
            assert visible[n - window : n + later].all()
            assert visible[: n - window].tolist() == kept(found, [n - 1], n, sinks, window)[0, 0, : n - window].tolist()


class TestErrors:
    def test_bad_selections(self) -> None:
        for budget, block in ((0, 1), (4, 0)):
            with pytest.raises(PolicyError, match="at least 1"):
                hip_search(SIXTEEN, 0, 16, budget, block)
        with pytest.raises(PolicyError, match="middle, first, last, oracle"):
            hip_search(SIXTEEN, 0, 16, 4, 1, "nearest")
        for lo, hi in ((-1, 4), (0, 17), (5, 4)):
            with pytest.raises(ShapeError, match="16 keys"):
                hip_search(SIXTEEN, lo, hi, 4)
            with pytest.raises(ShapeError, match="16 keys"):
                infinite_hip_search(SIXTEEN, lo, hi)
        with pytest.raises(ShapeError):
            hip_search(SIXTEEN[0], 0, 16, 4)
        with pytest.raises(PolicyError, match="at least 0"):
            region([3], -1, 4)
        with pytest.raises(ShapeError, match="at least one query"):
            region([], 1, 4)

    def test_bad_stages(self) -> None:
        for chunks, keep in (((8, 3), (8, 3)), ((8, 4), (12, 4)), ((8, 4), (8,)), ((), ()), ((8, 0), (8, 8))):
            with pytest.raises(PolicyError):
                infinite_hip_search(SIXTEEN, 0, 16, chunks, keep)
        with pytest.raises(PolicyError, match="first or middle"):
            infinite_hip_search(SIXTEEN, 0, 16, (8, 4), (8, 4), "last")
        with pytest.raises(PolicyError, match="needs the inputs"):
            infinite_hip_search(SIXTEEN, 0, 16, (8, 4), (8, 4), start=1)
        with pytest.raises(PolicyError, match="at least 1"):
            first_stage(3, (16, 0))

    def test_queries_that_do_not_fit(self) -> None:
        for q, at in ((torch.ones(3, 1, 4), [5]), (torch.ones(4, 1, 5), [5]), (torch.ones(4, 2, 4), [5])):
            with pytest.raises(ShapeError):
                group_scores(q, torch.ones(2, 6, 4), at, 2)
