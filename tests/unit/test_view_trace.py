"""What a search read, counted into bins and drawn."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from kvsieve.cli import main
from kvsieve.errors import KvsieveError, StateError
from kvsieve.evals.reads import Reads, record
from kvsieve.stats import HeadTrace, LayerTrace
from kvsieve.view.trace import Panel, bin_edges, draw_reads, share_read

Ints = npt.NDArray[np.int64]


def ints(*ranges: tuple[int, int]) -> Ints:
    return np.array(ranges, np.int64).reshape(-1, 2)


def head(read: Ints, scored: int = 7) -> HeadTrace:
    return HeadTrace(read, ints(), scored, 1)


def layer(index: int, *heads: HeadTrace, scored: int = 0, dense: bool = False) -> LayerTrace:
    return LayerTrace(index, dense, scored, 0, (heads,))


# --------------------------------------------------------------------------------------------------------------------- binning


def test_edges_cover_all_positions_in_few_equal_bins() -> None:
    for start, stop, most in [(0, 1, 5), (3, 3, 4), (0, 100, 7), (16, 3744, 160), (5, 9, 100)]:
        edges = bin_edges(start, stop, most)
        widths = np.diff(edges)
        assert (edges[0], edges[-1]) == (start, max(stop, start + 1))
        assert len(widths) <= most
        assert set(widths[:-1].tolist()) <= {int(widths[0])}
        assert 0 < widths[-1] <= widths[0]


def test_shares_are_those_counted_token_by_token() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        seen, heads = int(rng.integers(1, 60)), int(rng.integers(1, 6))
        read = rng.random((heads, seen)) < rng.random()
        edges = np.unique(rng.integers(0, 70, int(rng.integers(2, 9))))
        got = share_read([ints(*_stretches(row)) for row in read], edges, seen)
        for value, lo, hi in zip(got, edges, edges[1:]):
            part = read[:, lo : min(hi, seen)]
            assert np.isnan(value) if part.size == 0 else value == pytest.approx(part.mean())


def _stretches(row: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    found, start = [], None
    for at, on in enumerate([*row, False]):
        if on and start is None:
            start = at
        elif not on and start is not None:
            found.append((start, at))
            start = None
    return found


def test_a_trace_by_hand() -> None:
    """Ten tokens, then eleven; two layers of one head search, one reads everything and is left out."""
    reads = Reads()
    dense = layer(0, head(ints((0, 10)), 0), dense=True)
    reads.add([dense, layer(1, head(ints((0, 2), (4, 6), (7, 10))), scored=99), layer(2, head(ints((0, 2), (7, 10)), 3))], 10)
    reads.add([dense, layer(1, head(ints((0, 2), (4, 6), (7, 11))), scored=0), layer(2, head(ints((0, 2), (8, 11))), scored=6)], 11)
    assert (reads.dense, reads.layers, reads.seen) == (1, 2, [10, 11])
    assert reads.scored == [5.0, 3.0]  # the first step selected for a whole block of the prompt: one of its queries counts
    assert reads.read == [6.0, 6.5]
    sinks, between, window = reads.panels(sinks=2, window=3, bins=3)
    assert (sinks.edges.tolist(), sinks.share.tolist()) == ([0, 1, 2], [[1.0, 1.0], [1.0, 1.0]])
    assert between.edges.tolist() == [2, 4, 6, 7]
    assert between.share.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    assert window.edges.tolist() == [7, 9, 11]
    np.testing.assert_array_equal(window.share, [[1.0, 1.0], [0.75, 1.0]])
    assert "newest 3" in window.title


def test_what_is_not_written_yet_is_nan() -> None:
    reads = Reads()
    for seen in (9, 10, 11):
        reads.add([layer(0, head(ints((0, seen))))], seen)
    (window,) = (panel for panel in reads.panels(2, 4, bins=100) if "window" in panel.title)
    assert np.isnan(window.share).sum(1).tolist() == [2, 1, 0]


# ---------------------------------------------------------------------------------------------------------------- at the real thing


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_stream_is_looked_at_at_every_step(backend: str, tmp_path: Path) -> None:
    model, ids = tiny.model(), tiny.ids(1, 90)
    policy = kvsieve.HiP(16, sinks=2, window=8, dense_layers=1, refresh=4, query_block=16)
    with kvsieve.stream(model, policy, backend) as stream:
        reads, new = record(stream, ids, 9)
    with kvsieve.stream(model, policy, backend) as stream:
        assert torch.equal(new, stream.generate(ids, max_new_tokens=9, do_sample=False)[0, 90:])
    assert reads.seen == list(range(90, 99))
    assert (reads.dense, reads.layers, len(reads.heads[0])) == (1, 1, 2)
    # The choice of the prompt's last block is the first of four steps.
    assert [count > 0 for count in reads.scored] == [step % 4 == 0 for step in range(9)]
    assert all(2 + 8 < read <= 2 + 8 + 3 + 16 for read in reads.read)
    sinks, between, window = reads.panels(policy.selection.sinks, policy.selection.window)
    assert (sinks.share == 1.0).all()
    assert 0.0 < between.share.mean() < 0.5
    assert between.edges[-1] == window.edges[0] == 82
    draw_reads([sinks, between, window], reads.scored, reads.read, tmp_path / "new" / "t.png", title="t", caption="c")
    assert _size(tmp_path / "new" / "t.png") >= (1200, 600)


def _size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_stream_that_reads_everything_has_nothing_to_draw() -> None:
    with kvsieve.stream(tiny.model(), kvsieve.HiP(512)) as stream, pytest.raises(KvsieveError, match="40 tokens whole"):
        record(stream, tiny.ids(1, 40), 3)
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream, pytest.raises(StateError):
        record(stream, tiny.ids(1, 40), 3)


@pytest.mark.filterwarnings("error")
def test_few_steps_and_no_room_between_are_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    reads = Reads()
    reads.add([layer(0, head(ints((0, 12))))], 12)
    panels = reads.panels(4, 8)
    assert [panel.edges[-1] for panel in panels] == [4, 12]
    draw_reads(panels, reads.scored, reads.read, tmp_path / "t.png", title="t")
    assert _size(tmp_path / "t.png") > (800, 400)


def test_what_does_not_fit_together_is_not_drawn(tmp_path: Path) -> None:
    panel = Panel("p", np.array([0, 1, 2]), np.zeros((3, 2)))
    for panels, scored in (([], [1.0] * 3), ([panel], []), ([panel], [1.0] * 2)):
        with pytest.raises(ValueError, match="same steps"):
            draw_reads(panels, scored, scored, tmp_path / "t.png", title="t")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--policy", "sirllm(64)"], "a selection leaves out"),
        (["--policy", "selectivev(8)"], "a selection leaves out"),
        (["--policy", "refreshkv(64)"], "everything at some steps"),
        (["--prompt-file", "no-such-file.txt"], "no-such-file.txt"),
        (["--model", "no-such-folder"], "no model at no-such-folder"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", "trace", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert says in err[0]


@pytest.mark.model
@pytest.mark.usefixtures("loaded")
def test_the_command_draws_and_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    pytest.importorskip("matplotlib")
    policy = "hip(64, window=64, sinks=4, refresh=8)"
    out = tmp_path / "trace.png"
    argv = ["view", "trace", "--policy", policy, "--tokens", "300", "--max-new-tokens", "4", "--threads", "1"]
    assert main([*argv, "--out", str(out)]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert _size(out) >= (1200, 600)
    assert report["policy"] == "HiP(budget=64, sinks=4, window=64, refresh=8)"
    assert (report["layers_that_search"], report["layers_that_read_everything"], report["kv_heads"]) == (27, 3, 3)
    assert [step["seen"] for step in report["steps"]] == [300, 301, 302, 303]
    assert [step["compared"] > 0 for step in report["steps"]] == [True, False, False, False]
    assert all(4 + 64 < step["read"] <= 4 + 64 + 64 + 3 for step in report["steps"])
    assert [len(panel["share"]) for panel in report["panels"]] == [4, 4, 4]
    assert "4 steps" in capsys.readouterr().out


@pytest.mark.model
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("policy", "first", "newest", "read"),
    [
        ("infllm(window=64, blocks=2, block=16, sinks=8, query_block=64)", 8, 64, (8 + 64 + 2 * 16, 8 + 64 + 3 * 16)),
        ("longheads(128, chunk=32)", 32, 33, (3 * 32, 4 * 32)),
    ],
)
def test_what_was_fetched_is_drawn(policy: str, first: int, newest: int, read: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "trace.png"
    argv = ["view", "trace", "--policy", policy, "--tokens", "300", "--max-new-tokens", "3", "--threads", "1"]
    assert main([*argv, "--out", str(out)]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert _size(out) >= (1200, 600)
    assert (report["layers_that_search"], report["layers_that_read_everything"]) == (30, 0)
    # The prompt's last queries chose before they came, so what no block had then is read besides.
    assert read[0] <= report["steps"][0]["read"] <= read[1] + 64
    assert all(read[0] <= step["read"] <= read[1] for step in report["steps"][1:])
    assert all(step["compared"] > 0 for step in report["steps"])
    sinks, between, window = (np.array(panel["share"], float) for panel in report["panels"])
    assert (sinks == 1).all(), "the first tokens are read by every head"
    assert [panel["edges"][-1] - panel["edges"][0] for panel in report["panels"]] == [first, 300 - first - newest, newest + 2]
    assert 0 < between.mean() < 0.6
    # What the first step reads of its window, and the tokens that came since, but for what has left it.
    assert (window[0][: newest - 2] == 1).all()
    assert (window[-1][-3:] == 1).all()
