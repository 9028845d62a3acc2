"""Charts as plain SVG text, without a library: the same numbers give the same bytes on every machine.

A chart is drawn for a light and for a dark page. Lines are named at their ends, so that no colour must be looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FONT = "-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"

# Of Okabe and Ito's palette, each light or dark enough for its page.
THEMES = {
    "light": {
        **{"text": "#1f2328", "muted": "#59636e", "grid": "#d1d9e0", "within": "#9ec1ea", "beyond": "#1f5fa8"},
        **{"c0": "#1f2328", "c1": "#b35900", "c2": "#8250a8", "c3": "#0a63a5", "c4": "#00795b", "c5": "#b0326d", "c6": "#8a6d00"},
    },
    "dark": {
        **{"text": "#f0f6fc", "muted": "#9198a1", "grid": "#3d444d", "within": "#2f5f99", "beyond": "#7fb6f5"},
        **{"c0": "#f0f6fc", "c1": "#f0a04b", "c2": "#c79bf2", "c3": "#6cb6ff", "c4": "#46c7a0", "c5": "#f28cba", "c6": "#e3c454"},
    },
}
COLOURS, DASHES = 7, ("", "6 3", "2 3")


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Canvas:
    """A picture in one of the themes: shapes are added, and :meth:`text_of` gives it."""

    def __init__(self, theme: str, width: float, title: str) -> None:
        self.colours, self.width, self.title = THEMES[theme], width, title
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, what: str, size: int = 12, colour: str = "text", anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:.5g}" y="{y:.5g}" font-size="{size}" fill="{self.colours[colour]}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{weight}>{escaped(what)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "grid", dash: str = "") -> None:
        self.path([(x1, y1), (x2, y2)], colour, 1, dash)

    def path(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2, dash: str = "") -> None:
        where = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{where}" fill="none" stroke="{self.colours[colour]}" stroke-width="{width:g}"{dashes}/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        place = f'x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}"'
        self.parts.append(f'<rect {place} fill="{self.colours[colour]}"/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        self.parts.append(f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{radius:g}" fill="{self.colours[colour]}"/>')

    def text_of(self, height: float) -> str:
        """The picture, ``height`` high."""
        size = f'width="{self.width:g}" height="{height:g}" viewBox="0 0 {self.width:g} {height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">'
        return "\n".join([head, f"<title>{escaped(self.title)}</title>", *self.parts, "</svg>", ""])


class Box(NamedTuple):
    """Where a panel's axes are."""

    x: float
    y: float
    width: float
    height: float


class Axis(NamedTuple):
    """From numbers to places: linear, or logarithmic."""

    least: float
    most: float
    start: float
    length: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.least, self.most, value))
        return self.start + self.length * ((at - low) / (high - low) if high > low else 0.5)


def ticks(least: float, most: float, log: bool) -> list[float]:
    """Round numbers that are not closer together than a reader can tell: 1, 2 and 5 times powers of ten."""
    if not log:
        step = 10 ** math.floor(math.log10(max(most - least, 1e-9) / 3))
        step = next(step * m for m in (1, 2, 5, 10) if (most - least) / (step * m) <= 5)
        return [at * step for at in range(math.ceil(least / step), math.floor(most / step + 1e-9) + 1)]
    found = [m * 10.0**e for e in range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1) for m in (1, 2, 5)]
    found = [at for at in found if least <= at <= most]
    if len(found) < 3:
        return [at for at in ticks(least, most, False) if at >= least]
    return found if len(found) <= 7 else [at for at in found if round(math.log10(at), 6).is_integer()]


def spread_out(wanted: Sequence[float], least: float) -> list[float]:
    """Places near ``wanted``, at least ``least`` apart, in the same order: labels that do not cover each other."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            lack = least - (places[i + 1] - places[i])
            if lack > 1e-6:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    found = [0.0] * len(wanted)
    for place, index in zip(places, order):
        found[index] = place
    return found


Points = Sequence[tuple[float, float]]


def lines(
    canvas: Canvas, box: Box, drawn: Mapping[str, Points], title: str, unit: str, *, log: bool = True, style: Mapping[str, int]
) -> None:
    """A panel of lines over length, which is on a logarithmic axis; each line is named at its end, right of the box.

    Args:
        drawn: points ``(length, value)`` by name; at least one line.
        style: the number of each line's colour; a number from ``COLOURS`` on is dashed.
    """
    xs = sorted({x for points in drawn.values() for x, _ in points})
    ys = [y for points in drawn.values() for _, y in points]
    low, high = (min(ys) / 1.25, max(ys) * 1.15) if log else (0.0, max(ys) * 1.08)
    across = Axis(xs[0], xs[-1], box.x + 8, box.width - 16, True)
    up = Axis(low, high, box.y + box.height, -box.height, log)
    canvas.text(box.x, box.y - 24, title, 13, bold=True)
    canvas.text(box.x, box.y - 8, unit, 11, "muted")
    for at in ticks(low, high, log):
        canvas.line(box.x, up(at), box.x + box.width, up(at))
        canvas.text(box.x - 6, up(at) + 4, f"{at:,.10g}", 11, "muted", "end")
    for at in xs:
        canvas.line(across(at), box.y + box.height, across(at), box.y + box.height + 4, "muted")
        canvas.text(across(at), box.y + box.height + 18, f"{at:,.10g}", 11, "muted", "middle")
    ends = spread_out([up(points[-1][1]) for points in drawn.values()], 14)
    for (name, points), end in zip(drawn.items(), ends):
        number = style[name]
        colour, dash = f"c{number % COLOURS}", DASHES[number // COLOURS]
        places = [(across(x), up(y)) for x, y in points]
        canvas.path(places, colour, 2, dash)
        for x, y in places:
            canvas.dot(x, y, colour, 2.5)
        tip = box.x + box.width + 10
        canvas.line(places[-1][0] + 4, places[-1][1], tip, end, colour)
        canvas.text(tip + 4, end + 4, name, 11, colour)


def dots(
    canvas: Canvas, box: Box, drawn: Mapping[str, tuple[float, float]], title: str, note: str, most: tuple[float, float]
) -> None:
    """A panel of one dot a name, from zero to ``most`` on both axes; colours are numbered in the order of the names."""
    across, up = Axis(0, most[0], box.x, box.width, False), Axis(0, most[1], box.y + box.height, -box.height, False)
    canvas.text(box.x, box.y - 20, title, 12, bold=True)
    canvas.text(box.x, box.y - 6, note, 10, "muted")
    for at in ticks(0, most[1], False):
        canvas.line(box.x, up(at), box.x + box.width, up(at))
        canvas.text(box.x - 5, up(at) + 4, f"{at:g}", 10, "muted", "end")
    for at in ticks(0, most[0], False):
        canvas.text(across(at), box.y + box.height + 15, f"{at:g}", 10, "muted", "middle")
    for number, (x, y) in enumerate(drawn.values()):
        canvas.dot(across(x), up(y), f"c{(number + 3) % COLOURS}" if number else "c0", 5)
