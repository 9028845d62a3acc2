"""Every CUDA kernel, run on the CPU under the shim, gives what its definition gives in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulator
import kernel_cases
import pytest
import torch
from kernel_blocks import Blocks, PackedBlocks
from kernel_cases import CASES, PACKED_CASES, operations
from kvsieve.backends.cuda.ops.hip import hip
from kvsieve.backends.cuda.ops.residents import Residents
from kvsieve.backends.cuda.ops.surprisal import surprisal
from kvsieve.errors import BackendError, ShapeError
from kvsieve.policy.storage import Channels, Packing
from operations import ops
from torch import library

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launched() -> Iterator[emulator.Emulator]:
    with emulator.emulated(emulator.Emulator()) as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_attend(case: kernel_cases.Case) -> None:
    kernel_cases.attend(case, CPU)


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_attend_over_packed_blocks(case: kernel_cases.PackedCase) -> None:
    kernel_cases.packed_attend(case, CPU)


@pytest.mark.parametrize("name", list(kernel_cases.every(CPU)))
def test_small_cases(name: str) -> None:
    kernel_cases.every(CPU)[name]()


def test_what_does_not_fit_is_refused_before_anything_runs(launched: emulator.Emulator) -> None:
    launched.launches = []
    held = Blocks(2, 16, 16, torch.float32, 0)
    q, starts, spans = torch.randn(1, 4, 1, 16), torch.zeros(2, dtype=torch.int32), torch.zeros(0, 4, dtype=torch.int32)

    def attend(**changes: Any) -> Any:
        given = {"q": q, "blocks": held.table, "starts": starts, "spans": spans, "rotations": None, "in_block": None}
        return ops.attend(**{**given, "kv_heads": 2, "value_dim": 16, "splits": 1, "scale": 1.0, **changes})

    attend()
    count = len(launched.launches)
    for changes in (
        {"kv_heads": 3},
        {"splits": 0},
        {"starts": starts[:1]},
        {"starts": starts.long()},
        {"spans": spans.float()},
        {"blocks": held.table[:, :2]},
        {"sink_logits": torch.zeros(3)},
        {"layout": 1},
        {"q": q[0]},
        {"format": [8, 0, 0, 32]},
        {"packed": held.table, "format": [8, 0, 0, 32]},
        {"packed": torch.zeros(1, 8, dtype=torch.int64), "format": [8, 4, 4, 12]},
        {"packed": torch.zeros(1, 8, dtype=torch.int64), "format": [17, 0, 0, 32]},
    ):
        with pytest.raises(ShapeError):
            attend(**changes)
    with pytest.raises(BackendError, match="reference"):
        attend(q=torch.randn(1, 4, 1, 18))
    with pytest.raises(BackendError, match="reference"):
        attend(q=q.double())
    with pytest.raises(ShapeError, match="16 bytes"):
        ops.scatter(*(torch.randn(2 * 16 + 1)[1:].view(2, 1, 16) for _ in "kv"), held.table, spans)
    with pytest.raises(ShapeError, match="capacity"):
        ops.append(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), held.table, spans, starts, 1)
    packed = PackedBlocks(Packing(8), [Channels(torch.arange(8).expand(2, 8), (0, 0))], 16, 16, torch.float32, 0)
    for k, v in (
        (torch.zeros(2, 3, 16), torch.zeros(2, 4, 16)),
        (torch.zeros(2, 3, 8), None),
        (torch.zeros(2, 3, 16).half(), None),
    ):
        if v is None:
            k = k[:, :, :7]
        with pytest.raises(ShapeError):
            ops.unpack(packed.table, spans, k, v, 16, 16, torch.float32, packed.format)
    with pytest.raises(ShapeError, match="moves"):
        ops.carry(packed.table, spans.long(), 2, 16, torch.float32, packed.format)
    with pytest.raises(ShapeError, match="packed"):
        ops.pack(held.table, held.table, spans, starts, 2, 16, 16, torch.float32, packed.format, False)
    with pytest.raises(ShapeError):
        ops.top_k(torch.zeros(2, 3), 4)
    given = operations()
    for name in ("hip", "narrow", "sparse"):
        getattr(ops, name)  # defines it
    for name, at, bad in (
        ("hip", 0, torch.randn(1, 3, 1, 16)),
        ("hip", 5, queries_of(given)[:, :8].contiguous()),
        ("hip", 9, 0),
        ("hip", 10, 0),
        ("hip", 11, 2000),
        ("hip", 13, torch.zeros(1, 2, 8)),
        ("narrow", 9, 0),
        ("narrow", 10, 8),
        ("narrow", 11, 0),
        ("narrow", 21, torch.zeros(1, dtype=torch.int32)),
        ("sparse", 7, torch.zeros(2, 2, dtype=torch.int32)),
        ("sparse", 16, given["hip"][13][:, :1]),
        ("sparse", 17, 0),
        ("sparse", 20, torch.zeros(3)),
    ):
        args = list(given[name])
        args[at] = bad
        with pytest.raises(ShapeError):
            getattr(torch.ops.kvsieve, name)(*args)
    assert len(launched.launches) == count
    with pytest.raises(BackendError, match="meta"):
        ops.top_k(torch.zeros(2, 3, device="meta"), 1)


def queries_of(given: dict[str, tuple[Any, ...]]) -> torch.Tensor:
    return given["hip"][5]


@pytest.mark.parametrize("name", [name for name in operations() if name != "_keep"])
def test_torch_knows_the_operation(name: str) -> None:
    """Its schema says what it changes, and its fake gives the shapes and dtypes that running gives."""
    every = operations()
    torch.use_deterministic_algorithms(False)
    getattr(ops, name)
    library.opcheck(getattr(torch.ops.kvsieve, name).default, every[name], test_utils=("test_schema", "test_faketensor"))
    del every


def test_operations_pass_through_torch_compile() -> None:
    logits, ids = torch.randn(4, 50), torch.arange(4)

    def score(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return surprisal(logits * 2.0, ids) + 1.0

    torch._dynamo.reset()
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, ids), score(logits, ids))


def test_operations_with_groups_of_arguments_pass_through_torch_compile() -> None:
    every = operations()
    q, blocks, starts, spans, items, queries, *numbers, held, spare = every["hip"]

    def search(
        q: torch.Tensor, residents: Residents, queries: torch.Tensor, held: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        return hip(q, residents, queries, *numbers, held, spare) + 1

    torch._dynamo.reset()
    given = q, Residents(blocks, starts, spans, items), queries, held, spare
    torch.testing.assert_close(torch.compile(search, backend="aot_eager", fullgraph=True)(*given), search(*given))
    del every
