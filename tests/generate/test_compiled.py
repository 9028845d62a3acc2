"""Compiled models under a stream: whatever is compiled, the answers are those of the model as it was.

Compilers that make nothing of a graph (`eager`, and `aot_eager`, which rewrites what writes to a tensor) tell as much of the seam
as one that makes code of it, in seconds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward as read
from drive import forwards, pad_left, same_memory
from kvsieve.errors import ArgumentError, PaddingError, StateError, UnsupportedError, UnsupportedModelError
from kvsieve.model import graphed
from systems import OF_EVERY_KIND, PROMPT, SYSTEMS
from torch._dynamo.backends.registry import lookup_backend

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)

TEXT, MORE = tiny.ids(1, 12), tiny.ids(1, 5, 1)


def forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def method(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def wrapped_layers(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def decoder(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


def attention(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager")
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Two layers where what is compiled may go on from one into the next; one layer forwarded whole is `method` and `whole`.
CASES = [(forward, 2), (method, 1), (whole, 1), (layers, 2), (wrapped_layers, 1), (decoder, 1), (attention, 1)]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("compiled", "count"), CASES)
@torch.no_grad()
def test_compiled(compiled: Callable[[Any], Any], count: int) -> None:
    """Used without a stream, under one, and without again; where the whole forward is compiled, with raw keys and scores too.

    A forward that is refused leaves the next one right.
    """
    model = compiled(copy.deepcopy(tiny.model(num_hidden_layers=count)))
    both = torch.cat([TEXT, MORE], 1)
    want = tiny.model(num_hidden_layers=count)(both).logits
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)
    policy = {forward: kvsieve.SirLLM(400), layers: kvsieve.LMInfinite(400)}.get(compiled, kvsieve.Full())
    with kvsieve.stream(model, policy) as stream:
        got = [model(TEXT, past_key_values=stream.cache).logits]
        if compiled is whole:
            with pytest.raises(kvsieve.errors.CacheMismatchError):
                model(tiny.ids(2, 3), past_key_values=stream.cache)
        got.append(model(MORE, past_key_values=stream.cache).logits)
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
        assert stream.seen == 17
    torch.testing.assert_close(model(both).logits, want, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- compiled decoding


class Compiler:
    """Counts the graphs that it is given, and the attention layers in each. What it makes of one computes as `backend` does."""

    def __init__(self, backend: str = "eager") -> None:
        self.layers: list[int] = []
        self._make = lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.layers.append(sum("attend_layer" in str(node.target) for node in graph.graph.nodes))
        return self._make(graph, inputs)


def decoding(family: str = "llama", backend: str = "eager", **changes: Any) -> tuple[Any, Compiler]:
    """A tiny model that decodes by compiled code, and its compiler."""
    model, compiler = tiny.fresh(family, **changes), Compiler(backend)
    kvsieve.compile(model, backend=compiler)
    return model, compiler


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Compiler]:
    """The same for all tests that change nothing about it: what is compiled for one serves the others."""
    return decoding(backend="aot_eager", max_position_embeddings=16384)


def said(model: Any, policy: Any, text: torch.Tensor, new: int = 12) -> tuple[torch.Tensor, kvsieve.Stream]:
    """What a stream says greedily in two turns, and the stream, still open."""
    stream = kvsieve.stream(model, policy, "cpu")
    first = stream.generate(text, do_sample=False, max_new_tokens=new)
    second = stream.generate(tiny.ids(len(text), 5, 9), do_sample=False, max_new_tokens=new)
    return torch.cat([first, second], 1), stream


@pytest.mark.parametrize("names", [OF_EVERY_KIND, pytest.param(tuple(SYSTEMS), marks=pytest.mark.slow)], ids=["kinds", "all"])
def test_every_system_decodes_as_without_a_compiler(names: tuple[str, ...], decoder: tuple[Any, Compiler]) -> None:
    """Two graphs serve them all: keys stored before their rotation, and after it. They hold every layer."""
    model, compiler = decoder
    before = len(compiler.layers)
    for name in names:
        system = SYSTEMS[name]
        text = tiny.ids(1, PROMPT, 3)
        want, plain = said(tiny.model(), system.make(), text)
        got, stream = said(model, system.make(), text)
        assert torch.equal(got, want), name
        assert [kept.positions.tolist() for kept in stream.kept()] == [kept.positions.tolist() for kept in plain.kept()], name
        stream.close()
        plain.close()
    assert before or compiler.layers == [2, 2]
    assert len(compiler.layers) == (before or 2)


LONG = ("gpt_neox", "qwen3", "gemma2", "gpt_oss", "phi3", "mistral", "cohere2")


@pytest.mark.parametrize("family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_families(family: str) -> None:
    """Sliding layers, learned sinks, partial rotary, parallel attention: all layers are in one graph."""
    model, compiler = decoding(family)
    count = model.config.num_hidden_layers
    for policy in (kvsieve.StreamingLLM(40), kvsieve.SirLLM(40, recent=8)):
        want, plain = said(tiny.model(family), policy, tiny.ids(1, 60))
        got, stream = said(model, policy, tiny.ids(1, 60))
        assert torch.equal(got, want)
        plain.close()
        stream.close()
    assert set(compiler.layers) == {count}
    assert len(compiler.layers) <= 2


@pytest.mark.parametrize("compiled", ["layers", pytest.param("whole", marks=pytest.mark.slow)])
@torch.no_grad()
def test_nothing_is_compiled_again_as_the_text_grows(compiled: str) -> None:
    """Where a caller compiled the model, or its layers one by one, which then share their code.

    (What is around the decoder has the mask over all that was seen among its arguments, which becomes a dynamic shape.)
    """
    compiler, model = Compiler(), tiny.fresh(num_hidden_layers=3)
    for layer in model.model.layers if compiled == "layers" else ():
        layer.compile(backend=compiler, fullgraph=True)
    if compiled == "whole":
        model = torch.compile(model, backend=compiler)
    with kvsieve.stream(model, kvsieve.StreamingLLM(64), "cpu") as stream:
        text = tiny.ids(1, 3000, 4)
        known, mask = [], torch.ones(1, 3000, dtype=torch.long)
        for seen in (100, 103, 700, 2900):
            with torch.compiler.set_stance("force_eager"):
                stream.feed(text[:, stream.seen : seen])
            # With the mask over all that was seen, as generate gives it, and without.
            read(model, stream.cache, text[:, seen : seen + 1], mask[:, : seen + 1])
            model(text[:, seen + 1 : seen + 2], past_key_values=stream.cache)
            known.append(sum(count > 0 for count in compiler.layers))
        assert known[-1] == known[0]
        assert set(compiler.layers) - {0} == ({1} if compiled == "layers" else {3})


@torch.no_grad()
def test_ten_thousand_tokens(decoder: tuple[Any, Compiler]) -> None:
    model, compiler = decoder
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        known = []
        for seen in (100, 1000, 10_000):
            stream.feed(tiny.ids(1, seen - stream.seen, seen))
            stream.generate(tiny.ids(1, 1), do_sample=False, max_new_tokens=3)
            known.append(len(compiler.layers))
        assert known[0] == known[-1] > 0


def test_streams_that_come_and_go_share_what_was_compiled(decoder: tuple[Any, Compiler]) -> None:
    """More of them than a compiler's limit of variants; between them the model is as it was."""
    model, compiler = decoder
    want, known = tiny.model()(TEXT).logits, []
    for at in range(10):
        said(model, kvsieve.StreamingLLM(16 + at), TEXT, 3)[1].close()
        assert not any("kvsieve" in name for module in model.modules() for name in vars(module))
        torch.testing.assert_close(model(TEXT).logits, want)
        known.append(len(compiler.layers))
    assert known[0] == known[-1] > 0


