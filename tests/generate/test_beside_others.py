"""A stream beside others on one model: forwards without a stream, other threads, copies, models that share a configuration."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.model.handoff import state

TEXT = tiny.ids(1, 20)


def fresh(family: str = "llama", **changes: Any) -> Any:
    """A model that a test may change."""
    return copy.deepcopy(tiny.model(family, **changes))


def hooks(model: Any) -> list[Any]:
    """Every hook on a model; transformers leaves some of its own."""
    return [list(d.values()) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]


def close(got: Any, want: Any) -> None:
    """Equal within what another order of the same sums costs."""
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@torch.no_grad()
def stock(model: Any) -> torch.Tensor:
    return model(TEXT).logits


@torch.no_grad()
def streamed(model: Any) -> torch.Tensor:
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        return model(TEXT, past_key_values=stream.cache).logits


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that run at the same time; the first error is raised."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return results


# ------------------------------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("event", ["opens and closes", "opens", "closes"])
def test_a_forward_without_a_stream_does_not_notice_one_that(event: str, family: str) -> None:
    model, opened = fresh(family), []
    want = stock(model)
    if event == "closes":
        opened.append(kvsieve.stream(model, kvsieve.Full()))

    def change() -> torch.Tensor:
        if event == "opens and closes":
            return streamed(model)
        if event == "opens":
            opened.append(kvsieve.stream(model, kvsieve.Full()))
        else:
            opened.pop().close()
        return want

    got: list[torch.Tensor] = []
    mine = threading.get_ident()

    def hook(module: Any, args: Any) -> None:
        if threading.get_ident() == mine and not got:
            got.extend(in_threads(change))

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    close(stock(model), want)
    handle.remove()
    close(got[0], want)
    for stream in opened:
        stream.close()


def test_many_threads_open_read_and_close_while_others_read_without_a_stream() -> None:
    model = fresh()
    want = stock(model)
    before = hooks(model)
    calls = [lambda: streamed(model), lambda: stock(model)] * 4
    for _ in range(3):
        for got in in_threads(*calls):
            close(got, want)
    assert hooks(model) == before
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_a_forward_inside_a_streams_forward_is_a_forward_of_its_own() -> None:
    """A caller's hook runs the model, or another one, while a stream's forward is under way."""
    model, other, inner = fresh(), fresh("gemma2"), []

    def hook(module: Any, args: Any) -> None:
        if not inner:
            inner.append(None)
            inner[:] = [stock(model), stock(other), streamed(other)]

    want = [stock(model), stock(other), stock(other)]
    handle = model.model.layers[1].register_forward_pre_hook(hook)
    close(streamed(model), want[0])
    handle.remove()
    close(inner, want)


@torch.no_grad()
def test_a_forward_that_died_leaves_the_thread_as_it_was() -> None:
    model = fresh()
    with kvsieve.stream(model, kvsieve.Full()) as stream:

        def interrupt(module: Any, args: Any) -> None:
            raise KeyboardInterrupt  # torch calls no hook after it

        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model(TEXT, past_key_values=stream.cache)
        handle.remove()
        assert len(state.frames) <= 2
        close(model(TEXT, past_key_values=stream.cache).logits, stock(model))
        assert state.frames == []


# ------------------------------------------------------------------------------------------------------ configuration, copies


def test_the_configuration_is_never_touched() -> None:
    model = fresh("gemma2")
    config, before = model.config, copy.deepcopy(vars(model.config))
    with kvsieve.stream(model, kvsieve.Full()):
        assert model.config is config
        assert vars(config) == before
        inner = model.model.layers[0].self_attn.config
        assert isinstance(inner, type(config))
        assert inner.__class__ is type(config)
        assert inner._attn_implementation == config._attn_implementation
        assert inner == config
        assert inner.to_dict() == config.to_dict()
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_made_inside_the_block_is_a_stock_model(how: str) -> None:
    model = fresh()
    want = stock(model)
    with kvsieve.stream(model, kvsieve.StreamingLLM(64)) as stream:
        stream.feed(tiny.ids(1, 9, 5))
        other = COPIES[how](model)
        close(stock(other), want)
        close(streamed(other), want)
        assert stream.seen == 9
    for result in in_threads(lambda: stock(other), lambda: streamed(other)):
        close(result, want)
    configs = [m.config for m in other.modules() if hasattr(m, "config")]
    assert {type(c) for c in configs} == {type(model.config)}
    assert all(c is other.config for c in configs)
    assert other.config._attn_implementation == model.config._attn_implementation


def test_a_pickle_made_inside_the_block_needs_no_kvsieve_and_takes_hooks(tmp_path: Path) -> None:
    model = fresh()
    with kvsieve.stream(model, kvsieve.Full()):
        torch.save(model, tmp_path / "model.pt")
        torch.save(stock(model), tmp_path / "want.pt")
        model.save_pretrained(tmp_path / "pretrained")
    script = """
