"""Linear layers of compiled decoding by the core's products: which of them, and that they say what torch's say."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.model import products
from kvsieve.model.products import Head, replace_products
from torch._dynamo.backends.registry import lookup_backend


class Layers(torch.nn.Module):
    """Three layers of one input, one of their sum, and one whose weights are computed."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, outputs, bias=bias) for outputs in (16, 7, 16))
        self.o, self.of_another = torch.nn.Linear(16, 5, bias=not bias), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        o = self.o(q * v)
        computed = torch.nn.functional.linear(o, self.of_another.weight[:, :5] * 2.0, self.of_another.bias)
        return torch.cat([q, k, o, computed], -1)


class Replacing:
    """A backend that replaces products, and counts them, and the operations that they have become."""

    def __init__(self, then: str) -> None:
        self.layers, self.operations, self._make = 0, 0, lookup_backend(then)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.layers += replace_products(graph)
        self.operations += sum(node.target is torch.ops.kvsieve.products.default for node in graph.graph.nodes)
        graph.graph.lint()
        return self._make(graph, inputs)


@pytest.fixture(autouse=True)
def _one_row_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is not Intel's."""
    torch.compiler.reset()
    monkeypatch.setattr(products, "_LEAST", 1)


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 16), (16,), (3, 1, 16), (2, 3, 16)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products_of_a_few_rows_are_the_cores(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(len(shape))
    layers, backend, x = Layers(bias), Replacing("aot_eager"), torch.randn(shape)
    got = torch.compile(layers, backend=backend, dynamic=False)(x)
    torch.testing.assert_close(got, layers(x), atol=1e-6, rtol=1e-5)
    assert (backend.layers, backend.operations) == (4, 2)


@torch.library.custom_op("kvsieve_tests::double", mutates_args=["x"])
def double(x: torch.Tensor) -> None:
    """An operation of somebody else's, whose name does not say that it writes."""
    x.mul_(2.0)


@double.register_fake
def _(x: torch.Tensor) -> None:
    return None


class Written(torch.nn.Module):
    """Layers of one input that is written in between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers, self.way = torch.nn.ModuleList(torch.nn.Linear(16, size) for size in (16, 24, 16)), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        first, second = self.layers[0](x), self.layers[1](x)
        if self.way == "method":
            x.mul_(2.0)
        elif self.way == "operator":
            x *= 2.0
        elif self.way == "item":
            x[..., :4] = 1.0
        elif self.way == "view":
            x[..., 2:].view(-1).sub_(1.0)
        elif self.way == "operation":
            torch.ops.kvsieve_tests.double.default(x)
        elif self.way == "out":
            torch.mul(x, 2.0, out=x)
        else:
            torch.nn.functional.relu_(x)
        return torch.cat([first, second, self.layers[2](x)], -1)


@pytest.mark.parametrize("way", ["method", "operator", "operation", "item", "view", "out", "function"])
@torch.no_grad()
def test_an_input_that_is_written_in_between_is_another(way: str) -> None:
    torch.manual_seed(3)
    layers, backend, x = Written(way), Replacing("aot_eager"), torch.randn(1, 1, 16)
    got = torch.compile(layers, backend=backend, dynamic=False)(x)
    torch.testing.assert_close(got, layers(x), atol=1e-6, rtol=1e-5)
    assert (backend.layers, backend.operations) == (3, 2)


@torch.no_grad()
def test_others_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(x: torch.Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> int:
        torch.compiler.reset()
        layers, backend = Layers(True).to(dtype), Replacing("eager")
        torch.testing.assert_close(torch.compile(layers, backend=backend, **options)(x), layers(x), atol=1e-5, rtol=1e-4)
        return backend.layers

    assert replaced(torch.randn(32, 16)) == 4
    assert replaced(torch.randn(33, 16)) == 0
    assert replaced(torch.randn(1, 16, dtype=torch.bfloat16), torch.bfloat16) == 0
    assert replaced(torch.randn(1, 16).double(), torch.double) == 0
    assert replaced(torch.randn(0, 16)) == 0
    assert replaced(torch.randn(4, 16), dynamic=True) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert replaced(torch.randn(1, 16)) == 0
    monkeypatch.setattr(products, "_LEAST", 2)  # as on Intel's processors
    assert replaced(torch.randn(1, 16)) == 0
    assert replaced(torch.randn(2, 16)) == 4


def test_the_compiler_is_told_the_shapes() -> None:
    x, weights = torch.randn(2, 1, 4), [torch.randn(3, 4), torch.randn(5, 4)]
    biases = [torch.randn(3), None]
    told, made = products._like(x, weights, biases), products._products(x, weights, biases)
    assert [t.shape for t in told] == [t.shape for t in made] == [(2, 1, 3), (2, 1, 5)]
    want = [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    torch.testing.assert_close(made, want)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """A compiled model, and the rows of each product of its head by the core."""
    rows: list[int] = []
    stock = products.product

    def counted(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return stock(x, *weights)

    monkeypatch.setattr(products, "product", counted)
    model = tiny.fresh()
    kvsieve.compile(model, backend="eager")
    return model, rows


@torch.no_grad()
def test_the_logits_of_a_compiled_token_are_the_cores(compiled: tuple[Any, list[int]]) -> None:
    model, rows = compiled
    text = tiny.ids(2, 9)
    want = tiny.model()(text).logits
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        got = [model(text[:, :-2], past_key_values=stream.cache).logits]
        before = len(rows)
        for at in (-2, -1):
            last = text[:, at:] if at == -1 else text[:, at:-1]
            got.append(model(last, past_key_values=stream.cache).logits)
        assert rows[before:] == [2, 2]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
    count = len(rows)
    torch.testing.assert_close(model(text).logits, want, atol=1e-4, rtol=0)
    assert len(rows) == count, "without a stream a model's head is torch's"


@torch.no_grad()
def test_a_hooked_head_is_called_as_it_was(compiled: tuple[Any, list[int]]) -> None:
    model, rows = compiled
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        model(tiny.ids(1, 4), past_key_values=stream.cache)
        handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0)
        rows.clear()
        assert not model(tiny.ids(1, 1), past_key_values=stream.cache).logits.any()
        assert not rows
        handle.remove()
        everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        model(tiny.ids(1, 1), past_key_values=stream.cache)
        assert not rows
        everywhere.remove()
        assert model(tiny.ids(1, 1), past_key_values=stream.cache).logits.any()
        assert rows == [1]


def test_copies_and_undoing_leave_the_head_as_it_was(compiled: tuple[Any, list[int]]) -> None:
    model, _ = compiled
    head = model.lm_head
    assert type(head._compiled_call_impl) is Head
    assert copy.deepcopy(head)._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(head))._compiled_call_impl is None
    kvsieve.compile(model, disable=True)
    assert head._compiled_call_impl is None


def test_a_torch_whose_compiler_is_elsewhere_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda *args, **options: made.append(type(options.get("backend")).__name__))
    kvsieve.compile(tiny.fresh())
    assert made == ["NoneType", "_Inductor"]
    monkeypatch.delattr(torch, "_TorchCompileInductorWrapper")
    kvsieve.compile(tiny.fresh())
    assert made == ["NoneType", "_Inductor", "NoneType"]


def test_options_are_still_the_compilers_own() -> None:
    model = tiny.fresh()
    for wrong in ({"mode": "fastest"}, {"options": {"colour": 1}}, {"mode": "reduce-overhead", "options": {"trace.enabled": True}}):
        with pytest.raises(kvsieve.errors.ArgumentError):
            kvsieve.compile(model, **wrong)
    assert model.model._compiled_call_impl is None
    assert model.lm_head._compiled_call_impl is None
    kvsieve.compile(model, mode="reduce-overhead")
    kvsieve.compile(model, options={"epilogue_fusion": False})
