"""A model that transformers spreads over two processes (gloo) answers as one process does, under every policy."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import systems
import tiny
import torch

SIZE = 2
NAMES = [name for name in systems.SYSTEMS if name not in ranks.WITH_FILES]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What two processes answered, the first of them; and what they refused."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.model().save_pretrained(folder / "model")
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny.model().config)
    config.num_attention_heads = config.num_key_value_heads = 3
    config.hidden_size = config.head_dim * 3
    LlamaForCausalLM(config).save_pretrained(folder / "odd")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = str(Path(ranks.__file__))
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(SIZE)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(SIZE)
    ]
    try:
        for process in reversed(running):
            _, error = process.communicate(timeout=400)
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in running:
            process.kill()
    apart = torch.load(folder / "logits-1.pt")
    mine: dict[str, Any] = torch.load(folder / "logits-0.pt")
    for name, logits in mine.items():
        assert logits.equal(apart[name]), f"{name}: the processes disagree"
    return mine, json.loads((folder / "refused.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_answer_as_one(name: str, told: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    # Sums over heads are taken in another order; codes of 8 bits may move by a step.
    torch.testing.assert_close(told[0][name], ranks.logits(tiny.model(), name), atol=2e-3, rtol=1e-3)


def test_heads_of_all_processes_have_one_mean_query(told: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    want = ranks.queries(tiny.model())
    assert want.shape[0] > 0
    torch.testing.assert_close(told[0]["queries"], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("odd", "UnsupportedModelError: LlamaForCausalLM has 3 KV heads, which 2 processes do not divide"),
        *((name, "UnsupportedError: a bank holds all heads of a model") for name in ranks.WITH_FILES),
        ("other policies", "StateError: the 2 processes of this model open different streams; this one's is StreamingLLM"),
        ("save", "UnsupportedError: a session file holds all heads"),
        ("held then", "260"),
    ],
)
def test_what_would_be_wrong_is_refused(what: str, said: str, told: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    assert told[1][what].startswith(said)


def test_a_process_that_dies_is_an_error_in_the_others(told: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    assert "Error" in told[1]["a process died"].partition(":")[0]
