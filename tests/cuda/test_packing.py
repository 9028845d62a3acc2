"""Packed storage on the CUDA backend, over tensors on the CPU: every way to pack, every loop, and graphs, beside the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backend_cases
import emulator
import kvsieve
import numpy as np
import pytest
import torch
from backend_cases import PACKINGS, close
from drive import Layer
from kvsieve.backends.cuda.ops.format import Format
from kvsieve.backends.cuda.ops.launch import DTYPES
from kvsieve.backends.cuda.storage import locate
from kvsieve.errors import ShapeError, StateError, UnsupportedError
from kvsieve.facts import LayerRope
from kvsieve.methods import think
from kvsieve.policy.storage import Channels, Packing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """The emulated backend; it pretends two multiprocessors, so that keys are split."""
    with emulator.emulated(emulator.Emulator(processors=2)) as made:
        yield made


@pytest.mark.parametrize("bits", [(0, 0), (4, 4), (2, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frame", ["post_rope", "pre_rope"])
def test_a_layer_equals_the_reference(bits: tuple[int, int], dtype: torch.dtype, frame: str) -> None:
    backend_cases.packed_layer(dtype, bits, frame, CPU)


@pytest.mark.parametrize("policy", list(PACKINGS))
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_a_model_equals_the_reference(family: str, policy: str) -> None:
    backend_cases.packed_model(family, policy, CPU)


@pytest.mark.parametrize("policy", ["thin", "thin_codes", "sirllm_thin", "streaming_thin"])
def test_a_capped_model_with_learned_sinks_equals_the_reference(policy: str) -> None:
    backend_cases.packed_model("gpt_oss", policy, CPU)
    if policy != "thin_codes":
        backend_cases.packed_model("gemma2", policy, CPU)


@pytest.mark.parametrize("policy", list(PACKINGS))
def test_streams_fork_beam_rewind_and_save(policy: str, tmp_path: Path) -> None:
    backend_cases.packed_loops(policy, CPU, tmp_path)


def test_bytes_are_the_formula_and_given_back() -> None:
    heads, dim, kept, count, recent = 2, 128, 78, 1024, 64
    x = torch.randn(1, heads, count, dim)
    for packing, wide, of_codes in ((Packing(kept), 80, False), (Packing(kept, 4, 2, 32), 80, True)):
        layer = Layer("cuda", kvsieve.Full(), dtype=torch.bfloat16, scale=0.1)
        layer.feed(x, x, x)
        full = layer.store.bytes_held
        assert full == 2 * 2 * count * dim * heads
        layer.pack(count - recent, think.heaviest_channels(x[0], x[0], kept, "single", None), packing)
        layer.store.apply(layer.planner.tidy())
        layer.store.free_unused(layer.planner.blocks_in_use(), layer.planner.packed_in_use())
        held, tokens = layer.store.held(), (count - recent) * heads
        assert held.keys == (tokens * wide // 2 if of_codes else 2 * tokens * wide)
        assert held.values == tokens * dim * 2 // (8 if of_codes else 1)
        assert held.scales == (tokens // 32 * (wide + dim) * 4 if of_codes else 0)
        assert held.channels == 2 * heads * (1 + wide)
        assert held.plain_keys == held.plain_values == 2 * recent * dim * heads
        slabs = [*layer.store.plain.slabs.values(), *layer.store._packed._slabs.values()]
        assert layer.store.bytes_held == held.channels + sum(x.untyped_storage().nbytes() for slab in slabs for x in slab)
        layer.planner.reset()
        layer.store.free_unused(layer.planner.blocks_in_use(), layer.planner.packed_in_use())
        assert layer.store.bytes_held == 0
        assert not layer.store._packed.table.host.any()


def test_what_cannot_be_packed_is_refused() -> None:
    layer = Layer("cuda", kvsieve.Full(), scale=1.0)
    layer.feed(torch.randn(1, 4, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16))
    store = layer.store
    with pytest.raises(StateError, match="how to pack"):
        store.channels(1 << 25)
    for packing in (Packing(0), Packing(17), Packing(8, 3), Packing(8, 4, 4, 4), Packing(8, 4, 4, 32)):
        with pytest.raises(ShapeError):
            store.set_packing(packing)
    store.set_packing(Packing(8))
    with pytest.raises(StateError, match="cannot change"):
        store.set_packing(Packing(9))
    moves = layer.planner.pack(0, 64, 1)
    with pytest.raises(ShapeError, match="channels"):
        store.pack(moves, Channels(torch.zeros(2, 9, dtype=torch.int64), (0, 0)))
    with pytest.raises(StateError, match="never packed"):
        store.pack(moves, (1 << 25) + 5)
    assert store.held().keys == 0
    with pytest.raises(StateError, match="never packed"):
        store.write([(1 << 25, 0, 1)], torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))


def test_single_channels_cannot_turn() -> None:
    rope = LayerRope(10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), "half")
    layer = Layer("cuda", kvsieve.SirLLM(300, sinks=2, recent=8), rope=rope, scale=1.0)
    q, k = torch.randn(1, 4, 101, 16), torch.randn(1, 2, 101, 16)
    layer.feed(q[:, :, :100], k[:, :, :100], k[:, :, :100], scores=[np.zeros(100, np.float32)])
    layer.pack(64, think.heaviest_channels(q[0], k[0], 9, "single", None), Packing(9))
    with pytest.raises(UnsupportedError, match="pair"):
        layer.feed(q[:, :, 100:], k[:, :, 100:], k[:, :, 100:], scores=[np.zeros(1, np.float32)])


def test_recorded_launches_read_what_was_packed_meanwhile(launcher: emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launches and addresses, while plain blocks empty into packed ones between them."""
    layers = [Layer(name, kvsieve.Full(), scale=0.25) for name in ("cuda", "reference")]
    tested, exact = layers
    generator = torch.Generator().manual_seed(0)
    fixed = [torch.zeros(1, h, 1, 16) for h in (4, 2, 2)]
    packing = Packing(10, 4, 4, 16)

    def draw(width: int) -> list[torch.Tensor]:
        return [torch.randn(1, h, width, 16, generator=generator) for h in (4, 2, 2)]

    first = draw(150)
    chosen = think.heaviest_channels(first[0][0], first[1][0], 10, "single", None)
    for layer in layers:
        layer.feed(*first)
        layer.pack(96, chosen, packing)
    recorded: list[Any] = []
    held: torch.Tensor | None = None
    scratch: list[torch.Tensor] = []  # a graph's memory pool: what was allocated while it was recorded stays
    empty = torch.empty
    addresses: tuple[int, ...] = ()
    for step in range(100):
        if step % 20 == 19:
            for layer in layers:
                block = layer.planner.runs(0, 0)[0][0]
                layer.pack((layer.planner.resident(0, 0) - 10) // 16 * 16, block, packing)
        given = draw(1)
        want = exact.feed(*given)
        for place, x in zip(fixed, given):
            place.copy_(x)
        plan = tested.planner.begin([1], 1, True, False)
        tested.store.prepare(plan)
        if step == 0:
            addresses = tested.store.addresses(plan)
            launcher.launches = recorded
            with monkeypatch.context() as patched:
                patched.setattr(torch, "empty", lambda *a, **k: (scratch.append(empty(*a, **k)), scratch[-1])[1])
                held = tested.store.run(*fixed, plan, tested.call)
            launcher.launches = None
        else:
            assert tested.store.addresses(plan) == addresses
            launcher.replay(recorded)
        tested.planner.commit()
        tested.settle(False)
        assert held is not None
        close(held, want, 1e-5)
    assert tested.planner.num_packed(0) > 200


def test_a_table_that_grows_makes_a_graph_out_of_date() -> None:
    layer = Layer("cuda", kvsieve.Full(), scale=0.25)
    x = torch.randn(1, 1, 64 * 70, 16)
    layer.feed(x, x, x)
    layer.store.set_packing(Packing(8))
    plan = layer.planner.begin([1], 1, True, False)
    before = layer.store.addresses(plan)
    layer.planner.rollback()
    layer.pack(64 * 70 - 8, think.heaviest_channels(x[0], x[0], 8, "single", None), Packing(8))
    plan = layer.planner.begin([1], 1, True, False)
    assert layer.store.addresses(plan) != before
    assert locate(69)[1] >= 64


def test_a_format_fits_the_stages_of_attend() -> None:
    """Every format finds a tile; its rows are whole vectors."""
    for dtype in DTYPES:
        for dim in range(16 // dtype.itemsize, 257, 16 // dtype.itemsize):
            for bits in ((a, b) for a in (0, 2, 4, 8) for b in (0, 2, 4, 8)):
                for group in (8, 16, 32, 64):
                    if bits[1] and dim % group:
                        continue
                    made = Format(dim, *bits, group)
                    tile = made.tile(dtype, dim, dim)
                    room = min(64, 1 << ((16384 // (2 * dim * dtype.itemsize)).bit_length() - 1)) * 2 * dim * dtype.itemsize
                    assert made._stage(tile, dtype, dim) <= room
                    assert tile >= 4
