"""The CUDA backend's Python, from `backends.get("cuda")` down to the kernels, over tensors on the CPU; every policy there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import backend_cases
import emulator
import kvsieve
import pytest
import tiny
import torch
from backend_cases import close
from drive import Layer, forwards
from kvsieve import backends
from kvsieve.backends.cuda import buffers
from kvsieve.backends.cuda.backend import CudaBackend
from kvsieve.backends.cuda.launcher import CupyLauncher
from kvsieve.backends.cuda.nvrtc import Module
from kvsieve.errors import BackendError, ShapeError
from kvsieve.facts import LayerRope

CPU = torch.device("cpu")


@pytest.fixture
def launcher() -> Iterator[emulator.Emulator]:
    """`backends.get("cuda")` is the emulated one; it pretends two multiprocessors, so that keys are split."""
    with emulator.emulated(emulator.Emulator(processors=2)) as made:
        yield made


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_equals_the_reference(launcher: emulator.Emulator, policy: str, dtype: torch.dtype) -> None:
    backend_cases.layer(policy, dtype, CPU)


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "glm4"])
def test_a_model_equals_the_reference(launcher: emulator.Emulator, family: str, policy: str) -> None:
    backend_cases.model(family, policy, CPU)


@pytest.mark.parametrize("policy", ["sirllm", *tiny.PER_HEAD])
def test_streams_fork_reorder_rewind_and_save(launcher: emulator.Emulator, policy: str, tmp_path: Any) -> None:
    """What moves blocks about: a fork that writes, beams, going back, a file."""
    model, made = tiny.model(), tiny.POLICIES[policy](40)
    ids, tokens = tiny.ids(1, 70), {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(model, made, backend) as stream:
            stream.feed(ids)
            with stream.fork() as child:
                found = [child.generate(tiny.ids(1, 9, 3), max_new_tokens=6, do_sample=False)]
            found.append(stream.generate(tiny.ids(1, 9, 4), max_new_tokens=6, num_beams=3, do_sample=False))
            mark = stream.mark()
            found.append(stream.generate(tiny.ids(1, 9, 6), max_new_tokens=6, do_sample=False))
            stream.rewind(mark)
            stream.save(tmp_path / backend)
        with kvsieve.load(tmp_path / backend, model, backend=backend) as stream:
            found.append(stream.generate(tiny.ids(1, 5, 5), max_new_tokens=5, do_sample=False))
        tokens[backend] = torch.cat(found, 1)
    assert torch.equal(tokens["cuda"], tokens["reference"])


@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_pinned_and_evicted_tokens(launcher: emulator.Emulator, policy: str) -> None:
    """In decoding, in chunks that see pinned tokens outside their window, and after blocks were moved together."""
    model, ids, found = tiny.model(), tiny.ids(1, 130), {}
    for backend in ("cuda", "reference"):
        with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
            stream.pin(1, 6)
            stream.pin(70, 75)
            logits = [forwards(model, stream.cache, ids[:, :30], [30])]
            stream.pin(12, 18)
            stream.evict(20, 27)
            logits.append(forwards(model, stream.cache, ids[:, 30:], [60, 17, 1]))
            held = stream.kept(stream._engine.facts.layers[0].index, 0)[0].positions.tolist()
            found[backend] = torch.cat(logits, 1), held
    torch.testing.assert_close(found["cuda"][0], found["reference"][0], rtol=0, atol=1e-3)
    assert found["cuda"][1] == found["reference"][1]
    assert {*range(1, 6), *range(12, 18), *range(70, 75)} <= set(found["cuda"][1])


def rope16() -> LayerRope:
    return LayerRope(10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), "half")


@pytest.mark.parametrize("policy", ["streaming", "lm_infinite", "sirllm"])
def test_recorded_launches_run_the_next_steps_plan(
    launcher: emulator.Emulator, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replaying a captured graph does: the same launches and addresses, another plan and other tensors in their place."""
    made = tiny.POLICIES[policy](100)
    tested, exact = (Layer(name, made, rope=rope16(), scale=0.25) for name in ("cuda", "reference"))
    assert isinstance(tested.backend, CudaBackend)
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
        if tested.stored_keys == "post_rope":
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
        slabs = layer.store.plain.slabs.values()
        assert layer.store.bytes_held == sum(x.untyped_storage().nbytes() for pair in slabs for x in pair)
    block = 64 * 2 * (16 + 16) * 4
    assert layer.store.bytes_held <= 4 * block
    layer.planner.reset()
    layer.store.free_unused(layer.planner.blocks_in_use(), layer.planner.packed_in_use())
    assert layer.store.bytes_held == 0
    assert not layer.store.plain.table.host.any()