import sys, torch
sys.modules["kvsieve"] = None
model, want = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False) for name in ("model", "want"))
seen = []
for module in model.modules():  # hooks without keywords: their numbers begin anew in this process
    module.register_forward_pre_hook(lambda module, args: seen.append(1))
    module.register_forward_hook(lambda module, args, out: seen.append(1))
with torch.no_grad():
    torch.testing.assert_close(model(torch.load(f"{sys.argv[1]}/text.pt")).logits, want)
assert len(seen) > 50
"""
    torch.save(TEXT, tmp_path / "text.pt")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    again = type(model).from_pretrained(tmp_path / "pretrained")
    close(stock(again), stock(model))


def test_models_of_one_configuration_object_are_independent() -> None:
    one = fresh()
    two = type(one)(one.config).eval()
    assert one.config is two.config
    wants = [stock(one), stock(two)]
    with kvsieve.stream(one, kvsieve.Full()) as first:
        close(stock(two), wants[1])
        with kvsieve.stream(two, kvsieve.Full()) as second, torch.no_grad():
            close(one(TEXT, past_key_values=first.cache).logits, wants[0])
            close(two(TEXT, past_key_values=second.cache).logits, wants[1])
        close(stock(one), wants[0])
    assert [stock(one).equal(wants[0]), stock(two).equal(wants[1])] == [True, True]


def test_models_that_share_a_decoder_have_streams_of_their_own() -> None:
    one = fresh()
    two = type(one)(one.config).eval()
    two.model = one.model
    wants = [stock(one), stock(two)]
    with kvsieve.stream(one, kvsieve.Full()) as first:
        with kvsieve.stream(two, kvsieve.Full()) as second, torch.no_grad():
            close(two(TEXT, past_key_values=second.cache).logits, wants[1])
            close(one(TEXT, past_key_values=first.cache).logits, wants[0])
        close(stock(two), wants[1])
        with torch.no_grad():
            assert one(TEXT[:, :1], past_key_values=first.cache).logits.isfinite().all()
    assert all(m.config is one.config for m in one.modules() if hasattr(m, "config"))


# ------------------------------------------------------------------------------------------------------------------------- memory


def block(model: Any) -> None:
    with kvsieve.stream(model, kvsieve.SirLLM(32)) as stream:
        stream.generate(TEXT, max_new_tokens=2, do_sample=False)


def dropped(model: Any) -> None:
    kvsieve.stream(model, kvsieve.StreamingLLM(32)).generate(TEXT, max_new_tokens=2, do_sample=False)


def threads(model: Any) -> None:
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        in_threads(lambda: stream.feed(TEXT))
        in_threads(lambda: stock(model))


def interrupted(model: Any) -> None:
    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(TEXT, past_key_values=stream.cache)


def refused(model: Any) -> None:
    with pytest.raises(kvsieve.errors.PolicyError):
        kvsieve.stream(model, kvsieve.StreamingLLM(budget="1 KiB"))


@pytest.mark.parametrize("use", [block, dropped, threads, interrupted, refused])
def test_nothing_keeps_a_model_alive(use: Callable[[Any], None]) -> None:
    model = fresh()
    watch = weakref.ref(model)
    use(model)
    del model
    gc.collect()
    assert watch() is None
