"""HiP and InfiniteHiP under a model, over what another policy retained or compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import distinct, forward, forwards, pad_left, tokens_of
from search_policies import SEARCHES
from tiny import BACKENDS

# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow

EVERY = pytest.mark.parametrize("name", list(SEARCHES))
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def with_sirllm(name: str, budget: int) -> Any:
    return kvsieve.SirLLM(budget, sinks=2, recent=8) | SEARCHES[name]()


@BACKEND
@EVERY
def test_a_selection_over_more_than_is_retained_is_sirllm_alone(name: str, backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 130), []
    for policy in (kvsieve.SirLLM(24, sinks=2, recent=8), kvsieve.SirLLM(24, sinks=2, recent=8) | SEARCHES[name](window=80)):
        with kvsieve.stream(model, policy, backend) as stream:
            got.append(forwards(model, stream.cache, ids, [60, 1]))
            assert stream.stats().resident <= 24 + 63
    assert torch.equal(*got)


@EVERY
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_selection_over_what_sirllm_retained(family: str, name: str) -> None:
    model, ids, got, read = tiny.model(family, vocab_size=600), distinct(2, 260), [], []
    for backend in BACKENDS:
        with kvsieve.stream(model, with_sirllm(name, 100), backend) as stream:
            # Token 254 makes 163 residents into 100 again, in the midst of decoding.
            got.append(forwards(model, stream.cache, ids, [40, 40, 40, 40, 30, 1]))
            assert stream.stats().resident == 106
            assert stream.stats().stored_keys == "pre_rope"
            layers = stream.trace()
            kept = [set(kept.positions.tolist()) for kept in stream.kept()]
            for layer in layers[1:]:
                heads = [set(tokens_of(head.read)) for head in layer.rows[0]]
                assert all(len(tokens) < len(kept[0]) for tokens in heads)
                assert all(259 in tokens and 0 in tokens for tokens in heads)
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in layers])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[0] == read[1]


PACKS = {
    "think": lambda: kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=8),
    "codes": lambda: kvsieve.Quantized(8, group=16, residual=16),
    "both": lambda: kvsieve.ThinK(0.25, recent=8, observe=8) | kvsieve.Quantized(4, group=16, residual=16),
}


@EVERY
@pytest.mark.parametrize("pack", list(PACKS))
def test_a_selection_from_compressed_tokens(pack: str, name: str) -> None:
    """Channel-pruned and quantized keys are compared and read as stored; the second turn is read over compressed tokens."""
    model, ids, got, read = tiny.model(), tiny.ids(2, 150), [], []
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name]() | PACKS[pack](), backend) as stream:
            out = [forwards(model, stream.cache, ids[:, :112], [90, 1])]
            stream.end_turn()
            got.append(torch.cat([*out, forwards(model, stream.cache, ids[:, 112:], [20, 1])], 1))
            assert stream.stats().compressed > 90
            assert not stream.trace()[1].dense
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * float(got[0].abs().max())
    assert read[0] == read[1]


OVER: dict[str, Callable[[str], Any]] = {
    "extended": lambda name: SEARCHES[name](extend=40),
    "retained": lambda name: with_sirllm(name, 100),
    "thin": lambda name: SEARCHES[name]() | PACKS["think"](),
    "codes": lambda name: SEARCHES[name]() | PACKS["codes"](),
}


@pytest.mark.parametrize("name", ["hip", "infinite_middle"])
@pytest.mark.parametrize("over", list(OVER))
def test_padded_rows_and_two_turns_of_whatever_is_selected_from(over: str, name: str) -> None:
    """Each row of a padded batch reads what it reads alone, in the first turn and in the second."""
    model, rows = tiny.model(vocab_size=600), [distinct(1, n)[0] for n in (120, 84)]
    (ids, mask), more = pad_left(rows), distinct(1, 204)[0, 120:].view(2, 42)
    got, read = [], []

    def drive(stream: Any, ids: torch.Tensor, mask: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
        forwards(model, stream.cache, ids, [ids.shape[1] - 30, 20, 1], mask)
        stream.end_turn()
        whole = None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)
        return torch.cat(
            [
                forward(model, stream.cache, more[:, lo:hi], None if whole is None else whole[:, : ids.shape[1] + hi])
                for lo, hi in [(0, 30), *((at, at + 1) for at in range(30, 42))]
            ],
            1,
        )

    for backend in BACKENDS:
        with kvsieve.stream(model, OVER[over](name), backend) as stream:
            got.append(drive(stream, ids, mask, more))
            assert not stream.trace()[1].dense
            read.append([[head.read.tolist() for row in layer.rows for head in row] for layer in stream.trace()])
    scale = float(got[0].abs().max())
    assert float((got[0] - got[1]).abs().max()) <= 1e-3 * scale
    assert read[0] == read[1]
    for row in range(2):
        with kvsieve.stream(model, OVER[over](name), "cpu") as solo:
            alone = drive(solo, rows[row][None], None, more[row : row + 1])
        assert float((got[1][row] - alone[0]).abs().max()) <= 1e-3 * scale


@BACKEND
@EVERY
def test_packing_does_not_end_a_choice(name: str, backend: str) -> None:
    """A choice names residents by number, which packing does not change: a layer that packs all it has reads what it would have."""
    model, ids, read = tiny.model(num_hidden_layers=3), tiny.ids(1, 120), []
    # The last layer drops channels, so that there is something to pack; those before it are packed whole.
    for extra in (None, kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=4, skip_layers=(0, 1))):
        policy = SEARCHES[name]() if extra is None else SEARCHES[name]() | extra
        with kvsieve.stream(model, policy, backend) as stream:
            forward(model, stream.cache, ids[:, :100])
            steps = []
            for at in range(100, 120):
                forward(model, stream.cache, ids[:, at : at + 1])
                steps.append([head.read.tolist() for layer in stream.trace()[:2] for head in layer.rows[0]])
            read.append(steps)
            assert (stream.stats().compressed > 100) == (extra is not None)
    assert read[0] == read[1]
