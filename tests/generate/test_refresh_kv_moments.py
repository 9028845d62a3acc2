"""RefreshKV in a stream's other moments (files, crops, traces, tokens taken out), and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from drive import forward, forwards
from kvsieve.backends.cuda.capabilities import CAPABILITIES as CUDA
from kvsieve.errors import BackendError, PolicyError, StateError, UnsupportedModelError
from refresh_twin import part_of, read_by
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@BACKEND
def test_a_session_file_goes_on_as_the_stream_would(tmp_path: Path, backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.RefreshKV(20, stride=3, similarity=0.5), backend) as stream:
        forwards(model, stream.cache, tiny.ids(2, 44), [40, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, tiny.ids(2, 9, 3), [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend=backend) as loaded:
        assert torch.equal(forwards(model, loaded.cache, tiny.ids(2, 9, 3), [1]), want)


@BACKEND
def test_a_crop_within_partial_steps_is_exact_and_refused_beyond(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 60)
    with kvsieve.stream(model, kvsieve.RefreshKV(20, stride=4, similarity=None), backend) as stream:
        forwards(model, stream.cache, ids[:, :43], [40, 1])
        mark = stream.mark()
        want = forwards(model, stream.cache, ids[:, 43:], [1])
        stream.rewind(mark)
        stream.cache.crop(-2)
        got = forwards(model, stream.cache, ids[:, 41:], [1])
        assert torch.equal(got[:, 2:], want)
        with pytest.raises(StateError, match=r"cannot forget 4 tokens.*at most 0 can be"):
            stream.cache.crop(-4)
        stream.rewind(mark)
        assert torch.equal(forwards(model, stream.cache, ids[:, 43:], [1]), want)


@BACKEND
def test_after_tokens_were_taken_out_heads_choose_anew(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 50)
    with kvsieve.stream(model, kvsieve.RefreshKV(20, similarity=None), backend) as stream:
        forwards(model, stream.cache, ids[:, :42], [40, 1])
        stream.evict(5, 9)
        forward(model, stream.cache, ids[:, 42:43])
        assert read_by(stream) == [None] * 2
        forward(model, stream.cache, ids[:, 43:44])
        sets = part_of(stream).read[0][0]
        assert sets is not None
        assert sets.read(0, 40).shape == (21,)


@BACKEND
def test_a_trace_tells_what_was_read(backend: str) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.RefreshKV(20, similarity=None), backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 42), [40, 1])
        for layer, heads in zip(stream.trace(), read_by(stream)):
            assert heads is not None
            assert (layer.dense, layer.scored, layer.read) == (False, 0, sum(map(len, heads)))
            for traced, read in zip(layer.rows[0], heads):
                assert np.concatenate([np.arange(*r) for r in traced.read]).tolist() == read
                assert np.concatenate([np.arange(*r) for r in traced.found]).tolist() == [t for t in read if t < 40]
        stream.feed(tiny.ids(1, 5, 3))
        assert all(layer.dense and layer.read == 2 * 47 for layer in stream.trace())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 0}, "budget must be"),
        ({"budget": "1MiB"}, "budget must be"),
        ({"stride": 0}, "stride must be"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"similarity": "high"}, "similarity must be a number"),
        ({"similarity": True}, "similarity must be a number"),
        ({"similarity": float("nan")}, "similarity must be a number"),
    ],
)
def test_numbers_that_are_none_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.RefreshKV(**{"budget": 64, **arguments})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sirllm(64) | refreshkv(64)", "evicts some of them"),
        ("streamingllm(64) | refreshkv(64)", "evicts some of them"),
        ("snapkv(64) | refreshkv(64)", "keeps other tokens for each head"),
        ("hip(64) | refreshkv(64)", "decide select"),
        ("streamingllm(64) >> refreshkv(64)", "one part of a chain"),
        ("refreshkv(64) >> full()", "one part of a chain"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_it_is_built(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        kvsieve.methods.parse(text)
    with pytest.raises(PolicyError, match="goes with Original"):
        kvsieve.RefreshKV(64) | kvsieve.Memory(position=kvsieve.policy.InCache())


def test_a_text_of_it_is_read_back() -> None:
    assert repr(kvsieve.RefreshKV(64)) == "RefreshKV(budget=64)"
    policy = kvsieve.RefreshKV(64, stride=5, similarity=None, kernel=1)
    assert repr(policy) == "RefreshKV(budget=64, stride=5, similarity=None, kernel=1)"
    assert kvsieve.methods.parse(repr(policy)) == policy


def test_a_backend_that_cannot_says_so() -> None:
    without = replace(CUDA, selection=replace(CUDA.selection, recycled=False))
    with pytest.raises(BackendError, match="chose at an earlier step"):
        without.check_recycling()
    CUDA.check_recycling()
    with pytest.raises(BackendError, match=r"compresses some.*leave"):
        CUDA.check_recycling(compressed=True)


def test_models_whose_frequencies_change_go_with_a_fixed_schedule() -> None:
    model = tiny.fresh(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UnsupportedModelError, match="similarity=None"):
        kvsieve.stream(model, kvsieve.RefreshKV(64)).__enter__()
    with kvsieve.stream(model, kvsieve.RefreshKV(64, similarity=None)) as stream:
        stream.feed(tiny.ids(1, 80))
