"""The examples in the documentation run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
POLICIES = ("full", "streaming_llm", "lm_infinite", "sirllm", "snapkv", "h2o", "hip", "think", "quantized")
MODULES = [
    *(f"kvsieve.policies.{name}" for name in POLICIES),
    *(f"kvsieve.{name}" for name in ("bench", "evals.packing_nll", "thin", "view.trace")),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.model
def test_the_first_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "seen=" in out
    assert "SirLLM(budget=256" in out


def test_the_policy_of_ones_own_in_the_readme() -> None:
    import kvsieve
    import tiny

    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    scope = {"kvsieve": kvsieve}
    exec(compile(code, "README.md", "exec"), scope)
    with kvsieve.stream(tiny.model(), scope["policy"]) as stream:  # type: ignore[arg-type]
        stream.feed(tiny.ids(1, 900))
        kept = stream.kept()[0].positions
        assert len(kept) <= 512 + 63
        assert kept[:4].tolist() == [0, 1, 2, 3]


def test_the_rule_per_head_in_the_readme() -> None:
    import kvsieve
    import tiny

    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    scope = {"kvsieve": kvsieve}
    exec(compile(code, "README.md", "exec"), scope)
    with kvsieve.stream(tiny.model(), scope["policy"]) as stream:  # type: ignore[arg-type]
        stream.feed(tiny.ids(1, 900))
        kept = [stream.kept(layer=1, head=head)[0].positions.tolist() for head in range(2)]
        assert kept[0] != kept[1]
        assert all(len(k) == 512 and k[-64:] == list(range(836, 900)) for k in kept)
