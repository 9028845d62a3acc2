"""Tensors that the core reads where they lie, by DLPack's table of C functions: the same numbers as by views of numpy."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from kvsieve import _core
from kvsieve.backends.cpu import store as cpu_store
from kvsieve.backends.cpu.tensors import DTYPES, LENT, view
from kvsieve.errors import ShapeError
from kvsieve.model import linears

lends = pytest.mark.skipif(not LENT, reason="this torch has no table of DLPack's C functions")


def opened(rows: int, width: int) -> tuple[Any, Any]:
    """A planner that keeps everything, and its step over ``width`` tokens of each row."""
    planner = _core.Planner([_core.Memory(_core.Eviction.keep_all(), _core.PositionRule.original())], "post_rope")
    return planner, planner.begin([width] * rows, width, True, False)


def some(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, often a part or a turn of a larger tensor."""
    batch, heads, tokens, dim = shape
    way = rng.randrange(4)
    if way == 0:
        return torch.randn(shape).to(dtype)
    if way == 1:
        return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    if way == 2:
        return torch.randn(batch, heads, tokens + 2, dim + 3).to(dtype)[:, :, 1:-1, 1 : dim + 1]
    return torch.randn(batch, tokens, heads * dim + 5).to(dtype)[..., 2:-3].view(batch, tokens, heads, dim).transpose(1, 2)


