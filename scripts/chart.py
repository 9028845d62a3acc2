"""The README's chart, made of the table in docs/results/demo.md: `python scripts/chart.py` writes docs/assets/demo-*.svg.

Plain SVG without a library, once for a light and once for a dark page. A test compares the files with what this script makes.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "results" / "demo.md"
THEMES = {
    "light": {"text": "#1f2328", "muted": "#59636e", "grid": "#d1d9e0", "within": "#9ec1ea", "beyond": "#1f5fa8"},
    "dark": {"text": "#f0f6fc", "muted": "#9198a1", "grid": "#3d444d", "within": "#2f5f99", "beyond": "#7fb6f5"},
}
WIDTH, LEFT, RIGHT, TOP, GROUP, BAR = 760, 220, 20, 88, 62, 20
LIMIT = 4.0
CAPTION = (
    "23 November 2026; SmolLM2-135M-Instruct in bfloat16, 2 threads of a shared AMD Zen 4 server;",
    'make demo DEMO_ARGS="--tokens 12288 --dialogues 4"',
)


def rows() -> list[tuple[str, float, float, float]]:
    """Memory, MiB held, nll within the trained length and beyond it."""
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"\d+\.\d", cells[1] if len(cells) > 3 else ""):
            found.append((cells[0], float(cells[1]), float(cells[2]), float(cells[3])))
    return found


def svg(theme: str) -> str:
    """The chart as text."""
    colours, data = THEMES[theme], rows()
    scale = (WIDTH - LEFT - RIGHT) / LIMIT
    bottom = TOP + GROUP * len(data)
    height = bottom + 70
    lines: list[str] = []

    def text(
        x: float, y: float, what: str, size: int = 13, colour: str = "text", anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        what = what.replace("&", "&amp;").replace("<", "&lt;")
        lines.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colours[colour]}" text-anchor="{anchor}"{weight}>{what}</text>'
        )

    text(12, 24, "One text of 12,288 tokens, read by a model that was trained for 8,192", 16, bold=True)
    text(12, 44, "Negative log-likelihood in nats per token; lower is better", 13, "muted")
    for at, (key, what) in enumerate((("within", "tokens 0 to 8,192"), ("beyond", "tokens 11,264 to 12,288"))):
        lines.append(f'<rect x="{LEFT + 170 * at}" y="58" width="12" height="12" fill="{colours[key]}"/>')
        text(LEFT + 18 + 170 * at, 69, what, 13)
    for tick in range(int(LIMIT)):
        x = LEFT + tick * scale
        lines.append(f'<line x1="{x:g}" y1="{TOP - 6}" x2="{x:g}" y2="{bottom}" stroke="{colours["grid"]}" stroke-width="1"/>')
        text(x, bottom + 16, str(tick), 12, "muted", "middle")
    for at, (name, mib, within, beyond) in enumerate(data):
        y = TOP + at * GROUP
        text(LEFT - 10, y + 18, name, 13, anchor="end", bold=True)
        text(LEFT - 10, y + 36, f"{mib:.1f} MiB held", 12, "muted", "end")
        for offset, key, value in ((2, "within", within), (2 + BAR + 2, "beyond", beyond)):
            lines.append(f'<rect x="{LEFT}" y="{y + offset}" width="{value * scale:.1f}" height="{BAR}" fill="{colours[key]}"/>')
            text(LEFT + value * scale + 6, y + offset + 15, f"{value:.3f}", 12)
    for at, line in enumerate(CAPTION):
        text(12, bottom + 42 + 16 * at, line, 11, "muted")
    title = "Negative log-likelihood of a long text under the full cache and three bounded memories"
    style = "font-family=\"-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\""
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>'
    return "\n".join([head, f"<title>{title}</title>", *lines, "</svg>", ""])


def main() -> None:
    for theme in THEMES:
        path = ROOT / "docs" / "assets" / f"demo-{theme}.svg"
        path.write_text(svg(theme), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
