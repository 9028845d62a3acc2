"""Two panels over position: what forgetting costs, and what remembering weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsieve.errors import KvsieveError

__all__ = ["STYLES", "Series", "plot_curves"]

# Okabe and Ito's palette: tells apart without hue; the dash and the marker tell apart without colour.
STYLES = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#E69F00", "-.", "^"),
    ("#009E73", "-", "D"),
    ("#CC79A7", ":", "v"),
    ("#D55E00", "--", "x"),
)
_MIB = 2**20


@dataclass(frozen=True)
class Series:
    """One line in both panels.

    `nll[i]` in nats a token belongs to the bucket that is centred on token `centres[i]`; `bytes_held[j]` was held
    after `seen[j]` tokens.
    """

    name: str
    centres: Sequence[float]
    nll: Sequence[float]
    seen: Sequence[int]
    bytes_held: Sequence[int]


def plot_curves(series: Sequence[Series], path: Path, *, trained_length: int | None = None, title: str | None = None) -> None:
    """Draws nll (nats a token) and memory held (MiB) against position and writes a PNG to `path`.

    The trained length is marked where the text reaches it.

    Raises `ValueError` without series or on lengths that differ, and `KvsieveError` without matplotlib.
    """
    if not series:
        raise ValueError("plot_curves needs at least one series")
    for line in series:
        if len(line.centres) != len(line.nll) or len(line.seen) != len(line.bytes_held):
            raise ValueError(f"the series {line.name} has coordinates of different lengths")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvsieveError("drawing curves needs matplotlib; pip install 'kvsieve[demo]'") from error

    reached = max((max(line.seen, default=0) for line in series), default=0)
    if trained_length is not None and trained_length > reached:
        trained_length = None
    figure = Figure(figsize=(9, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, line in enumerate(series):
        color, dash, marker = STYLES[i % len(STYLES)]
        top.plot(
            line.centres,
            line.nll,
            color=color,
            linestyle=dash,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            label=line.name,
        )
        held = [count / _MIB for count in line.bytes_held]
        # Bounded memories hold the same and would hide each other: the earlier line is the wider one.
        width = 1.3 + 0.8 * (len(series) - 1 - i)
        label = f"{line.name}: {max(held, default=0.0):,.1f} MiB at most"
        bottom.plot([0, *line.seen], [0.0, *held], color=color, linewidth=width, label=label)
    top.set_ylabel("negative log-likelihood\n(nats per token, mean per bucket)")
    bottom.set_ylabel("keys and values held (MiB)")
    bottom.set_xlabel("position in the text (tokens)")
    bottom.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    bottom.set_ylim(bottom=0)
    bottom.set_xlim(left=0)
    for panel in (top, bottom):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if trained_length is not None:
            panel.axvline(trained_length, color="#777777", linewidth=1.2, linestyle=(0, (2, 2)))
    if trained_length is not None:
        top.annotate(
            f"trained length\n{trained_length:,} tokens",
            (trained_length, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-5, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color="#555555",
        )
    for panel in (top, bottom):
        panel.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
