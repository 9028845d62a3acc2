"""InfLLM and LongHeads on the CUDA backend under the emulator: attention to pieces, a layer, models, and what moves rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emulator
import kvsieve
import piece_cases
import pytest
import tiny
import torch
from backend_cases import close
from fetched import FetchingLayer, Numbers, infllm, rope
from kvsieve.backends.base import AttendCall
from kvsieve.backends.cuda.ops.attend import Attend
from kvsieve.backends.cuda.pieces import cut
from kvsieve.backends.pieces import sees
from kvsieve.errors import UnsupportedError
from kvsieve.graphs import GraphDecoder
from kvsieve.policy.select import Piece

CPU = torch.device("cpu")
POLICY = pytest.mark.parametrize("policy", list(piece_cases.POLICIES))


@pytest.fixture(autouse=True)
def launcher() -> Iterator[emulator.Emulator]:
    """It pretends several multiprocessors, so that keys are split."""
    with emulator.emulated(emulator.Emulator(processors=3)) as made:
        yield made


@pytest.mark.parametrize("case", piece_cases.CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_pieces_are_those_of_the_definition(case: piece_cases.Case) -> None:
    piece_cases.pieces(case, CPU)


@POLICY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_equals_the_reference(policy: str, dtype: torch.dtype) -> None:
    piece_cases.layer(policy, dtype, CPU)


@pytest.mark.parametrize(
    ("n", "query_block", "heads"), [(Numbers(6, 2, 3, 2, 1), 4, 4), (Numbers(5, 3, 2, 3, 2, per_head=True), 8, 6)]
)
def test_a_layer_is_the_twin(n: Numbers, query_block: int, heads: int) -> None:
    """InfLLM written out key by key: outputs, and the blocks that every call chose last."""
    generator = torch.Generator().manual_seed(query_block)
    q, k, v = (torch.randn(1, count, 52, 16, generator=generator) for count in (heads, 2, 2))
    calls, at, blocks = [40, *[1] * 6, 3, 1, 2], 0, []
    policy = kvsieve.InfLLM(n.n_local, n.topk, n.bs, n.r_k, n.n_init, n.per_head, query_block)
    layer = FetchingLayer("cuda", policy, AttendCall(0.3, rope=rope(16, "interleaved", 1.1)))
    outs, chosen = [], []
    for size in calls:
        ends = [*range((at // query_block + 1) * query_block, at + size, query_block), at + size]
        blocks += [hi - lo for lo, hi in zip([at, *ends[:-1]], ends)]
        outs.append(layer.feed(*(x[:, :, at : at + size] for x in (q, k, v))))
        chosen.append((at + size, layer.chosen()))
        at += size
    want = infllm((q[0], k[0], v[0]), blocks, n, rope(16, "interleaved", 1.1), 0.3)
    close(torch.cat(outs, 1)[0].transpose(0, 1), want.out, 1e-5)
    last = {sum(blocks[: i + 1]): found for i, found in enumerate(want.chosen)}
    assert all(found == last[end] for end, found in chosen)


@POLICY
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "glm4"])
def test_a_model_equals_the_reference(family: str, policy: str) -> None:
    piece_cases.model(family, policy, CPU)


@POLICY
def test_streams_fork_beam_rewind_and_save(policy: str, tmp_path: Path) -> None:
    piece_cases.loops(policy, CPU, tmp_path)


def test_a_piece_is_cut_where_all_queries_see_it() -> None:
    """Every query sees what it saw, at the same distance, and nobody sees nothing of a cut piece."""
    for lo, hi, within, nearest, fixed in (
        (0, 40, 30, 0, False),
        (0, 12, None, 25, True),
        (3, 35, None, 0, False),
        (10, 20, 5, 0, False),
        (0, 31, None, 30, True),
        (5, 50, 20, 8, False),
    ):
        first, count = 30, 8
        piece = Piece(lo, hi, 77, fixed, nearest, within, head=1)
        cuts = cut(piece, first, count)
        seen = torch.zeros(count, 60, dtype=torch.long)
        wanted = torch.zeros(count, 60, dtype=torch.long)
        for to, parts in ((seen, cuts), (wanted, [piece])):
            for part in parts:
                mask = sees(part, first, count, CPU)
                mask = torch.ones(count, part.hi - part.lo, dtype=torch.bool) if mask is None else mask
                at = torch.arange(count)[:, None] * (not fixed) - torch.arange(part.hi - part.lo)[None] * (not fixed)
                to[:, part.lo : part.hi] += (part.distance + at) * mask
                if to is seen:
                    assert mask.any(0).all()
        assert torch.equal(seen, wanted)
        assert [part.head for part in cuts] == [1] * len(cuts)
        assert (lo, hi) != (0, 40) or sum(sees(part, first, count, CPU) is None for part in cuts) == 1


@pytest.mark.parametrize(("policy", "heads"), [("infllm", 1), ("infllm_per_head", 2), ("longheads", 2)])
def test_a_decoded_token_is_one_launch_of_attention_a_layer(launcher: emulator.Emulator, policy: str, heads: int) -> None:
    """However many pieces there are; where heads read different ones, each is an item."""
    model = tiny.model()
    with kvsieve.stream(model, piece_cases.POLICIES[policy](), "cuda") as stream:
        stream.feed(tiny.ids(1, 150))
        launcher.launches = []
        stream.feed(tiny.ids(1, 1))
    launches = [(module.file, grid) for module, grid, *_ in launcher.launches]
    layers = model.config.num_hidden_layers
    assert [file for file, _ in launches].count("append.cu") == layers
    grids = [grid for file, grid in launches if file == "attend.cu"]
    assert [grid[2] for grid in grids] == [heads] * layers
    assert all(grid[1] * grid[2] == 2 for grid in grids), "two KV heads"


def test_sink_logits_of_rows_are_as_many_as_there_are() -> None:
    q, ints = torch.zeros(2, 4, 1, 16), torch.int32
    tables = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(3, dtype=ints), torch.zeros(0, 4, dtype=ints)
    for count in (4, 8):
        Attend(q, *tables, None, None, 1, 16, 1, 1.0, sink_logits=torch.zeros(count)).check()
    with pytest.raises(kvsieve.errors.ShapeError, match="4, or 8 where each row has its own"):
        Attend(q, *tables, None, None, 1, 16, 1, 1.0, sink_logits=torch.zeros(6)).check()


def test_a_graph_cannot_hold_what_the_host_chooses() -> None:
    with kvsieve.stream(tiny.model(), piece_cases.POLICIES["infllm"](), "cuda") as stream:
        stream.feed(tiny.ids(1, 50))
        with pytest.raises(UnsupportedError, match="blocks are fetched"):
            GraphDecoder(stream)
