"""The figures of README and the documentation, made of the results under ``benches/record`` and of nothing else: `make figures`.

Each is drawn for a light and for a dark page, as plain SVG: ``docs/assets/NAME-light.svg``. A test compares the files with what
this script makes. `make report` draws the same figures of what it has measured.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from svg import COLOURS, THEMES, Box, Canvas, Points, dots, lines

ROOT = Path(__file__).resolve().parent.parent
RECORDS, ASSETS = ROOT / "benches" / "record", ROOT / "docs" / "assets"
MIB = 2**20

STOCK = "DynamicCache"


class Figure(NamedTuple):
    """A figure: its name, the file of results it is made of, and how it is drawn in a theme."""

    name: str
    record: str
    draw: Callable[[Any, str], str]


def when(record: Mapping[str, Any]) -> str:
    """The date and the machine of a record, for the last line of a figure."""
    day = datetime.date.fromisoformat(record["date"])
    return f"{day.day} {day:%B %Y}; {record.get('machine') or record['cpu']}"


def short(names: Sequence[str]) -> dict[str, str]:
    """Policies by their text, each with its first argument alone: ``StreamingLLM(1024)``; whole where two would be alike."""

    def first(found: re.Match[str]) -> str:
        return f"({found[1].split(',')[0].rpartition('=')[2]})"

    made = {name: re.sub(r"\(([^()]*)\)", first, name) for name in names}
    alike = [text for text in made.values() if list(made.values()).count(text) > 1]
    return {name: name if text in alike else text for name, text in made.items()}


# ---------------------------------------------------------------------------------------------------------------------------- demo


def demo(record: Any, theme: str) -> str:
    """Bars: what each memory's text costs within the trained length and beyond it."""
    left, top, group, bar, limit = 220, 88, 62, 20, 4.0
    rows, trained = record["reading"], record["machine"]["trained_length"]
    since, stop = record["compared_positions"]
    canvas = Canvas(theme, 760, "Negative log-likelihood of a long text under the full cache and bounded memories")
    scale, bottom = (canvas.width - left - 20) / limit, top + group * len(rows)
    canvas.text(12, 24, f"One text of {stop:,} tokens, read by a model that was trained for {trained:,}", 16, bold=True)
    canvas.text(12, 44, "Negative log-likelihood in nats per token; lower is better", 13, "muted")
    told = (("within", f"tokens 0 to {record['within_positions'][1]:,}"), ("beyond", f"tokens {since:,} to {stop:,}"))
    for at, (key, what) in enumerate(told):
        canvas.bar(left + 170 * at, 58, 12, 12, key)
        canvas.text(left + 18 + 170 * at, 69, what, 13)
    for tick in range(int(limit)):
        canvas.line(left + tick * scale, top - 6, left + tick * scale, bottom)
        canvas.text(left + tick * scale, bottom + 16, str(tick), 12, "muted", "middle")
    for at, row in enumerate(rows):
        y = top + at * group
        canvas.text(left - 10, y + 18, row["memory"], 13, anchor="end", bold=True)
        canvas.text(left - 10, y + 36, f"{row['bytes_held'] / MIB:.1f} MiB held", 12, "muted", "end")
        for offset, key, value in ((2, "within", row["nll_within_trained"]), (bar + 4, "beyond", row["nll_compared"])):
            if value is not None:
                canvas.bar(left, y + offset, min(value, limit) * scale, bar, key)
                canvas.text(left + min(value, limit) * scale + 6, y + offset + 15, f"{value:.3f}", 12)
    machine = record["machine"]
    canvas.text(
        12, bottom + 42, f"{when({**record, 'machine': machine['name']})}; {machine['model']} in {machine['dtype']};", 11, "muted"
    )
    canvas.text(12, bottom + 58, record["command"], 11, "muted")
    return canvas.text_of(bottom + 70)


# ----------------------------------------------------------------------------------------------------------------- against length


