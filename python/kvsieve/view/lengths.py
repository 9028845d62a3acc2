"""Measurements against length: a panel for each quantity, a line for each thing that was measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsieve.errors import KvsieveError
from kvsieve.files.replace import replacing
from kvsieve.view.curves import STYLES

__all__ = ["Line", "Panel", "need_matplotlib", "plot_lengths"]


@dataclass(frozen=True)
class Line:
    """``values[i]`` at ``lengths[i]`` tokens."""

    name: str
    lengths: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Lines of one quantity; both axes are logarithmic."""

    title: str
    unit: str
    lines: Sequence[Line]


def need_matplotlib() -> None:
    """Says what to install. Raises KvsieveError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KvsieveError("drawing needs matplotlib; pip install 'kvsieve[demo]'")


def plot_lengths(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Draws the panels side by side and writes a picture of the kind that ``path`` ends with; the same one every time.

    Raises:
        ValueError: without a panel that has a line.
        KvsieveError: without matplotlib.
        SaveError: for a file that cannot be written.
    """
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        raise ValueError("plot_lengths needs at least one panel with a line")
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(panels), 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _draw(axis, panel)
    figure.suptitle(title, fontsize=11)
    kind = path.suffix.removeprefix(".")
    same = {"svg.hashsalt": "kvsieve", "svg.fonttype": "none"}
    with matplotlib.rc_context(same), replacing(path, "picture") as file:
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _draw(axis: Any, panel: Panel) -> None:
    for number, line in enumerate(panel.lines):
        colour, dash, marker = STYLES[number % len(STYLES)]
        axis.plot(
            line.lengths, line.values, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.6, label=line.name
        )
    ticks = sorted({length for line in panel.lines for length in line.lengths})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:,.6g}")
    axis.tick_params(labelsize=8, which="both")
    axis.set_xlabel("tokens")
    axis.set_ylabel(panel.unit)
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
