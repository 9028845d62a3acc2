"""What a table of ``kvsieve bench`` shows, as lines over length: made of the rows as they stand in the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsieve.errors import BenchError
from kvsieve.view.lengths import Line, Panel, plot_lengths

__all__ = ["draw", "panels"]

Row = Mapping[str, Any]
MIB = 2**20


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws a table, as its JSON holds it.

    Raises:
        BenchError: for a table without rows: nothing was measured.
        SaveError, KvsieveError: as :func:`~kvsieve.view.lengths.plot_lengths`.
    """
    if not content["rows"]:
        raise BenchError("no row was measured, so that there is nothing to draw")
    clock = f"{content['threads']} thread{'s' * (content['threads'] > 1)}, {content['clock']}"
    plot_lengths(panels(content), path, title=f"kvsieve bench {content['table']}: {content['cpu']}, {clock}")


def panels(content: Mapping[str, Any]) -> list[Panel]:
    """The panels of a table: one for each shape and dtype, or one for each quantity of ``policies``."""
    table, rows = content["table"], content["rows"]
    if table == "policies":
        return _policies(rows)
    if table == "search":
        return _search(rows)
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_case(row), []).append(row)
    return [Panel(case, "ms", _times(mine)) for case, mine in found.items()]


def _case(row: Row) -> str:
    return f"{row['heads']}/{row['kv_heads']}/{row['head_dim']} {row['dtype']}" if "heads" in row else str(row["dtype"])


def _times(rows: Sequence[Row]) -> list[Line]:
    """The medians of all that every row timed, but of reading memory, and what reading alone would take."""
    names = [name for name in rows[0]["times"] if name != "read" and all(name in row["times"] for row in rows)]
    lines = [_line(name, rows, lambda row, name=name: row["times"][name]["median_ms"]) for name in names]  # type: ignore[misc]
    if all("least_ms" in row for row in rows):
        lines.append(_line("weights, keys, values read once", rows, lambda row: row["least_ms"]))
    return lines


def _line(name: str, rows: Iterable[Row], value: Callable[[Row], float]) -> Line:
    points = sorted((row["length"], value(row)) for row in rows)
    return Line(name, [length for length, _ in points], [number for _, number in points])


def _search(rows: Sequence[Row]) -> list[Panel]:
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(_case(row), {}).setdefault(row["name"], []).append(row)
    made = []
    for case, named in found.items():
        lines = [_line(name, mine, lambda row: 1e3 * row["seconds"]["as_refreshed"]) for name, mine in named.items()]
        first = next(iter(named.values()))
        for run, name in (("full", "Full()"), ("generate_default", "generate's default")):
            lines.append(_line(name, first, lambda row, run=run: 1e3 * row["seconds"][run]))  # type: ignore[misc]
        made.append(Panel(case, "ms a layer", lines))
    return made


def _policies(rows: Sequence[Row]) -> list[Panel]:
    named: dict[str, list[Row]] = {}
    several = len({row["dtype"] for row in rows}) > 1
    for row in rows:
        named.setdefault(f"{row['name']} {row['dtype']}" if several else row["name"], []).append(row)
    quantities: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("time of a token", "ms", lambda row: row["times"]["token"]["median_ms"]),
        ("keys and values held", "MiB", lambda row: row["bytes_held"] / MIB),
        ("memory of the process", "MiB", lambda row: None if row["resident_bytes"] is None else row["resident_bytes"] / MIB),
    )
    made = []
    for title, unit, value in quantities:
        known = {name: [row for row in mine if value(row) is not None] for name, mine in named.items()}
        lines = [_line(name, mine, lambda row: float(value(row) or 0.0)) for name, mine in known.items() if mine]  # noqa: B023
        made.append(Panel(title, unit, lines))
    return made