@torch.no_grad()
def test_rows_with_pads(decoder: tuple[Any, Compiler]) -> None:
    """A left-padded batch, of which a row stops before the other; pads of new columns reach the layers."""
    model, _ = decoder
    ids, mask = pad_left([tiny.ids(1, 30)[0], tiny.ids(1, 11, 5)[0]])
    policy = kvsieve.SirLLM(24, recent=8)
    with kvsieve.stream(tiny.model(), policy, "cpu") as plain, kvsieve.stream(model, policy, "cpu") as stream:
        shown = torch.cat([mask, torch.tensor([[1], [0]]), torch.ones(2, 2, dtype=torch.long)], 1)
        columns = torch.cat([ids, tiny.ids(2, 3, 8)], 1)
        want, got = (forwards(m, s.cache, columns, [30, 1], shown) for m, s in ((tiny.model(), plain), (model, stream)))
        torch.testing.assert_close(got[1, -2:], want[1, -2:])
        torch.testing.assert_close(got[0, -3:], want[0, -3:])
        assert same_memory(stream, plain)


def test_forks_and_two_streams_in_turns(decoder: tuple[Any, Compiler]) -> None:
    model, _ = decoder
    texts = [tiny.ids(1, 40, at) for at in range(3)]
    with (
        torch.no_grad(),
        kvsieve.stream(model, kvsieve.LMInfinite(32), "cpu") as a,
        kvsieve.stream(model, kvsieve.Full(), "cpu") as b,
    ):
        plain = {s: kvsieve.stream(tiny.model(), s.policy, "cpu") for s in (a, b)}
        for s, mine in plain.items():
            for stream in (s, mine):
                stream.feed(texts[0])
        plain[fork := a.fork()] = plain[a].fork()
        for at in range(6):
            for stream, mine in plain.items():
                ids = texts[1 + (stream is fork)][:, at : at + 1]
                got, want = read(model, stream.cache, ids), read(tiny.model(), mine.cache, ids)
                torch.testing.assert_close(got, want)
        for stream, mine in plain.items():
            assert same_memory(stream, mine)
            mine.close()