def decode(record: Any, theme: str) -> str:
    """Lines: the time of a token against tokens seen, a panel for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    canvas = Canvas(theme, 60 + 400 * len(dtypes), "Time of a generated token against tokens seen")
    canvas.text(12, 24, "One generated token of a model of SmolLM2-135M's shape, against tokens seen", 16, bold=True)
    bounded = f"StreamingLLM({record['rows'][0]['budget']:,})"
    names = {STOCK: STOCK, "StaticCache": "StaticCache", "QuantizedCache": "QuantizedCache", "Full": "Full()"}
    names["StreamingLLM"] = bounded
    style = {name: number for number, name in enumerate([*names.values(), "no attention"])} | {"read once": COLOURS}
    for at, dtype in enumerate(dtypes):
        rows = sorted((row for row in record["rows"] if row["dtype"] == dtype), key=lambda row: row["length"])
        drawn: dict[str, Points] = {}
        for key, name in (*names.items(), ("alone", "no attention")):
            points = [(row["length"], row["times"][key]["median_ms"]) for row in rows if key in row["times"]]
            drawn |= {name: points} if points else {}
        drawn["read once"] = [(row["length"], row["least_ms"]) for row in rows]
        lines(canvas, Box(60 + 400 * at, 80, 230, 260), drawn, dtype, "milliseconds, one thread", style=style)
    canvas.text(
        12,
        384,
        "no attention: a token that attends to itself only; read once: weights, keys and values at the read bandwidth",
        11,
        "muted",
    )
    canvas.text(12, 402, f"{when(record)}, {record['clock']}; random weights; kvsieve bench decode", 11, "muted")
    return canvas.text_of(414)


def policies(record: Any, theme: str) -> str:
    """Lines: memory of the process, bytes held and time of a token against length, for every policy."""
    canvas = Canvas(theme, 1240, "Memory and time of every policy against length")
    canvas.text(12, 24, "What a policy holds, what its process takes and what a token costs, against length", 16, bold=True)
    rows = [row for row in record["rows"] if row["dtype"] == record["rows"][0]["dtype"]]
    names = short(list(dict.fromkeys(row["name"] for row in rows)))
    style = {told: number for number, told in enumerate(names.values())}
    panels: tuple[tuple[str, str, bool, Callable[[Any], float | None]], ...] = (
        ("keys and values held", "MiB", True, lambda row: row["bytes_held"] / MIB),
        ("memory of the process", "MiB, weights included", False, lambda row: (row["resident_bytes"] or 0) / MIB or None),
        ("speed of a token", "times as fast as DynamicCache in the same rounds", False, lambda row: row["times_as_fast"]),
    )
    for at, (title, unit, log, value) in enumerate(panels):
        drawn: dict[str, Points] = {}
        for name in names:
            told = sorted((row["length"], value(row)) for row in rows if row["name"] == name and value(row) is not None)
            drawn |= {names[name]: told} if told else {}
        if drawn:
            lines(canvas, Box(60 + 405 * at, 80, 200, 300), drawn, title, unit, log=log, style=style)
    canvas.text(12, 424, f"{when(record)}, {record['clock']}; kvsieve bench policies", 11, "muted")
    return canvas.text_of(436)


# ------------------------------------------------------------------------------------------------------------------------- quality


def tasks(record: Any, theme: str) -> str:
    """Dots: a panel for each task, a dot for each policy, its mean score over the bytes that it held."""
    runs = record["runs"]
    across, width, height = 4, 190, 130
    canvas = Canvas(theme, 60 + across * (width + 45), "Mean score of each task against bytes held")
    canvas.text(12, 24, "What a policy remembers against what it holds, task by task", 16, bold=True)
    canvas.text(12, 44, "up: mean score in percent; to the right: MiB of keys, values and what goes with them", 12, "muted")
    names = short(list(dict.fromkeys(row["policy"] for run in runs.values() for row in run["summary"])))
    most = max(row["bytes_held"] for run in runs.values() for row in run["summary"]) / MIB * 1.08
    x = 12.0
    for number, name in enumerate(names.values()):
        colour = f"c{(number + 3) % COLOURS}" if number else "c0"
        canvas.dot(x + 6, 62, colour, 5)
        canvas.text(x + 18, 66, name, 12)
        x += 40 + 7 * len(name)
    for number, (task, run) in enumerate(runs.items()):
        box = Box(45 + (number % across) * (width + 45), 112 + (number // across) * (height + 62), width, height)
        found = {row["policy"]: (row["bytes_held"] / MIB, 100 * row["score"]) for row in run["summary"]}
        length = max(row["length"] for row in run["summary"])
        cases = max(row["cases"] for row in run["summary"])
        note = f"{cases} case{'s' * (cases > 1)} of {length:,} tokens"
        dots(canvas, box, {name: found[name] for name in names if name in found}, task, note, (most, 108))
    bottom = 112 + -(-len(runs) // across) * (height + 62) - 20
    canvas.text(12, bottom + 4, f"{when(record)}; kvsieve eval", 11, "muted")
    return canvas.text_of(bottom + 16)


FIGURES = (
    Figure("demo", "demo.json", demo),
    Figure("decode", "decode.json", decode),
    Figure("policies", "policies.json", policies),
    Figure("tasks", "tasks.json", tasks),
)


def made(figure: Figure, theme: str) -> str:
    """The figure as it stands in ``docs/assets``."""
    return figure.draw(json.loads((RECORDS / figure.record).read_text(encoding="utf-8")), theme)


def main() -> None:
    for figure in FIGURES:
        for theme in THEMES:
            path = ASSETS / f"{figure.name}-{theme}.svg"
            path.write_text(made(figure, theme), encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
