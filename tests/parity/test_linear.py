"""Linear layers of a few rows: the core's product, and a model whose layers take it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from kvsieve import _core
from kvsieve.errors import ShapeError
from kvsieve.model import linears
from kvsieve.model.linears import MOST_ROWS, FewRows


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, threads: int = 1) -> torch.Tensor:
    out = torch.full((len(x), len(weight)), torch.nan)
    _core.linear(x.numpy(), weight.numpy(), None if bias is None else bias.numpy(), out.numpy(), threads)
    return out


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (100, 7), (7, 1), (1, 130), (0, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_torchs(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    made = torch.Generator().manual_seed(rows + inputs)
    x, weight = torch.randn(rows, inputs, generator=made), torch.randn(outputs, inputs, generator=made)
    added = torch.randn(outputs, generator=made) if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    got = product(x, weight, added)
    assert torch.allclose(got.double(), want, atol=1e-4)
    assert torch.equal(product(x, weight, added, threads=3), got)
    assert all(torch.equal(product(x[row : row + 1], weight, added)[0], got[row]) for row in range(rows))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, out = (np.zeros(shape, np.float32) for shape in ((2, 4), (3, 4), (2, 3)))
    for given in (
        (x[0], weight, None, out),
        (x, weight[:, :3], None, out),
        (x, weight, np.zeros(2, np.float32), out),
        (x, weight, np.zeros(6, np.float32)[::2], out),
        (x, weight, None, out.T),
        (x.astype(np.int16), weight, None, out),
        (x[:, ::2], weight[:, ::2], None, out),
    ):
        with pytest.raises(ShapeError):
            _core.linear(*given)
    with pytest.raises(ValueError, match="threads"):
        _core.linear(x, weight, None, out, threads=0)


def test_layers_take_it_inside_and_in_no_other_thread() -> None:
    model = tiny.fresh()
    layer, head = model.model.layers[0].mlp.up_proj, model.lm_head
    x = torch.randn(2, 1, layer.in_features)
    with torch.no_grad():
        plain, few = layer(x), FewRows.of(model)
        assert FewRows.of(model) is few
        elsewhere: list[Any] = []
        with few:
            assert "forward" in layer.__dict__
            assert "forward" in head.__dict__
            inside = layer(x)
            thread = threading.Thread(target=lambda: elsewhere.append(layer(x.detach())))
            thread.start()
            thread.join()
            copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            for copied in [*copies, copy.deepcopy(model).model.layers[0].mlp.up_proj]:
                assert copied.forward.__self__ is copied
                assert torch.equal(copied(x), plain)
            with few:
                pass
            assert torch.equal(layer(x), inside), "still inside"
        assert "forward" not in layer.__dict__
    assert torch.equal(elsewhere[0], plain)
    assert torch.equal(inside[:, 0], product(x[:, 0], layer.weight.detach(), None if layer.bias is None else layer.bias.detach()))


def unfit(name: str, layer: Any) -> torch.Tensor:
    """Input of a layer that is not the core's to multiply."""
    if name == "many rows":
        return torch.randn(MOST_ROWS + 1, layer.in_features)
    if name == "no rows":
        return torch.randn(0, layer.in_features)
    layer.to(torch.bfloat16)
    return torch.randn(2, layer.in_features, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["many rows", "no rows", "bfloat16"])
def test_everything_else_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.fresh()
    layer = model.model.layers[0].mlp.up_proj
    x = unfit(name, layer)
    monkeypatch.setattr(linears, "product", None)
    with torch.no_grad(), FewRows.of(model):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_gradients_and_autocast_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.fresh()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features, requires_grad=True)
    monkeypatch.setattr(linears, "product", None)
    with FewRows.of(model):
        layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), FewRows.of(model):
        assert layer(x).dtype == torch.bfloat16


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    """As other libraries' hooks give it one."""
    model = tiny.fresh()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = own = lambda x: x[..., :1]
    with torch.no_grad(), FewRows.of(model):
        assert layer.__dict__["forward"] is own
    assert layer.__dict__["forward"] is own


def test_an_answer_does_not_depend_on_who_else_is_answered() -> None:
    """Bit by bit: what a stream holds, and the probabilities of what it says."""
    model = tiny.model()

    def said(others: int) -> tuple[list[float], list[torch.Tensor]]:
        streams = [kvsieve.stream(model, kvsieve.SirLLM(48, recent=8)) for _ in range(1 + others)]
        batch = kvsieve.Batch(model)
        asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        answers = [batch.add(one, tiny.ids(1, 20, at), logprobs=0, **asked) for at, one in enumerate(streams)]
        batch.run()
        keys = [store.read(streams[0]._engine.planner.runs(0, 0))[0] for store in streams[0]._engine.stores.values()]
        for one in streams:
            one.close()
        return [one.token for one in answers[0].logprobs], keys

    alone, keys = said(0)
    for others in (1, 4):
        beside, theirs = said(others)
        assert beside == alone
        assert all(torch.equal(a, b) for a, b in zip(keys, theirs))
