"""Quality against bytes, one point a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvsieve.errors import KvsieveError

__all__ = ["plot_front"]

Point = tuple[str, int, float, bool]
"""A policy's name, the bytes that it held, nats a token, and whether nothing beats it."""


def plot_front(points: Sequence[Point], most: int, path: Path, *, title: str | None = None) -> None:
    """Draws nats a token against megabytes held and writes a PNG to `path`. What nothing beats is filled.

    Args:
        most: bytes that were allowed.

    Raises:
        ValueError: without points.
        KvsieveError: without matplotlib.
    """
    if not points:
        raise ValueError("plot_front needs at least one point")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvsieveError("drawing needs matplotlib; pip install 'kvsieve[demo]'") from error
    figure = Figure(figsize=(9, 4.5 + 0.22 * len(points)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for number, (name, held, nll, chosen) in enumerate(sorted(points, key=lambda p: p[2]), 1):
        colour = "#0072B2" if chosen else "#777777"
        label = f"{number}  {name}: {held / 1e6:.1f} MB, {nll:.3f}"
        panel.scatter([held / 1e6], [nll], color=colour, marker="o" if chosen else "x", zorder=3, label=label)
        # Points that are alike would hide each other's numbers.
        panel.annotate(str(number), (held / 1e6, nll), xytext=(5 + 9 * (number % 3), 3), textcoords="offset points", fontsize=8)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8, title="filled: nothing beats it in quality, bytes and time")
    panel.axvline(most / 1e6, color="#D55E00", linestyle="--", linewidth=1)
    panel.annotate("allowed", (most / 1e6, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, -12), textcoords="offset points",
                   ha="right", fontsize=9, color="#D55E00")  # fmt: skip
    panel.set_xlim(0, 1.12 * max(most, *(p[1] for p in points)) / 1e6)
    panel.set_xlabel("held (MB)")
    panel.set_ylabel("negative log-likelihood of the second half\n(nats per token; lower is better)")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