@lends
@pytest.mark.parametrize("seed", range(12))
def test_decode_is_append_and_attend(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(list(DTYPES))
    rows, kv_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
    heads, key_dim, value_dim = kv_heads * group, rng.choice((8, 16, 64)), rng.choice((8, 32))
    rope = _core.Rope([0.5**i for i in range(key_dim // 2)]) if seed % 2 else None
    stores = [_core.Store(kv_heads, key_dim, value_dim, DTYPES[dtype]) for _ in range(2)]
    planner, step = opened(rows, 7)
    for number in range(4):
        width = 7 if number == 0 else 1
        if number:
            step = planner.begin([1] * rows, 1, True, False)
        q, k = some(rng, (rows, heads, width, key_dim), dtype), some(rng, (rows, kv_heads, width, key_dim), dtype)
        v = some(rng, (rows, kv_heads, width, value_dim), dtype)
        sinks = np.linspace(-1, 1, heads, dtype=np.float32) if seed % 3 == 0 else None
        numbers = 0.3, 5.0 if seed % 5 == 0 else None, sinks
        mine, theirs = (torch.empty(rows, width, heads, value_dim, dtype=dtype) for _ in range(2))
        assert _core.decode(stores[0], q, k, v, step, rope, *numbers, mine, 1, False) is True
        stores[1].append(view(k), view(v), step)
        stores[1].attend(view(q), step, rope, *numbers, view(theirs), threads=1, apply_factor=False)
        assert torch.equal(mine, theirs)
        assert bool(mine.isfinite().all())
        planner.commit()


def unlike(good: torch.Tensor) -> dict[str, Any]:
    """What is no tensor with memory that can be read as it is, and looks like `good`."""
    complex_ones = torch.randn(*good.shape, dtype=torch.complex64)
    return {
        "channels apart": good.repeat_interleave(2, -1)[..., ::2],
        "negated when it is read": complex_ones.conj().imag,
        "of another dtype": good.double(),
        "of bits": good.bfloat16(),
        "sparse": good.to_sparse(),
        "nowhere": good.to("meta"),
        "of a subclass": torch.nn.Buffer(good).as_subclass(type("Mine", (torch.Tensor,), {})),
        "without memory": _freed(good.clone()),
        "an array": good.numpy(),
        "nothing": None,
    }


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@lends
def test_what_cannot_be_lent_is_told_before_anything_is_stored() -> None:
    _, step = opened(1, 2)
    store = _core.Store(2, 8, 8, "float32")
    q, k, out = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8), torch.empty(1, 2, 4, 8)
    given = {"q": q, "k": k, "v": k, "out": out}
    for name, good in given.items():
        for what, bad in unlike(good).items():
            args = {**given, name: bad}
            told = _core.decode(store, args["q"], args["k"], args["v"], step, None, 0.3, None, None, args["out"])
            assert told is False, (name, what)
    assert store.num_blocks == 0
    assert _core.decode(store, q, k, k, step, None, 0.3, None, None, out)


@lends
def test_an_output_has_its_own_memory_and_the_right_shape() -> None:
    _, step = opened(1, 2)
    store = _core.Store(2, 8, 8, "float32")
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8)
    for wrong in (
        q.view(1, 2, 4, 8),  # q's own memory
        torch.empty(1, 4, 2, 8),
        torch.empty(1, 4, 2, 8).transpose(1, 2),
        torch.empty(1, 1, 4, 8).expand(1, 2, 4, 8),
    ):
        with pytest.raises(ShapeError, match="out"):
            _core.decode(store, q, k, k, step, None, 0.3, None, None, wrong)
    out = torch.empty(1, 2, 4, 8)
    for sinks in (out.view(-1)[:4].numpy(), out.view(-1)[-4:].numpy()):
        with pytest.raises(ShapeError, match="memory of its own"):
            _core.decode(store, q, k, k, step, None, 0.3, None, sinks, out)
    assert store.num_blocks == 0
    for wrong in (torch.randn(2, 2, 2, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 2, 9)):
        with pytest.raises(kvsieve.KvsieveError):
            _core.decode(store, q, wrong, wrong, step, None, 0.3, None, None, torch.empty(1, 2, 4, 8))


@lends
@pytest.mark.parametrize("seed", range(8))
def test_a_product_of_lent_tensors(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, inputs, outputs = rng.choice((1, 1, 2, 5, 9)), rng.choice((1, 5, 16, 70, 576)), rng.choice((1, 3, 4, 7, 130))
    x = torch.randn(rows + 1, inputs + 2)[1:, 1:-1]
    weights = torch.nn.Parameter(torch.randn(outputs, inputs)) if seed % 2 else torch.randn(outputs, inputs + 1)[:, :-1]
    bias = torch.randn(outputs) if seed % 3 else None
    out = torch.full((rows, outputs), torch.nan)
    assert _core.linear_lent(x, weights, bias, out, 1) is True
    want = x.double() @ weights.detach().double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=1e-4)


@lends
def test_a_product_refuses_what_it_cannot_do() -> None:
    x, weights, bias, out = torch.randn(2, 5), torch.randn(7, 5), torch.randn(7), torch.empty(2, 7)
    given = {"x": x, "weights": weights, "bias": bias, "out": out}
    for name, good in given.items():
        for what, bad in unlike(good).items():
            if not (name == "bias" and bad is None):
                assert _core.linear_lent(*{**given, name: bad}.values()) is False, (name, what)
    for wrong in ({"x": torch.randn(2, 6)}, {"x": torch.randn(3, 5)}, {"bias": torch.randn(6)}, {"out": torch.empty(7, 2)}):
        with pytest.raises(ShapeError):
            _core.linear_lent(*{**given, **wrong}.values())
    square = torch.randn(5, 5)
    with pytest.raises(ShapeError, match="memory of its own"):
        _core.linear_lent(square[:2], square, None, square[1:3])


@lends
def test_tensors_that_transforms_and_modes_wrap_are_not_lent() -> None:
    weights, told = torch.randn(4, 3), list[bool]()

    def of(x: torch.Tensor) -> torch.Tensor:
        assert type(x) is torch.Tensor
        told.append(_core.linear_lent(x, weights, None, torch.empty(1, 4)))
        return x.sum()

    for transform in (torch.func.grad, torch.func.functionalize):
        transform(of)(torch.randn(1, 3))
    torch.func.vmap(of)(torch.randn(5, 1, 3))
    of(torch.randn(1, 3).to_mkldnn().to_dense())
    assert told == [False, False, False, True]
    shared = torch.zeros(1, 4)
    assert _core.linear_lent(torch.ones(1, 3), weights, None, torch._lazy_clone(shared))
    assert not shared.any(), "memory that is shared until it is written to"


@torch.no_grad()
def test_without_a_table_tensors_go_by_views_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[torch.Tensor]:
        model, text = tiny.model(), tiny.ids(2, 12)
        with kvsieve.stream(model, kvsieve.StreamingLLM(8, sinks=2)) as stream:
            pieces = (text[:, :9], text[:, 9:10], text[:, 10:11])
            said = [model(piece, past_key_values=stream.cache).logits for piece in pieces]
        torch.manual_seed(3)
        x, layer = torch.randn(3, 2, 7), torch.nn.Linear(7, 5)
        return [*said, linears.product(x, layer.weight, layer.bias), linears.product(x[1, 1], layer.weight, None)]

    calls = 0

    def counted(*args: Any) -> bool:
        nonlocal calls
        calls += 1
        return _core.linear_lent(*args)

    monkeypatch.setattr(linears, "linear_lent", counted)
    mine = answers()
    assert (calls > 0) is LENT
    for module in (cpu_store, linears):
        monkeypatch.setattr(module, "LENT", False)
    monkeypatch.delattr(linears, "linear_lent")
    monkeypatch.delattr(cpu_store, "decode")
    for own, viewed in zip(mine, answers(), strict=True):
        assert torch.equal(own, viewed)


def test_a_torch_without_the_table_is_known_by_it() -> None:
    lines = (
        "import torch",
        "for name in ('__dlpack_c_exchange_api__', '__c_dlpack_exchange_api__'):",
        "    if hasattr(torch.Tensor, name):",
        "        delattr(torch.Tensor, name)",
        "import kvsieve",
        "from kvsieve import _core",
        "from kvsieve.backends.cpu.tensors import LENT",
        "assert LENT is False and _core.lenders(torch.Tensor) == []",
        "assert _core.linear_lent(*(torch.ones(n) for n in ((1, 3), (4, 3), (4,), (1, 4)))) is False",
        "import tiny",
        "model = tiny.model()",
        "with torch.no_grad(), kvsieve.stream(model, kvsieve.Full()) as stream:",
        "    model(tiny.ids(1, 5), past_key_values=stream.cache)",
        "    got = model(tiny.ids(1, 1), past_key_values=stream.cache).logits",
        "    want = model(torch.cat([tiny.ids(1, 5), tiny.ids(1, 1)], 1)).logits[:, -1:]",
        "torch.testing.assert_close(got, want, atol=1e-4, rtol=0)",
    )
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([f"import sys; sys.path.insert(0, {tests!r})", *lines])], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@lends
def test_types_that_lend_are_decided_once() -> None:
    assert _core.lenders(int, np.ndarray) == [torch.Tensor, torch.nn.Parameter]
