"""A bank's values without a model: what they hold, what is found in them, and attention to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bank_cases import held, shape_of, tokens
from drive import Layer
from kvsieve.backends import recall
from kvsieve.backends.attention import attend
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.bank import entries as entries_module
from kvsieve.bank.entries import BankLayer, Entries, Shape
from kvsieve.errors import BackendError
from kvsieve.facts import LayerRope
from kvsieve.methods.parser import parse
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def with_keys(keys: list[tuple[float, float]], chunk: int) -> Entries:
    shape = Shape((BankLayer(0, 1, 2, 2, torch.float32),), chunk, 64)
    both = {0: torch.tensor(keys)[None]}
    return Entries(shape).append(both, both)


# ---------------------------------------------------------------------------------------------------------------- worked numbers


def test_the_worked_merge() -> None:
    """Own keys (1, 0), (0, 1) with values the same, found ones (1, 1), (-1, 0) with values (2, 2), (5, -1)."""
    q, scale = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64), 2**-0.5
    own_k, found_k = torch.eye(2).double()[None], torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]).double()
    found_v = torch.tensor([[[2.0, 2.0], [5.0, -1.0]]]).double()
    seen = torch.ones(1, 2, dtype=torch.bool)
    own, found = attend(q, own_k, own_k, seen, scale), attend(q, found_k, found_v, seen, scale)
    assert own[0].flatten().tolist() == pytest.approx([0.5875, 0.4125], abs=1e-4)
    assert found[0].flatten().tolist() == pytest.approx([2.4375, 1.5625], abs=1e-4)
    assert float(torch.sigmoid(found[1] - own[1])) == pytest.approx(0.4948, abs=1e-4)
    got = recall.joined(own[0].transpose(0, 1), own[1], found, 0.0)
    assert got.flatten().tolist() == pytest.approx([1.5029, 0.9816], abs=1e-4)
    both = attend(q, torch.cat([own_k, found_k], 1), torch.cat([own_k, found_v], 1), torch.ones(1, 4, dtype=torch.bool), scale)
    torch.testing.assert_close(got[:, 0], both[0][0])
    assert torch.equal(recall.joined(own[0].transpose(0, 1), own[1], found, -torch.inf)[0], own[0][0])
    # A bias that makes the gate one half is the published mean of two softmaxes.
    half = recall.joined(own[0].transpose(0, 1), own[1], found, float(own[1] - found[1]))
    assert half.flatten().tolist() == pytest.approx([1.5125, 0.9875], abs=1e-4)


def test_the_worked_retrieval() -> None:
    keys = [(1.0, 0.0), (0.0, 1.0), (2.0, 0.0), (2.0, 2.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 3.0), (1.0, 1.0)]
    entries = with_keys(keys, 2)
    segment = entries.pieces[0].segment
    assert segment.means[0][0, :4].tolist() == [[0.5, 0.5], [2.0, 1.0], [-0.5, -0.5], [0.5, 2.0]]
    assert recall.choose(entries, 0, torch.tensor([[[1.0, 0.2]]]), 2).tolist() == [[[1, 3]]]
    k, _, seen = recall.gather(entries, 0, torch.tensor([[[1, 3]]]))
    assert k[0, 0].tolist() == [list(keys[at]) for at in (2, 3, 6, 7)]
    assert seen is None


def test_of_equal_chunks_the_newer_ones_are_found() -> None:
    entries = with_keys([(1.0, 0.0), (5.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)], 1)
    for count, want in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        assert recall.choose(entries, 0, torch.tensor([[[1.0, 0.0]]]), count).tolist() == [[want]]


# ------------------------------------------------------------------------------------------------------------------------ values


def test_an_unfinished_chunk_cannot_be_found_until_it_is_flushed() -> None:
    shape = shape_of()
    entries = Entries(shape).append(*tokens(shape, 0, 6))
    assert (held(entries), entries.tail, entries.num_tokens) == ([[0, 1, 2, 3]], 2, 6)
    flushed = entries.flush()
    assert held(flushed) == [[0, 1, 2, 3], [4, 5]]
    assert held(entries) == [[0, 1, 2, 3]]
    assert held(flushed.append(*tokens(shape, 6, 5))) == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert flushed.flush() is flushed


def test_means_do_not_change_by_what_is_written_later() -> None:
    shape = shape_of(chunk=2)
    entries = Entries(shape).append(*tokens(shape, 0, 3))
    before = entries.pieces[0].segment.means[0][:, :1].clone()
    later = entries.append(*tokens(shape, 3, 40))
    assert torch.equal(later.pieces[0].segment.means[0][:, :1], before)
    assert torch.equal(entries.pieces[0].segment.means[0][:, :1], before)


def test_the_capacity_is_reached_and_never_exceeded() -> None:
    shape, most = shape_of(chunk=4, capacity=32), 0
    entries = Entries(shape)
    for at in range(150):
        entries = entries.append(*tokens(shape, at, 1))
        assert entries.num_tokens <= 32
        most = max(most, entries.num_tokens)
        # Numbers stay: the oldest token held is the one that `dropped` says.
        first = held(entries)[0][0] if entries.num_chunks else 0
        assert first == entries.dropped == 4 * entries.chunks_dropped
        assert sum(segment.size * 4 for segment in entries.segments()) <= 32 + 3 * shape.most_chunks * 4
    assert most == 32
    assert Entries(shape).append(*tokens(shape, 0, 150)).num_tokens == 30
    assert held(Entries(shape).append(*tokens(shape, 0, 150))) == held(entries)


@pytest.mark.parametrize("seed", range(3))
def test_values_go_on_from_anywhere_without_changing_each_other(seed: int) -> None:
    """Against lists of tokens: what is appended to, flushed, or gone on from twice holds what it should, and so do all others."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    chunk, capacity = ((1, 24), (3, 36), (4, 400))[seed % 3]
    shape = shape_of(chunk, capacity, heads=2)
    values: list[tuple[Entries, list[list[int]], list[int]]] = [(Entries(shape), [], [])]
    for _ in range(40):
        entries, chunks, tail = values[-1 if draw(3) else draw(len(values))]
        chunks, tail = [list(c) for c in chunks], list(tail)
        if draw(5):
            count = 1 + draw(3 if draw(2) else 60)
            entries = entries.append(*tokens(shape, entries.written, count))
            for number in range(entries.written - count, entries.written):
                tail.append(number)
                if len(tail) == chunk:
                    chunks.append(tail)
                    tail = []
                while sum(map(len, chunks)) + len(tail) > capacity:
                    chunks.pop(0)
        else:
            entries = entries.flush()
            chunks, tail = ([*chunks, tail], []) if tail else (chunks, tail)
        values.append((entries, chunks, tail))
        for found, want, rest in values[-4:]:
            assert (held(found), found.tail) == (want, len(rest))
            assert found.num_tokens == sum(map(len, want)) + len(rest)
    for found, want, _ in values:
        assert held(found) == want


