"""The CUDA backend's Python, from `backends.get("cuda")` down to the kernels, over tensors on the CPU; every policy there is."""

from __future__ import annotations

import random
import sys
from typing import Any

import emulator
import kvsieve
import pytest
import tiny
import torch
from drive import Layer, forwards, pad_left
from kvsieve import backends
from kvsieve.backends import cuda, kernels
from kvsieve.errors import BackendError, ShapeError
from kvsieve.rope import LayerRope

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> emulator.Emulator:
    """`backends.get("cuda")` is the emulated one; it pretends two multiprocessors, so that keys are split."""
    made = emulator.Emulator(processors=2)
    emulator.install(monkeypatch, made)
    return made


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)
    assert float(error) <= tolerance, f"off by {float(error):.2e} of the largest value"


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_layer_equals_the_reference(launcher: emulator.Emulator, policy: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        rows, heads, group = rng.choice([1, 2, 3]), 2, 2
        rope = LayerRope(10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), rng.choice(["half", "interleaved"]), 1.2)
        extra: dict[str, Any] = {"rope": rope, "scale": 0.25, "softcap": rng.choice([None, 5.0])}
        if seed == 1:
            extra["sinks"] = torch.randn(heads * group)
        made = tiny.POLICIES[policy](24)
        tested, exact = (Layer(name, made, **extra) for name in ("cuda", "reference"))
        generator = torch.Generator().manual_seed(seed)
        first = rng.choice([5, 40, 300])
        begin = (first, [rng.randint(1, first) for _ in range(rows)])
        for width, lens in [begin, *((n, [n] * rows) for n in (1, 1, 17, 1, 5, 40, 1, 70, 1))]:
            q, k, v = (torch.randn(rows, h, width, 16, generator=generator) for h in (heads * group, heads, heads))
            if tested.frame == "rotated":
                seen = [tested.planner.seen(r) if tested.planner.num_rows else 0 for r in range(rows)]
                q, k = (tested.rotated(x, [s - (width - n) for s, n in zip(seen, lens)]) for x in (q, k))
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            scores = [torch.rand(n, generator=generator).numpy() for n in lens] if made.needs_surprisal else None
            for layer in (tested, exact):
                layer.rope = None  # keys are in the layer's frame already
            got = tested.feed(q, k, v, lens, scores)
            close(got, exact.feed(q.double(), k.double(), v.double(), lens, scores), TOLERANCE[dtype])
            assert got.dtype == dtype
            for row, n in enumerate(lens):
                assert got[row, : width - n].abs().sum() == 0, "a pad's output is not zero"
            for memory in range(tested.planner.num_memories):
                for row in range(rows):
                    assert tested.positions(row, memory) == exact.positions(row, memory)
                    held, same = (layer.store.read(layer.planner.runs(memory, row)) for layer in (tested, exact))
                    assert all(torch.equal(x.double(), y) for x, y in zip(held, same))


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "glm4"])
def test_a_model_equals_the_reference(launcher: emulator.Emulator, family: str, policy: str) -> None:
    model = tiny.model(family)
    ids, mask = pad_left([tiny.ids(1, 80, 1)[0], tiny.ids(1, 61, 2)[0]])
    logits, kept = {}, {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(model, tiny.POLICIES[policy](30), backend) as stream:
            logits[backend] = forwards(model, stream.cache, ids, [50, 17, 5, 1], mask)
            kept[backend] = [k.positions.tolist() for k in stream.kept()]
            assert stream.stats().backend == backend
    assert kept["cuda"] == kept["reference"]
    for row in range(2):
        real = mask[row].bool()
        a, b = (logits[name][row, real] for name in ("cuda", "reference"))
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def test_streams_fork_crop_reorder_and_save(launcher: emulator.Emulator, tmp_path: Any) -> None:
    """What moves blocks about: a fork that writes, beams, a crop, a file."""
    model, made = tiny.model(), tiny.POLICIES["sirllm"](40)
    ids, tokens = tiny.ids(1, 70), {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(model, made, backend) as stream:
            stream.feed(ids)
            with stream.fork() as child:
                found = [child.generate(tiny.ids(1, 9, 3), max_new_tokens=6, do_sample=False)]
            found.append(stream.generate(tiny.ids(1, 9, 4), max_new_tokens=6, num_beams=3, do_sample=False))
            stream.cache.crop(-2)
            stream.save(tmp_path / backend)
        with kvsieve.load(tmp_path / backend, model, backend=backend) as stream:
            found.append(stream.generate(tiny.ids(1, 5, 5), max_new_tokens=5, do_sample=False))
        tokens[backend] = torch.cat(found, 1)
    assert torch.equal(tokens["cuda"], tokens["reference"])


def rope16() -> LayerRope:
    return LayerRope(10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), "half")


@pytest.mark.parametrize("policy", ["streaming", "lm_infinite", "sirllm"])
def test_recorded_launches_run_the_next_steps_plan(
    launcher: emulator.Emulator, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replaying a captured graph does: the same launches and addresses, another plan and other tensors in their place."""
    made = tiny.POLICIES[policy](100)
    tested, exact = (Layer(name, made, rope=rope16(), scale=0.25) for name in ("cuda", "reference"))
    assert isinstance(tested.backend, cuda.CudaBackend)
    generator, scored = torch.Generator().manual_seed(0), made.needs_surprisal
    fixed = [torch.zeros(1, h, 1, 16) for h in (4, 2, 2)]  # the graph's inputs

    def draw(width: int) -> tuple[list[torch.Tensor], list[Any] | None]:
        given = [torch.randn(1, h, width, 16, generator=generator) for h in (4, 2, 2)]
        return given, [torch.rand(width, generator=generator).numpy()] if scored else None

    for width in (120, 1):
        (q, k, v), scores = draw(width)
        for layer in (tested, exact):
            layer.feed(q, k, v, scores=scores)
    recorded: list[Any] = []
    held: torch.Tensor | None = None
    scratch: list[torch.Tensor] = []  # a graph's memory pool: what was allocated while it was recorded stays
    empty = torch.empty
    for step in range(150):  # more than two blocks' worth
        given, scores = draw(1)
        want = exact.feed(*given, scores=scores)
        if tested.frame == "rotated":
            given[:2] = [tested.rotated(x, [tested.planner.seen(0)]) for x in given[:2]]
        for place, x in zip(fixed, given):
            place.copy_(x)
        plan = tested.planner.begin([1], 1, True, False)
        if step == 0:
            launcher.launches = recorded
            with monkeypatch.context() as patched:
                patched.setattr(torch, "empty", lambda *a, **k: (scratch.append(empty(*a, **k)), scratch[-1])[1])
                held = tested.store.run(*fixed, plan, tested.call)
            launcher.launches = None
            addresses = tested.store.addresses(plan)
        else:
            tested.store.prepare(plan)
            assert tested.store.addresses(plan) == addresses
            launcher.replay(recorded)
        tested.planner.commit()
        if scores:
            tested.planner.set_scores(0, scores[0])
        tested.settle(False)
        assert held is not None
        close(held, want, 1e-5)
        assert tested.positions() == exact.positions()


def test_bytes_reported_are_bytes_held_and_given_back(launcher: emulator.Emulator) -> None:
    layer = Layer("cuda", kvsieve.StreamingLLM(64, sinks=2), rope=rope16(), scale=0.25)
    q, k, v = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16), torch.randn(1, 2, 700, 16)
    for lo in range(0, 700, 100):
        layer.feed(*(x[:, :, lo : lo + 100] for x in (q, k, v)))
        slabs = layer.store._slabs.values()
        assert layer.store.bytes_held == sum(x.untyped_storage().nbytes() for pair in slabs for x in pair)
    block = 64 * 2 * (16 + 16) * 4
    assert layer.store.bytes_held <= 4 * block
    layer.planner.reset()
    layer.store.free_unused(layer.planner.blocks_in_use())
    assert layer.store.bytes_held == 0
    assert not layer.store._host.any()


def test_probabilities_of_keys(launcher: emulator.Emulator) -> None:
    layer = Layer("cuda", kvsieve.Full(), scale=0.25)
    q, k, v = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    layer.feed(q[:, :, :88], k[:, :, :88], v[:, :, :88])
    step = layer.planner.begin([2, 2], 2, True, False)
    layer.store.run(q[:, :, 88:], k[:, :, 88:], v[:, :, 88:], step, layer.call)
    out, lse, mass = layer.store.attend_mass(q[:, :, 88:], step, layer.call)
    for item in range(4):
        row, query = divmod(item, 2)
        keys, values = (x[row, :, : 89 + query].double().repeat_interleave(2, 0) for x in (k, v))
        x = torch.einsum("hd,hnd->hn", q[row, :, 88 + query].double(), keys) * 0.25
        torch.testing.assert_close(mass[item].double(), x.softmax(-1).view(2, 2, -1).sum(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(lse[row, query].double(), x.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(out[row, query].double(), torch.einsum("hn,hnd->hd", x.softmax(-1), values), atol=1e-5, rtol=0)


def test_a_step_uploads_once_for_all_layers(launcher: emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan, one upload, one table of turns; per layer append, attend and merge, and nothing else."""
    fills = []
    fill = cuda.StepBuffer.fill
    monkeypatch.setattr(cuda.StepBuffer, "fill", lambda self, *args: (fills.append(1), fill(self, *args))[1])
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.StreamingLLM(200), "cuda") as stream:
        stream.feed(tiny.ids(1, 150))
        stream.feed(tiny.ids(1, 1))
        fills.clear()
        launcher.launches = []
        stream.feed(tiny.ids(1, 1))
    names = [module.file for module, *_ in launcher.launches]
    assert len(fills) == 1
    layers = model.config.num_hidden_layers
    assert names.count("rotate.cu") == 1
    assert names.count("append.cu") == names.count("attend.cu") == names.count("merge.cu") == layers
    assert len(names) == 3 * layers + 1


def test_another_layers_tensors_are_refused(launcher: emulator.Emulator) -> None:
    layer = Layer("cuda", kvsieve.Full(), scale=1.0)
    layer.feed(torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    for q, k in (((1, 4, 1, 16), (1, 1, 1, 16)), ((1, 4, 1, 16), (1, 2, 1, 8)), ((1, 3, 1, 16), (1, 2, 1, 16))):
        with pytest.raises(ShapeError):
            layer.feed(torch.randn(q), torch.randn(k), torch.randn(k))
    with pytest.raises(BackendError, match="reference"):
        backends.get("cuda").make_store(torch.randn(1, 2, 3, 18), torch.randn(1, 2, 3, 18))
    with pytest.raises(BackendError, match="reference"):
        backends.get("cuda").make_store(torch.randn(1, 2, 3, 16).double(), torch.randn(1, 2, 3, 16).double())


# ------------------------------------------------------------------------------------------------------- where something is missing


def test_without_a_card_the_message_says_what_to_use() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(BackendError, match="reference"):
        backends.get("cuda")
    with pytest.raises(BackendError, match="CUDA"):
        kvsieve.stream(tiny.model(), kvsieve.Full(), "cuda")
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(1, 5))
        assert stream.stats().backend == "cpu"


def test_without_cupy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(kernels, "_launchers", {})
    with pytest.raises(BackendError, match=r"pip install cupy-cuda1\dx.*reference"):
        backends.get("cuda")


def test_a_cuda_device_asks_for_the_cuda_backend() -> None:
    assert backends.choose(torch.device("cuda:0"), torch.bfloat16) == "cuda"
    assert backends.choose(torch.device("cuda:0"), torch.float64) == "reference"
    assert backends.choose(torch.device("cpu"), torch.bfloat16) == "cpu"
