"""Decoding by replays, without a GPU: a replay runs the forward again, and the host may plan and upload only outside of it."""

from __future__ import annotations

from collections.abc import Iterator

import backend_cases
import emulator
import kvsieve
import pytest
import tiny
import torch
from kvsieve.errors import StateError, UnsupportedError
from kvsieve.graphs import GraphDecoder


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    with emulator.emulated(emulator.Emulator()) as made:
        yield made


POLICIES = [name for name in tiny.POLICIES if name not in ("lm_infinite_middle", *tiny.PER_HEAD)]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_tokens_as_without_a_graph(policy: str) -> None:
    backend_cases.graph(policy, torch.device("cpu"), 70)


@pytest.mark.parametrize("policy", list(backend_cases.PACKINGS))
def test_packed_streams_under_a_graph(policy: str) -> None:
    backend_cases.graph(policy, torch.device("cpu"), 60)


def test_a_graph_needs_channels_that_were_chosen() -> None:
    """The queries of a replay never reach the host, so it must not be they that choose."""
    with kvsieve.stream(tiny.model(), kvsieve.ThinK(0.5, recent=8, observe=30, flush_every=4), "cuda") as stream:
        stream.feed(tiny.ids(1, 20))
        decoder = GraphDecoder(stream)
        with pytest.raises(UnsupportedError, match="at least 30 tokens"):
            decoder.step(tiny.ids(1, 1))
        assert stream.seen == 20
        stream.feed(tiny.ids(1, 20))
        assert decoder.step(tiny.ids(1, 1)).shape == (1, tiny.VOCAB)


def test_what_a_graph_cannot_hold_is_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "cuda") as stream, pytest.raises(StateError, match="prompt"):
        GraphDecoder(stream)
    for backend, policy, family in (
        ("reference", kvsieve.Full(), "llama"),
        ("cuda", tiny.POLICIES["lm_infinite_middle"](30), "llama"),
        ("cuda", tiny.POLICIES["snapkv"](30), "llama"),
        ("cuda", tiny.POLICIES["h2o"](30), "llama"),
        ("cuda", kvsieve.Quest(64), "llama"),
        ("cuda", kvsieve.RefreshKV(30), "llama"),
        ("cuda", kvsieve.SelectiveV(8), "llama"),
        ("cuda", kvsieve.StreamingLLM(30) >> kvsieve.MemoryBank(chunk=4, top_k=16, capacity=64), "llama"),
        ("cuda", kvsieve.Full(), "gemma2"),
    ):
        with kvsieve.stream(tiny.model(family), policy, backend) as stream:
            stream.feed(tiny.ids(1, 20))
            with pytest.raises(UnsupportedError, match="graph"):
                GraphDecoder(stream)


def test_a_forward_that_fails_leaves_the_stream_as_it_was(launcher: emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.StreamingLLM(40), "cuda") as stream:
        stream.feed(tiny.ids(1, 30))
        decoder = GraphDecoder(stream)
        want = decoder.step(tiny.ids(1, 1)).clone()
        stream.cache.crop(-1)
        with monkeypatch.context() as patched:
            patched.setattr(decoder._captured, "_replay", emulator.refuse)
            with pytest.raises(AssertionError):
                decoder.step(tiny.ids(1, 1))
        assert stream.seen == 30
        torch.testing.assert_close(decoder.step(tiny.ids(1, 1)), want)
