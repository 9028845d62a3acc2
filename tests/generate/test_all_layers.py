"""A change that all layers must make together: out of memory, Ctrl-C, and errors in its midst."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, snapshot
from kvsieve.errors import StateError
from kvsieve.runtime.process import defer_sigint

POLICIES = {
    "think": (lambda: kvsieve.ThinK(0.5, recent=8, observe=8, flush_every=8), "pack"),
    "codes": (lambda: kvsieve.Quantized(4, group=8, residual=8), "pack"),
    "sirllm": (lambda: kvsieve.SirLLM(40, sinks=2, recent=8), "apply"),
    "h2o": (lambda: kvsieve.H2O(40, recent=8), "permute"),
}
EVERY = pytest.mark.parametrize("name", list(POLICIES))


@pytest.fixture(autouse=True)
def _answers_ctrl_c() -> Iterator[None]:
    """A process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


def fails(monkeypatch: pytest.MonkeyPatch, store: Any, method: str, error: BaseException) -> list[int]:
    """``store.method`` raises; returns a list that grows by each call."""
    calls: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise error

    monkeypatch.setattr(store, method, broken)
    return calls


@BACKEND
@pytest.mark.parametrize("name", ["think", "codes"])
def test_no_room_to_pack_the_first_layer_leaves_everything_as_it_was(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 100), []
    for unlucky in (False, True):
        with kvsieve.stream(model, POLICIES[name][0](), backend) as stream:
            forward(model, stream.cache, ids[:, :90])
            if unlucky:
                before, store = snapshot(stream), next(iter(stream._engine.stores.values()))
                with monkeypatch.context() as patch:
                    calls = fails(patch, store, "pack", MemoryError("no room"))
                    with pytest.raises(MemoryError, match="no room"):
                        forward(model, stream.cache, ids[:, 90:91])
                assert calls
                after = snapshot(stream)
                assert all(torch.equal(before[key], after[key]) for key in before)
                assert stream.stats().compressed == 0
            got.append(forwards(model, stream.cache, ids[:, 90:], [1]))
            assert stream.stats().compressed > 0
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_an_error_in_a_later_layer_ends_the_stream_aloud(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.model(), tiny.ids(1, 160)
    make, method = POLICIES[name]
    with kvsieve.stream(model, make(), backend) as stream:
        forward(model, stream.cache, ids[:, :30])
        store = list(stream._engine.stores.values())[1]
        with monkeypatch.context() as patch:
            calls = fails(patch, store, method, MemoryError("no room"))
            with pytest.raises(MemoryError):
                forwards(model, stream.cache, ids[:, 30:], [1])
        assert calls
        for use in (
            lambda: forward(model, stream.cache, ids[:, :1]),
            lambda: stream.cache.crop(-1),
            stream.fork,
            stream.end_turn,
            lambda: stream.cache.reorder_cache(torch.tensor([0])),
        ):
            with pytest.raises(StateError, match="midst of the layers"):
                use()
        stream.reset()
        got = forwards(model, stream.cache, ids, [130, 1])
    with kvsieve.stream(model, make(), backend) as stream:
        assert torch.equal(got, forwards(model, stream.cache, ids, [130, 1]))


@EVERY
def test_ctrl_c_waits_until_all_layers_have_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.model(), tiny.ids(1, 160)
    make, method = POLICIES[name]
    with kvsieve.stream(model, make(), "cpu") as stream, kvsieve.stream(model, make(), "cpu") as twin:
        forward(model, stream.cache, ids[:, :30])
        forward(model, twin.cache, ids[:, :30])
        first = next(iter(stream._engine.stores.values()))
        changed = getattr(first, method)

        def rung(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return changed(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(first, method, rung)
            with pytest.raises(KeyboardInterrupt):
                forwards(model, stream.cache, ids[:, 30:], [1])
        assert stream._engine.blocks.broken is None
        # The forward was over, or had not begun, when the change was made.
        while twin.seen < stream.seen:
            forward(model, twin.cache, ids[:, twin.seen : twin.seen + 1])
        mine = forwards(model, stream.cache, ids[:, stream.seen :], [1])
        theirs = forwards(model, twin.cache, ids[:, twin.seen :], [1])
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_signals_that_wait_arrive() -> None:
    done = []

    def work() -> None:
        with defer_sigint():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []

    def run() -> None:
        with defer_sigint():
            seen.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen


def test_a_handler_that_is_not_pythons_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_sigint():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
