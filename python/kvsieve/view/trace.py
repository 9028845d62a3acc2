"""Which positions of a text were read at each step of decoding, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvsieve.errors import KvsieveError

__all__ = ["Panel", "bin_edges", "draw_reads", "share_read"]

Ints: TypeAlias = "npt.NDArray[np.int64]"
Floats: TypeAlias = "npt.NDArray[np.float64]"

# Of Okabe and Ito's palette: dark and light enough to be told apart without hue.
_READ, _COMPARED = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class Panel:
    """A range of the text over all steps.

    Attributes:
        title: what is drawn there.
        edges: int64 ``[bins + 1]``, positions between which tokens are counted together.
        share: float64 ``[steps, bins]``, 0 to 1: how many of the heads read a token there; nan where there was no token yet.
    """

    title: str
    edges: Ints
    share: Floats


def bin_edges(start: int, stop: int, most: int) -> Ints:
    """Edges of at most ``most`` bins over positions ``start`` to ``stop``, all as wide but the last, which may be narrower.

    >>> bin_edges(4, 15, 4).tolist()
    [4, 7, 10, 13, 15]
    """
    width = -(-max(stop - start, 1) // most)
    return np.array([*range(start, max(stop, start + 1), width), max(stop, start + 1)], np.int64)


def share_read(heads: Sequence[Ints], edges: Ints, seen: int) -> Floats:
    """How many heads read a token of each bin, in the mean over its tokens: float64 ``[bins]``, 0 to 1.

    Args:
        heads: for each head the ranges ``lo..hi`` of positions that it read, int64 ``[n, 2]``, without overlap.
        edges: int64 ``[bins + 1]``, ascending.
        seen: tokens that there are; a bin that begins later is nan, and of one that ends later only these count.

    >>> share_read([np.array([[0, 2], [5, 6]]), np.array([[0, 1]])], np.array([0, 2, 4, 6, 8]), 7).tolist()
    [0.75, 0.0, 0.25, 0.0]
    """
    within = np.minimum(edges, seen)
    tokens = np.diff(within)
    read = np.zeros(len(tokens))
    for ranges in heads:
        lo, hi = ranges[:, 0], ranges[:, 1]
        before = np.clip(within[:, None] - lo, 0, hi - lo).sum(1)
        read += np.diff(before)
    with np.errstate(invalid="ignore"):
        return np.where(tokens > 0, read / (tokens * max(len(heads), 1)), np.nan)


def draw_reads(
    panels: Sequence[Panel], scored: Sequence[float], read: Sequence[float], path: Path, *, title: str, caption: str = ""
) -> None:
    """Draws the panels side by side, steps downwards, and beside them the keys compared and read at each step; writes a PNG.

    Args:
        panels: with as many steps each as ``scored`` and ``read`` have numbers, at least one.
        scored, read: keys for each head.
        title, caption: lines above the picture.

    Raises:
        ValueError: for nothing to draw, or counts that differ.
        KvsieveError: without matplotlib.
    """
    steps = len(scored)
    if not steps or not panels or len(read) != steps or any(panel.share.shape != (steps, len(panel.edges) - 1) for panel in panels):
        raise ValueError("draw_reads needs panels and counts of the same steps, at least one")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise KvsieveError("drawing a trace needs matplotlib; pip install 'kvsieve[demo]'") from error

    figure = Figure(figsize=(13, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    tokens = [int(panel.edges[-1] - panel.edges[0]) for panel in panels]
    # The short ranges are drawn wider than they are: their titles need room.
    widths = [max(count / sum(tokens), 0.14) for count in tokens]
    axes = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[*widths, 0.3])
    norm = PowerNorm(0.5, 0.0, 1.0)  # most tokens between sinks and window are read by few heads
    thousands = FuncFormatter(lambda x, _: f"{x:,.0f}")
    mesh = None
    for axis, panel, count in zip(axes, panels, tokens):
        masked = np.ma.masked_invalid(panel.share)
        mesh = axis.pcolormesh(panel.edges, np.arange(steps + 1) + 0.5, masked, cmap="viridis", norm=norm, rasterized=True)
        axis.set_facecolor("#e6e6e6")
        axis.set_title(panel.title, fontsize=10)
        axis.xaxis.set_major_formatter(thousands)
        if count == max(tokens):
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, prune="both"))
        else:
            axis.set_xticks([int(panel.edges[0]), int(panel.edges[-1])])
        axis.tick_params(labelsize=9)
    axes[0].set_ylabel("step (generated token)")
    axes[0].set_yticks([1, *range(max(steps // 8, 1) * 2, steps + 1, max(steps // 8, 1))])
    axes[0].set_ylim(steps + 0.5, 0.5)
    axes[len(panels) // 2].set_xlabel("position in the text (tokens)")
    bars, at = axes[-1], np.arange(1, steps + 1)
    bars.barh(at - 0.2, read, height=0.4, color=_READ, label="read")
    bars.barh(at + 0.2, scored, height=0.4, color=_COMPARED, label="compared by the selection")
    bars.set_title("keys for each head", fontsize=10)
    bars.xaxis.set_major_formatter(thousands)
    bars.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    bars.tick_params(labelsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False, fontsize=9, ncols=1)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=list(axes[: len(panels)]), location="bottom", shrink=0.6, aspect=45, pad=0.02)
    bar.set_ticks([0, 0.02, 0.1, 0.25, 0.5, 1], labels=["0", "2 %", "10 %", "25 %", "50 %", "all"])
    bar.set_label("heads that read a token there (grey: not written yet)", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    figure.suptitle(title if not caption else f"{title}\n{caption}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
