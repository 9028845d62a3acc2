"""Leaving the block leaves no trace, whatever happened inside; a forward that died loses nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, positions, same_memory, snapshot
from kvsieve.errors import CacheMismatchError, PolicyError, StateError

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
EVERY = pytest.mark.parametrize("policy", list(tiny.POLICIES))


def hooks(model: Any) -> int:
    """Hooks of any kind on any module."""
    kinds = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class Picture:
    """All that a stream could leave behind on a model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.attention = [m.config._attn_implementation for m in model.modules() if getattr(m, "config", None) is not None]
        self.hooks = hooks(model)
        self.config = model.config.to_dict()
        self.attributes = {id(module): set(vars(module)) for module in model.modules()}
        with torch.no_grad():
            self.logits = model(tiny.ids(2, 30)).logits

    def check(self) -> None:
        model, now = self.model, Picture(self.model)
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in model.state_dict().items())
        assert now.attention == self.attention
        assert now.hooks == self.hooks
        assert now.config == self.config
        assert now.attributes == self.attributes
        assert torch.equal(now.logits, self.logits)


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt_oss"])
def test_leaving_the_block_restores_the_model(family: str, policy: str) -> None:
    model = tiny.model(family)
    before = Picture(model)
    with kvsieve.stream(model, tiny.POLICIES[policy](16), "reference") as stream:
        assert model.config._attn_implementation == before.attention[0]
        assert hooks(model) > before.hooks
        greedy(model, tiny.ids(1, 30), 4, past_key_values=stream.cache)
    before.check()
    stream.close()
    before.check()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_was_there_comes_back(attention: str) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(tiny.config("llama"), attn_implementation=attention).eval()
    before = Picture(model)
    with kvsieve.stream(model, kvsieve.SirLLM(budget=64), "reference") as stream, torch.no_grad():
        assert torch.equal(model(tiny.ids(2, 30)).logits, before.logits)
        torch.testing.assert_close(forward(model, stream.cache, tiny.ids(2, 30)), before.logits, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == attention
    before.check()


def test_an_exception_inside_the_block_restores_the_model() -> None:
    model = tiny.model()
    before = Picture(model)

    def work() -> None:
        with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
            forward(model, stream.cache, tiny.ids(1, 10))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()
    before.check()


def test_nested_streams_of_different_policies() -> None:
    model, ids = tiny.model(), tiny.ids(1, 40)
    before = Picture(model)
    alone = {}
    for name in ("streaming", "sirllm"):
        with kvsieve.stream(model, tiny.POLICIES[name](16), "reference") as stream:
            alone[name] = forwards(model, stream.cache, ids, [20, 1])
    with kvsieve.stream(model, tiny.POLICIES["streaming"](16), "reference") as outer:
        part = forwards(model, outer.cache, ids[:, :25], [20, 1])
        with kvsieve.stream(model, tiny.POLICIES["sirllm"](16), "reference") as inner:
            assert torch.equal(forwards(model, inner.cache, ids, [20, 1]), alone["sirllm"])
        assert model.config._attn_implementation == before.attention[0]
        rest = forwards(model, outer.cache, ids[:, 25:], [1])
        assert torch.equal(torch.cat([part, rest], 1), alone["streaming"])
    before.check()


def test_streams_may_close_in_any_order() -> None:
    model = tiny.model()
    before = Picture(model)
    a, b = (kvsieve.stream(model, tiny.POLICIES[name](16), "reference") for name in ("streaming", "sirllm"))
    a.close()
    assert forward(model, b.cache, tiny.ids(1, 30)).shape == (1, 30, tiny.VOCAB)
    a.close()
    b.close()
    before.check()


def test_a_stream_that_could_not_open_restores_the_model() -> None:
    model = tiny.model()
    before = Picture(model)
    with pytest.raises(PolicyError):
        kvsieve.stream(model, "sirllm", "reference")  # type: ignore[arg-type]
    with pytest.raises(PolicyError):
        kvsieve.stream(model, kvsieve.SirLLM(budget="1KiB"), "reference")
    with pytest.raises(kvsieve.errors.BackendError, match="unknown"):
        kvsieve.stream(model, kvsieve.Full(), "abacus")
    before.check()


def test_importing_changes_nothing_in_transformers() -> None:
    code = """
import sys
import kvsieve
assert "transformers.models" not in sys.modules, "imports models"
assert "cupy" not in sys.modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
assert "kvsieve" not in ALL_ATTENTION_FUNCTIONS.valid_keys()
assert "kvsieve" not in list(ALL_MASK_ATTENTION_FUNCTIONS.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------------- the wrong cache


def test_a_closed_stream_says_so() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        cache = stream.cache
        forward(model, cache, tiny.ids(1, 5))
    for call in (lambda: stream.cache, lambda: stream.feed(tiny.ids(1, 3)), lambda: stream.generate(tiny.ids(1, 3)), stream.fork):
        with pytest.raises(StateError, match="closed"):
            call()
    with pytest.raises(StateError, match="stream"):
        forward(model, cache, tiny.ids(1, 3))
    with torch.no_grad():
        assert model(tiny.ids(1, 3)).logits.shape == (1, 3, tiny.VOCAB)


def test_a_closed_streams_cache_is_refused_beside_an_open_stream() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        cache = stream.cache
        forward(model, cache, tiny.ids(1, 5))
    with kvsieve.stream(model, kvsieve.Full(), "reference") as other:
        with pytest.raises((StateError, CacheMismatchError)):
            forward(model, cache, tiny.ids(1, 3))
        assert forward(model, other.cache, tiny.ids(1, 3)).shape == (1, 3, tiny.VOCAB)


def test_a_cache_of_another_model_is_refused() -> None:
    model, other = tiny.model(), tiny.model(seed=3)
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        with kvsieve.stream(other, kvsieve.Full(), "reference") as theirs:
            with pytest.raises(CacheMismatchError, match="another model"):
                forward(other, stream.cache, tiny.ids(1, 5))
            assert torch.equal(forward(other, theirs.cache, tiny.ids(1, 5)).argmax(-1), other(tiny.ids(1, 5)).logits.argmax(-1))
        with pytest.raises(StateError):
            forward(other, stream.cache, tiny.ids(1, 5))
        torch.testing.assert_close(
            forward(model, stream.cache, tiny.ids(1, 5)), model(tiny.ids(1, 5)).logits.detach(), atol=1e-4, rtol=0
        )


# -------------------------------------------------------------------------------------------- a forward that died half-way


@BACKEND
@EVERY
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_forward_that_died_loses_nothing(family: str, policy: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, of one token and of many, in the first layer and in the last."""
    model, ids = tiny.model(family), tiny.ids(2, 100)

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with (
        kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream,
        kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as twin,
    ):
        for s in (stream, twin):
            forwards(model, s.cache, ids[:, :50], [45, 1])
        before, memory = positions(stream), snapshot(stream)
        for width, layer in ((1, 0), (40, 0), (1, -1), (40, -1)):
            with monkeypatch.context() as patch:
                patch.setattr(model.model.layers[layer].mlp, "forward", dies)
                with pytest.raises(RuntimeError, match="out of memory"):
                    forward(model, stream.cache, ids[:, 60 : 60 + width])
            assert stream.seen == 50
            assert stream.cache.get_seq_length() == 50
            assert positions(stream) == before
            now = snapshot(stream)
            assert all(torch.equal(memory[name], now[name]) for name in memory), (width, layer)
        got, want = (forwards(model, s.cache, ids[:, 50:], [1, 1, 40, 1]) for s in (stream, twin))
        assert torch.equal(got, want)
        assert same_memory(stream, twin)


@BACKEND
@EVERY
def test_a_first_forward_that_died_leaves_an_empty_stream(policy: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with kvsieve.stream(model, tiny.POLICIES[policy](80), backend) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", dies)
            with pytest.raises(RuntimeError, match="out of memory"):
                forward(model, stream.cache, tiny.ids(3, 20))
        # Another batch size: the forward that died decided nothing.
        got = forward(model, stream.cache, tiny.ids(1, 20))
        torch.testing.assert_close(got, model(tiny.ids(1, 20)).logits.detach(), atol=1e-4, rtol=0)
        assert stream.seen == 20


@BACKEND
def test_a_stock_forward_after_one_that_died_is_clean(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    before = Picture(model)
    with kvsieve.stream(model, kvsieve.SirLLM(budget=16), backend) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].self_attn.o_proj, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                forward(model, stream.cache, tiny.ids(1, 20))
        with torch.no_grad():
            assert torch.equal(model(tiny.ids(2, 30)).logits, before.logits)
    before.check()