def test_a_value_that_goes_on_beside_another_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(chunk=2, capacity=4096)
    entries = Entries(shape).append(*tokens(shape, 0, 401))
    made: list[int] = []
    init = entries_module.Segment.__init__
    monkeypatch.setattr(entries_module.Segment, "__init__", lambda self, s, size: (made.append(size), init(self, s, size))[1])
    one, other = (entries.append(*tokens(shape, 401, 1)) for _ in range(2))
    assert made == [entries_module.FIRST]
    assert held(one) == held(other)


# --------------------------------------------------------------------------------------------------------------------- attention


def random_entries(generator: torch.Generator, heads: int, count: int, chunk: int, dim: int = 8) -> Entries:
    shape = Shape((BankLayer(0, heads, dim, dim, torch.float32),), chunk, 4096)
    k, v = (torch.randn(heads, count, dim, generator=generator) for _ in range(2))
    return Entries(shape).append({0: k}, {0: v})


def test_chunks_of_one_token_are_exact_nearest_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = random_entries(generator, 2, 300, 1)
    q = torch.randn(4, 1, 8, generator=generator)
    out, lse = recall.recall(q, entries, 0, 7, 10, AttendCall(0.5))
    k, v = (x[0] for x in (entries.pieces[0].segment.keys, entries.pieces[0].segment.values))
    for head in range(4):
        keys, values = k[head // 2, :300, 0], v[head // 2, :300, 0]
        best = (keys @ q[head // 2 * 2 : head // 2 * 2 + 2, 0].sum(0)).topk(10).indices
        logits = keys[best] @ q[head, 0] * 0.5
        torch.testing.assert_close(out[head, 0], logits.softmax(0) @ values[best])
        torch.testing.assert_close(lse[head, 0], logits.logsumexp(0))


@pytest.mark.parametrize(("first", "m"), [(0, 1), (5, 3), (0, 16), (13, 40), (16, 33)])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_queries_of_a_prompt_share_what_the_mean_of_their_block_finds(first: int, m: int, flush: bool, per_head: bool) -> None:
    generator = torch.Generator().manual_seed(first + m)
    entries = random_entries(generator, 2, 50, 4)
    if flush:
        extra = {0: torch.randn(2, 6, 8, generator=generator)}
        entries = entries.flush().append(extra, extra)
    q = torch.randn(4, m, 8, generator=generator)
    out, lse = recall.recall(q, entries, 0, first, 3, AttendCall(0.4, 5.0), per_head)
    every = torch.arange(entries.num_chunks).expand(2, 1, -1)
    k, v, seen = recall.gather(entries, 0, every)
    seen = torch.ones(k.shape[:3], dtype=torch.bool) if seen is None else seen
    means = torch.cat([p.segment.means[0][:, p.lo : p.hi] for p in entries.pieces], 1)
    for i in range(m):
        mine = [j for j in range(m) if (first + j) // recall.QUERIES == (first + i) // recall.QUERIES] if m > 1 else [0]
        for head in range(4):
            asks = q[:, mine].mean(1).view(2, 2, 8).sum(1)
            scores = (means @ asks[..., None])[..., 0]
            best = (scores[head // 2] if per_head else scores.sum(0)).topk(3).indices
            slots = torch.cat([torch.arange(int(c) * 4, int(c) * 4 + 4) for c in best])
            slots = slots[seen[head // 2, 0, slots]]
            logits = 5.0 * torch.tanh(k[head // 2, 0, slots] @ q[head, i] * 0.4 / 5.0)
            torch.testing.assert_close(lse[head, i], logits.logsumexp(0))
            torch.testing.assert_close(out[head, i], logits.softmax(0) @ v[head // 2, 0, slots])


def test_where_fewer_chunks_are_held_only_these_are_read() -> None:
    """Every value is one, so the output is one: probabilities of tokens that are there add up to it."""
    shape = Shape((BankLayer(0, 1, 4, 2, torch.float32),), 4, 64)
    entries = Entries(shape).append({0: torch.randn(1, 7, 4)}, {0: torch.ones(1, 7, 2)}).flush()
    out, _ = recall.recall(torch.randn(2, 5, 4), entries, 0, 0, 16, AttendCall(1.0))
    torch.testing.assert_close(out, torch.ones(2, 5, 2))


def test_chunks_are_read_alike_one_by_one_and_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = Shape((BankLayer(0, 3, 8, 8, torch.float32),), 4, 512)
    entries = Entries(shape)
    for count in (301, 77, 200):
        both = {0: torch.randn(3, count, 8, generator=generator)}
        entries = entries.append(both, both).flush()
    assert len(entries.pieces) > 4
    chunks = torch.randint(entries.num_chunks, (3, 2, 5), generator=generator)
    found = []
    for few in (64, 0):
        monkeypatch.setattr(recall, "FEW", few)
        found.append(recall.gather(entries, 0, chunks))
    for one, other in zip(*found):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_keys_are_seen_at_one_distance(factor: float) -> None:
    rope = LayerRope(torch.tensor([1.0, 0.1], dtype=torch.float64), "half", factor)
    q, k = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)
    want = rope.rotate(q, torch.tensor([90])) @ rope.rotate(k, torch.tensor([67])).transpose(1, 2)
    torch.testing.assert_close(rope.turn(q, recall.table_of(rope, 23, torch.float64)) @ k.transpose(1, 2), want)


@BACKEND
@pytest.mark.parametrize("policy", ["full()", "streamingllm(48, sinks=2)", "streamingllm(24, sinks=2) >> full()"])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_attention_tells_its_log_sum_exp(width: int, policy: str, backend: str) -> None:
    """The output is that of `run`, bit for bit, and so is what it stores."""
    generator = torch.Generator().manual_seed(width)
    heads, kv_heads, dim, old = 4, 2, 8, 90
    q, k, v = (torch.randn(3, h, old + width, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    sinks = torch.randn(heads, generator=generator) if width != 3 else None
    lens = [width, 0, 1]
    outs = []
    for asks in (False, True):
        layer = Layer(backend, parse(policy), scale=0.4, softcap=None if width == 1 else 4.0, sinks=sinks)
        layer.feed(q[:, :, :old], k[:, :, :old], v[:, :, :old])
        step = layer.planner.begin(lens, width, True, layer.backend.capabilities.needs_parts)
        run = layer.store.run_with_lse if asks else layer.store.run
        outs.append(run(q[:, :, old:], k[:, :, old:], v[:, :, old:], step, layer.call))
        layer.planner.commit()
        outs.append(layer.store.read(layer.planner.runs(0, 0)))
    (want, stored, (out, lse), stored_too) = outs
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(stored, stored_too))
    assert lse.shape == (3, heads, width)
    assert lse[1].isneginf().all()
    assert lse[2, :, : width - 1].isneginf().all()
    if policy == "full()":
        for row in (0, 2):
            for i in range(width - lens[row], width):
                keys = torch.cat([k[row, :, :old], k[row, :, old + width - lens[row] : old + i + 1]], 1).repeat_interleave(2, 0)
                logits = torch.einsum("hd,hnd->hn", q[row, :, old + i], keys) * 0.4
                logits = logits if width == 1 else 4.0 * torch.tanh(logits / 4.0)
                logits = logits if sinks is None else torch.cat([logits, sinks[:, None]], 1)
                torch.testing.assert_close(lse[row, :, i], logits.logsumexp(1), atol=1e-5, rtol=1e-5)


def test_a_backend_that_cannot_says_so() -> None:
    with pytest.raises(BackendError, match="MemoryBank"):
        replace(CUDA, tells_lse=False).check_lse()