def test_probabilities_of_keys(launcher: emulator.Emulator) -> None:
    layer = Layer("cuda", kvsieve.Full(), scale=0.25)
    q, k, v = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    layer.feed(q[:, :, :88], k[:, :, :88], v[:, :, :88])
    step = layer.planner.begin([2, 2], 2, True, False)
    layer.store.run(q[:, :, 88:], k[:, :, 88:], v[:, :, 88:], step, layer.call)
    out, lse, scores = layer.store.attend_with_scores(q[:, :, 88:], step, layer.call)
    for item in range(4):
        row, query = divmod(item, 2)
        keys, values = (x[row, :, : 89 + query].double().repeat_interleave(2, 0) for x in (k, v))
        x = torch.einsum("hd,hnd->hn", q[row, :, 88 + query].double(), keys) * 0.25
        torch.testing.assert_close(scores[item].double(), x.softmax(-1).view(2, 2, -1).sum(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(lse[row, query].double(), x.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(out[row, query].double(), torch.einsum("hn,hnd->hd", x.softmax(-1), values), atol=1e-5, rtol=0)


def test_a_step_uploads_once_for_all_layers(launcher: emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan, one upload, one table of rotations; per layer append, attend and merge, and nothing else."""
    fills = []
    fill = buffers.StepBuffer.fill
    monkeypatch.setattr(buffers.StepBuffer, "fill", lambda self, *args: (fills.append(1), fill(self, *args))[1])
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


def test_heads_that_do_not_fit_are_refused_when_the_stream_opens(launcher: emulator.Emulator) -> None:
    model = tiny.model(head_dim=18)
    with pytest.raises(BackendError, match=r"18 and 18.*reference"):
        kvsieve.stream(model, kvsieve.Full(), "cuda")
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream:
        stream.feed(tiny.ids(1, 5))


# ------------------------------------------------------------------------------------------------------- where something is missing


def test_without_a_gpu_the_message_says_what_to_use() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
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
    monkeypatch.setattr("kvsieve.backends.cuda.launcher._launchers", {})
    with pytest.raises(BackendError, match=r"pip install cupy-cuda1\dx.*reference"):
        backends.get("cuda")


@pytest.mark.parametrize("current", [0, 1])
def test_the_launcher_loads_once_and_starts_on_torchs_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, current: int) -> None:
    """CuPy's launcher against a stand-in for CuPy: everything but the driver."""
    started: list[Any] = []
    loaded: list[str] = []
    entered: list[Any] = []

    class FakeModule:
        def load(self, cubin: bytes) -> None:
            assert cubin[:4] == b"\x7fELF"
            self.cubin = cubin

        def get_function(self, name: str) -> Any:
            assert name.encode() in self.cubin, "the symbol is in the machine code"
            loaded.append(name)
            return lambda *args, **kwargs: started.append((*args, kwargs["stream"]))

    def from_external(stream: Any) -> str:
        version, address = stream.__cuda_stream__()
        return f"stream {version} {address}"

    class FakeDevice:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...

    stream = SimpleNamespace(from_external=from_external)
    cupy = SimpleNamespace(cuda=SimpleNamespace(function=SimpleNamespace(Module=FakeModule), Stream=stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("KVSIEVE_CUDA_CACHE", str(tmp_path))
    for name, value in {
        "is_available": lambda: True,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=77),
        "current_device": lambda: current,
        "get_device_capability": lambda device: (9, 0),
        "get_device_properties": lambda index: SimpleNamespace(multi_processor_count=132),
        "device": FakeDevice,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    launcher, gpu = CupyLauncher(), torch.device("cuda", 0)
    module = Module("top_k.cu", ("top_k",))
    for _ in range(2):
        launcher.launch(module, (1, 2, 3), 128, [7, 2.5, None], gpu)
    assert len(loaded) == 1
    assert started == [((1, 2, 3), (128, 1, 1), (7, 2.5, 0), "stream 0 77")] * 2
    assert launcher.processors(gpu) == 132
    assert len(entered) == (1 if current == 0 else 3), "another device than the current one is entered for each launch"


def test_a_cuda_device_asks_for_the_cuda_backend() -> None:
    assert backends.choose(torch.device("cuda:0"), torch.bfloat16) == "cuda"
    assert backends.choose(torch.device("cuda:0"), torch.float64) == "reference"
    assert backends.choose(torch.device("cpu"), torch.bfloat16) == "cpu"