def test_a_batch_of_conversations(decoder: tuple[Any, Compiler]) -> None:
    """Rows come and go: each says what it says alone."""
    model, compiler = decoder
    texts, most = [tiny.ids(1, n, n) for n in (40, 9, 21)], (9, 3, 12)
    with torch.no_grad():
        want = [said(tiny.model(), kvsieve.StreamingLLM(32), text, new) for text, new in zip(texts, most)]
        batch = kvsieve.Batch(model)
        streams = [kvsieve.stream(model, kvsieve.StreamingLLM(32), "cpu") for _ in texts]
        answers = [batch.add(s, text, do_sample=False, max_new_tokens=new) for s, text, new in zip(streams, texts, most)]
        batch.run()
    for answer, (alone, plain), text, new, stream in zip(answers, want, texts, most, streams):
        assert answer.result().tolist() == alone[0, text.shape[1] :][:new].tolist()
        plain.close()
        stream.close()
    assert set(compiler.layers) == {2}


@torch.no_grad()
def test_threads_are_told_apart(decoder: tuple[Any, Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a thread is in a layer of a stream's forward, others read without one, and with another one: each is told its own."""
    model, _ = decoder
    with contextlib.ExitStack() as block:
        policies = (kvsieve.SirLLM(16, recent=4), kvsieve.Full())
        streams = [block.enter_context(kvsieve.stream(m, p, "cpu")) for m in (model, tiny.model()) for p in policies]
        mine, other, *plain = streams
        for s in streams:
            s.feed(TEXT)
        attend, got = mine._engine.attend, []

        def beside(*args: Any, **kwargs: Any) -> Any:
            calls = (lambda: model(TEXT).logits, lambda: read(model, other.cache, MORE[:, :1]))
            for call in calls if len(got) < 2 else ():
                run = threading.Thread(target=torch.no_grad()(lambda call=call: got.append(call())))
                run.start()
                run.join()
            return attend(*args, **kwargs)

        monkeypatch.setattr(mine._engine, "attend", beside)
        answer = read(model, mine.cache, MORE[:, :1])
        wants = [tiny.model()(TEXT).logits, read(tiny.model(), plain[1].cache, MORE[:, :1])]
        torch.testing.assert_close(answer, read(tiny.model(), plain[0].cache, MORE[:, :1]))
        for answer, want in zip(got, wants, strict=True):
            torch.testing.assert_close(answer, want)


@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing(decoder: tuple[Any, Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or Ctrl-C, in the last layer's attention: the stream is as before, and goes on by the same code."""
    model, compiler = decoder
    with (
        kvsieve.stream(model, kvsieve.SirLLM(16, recent=4), "cpu") as stream,
        kvsieve.stream(model, stream.policy, "cpu") as calm,
    ):
        for s in (stream, calm):
            s.feed(TEXT)
        engine, attend = stream._engine, stream._engine.attend
        for error in (MemoryError, KeyboardInterrupt):

            def fail(index: int, *args: Any, error: Any = error, **kwargs: Any) -> Any:
                if index == 1:
                    raise error
                return attend(index, *args, **kwargs)

            monkeypatch.setattr(engine, "attend", fail)
            with pytest.raises(error):
                read(model, stream.cache, MORE[:, :1])
            monkeypatch.undo()
            assert stream.seen == 12
        for at in range(5):
            got, want = (read(model, s.cache, MORE[:, at : at + 1]) for s in (stream, calm))
            assert torch.equal(got, want)
        assert same_memory(stream, calm)
    assert set(compiler.layers) == {2}


@pytest.mark.slow
def test_gradients_and_autocast_stay_outside(decoder: tuple[Any, Compiler]) -> None:
    """They are served as without a compiler: by Python."""
    model, compiler = decoder
    known = len(compiler.layers)
    with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream, kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as plain:
        for s in (stream, plain):
            s.feed(TEXT)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = (m(MORE[:, :1], past_key_values=s.cache).logits for m, s in ((model, stream), (tiny.model(), plain)))
            assert torch.equal(got, want)
        logits = model(MORE[:, 1:2], past_key_values=stream.cache).logits
        torch.testing.assert_close(logits, tiny.model()(MORE[:, 1:2], past_key_values=plain.cache).logits)
        with pytest.raises(UnsupportedError, match="gradients"):
            logits.sum().backward()
        assert len(compiler.layers) == known
        with torch.inference_mode():
            got = model(MORE[:, 2:3], past_key_values=stream.cache).logits
        torch.testing.assert_close(got, tiny.model()(MORE[:, 2:3], past_key_values=plain.cache).logits, check_stride=False)


@pytest.mark.slow
@torch.no_grad()
def test_a_caller_who_compiled_the_model_with_gradients_on_is_refused_backward() -> None:
    model = tiny.fresh()
    model.forward = torch.compile(model.forward, backend="eager")
    with torch.enable_grad(), kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
        logits = model(TEXT, past_key_values=stream.cache).logits
        torch.testing.assert_close(logits, tiny.model()(TEXT).logits)
        with pytest.raises(UnsupportedError, match="gradients"):
            logits.sum().backward()


def test_what_cannot_be_compiled_is_refused_and_changes_nothing() -> None:
    model = tiny.fresh()
    for wrong in ({"fullgraph": True}, {"backend": "none such"}, {"colour": 1}):
        with pytest.raises(ArgumentError):
            kvsieve.compile(model, **wrong)
    with pytest.raises(UnsupportedModelError):
        kvsieve.compile(torch.nn.Linear(2, 2))
    assert model.model._compiled_call_impl is None
    kvsieve.compile(model, backend="eager")
    kvsieve.compile(model, disable=True)
    assert model.model._compiled_call_impl is None


def test_copies_and_pickles_are_not_compiled(decoder: tuple[Any, Compiler]) -> None:
    model, compiler = decoder
    known, stored = len(compiler.layers), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        said(twin, kvsieve.Full(), TEXT, 2)[1].close()
    assert len(compiler.layers) == known


def decoding_model(model: Any) -> Any:
    kvsieve.compile(model, backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("compiled", [decoding_model, method, layers])
def test_a_mask_without_positions_is_seen(compiled: Callable[[Any], Any]) -> None:
    """transformers' forward takes one, and makes no positions of it; compiled code makes no mask."""
    made, seen = compiled(tiny.fresh()), []
    pads = torch.ones(2, 12, dtype=torch.long)
    pads[1, :3] = 0
    for model in (tiny.model(), made):
        with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
            logits = [model(tiny.ids(2, 12), attention_mask=pads, past_key_values=stream.cache).logits[:, -1]]
            assert stream._engine.blocks.seen == [12, 9]
        with kvsieve.stream(model, kvsieve.Full(), "cpu") as stream:
            model(tiny.ids(2, 12), past_key_values=stream.cache)
            hidden = torch.ones(2, 13, dtype=torch.long)
            logits.append(model(tiny.ids(2, 1, 5), attention_mask=hidden, past_key_values=stream.cache).logits[:, -1])
            hidden = torch.ones(2, 14, dtype=torch.long)
            hidden[0, 4] = 0
            with pytest.raises(PaddingError):
                model(tiny.ids(2, 1, 6), attention_mask=hidden, past_key_values=stream.cache)
        seen.append(torch.cat(logits))
    torch.testing.assert_close(*seen, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_stream_that_opened_in_inference_mode_or_under_a_default_device_is_served_outside_of_it() -> None:
    want = tiny.model()(torch.cat([TEXT, MORE[:, :1]], 1)).logits[:, -1:]
    model, compiler = decoding(backend="aot_eager")
    for mode in (torch.inference_mode(), torch.device("meta")):
        with mode:
            stream = kvsieve.stream(model, kvsieve.Full(), "cpu")
        with stream:
            model(TEXT, past_key_values=stream.cache)
            torch.testing.assert_close(model(MORE[:, :1], past_key_values=stream.cache).logits, want, atol=1e-4, rtol=0)
    assert sum(compiler.layers) == 2


def test_a_torch_without_words_for_cuda_graphs_declares_the_operation_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphed._tags() == (torch.Tag.cudagraph_unsafe,)
    monkeypatch.setattr(torch, "Tag", object())
    assert graphed._tags() == ()


_NONE = dict.fromkeys(("softcap", "sinks", "sliding_window", "position_ids", "mask"))


def test_a_layer_that_runs_outside_of_a_forward_is_a_typed_error() -> None:
    with pytest.raises(StateError, match="compiled layer"):
        torch.ops.kvsieve.attend_layer(*(torch.zeros(1, 2, 1, 4) for _ in range(3)), torch.tensor([0]), 1.0, **_NONE)


def test_the_compiler_is_told_the_shape_of_an_answer() -> None:
    q, k, v = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 8, dtype=torch.bfloat16)
    told = graphed._like(q, k, v, torch.tensor([0]), 1.0)
    assert (told.shape, told.dtype, told.is_contiguous()) == ((2, 3, 4, 8), torch.bfloat16, True)


@pytest.mark.slow
def test_code_that_is_made_of_it() -> None:
    """By the compiler of `torch.compile` itself (it needs a C++ compiler): the effects of the layers stay, in their order."""
    for family in ("llama", "gemma3"):
        model = tiny.fresh(family)
        kvsieve.compile(model)
        for name in OF_EVERY_KIND[:4]:
            want, plain = said(tiny.model(family), SYSTEMS[name].make(), tiny.ids(1, 60))
            got, stream = said(model, SYSTEMS[name].make(), tiny.ids(1, 60))
            assert torch.equal(got, want), name
            plain.close()
            stream.close()
