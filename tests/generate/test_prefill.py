"""Compression while a prompt is read (``when="prefill"``): what is held after each piece, and what the pieces see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, pad_left, same_memory
from kvsieve.errors import PolicyError
from kvsieve.methods.parser import parse
from kvsieve.runtime.compression import Compression
from tiny import BACKENDS

Make = Callable[..., Any]

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def think(**changes: Any) -> Any:
    return kvsieve.ThinK(0.5, recent=16, observe=16, **changes)


def codes(**changes: Any) -> Any:
    return kvsieve.Quantized(4, group=16, residual=16, **changes)


KINDS: dict[str, Make] = {
    "think": think,
    "codes": codes,
    "both": lambda **changes: think(**changes) | codes(**changes),
    "hip": lambda **changes: kvsieve.HiP(64, sinks=4, window=32, dense_layers=1, query_block=16) | codes(**changes),
    "sirllm": lambda **changes: kvsieve.SirLLM(192, sinks=2, recent=32) | think(**changes),
    "snapkv": lambda **changes: kvsieve.SnapKV(192, observe=16) | codes(**changes),
}
EVERY = pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
CHUNK = 128


def token_bytes(stream: kvsieve.Stream) -> tuple[float, int]:
    """Bytes of a packed token and of a plain one, over all layers."""
    engine = stream._engine
    packed = 0.0
    for layer in engine.facts.layers:
        bits = engine.parts.the(Compression).packing[layer.index].bits_per_token(layer.value_dim, layer.dtype)
        packed += layer.num_kv_heads * sum(bits) / 8
    return packed, engine.facts.bytes_per_token


@BACKEND
@pytest.mark.parametrize("make", [KINDS[name] for name in ("think", "codes", "both")], ids=["think", "codes", "both"])
def test_a_prompt_in_pieces_is_never_held_in_full(make: Make, backend: str) -> None:
    """After each piece what is held is compressed but for the recent tokens; while one is read, it and no other comes on top."""
    model, ids, peaks = tiny.model(), tiny.ids(1, 1024), []
    with kvsieve.stream(model, make(when="prefill"), backend) as stream:
        last = model.model.layers[-1].self_attn.register_forward_hook(lambda *_: peaks.append(stream._engine.bytes_held))
        try:
            for lo in range(0, 1024, CHUNK):
                stream.feed(ids[:, lo : lo + CHUNK], chunk=CHUNK)
                seen = lo + CHUNK
                packed, plain = token_bytes(stream)
                # The recent tokens, a group that waits to be filled, a packed block and a plain one that are not full.
                least = (seen - 32) * packed + 16 * plain
                most = (seen + 63) * packed + (32 + 63) * plain
                assert stream._engine.planner.num_packed(0) >= seen - 32
                assert least <= stream.stats().bytes_held <= most, f"after {seen}"
                assert peaks[-1] <= most + (CHUNK + 63) * plain
        finally:
            last.remove()
        whole = stream.stats().bytes_full
    assert max(peaks) < 0.85 * whole
    with kvsieve.stream(model, make(), backend) as stream:
        stream.feed(ids, chunk=CHUNK)
        assert stream.stats().bytes_held >= whole, "by default a prompt is whole until it has been read"


@BACKEND
@EVERY
def test_pieces_are_read_as_if_a_turn_ended_after_each(make: Make, backend: str) -> None:
    """An ended turn packs what it has read, so with one after each piece the default is the same, bit for bit."""
    model, ids = tiny.model(), tiny.ids(2, 420)
    got, held = [], []
    for when in ("prefill", "decode"):
        with kvsieve.stream(model, make(when=when), backend) as stream:
            out = []
            for piece in ids.split([150, 90, 60, 100, 1, 1, 18], dim=1):
                out.append(forward(model, stream.cache, piece))
                if when == "decode" and piece.shape[1] > 1:
                    stream.end_turn()
            got.append(torch.cat(out, 1))
            held.append(stream.fork())
    assert torch.equal(*got)
    assert same_memory(*held)
    for fork in held:
        fork.close()


@EVERY
def test_the_backends_agree(make: Make) -> None:
    model, (ids, mask) = tiny.model(), pad_left([tiny.ids(1, n, n)[0] for n in (400, 333)])
    logits = []
    for backend in BACKENDS:
        with kvsieve.stream(model, make(when="prefill"), backend) as stream:
            logits.append(forwards(model, stream.cache, ids, [128, 128, 100, 43, 1], mask)[:, -333:])
    difference = (logits[0] - logits[1]).abs().flatten()
    # A number between two codes may be rounded either way by what else was rounded before it.
    assert float(difference.quantile(0.99)) <= 2e-3 * float(logits[0].abs().max())


@BACKEND
def test_the_first_piece_chooses_the_channels(backend: str) -> None:
    """By its last queries and its keys: whatever the rest of the prompt says."""
    model, first = tiny.model(), tiny.ids(1, 100)
    chosen = []
    for seed in (1, 2):
        with kvsieve.stream(model, think(when="prefill"), backend) as stream:
            forward(model, stream.cache, first)
            forward(model, stream.cache, tiny.ids(1, 80, seed))
            engine = stream._engine
            block = engine.planner.runs(0, 0)[0][0]
            chosen.append([store.channels(block).index.clone() for store in engine.stores.values()])
    assert all(torch.equal(a, b) for a, b in zip(*chosen))
    with kvsieve.stream(model, think(), backend) as stream:
        forward(model, stream.cache, first)
        stream.end_turn()
        engine = stream._engine
        alone = [store.channels(engine.planner.runs(0, 0)[0][0]).index for store in engine.stores.values()]
    assert all(torch.equal(a, b) for a, b in zip(chosen[0], alone))


@BACKEND
def test_pieces_shorter_than_what_is_observed_wait_for_more(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, think(when="prefill"), backend) as stream:
        packed = []
        for piece in ids.split([7, 7, 7, 20, 19], dim=1):
            forward(model, stream.cache, piece)
            packed.append(stream._engine.planner.num_packed(0))
    assert packed == [0, 0, 21 - 16, 41 - 16, 60 - 16]


@BACKEND
@EVERY
def test_a_prompt_in_one_piece_costs_its_answer_nothing(make: Make, backend: str) -> None:
    """Whether it is compressed at its end or before the next token is the same to all that follows."""
    model, ids = tiny.model(), tiny.ids(1, 300)
    answers = []
    for when in ("prefill", "decode"):
        with kvsieve.stream(model, make(when=when), backend) as stream:
            answers.append(greedy(model, ids, 20, past_key_values=stream.cache).tolist())
    assert answers[0] == answers[1]


@EVERY
def test_a_stream_saved_between_pieces_goes_on(make: Make, tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 330)
    with kvsieve.stream(model, make(when="prefill")) as stream:
        forwards(model, stream.cache, ids[:, :200], [120, 80])
        stream.save(tmp_path / "stream.safetensors")
        with stream.fork() as fork:
            want = forwards(model, stream.cache, ids[:, 200:], [100, 29, 1])
            forked = forwards(model, fork.cache, ids[:, 200:], [100, 29, 1])
            held = stream._engine.planner.num_packed(0)
    with kvsieve.load(tmp_path / "stream.safetensors", model) as loaded:
        assert repr(loaded.policy) == repr(make(when="prefill"))
        got = forwards(model, loaded.cache, ids[:, 200:], [100, 29, 1])
        assert loaded._engine.planner.num_packed(0) == held > 0
    torch.testing.assert_close(forked, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [kvsieve.ThinK, kvsieve.Quantized])
def test_when_is_one_of_two(make: Make) -> None:
    assert make().compression.when == make(when="decode").compression.when == "decode"
    assert repr(make(when="decode")) == repr(make())
    policy = make(when="prefill")
    assert parse(repr(policy)) == policy
    assert parse(repr(policy)).compression.when == "prefill"
    with pytest.raises(PolicyError, match="when must be 'decode' or 'prefill', got 'never'"):
        make(when="never")


def test_joined_formats_are_packed_early_if_either_is() -> None:
    for early in ((think(when="prefill"), codes()), (think(), codes(when="prefill"))):
        policy = early[0] | early[1]
        assert policy.compression.when == "prefill"
        assert parse(repr(policy)) == policy
    assert (think() | codes()).compression.when == "decode"
