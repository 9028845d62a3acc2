"""The model that a command's arguments ask for: what cannot be had is said before it is loaded."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve import loading
from kvsieve.arguments import add_machine, add_speed
from kvsieve.errors import ArgumentError, BackendError
from kvsieve.quantized_weights import Int4Linear


def asked(*argv: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_machine(parser, dtype_help="")
    add_speed(parser)
    return argparse.Namespace(model="mine", **vars(parser.parse_args(argv)), **more)


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to torch's compiler, which makes nothing of it."""
    given: list[Any] = []
    plain = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        given.append(function)
        return plain(function, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (copy.deepcopy(tiny.model()).to(dtype), None))
    return given


def test_the_model_is_rounded_and_then_compiled(compiled_with: list[Any]) -> None:
    arguments = asked("--weights", "int4", "--compile")
    loading.check_asked(arguments)
    model, _ = loading.load_asked(arguments)
    _, *decoder = compiled_with
    assert decoder, "the decoder is compiled, once its layers are rounded"
    assert all(call.__self__ is model.get_decoder() for call in decoder)
    assert {type(module) for module in model.modules()} >= {Int4Linear}
    assert model.get_decoder()._compiled_call_impl is not None
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.generate(tiny.ids(1, 5), max_new_tokens=3, do_sample=False)
        assert stream.seen == 7


def test_nothing_is_done_that_was_not_asked_for(compiled_with: list[Any]) -> None:
    arguments = asked("--dtype", "bfloat16")
    loading.check_asked(arguments)
    model, _ = loading.load_asked(arguments)
    assert compiled_with == []
    assert model.dtype == torch.bfloat16
    assert {type(module) for module in model.modules()} >= {torch.nn.Linear}
    assert model.get_decoder()._compiled_call_impl is None


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Any) -> Any:
        def fail(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No working C++ compiler found\nin many lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(
        BackendError, match=r"cannot compile here \(No working C\+\+ compiler found in many lines\).*leave --compile out"
    ):
        loading.check_asked(asked("--compile"))
    loading.check_asked(asked())


def test_weights_in_few_bits_are_for_a_cpu() -> None:
    with pytest.raises(ArgumentError, match="--weights int8 is for a CPU, not for --device cuda:1"):
        loading.check_asked(asked("--weights", "int8", device="cuda:1"))
